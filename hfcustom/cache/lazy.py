"""Images that are decoded when somebody looks: those of files whose processed form is in a cache.

file or bytes -> digest of the bytes -> an image that knows its size, or a decoded one where the cache does not know the bytes.
An image is left undecoded only if the same bytes have been decoded before, so that a damaged file is an error where it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.cache.fingerprint import DIGEST
from hfcustom.data import images
from hfcustom.data.sources import Examples


class LazyImage(Image.Image):
    """An RGB image whose pixels are made by `decode` when they are first asked for."""

    def __init__(self, size: tuple[int, int], decode: Callable[[], Image.Image]) -> None:
        super().__init__()
        self._mode, self._size, self._decode = "RGB", size, decode

    @property
    def im(self) -> Any:
        """Pillow's own image."""
        if self._im is None:
            self._im = self._decode().im
        return self._im

    @im.setter
    def im(self, im: Any) -> None:
        """Take the pixels that are there."""
        self._im = im


class Keeper:
    """Loads images in place of load_image, by the digest of their bytes; `size_of` says what a cache knows of one."""

    def __init__(self, size_of: Callable[[str], tuple[int, int] | None]) -> None:
        self.size_of = size_of

    def __call__(self, source: Any, root: Path | None, fetch: images.Fetch | None) -> Image.Image:
        data = _bytes_of(source, root, fetch)
        if data is None:
            return self._load(source, root, fetch)
        digest = hashlib.sha256(data).hexdigest()[:32]
        size = self.size_of(digest)
        image = (
            self._load(source, root, fetch)
            if size is None
            else LazyImage(size, lambda: self._load(source, root, fetch))
        )
        vars(image)[DIGEST] = digest  # not in info, which a changed copy would take along
        return image

    def _load(self, source: Any, root: Path | None, fetch: images.Fetch | None) -> Image.Image:
        token = images.KEEPER.set(None)
        try:
            return images.load_image(source, root, fetch)
        finally:
            images.KEEPER.reset(token)


def _bytes_of(source: Any, root: Path | None, fetch: images.Fetch | None) -> bytes | None:
    """Return the bytes of an encoded image; None for anything else, about which load_image says what there is to say."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        return None
    if isinstance(source, str) and images.is_url(source):
        return images.read_url(source, fetch)
    with images.open_regular(images.resolve_path(str(source), root)) as file:
        return file.read()


class LazyRows(Examples):
    """Rows whose images stay undecoded where `size_of` knows their bytes."""

    def __init__(self, rows: Examples, size_of: Callable[[str], tuple[int, int] | None]) -> None:
        self.rows: Examples = rows
        self.size_of = size_of

    def __getitem__(self, index: Any) -> Any:
        token = images.KEEPER.set(Keeper(self.size_of))
        try:
            return self.rows[index]
        finally:
            images.KEEPER.reset(token)

    def name_of(self, index: int) -> str:
        """Return what messages call a row."""
        return self.rows.name_of(index)


def only_loaded(rows: Any) -> bool:
    """Whether images reach the collator as they were loaded: rows of a user's own class may have changed them since."""
    if not isinstance(rows, Examples):
        return True
    if type(rows).__module__.partition(".")[0] != "hfcustom":
        return False
    inner = vars(rows)
    return all(map(only_loaded, [inner.get("rows"), *dict(inner.get("sources") or {}).values()]))
