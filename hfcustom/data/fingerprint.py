"""Fingerprints of data: whether a resumed run would meet the rows that it has left.

Files of up to WHOLE bytes together are hashed whole, more by their sizes and pieces all over them; rows in memory by the words
of some of them. Neither times nor places count, so that a data set may be copied or moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WHOLE = 2**28  # bytes, half a second
PIECES, PIECE = 256, 2**20  # of all files together, but two of each at least
SAMPLED_ROWS = 64


def files_fingerprint(paths: Iterable[Path], root: Path) -> str:
    """Return a hash of files, with their names below `root`."""
    digest, files = hashlib.sha256(), sorted(paths)
    sizes = [path.stat().st_size for path in files]
    pieces = None if sum(sizes) <= WHOLE else max(2, PIECES // len(files))
    for path, size in zip(files, sizes, strict=True):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        _add_file(digest, path, size, None if pieces is None or size <= pieces * PIECE else pieces)
    return digest.hexdigest()[:32]


def _add_file(digest: Any, path: Path, size: int, pieces: int | None) -> None:
    """Add a file, of which only its begin, its end and pieces between them if `pieces` says how many."""
    with path.open("rb") as file:
        if pieces is None:
            while block := file.read(PIECE):
                digest.update(block)
            return
        for at in range(pieces):
            file.seek((size - PIECE) * at // (pieces - 1))
            digest.update(file.read(PIECE))


def rows_fingerprint(rows: Sequence[Any]) -> str:
    """Return a hash of the number of rows in memory and the words and numbers of some of them, images left out."""
    digest = hashlib.sha256(str(len(rows)).encode())
    count = min(len(rows), SAMPLED_ROWS)
    for at in range(count):
        _add_words(digest, rows[at * (len(rows) - 1) // max(count - 1, 1)])
    return digest.hexdigest()[:32]


def _add_words(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode(errors="surrogatepass"))
            _add_words(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add_words(digest, item)
    elif isinstance(value, str | bool | int | float | bytes):
        digest.update(value if isinstance(value, bytes) else f"{value!r},".encode())
