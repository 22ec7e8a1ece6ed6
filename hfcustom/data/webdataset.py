"""Rows of a WebDataset shard: a tar whose members of one key, 000.json and 000.jpg, are one row.

A row is what `json` holds, with `txt`, `caption` or `cls` as columns of that name (txt as `text`) and images and videos in
the order of the archive, unless the JSON names them. Only the headers are read at first; a row's bytes when it is asked for.
Names that are absolute or lead upwards, links and devices are refused, nothing is ever written to disk, and members that
would have to be unpickled are not read. https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers.utils import logging

from hfcustom.data.jsonl import parse_object
from hfcustom.data.turns import RowError

logger = logging.get_logger("hfcustom")

IMAGES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
JSON = ("json", "jsn")
TEXTS = {"caption": "caption", "text": "text", "transcript": "text", "txt": "text"}
VIDEOS = ("avi", "m4v", "mkv", "mov", "mp4", "webm")
NUMBERS = ("cls", "npy")
MAX_TEXT = 2**28  # bytes of a member that is read as a whole and parsed
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # up to the first dot of the name


@dataclass
class Sample:
    """The members of one key: where the bytes of each field lie, or what is wrong with them."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # field -> (offset, bytes)
    problem: str = ""


class TarRows(Sequence[Any]):
    """The rows of one shard. What follows damage cannot be found, and is one bad row that says so."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or path.name
        self.size = path.stat().st_size
        self.samples: list[Sample] = []
        self._index()
        unread = {name.rpartition(".")[2] for sample in self.samples for name in sample.members} - set(_readable())
        if unread:
            logger.warning(
                f"{self.label}: members of the kinds {', '.join(sorted(unread))} are not read; those that are: "
                f"{', '.join(_readable())}."
            )

    def _index(self) -> None:
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    self._add(member)
                end = archive.offset
        except (tarfile.TarError, OSError, ValueError) as error:
            return self._damaged(str(error))
        with self.path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                self._damaged("no tar header where one must be")

    def _damaged(self, reason: str) -> None:
        after = f" after {self.samples[-1].key!r}" if self.samples else ""
        cure = "" if self.samples else " A compressed shard must be unpacked to .tar first."
        self.samples.append(
            Sample("the rest", problem=f"the archive is damaged{after} ({reason}), so no later row is found.{cure}")
        )

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        found = KEY.fullmatch(member.name)
        if not found:
            return  # no key or no kind: README, .DS_Store
        key, kind = found[1], found[2].lower()
        if not self.samples or self.samples[-1].key != key:
            self.samples.append(Sample(key))
        sample = self.samples[-1]
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            sample.problem = f"the member {member.name!r} leads out of the archive; rename it."
        elif not member.isreg() or member.issparse():
            sample.problem = (
                f"the member {member.name!r} is a link, a device or sparse, no plain file; store the file itself."
            )
        elif member.size < 0 or member.offset_data + member.size > self.size:
            sample.problem = f"the archive is cut within {member.name!r}; write it again."
        elif kind in sample.members:
            sample.problem = f"two members are called {member.name!r}; a key has one of each kind."
        sample.members[kind] = (member.offset_data, member.size)

    def __len__(self) -> int:
        return len(self.samples)

    def name_of(self, index: int) -> str:
        """Return the shard and the key of a row."""
        return f"{self.label}, {self.samples[index].key}"

    def __getitem__(self, index: Any) -> Any:
        sample, name = self.samples[index], self.name_of(index)
        if sample.problem:
            raise RowError(f"{name}: {sample.problem}")
        row: dict[str, Any] = {}
        with self.path.open("rb") as file:
            for kind in sample.members:
                if kind.rpartition(".")[2] in JSON:
                    row |= parse_object(_read(file, sample, kind, name), name)
            for kind in sample.members:
                _add_value(row, file, sample, kind, name)
            for single, extensions in (("image", IMAGES), ("video", VIDEOS)):
                own = [kind for kind in sample.members if kind.rpartition(".")[2] in extensions]
                if own:
                    chosen = _named(row, single, sample, own, name)
                    row[f"{single}s"] = [_read(file, sample, kind, name, whole=True) for kind in chosen]
        return row


def _readable() -> list[str]:
    return sorted((*IMAGES, *JSON, *TEXTS, *VIDEOS, *NUMBERS))


def _read(file: Any, sample: Sample, kind: str, name: str, whole: bool = False) -> bytes:
    offset, size = sample.members[kind]
    if size > MAX_TEXT and not whole:
        raise RowError(f"{name}: {kind} has {size} bytes; at most {MAX_TEXT} are parsed.")
    file.seek(offset)
    content: bytes = file.read(size)
    return content


def _add_value(row: dict[str, Any], file: Any, sample: Sample, kind: str, name: str) -> None:
    """Add a text, a class number or an array of numbers as a column."""
    last = kind.rpartition(".")[2]
    if last not in TEXTS and last not in NUMBERS:
        return
    column = TEXTS.get(kind, kind.replace(".", "_"))
    if column in row:
        raise RowError(f"{name}: the JSON has a {column!r} too, beside the member {kind!r}; drop one.")
    content = _read(file, sample, kind, name)
    try:
        if last == "npy":
            row[column] = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            row[column] = int(content) if last == "cls" else content.decode("utf-8-sig")
    except (ValueError, EOFError) as error:
        raise RowError(f"{name}: {kind} cannot be read: {error}") from error


def _named(row: dict[str, Any], single: str, sample: Sample, own: list[str], name: str) -> list[str]:
    """Return the members that the JSON names as its images or videos, taking the names out of it; all if it names none."""
    key = next((key for key in (f"{single}s", single) if row.get(key) is not None), None)
    if key is None:
        return own
    named = row.pop(key)
    named = list(named) if isinstance(named, list) else [named]
    base = PurePosixPath(sample.key).name
    by_name = {spelling: kind for kind in own for spelling in (kind, f"{base}.{kind}", f"{sample.key}.{kind}")}
    found = [by_name.get(each) if isinstance(each, str) else None for each in named]
    if len(named) == len(own) == 1:
        return own  # the name of the file before it was put into the archive
    chosen = [kind for kind in found if kind is not None]
    if len(chosen) != len(named):
        missing = named[found.index(None)]
        raise RowError(
            f"{name}: {key} names {missing!r:.80}, but the row's members are {', '.join(own)}; name them as the archive does, "
            "or leave the names out."
        )
    return chosen
