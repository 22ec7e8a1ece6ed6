"""A data set with more than a hundred rows that cannot be used, of each kind that people meet, among good ones.

Each bad row has a name and the code that training and preflight have to give it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import picture
from PIL import Image

TOO_LONG = "too long"  # the one that only a tokenizer can tell
MAX_LENGTH = 400


@dataclass(frozen=True)
class Corpus:
    """The file, and what stands in which line."""

    path: Path
    good: list[str]  # names of rows, as in messages
    bad: dict[str, tuple[str, str]]  # name of a row -> what is wrong, the code


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *more: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """Return a 1-bit PNG whose header promises any number of pixels, with chunks of one's own before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), *more, (b"IDAT", zlib.compress(data or b"\0")), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def row(image: Any = "good.png", question: Any = "What is it?", answer: Any = "A cat.") -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [image],
    }


def talk(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def user(content: Any = "Why?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def says(content: Any = "So.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# ---- images ---------------------------------------------------------------------------------------------------------


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return name -> (bytes, code) of files that are no usable image."""
    noise = picture(5, (90, 60))
    kinds = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
    whole = {kind: encode(noise, kind) for kind in kinds}
    broken = bytearray(whole["PNG"])
    broken[whole["PNG"].index(b"IDAT") + 30] ^= 255
    nan = Image.fromarray(np.full((9, 9), np.nan, "float32"))
    bomb = zlib.compress(bytes(2_000_000))
    files = {
        "random": (np.random.default_rng(0).bytes(400), "undecodable"),
        "empty": (b"", "undecodable"),
        "zeros": (bytes(500), "undecodable"),
        "html": (b"<!DOCTYPE html><html>404</html>", "undecodable"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "undecodable"),
        "json": (b'{"error": "not found"}', "undecodable"),
        "pickle": (pickle.dumps({"image": 1}), "undecodable"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "undecodable"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "undecodable"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "undecodable"),
        "header": (whole["PNG"][:20], "undecodable"),
        "broken": (bytes(broken), "damaged"),
        "short_jpeg": (whole["JPEG"][:-20], "damaged"),
        "nan": (encode(nan, "TIFF"), "not_finite"),
        "huge": (png(20_000, 20_000), "enormous"),
        "large": (png(10_000, 9_000), "enormous"),
        "huge_gif": (b"GIF89a\xff\xff\xff\xff" + whole["GIF"][10:], "enormous"),
        "ztxt": (png(9, 9, (b"zTXt", b"a\0\0" + bomb)), "undecodable"),
        "itxt": (png(9, 9, (b"iTXt", b"a\0\1\0\0\0" + bomb)), "undecodable"),
        "dot": (encode(Image.new("RGB", (1, 1)), "PNG"), "tiny"),
        "dots": (encode(Image.new("RGB", (3, 5)), "PNG"), "tiny"),
        "spacer": (encode(Image.new("RGB", (1, 15)), "GIF"), "tiny"),
        "thin": (encode(Image.new("RGB", (300, 3)), "PNG"), "tiny"),
        "thinner": (encode(Image.new("RGB", (1, 150)), "PNG"), "tiny"),
        "tall": (encode(Image.new("RGB", (1, 500)), "PNG"), "aspect"),
        "wide": (encode(Image.new("RGB", (2000, 1)), "PNG"), "aspect"),
        "strip": (encode(Image.new("RGB", (3000, 5)), "PNG"), "aspect"),
        "column": (encode(Image.new("RGB", (7, 1500)), "JPEG"), "aspect"),
    }
    for kind in ("EPS", "PDF", "PPM", "PCX", "TGA", "ICO", "DIB", "SGI", "MSP", "XBM"):
        bitmap = noise.convert("1") if kind in ("MSP", "XBM") else noise
        files[f"as_{kind}"] = encode(bitmap, kind), "undecodable"
    for kind, data in whole.items():  # a WEBP is read at once
        files[f"half_{kind}"] = data[: len(data) // 2], "undecodable" if kind == "WEBP" else "damaged"
    return files


def bad_sources(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return name -> (what a row gives as its image, code), having written the files."""
    found: dict[str, tuple[Any, str]] = {}
    for name, (data, code) in bad_files().items():
        (folder / f"{name}.png").write_bytes(data)
        found[name] = f"{name}.png", code
    picture().save(folder.parent / "outside.png")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in {"link": "../outside.png", "zero": "/dev/zero", "loop": "loop.png", "gone": "gone2"}.items():
        (folder / f"{name}.png").symlink_to(target)
    paths = {
        "missing": [
            "nope.png",
            "sub",
            "pipe.png",
            "loop.png",
            "gone.png",
            "a\0b.png",
            "x" * 5000,
            "\ud83d.png",
            "~/a.png",
        ],
        "outside": ["../outside.png", str(folder.parent / "outside.png"), "link.png", "/dev/zero", "zero.png"],
        "url": [f"{scheme}://host/a.png" for scheme in ("http", "https", "file", "ftp", "s3", "zip")],
        "no_image": [3, 1.5, True, [1, 2], {}, {"bytes": None, "path": None}, ""],
    }
    paths["url"] += ["data:image/png,iVBORw0KGgo=", "data:image/png;base64,#"]
    paths["undecodable"] = ["data:image/png;base64,iVBORw0KGgo="]
    paths["missing"].append(paths["no_image"].pop())
    for code, sources in paths.items():
        found |= {f"{code}: {source!r:.40}": (source, code) for source in sources}
    return found


# ---- rows -----------------------------------------------------------------------------------------------------------


def bad_lines() -> dict[str, tuple[bytes, str]]:
    """Return name -> (a line that is no row, code)."""
    good = json.dumps(row()).encode()
    lines = {
        "cut": good[:60],
        "no JSON": b"hello",
        "single quotes": b"{'messages': []}",
        "two rows": good + good,
        "latin-1": good.replace(b"cat", b"caf\xe9"),
        "deep": b"[" * 100_000,
        "list": b"[1, 2]",
        "string": b'"text"',
        "number": b"7",
        "null": b"null",
        "long number": b'{"messages": ' + b"9" * 6000 + b"}",
    }
    return {f"line: {name}": (line, "form") for name, line in lines.items()}


def bad_rows() -> dict[str, tuple[Any, str]]:
    """Return name -> (a row that is JSON but cannot be used, code)."""
    half = "half a letter \ud83d"
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    forms = [{}, {"text": "words"}, talk(), {"messages": None}, {"messages": "hi"}, {"messages": {"role": "user"}}]
    forms += [{**row(), "images": "good.png"}, {**row(), "images": {"a": 1}}, {**talk(user(), says()), "chosen": "x"}]
    forms += [{"chosen": "x"}, {"completion": "x"}, {**pair, "rejected": "This."}]
    forms += [
        {**pair, "chosen": []},
        talk(says(), user()),
        talk(user(), says(weight=-1)),
        talk(user(), says(weight="1")),
    ]
    forms += [talk(user(), says(weight=float("nan"))), talk(user(weight=1), says()), talk(user(), says(weight=True))]
    roles = [None, "robot", "", "User", 3, ["user"], {"a": 1}]
    contents: list[Any] = [None, 1.5, True, {"text": "x"}, [{"type": "text"}], [{"type": "text", "text": None}]]
    contents += [[{"type": "text", "text": 0.5}], float("inf")]
    blocks = [[None], [3], [{}], [{"type": "audio"}], [["text"]], [{"type": None}], [{"type": ["text"]}]]
    answers = ["", " ", "\n\t", "\u00a0", [], [{"type": "text", "text": ""}], [{"type": "text", "text": " "}] * 2]
    grouped = {
        "form": forms,
        "role": [talk({"role": role, "content": "x"}, says()) for role in roles] + [talk("hi"), talk(None), talk({})],
        "content": [talk(user(content), says()) for content in contents],
        "block": [talk(user(content), says()) for content in blocks],
        "empty_answer": [talk(user(), says(answer)) for answer in answers] + [talk(user(), says(), user(), says(""))],
        "no_labels": [talk(user()), talk({"role": "system", "content": "x"}, user()), talk(user(), says(weight=0))],
        "surrogate": [row(question=half), row(answer=half), talk(user([half]), says())],
        "image_count": [
            {**row(), "images": []},
            {**row(), "images": None},
            {**row(), "images": ["good.png"] * 2},
            talk(user([{"type": "image"}] * 3), says(), images=["good.png"]),
            talk(user("<image> what?"), says(), images=["good.png"]),
        ],
        "no_image": [{**row(), "images": [None]}],
        "url": [talk(user([{"type": "image", "url": "http://host/a.png"}]), says())],
        "missing": [talk(user([{"type": "image", "image": "nope.png"}]), says())],
        "kind": [pair, {**pair, "images": ["good.png"]}, {"prompt": "x", "completion": "y", "label": True}],
        "too_long": [talk(user("word " * 40_000), says())],
    }
    named = {f"{code} {at}": (bad, code) for code, rows in grouped.items() for at, bad in enumerate(rows)}
    named[TOO_LONG] = named.pop("too_long 0")
    return named


def write_corpus(folder: Path, good: list[dict[str, Any]]) -> Corpus:
    """Write rows.jsonl, the first row and every few of the others good; images of good rows are saved beside it."""
    picture().save(folder / "good.png")
    bad: list[tuple[str, bytes, str]] = [(name, *found) for name, found in bad_lines().items()]
    sources = {name: (row(source), code) for name, (source, code) in bad_sources(folder).items()}
    bad += [(name, json.dumps(made).encode(), code) for name, (made, code) in {**sources, **bad_rows()}.items()]
    every = len(bad) // len(good) + 1
    lines: list[bytes] = []
    names, named = [], {}
    for at, (what, line, code) in enumerate(bad):
        if at % every == 0:
            names.append(f"rows.jsonl, line {len(lines) + 1}")
            lines.append(json.dumps(_saved(good[at // every], folder, at)).encode())
        lines.append(line)
        named[f"rows.jsonl, line {len(lines)}"] = what, code
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert len(names) == len(good)
    return Corpus(path, names, named)


def _saved(good: dict[str, Any], folder: Path, at: int) -> dict[str, Any]:
    files = [f"good_{at}_{number}.png" for number, _ in enumerate(good["images"])]
    for file, image in zip(files, good["images"], strict=True):
        image.save(folder / file)
    return {**good, "images": files}
