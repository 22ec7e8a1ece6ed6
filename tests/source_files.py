"""What the tests of sources share: small files of every kind, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import picture
from PIL import Image

from hfcustom.data.messages import Example

TEXT_ROW = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]}


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def numbered(number: int) -> dict[str, Any]:
    """Return a row of text whose answer is its number."""
    answer = {"role": "assistant", "content": f"Number {number}."}
    return {"messages": [{"role": "user", "content": "What?"}, answer]}


def answer_of(example: Example) -> str:
    text: str = example.messages[-1]["content"][0]["text"]
    return text


def number_of(example: Example) -> int:
    return int(answer_of(example).removeprefix("Number ").rstrip("."))


def write_jsonl(path: Path, *lines: str | bytes | dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded) + b"\n")
    return str(path)


def write_groups(path: Path, rows: list[dict[str, Any]], group: int) -> str:
    """Write a Parquet file of row groups of a few rows, uncompressed, so that damage to one leaves the others alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"row_group_size": group, "compression": "NONE", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def write_tar(path: Path, members: dict[str, bytes | dict[str, Any] | tarfile.TarInfo]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def png(seed: int) -> bytes:
    return encode(picture(seed))
