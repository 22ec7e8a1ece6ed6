"""Files that are written whole or not at all; whole folders are hfcustom/commit.py's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield where to write; what stands there at the end takes the place of `path`, and after an error nothing does.

    A name that other folders share with this one (a hard link) keeps what it had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text; half a letter in it, as JSON may hold, becomes a question mark."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
