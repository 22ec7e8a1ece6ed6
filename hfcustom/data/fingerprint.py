"""Fingerprints of data: whether a resumed run would meet the rows that it has left.

Files are hashed whole up to WHOLE bytes, larger ones by their size and pieces all over them; rows in memory by the words of
some of them. Neither times nor places count, so that a data set may be copied or moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WHOLE = 2**28  # bytes of a file that is hashed whole, half a second
PIECES, PIECE = 64, 2**20
SAMPLED_ROWS = 64


def files_fingerprint(paths: Iterable[Path], root: Path) -> str:
    """Return a hash of files, with their names below `root`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        _add_file(digest, path)
    return digest.hexdigest()[:32]


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(PIECE):
                digest.update(block)
            return
        for at in range(PIECES):
            file.seek((size - PIECE) * at // (PIECES - 1))
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
