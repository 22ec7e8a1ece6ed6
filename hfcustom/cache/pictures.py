"""ImageCache: what an image processor made of each picture, computed once and read back bit for bit.

[[image, ...] a row of the batch] -> the processor's own output, put together from what it makes of each image alone. Which
way a processor puts images together (one after another, padded to the largest, nested by row) is found by trial: made-up pictures
of three sizes are processed together and alone, and a processor for which no way gives the same bits is not cached, which
is said. Pixels are kept as bytes where they are 256 levels (hfcustom/cache/codec.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.utils import logging

from hfcustom.cache import codec
from hfcustom.cache.fingerprint import image_digest, processor_digest
from hfcustom.cache.merging import Output, crops_of, find_merges, merge
from hfcustom.cache.store import ShardStore

logger = logging.get_logger("hfcustom")
PIXELS = "pixel_values"
PROBE_SIZES = ((203, 150), (90, 311), (64, 64))


class ImageCache:
    """What a processor makes of images, in a store; with `keeps_pixels=False` only what is not pixels (sizes, crops)."""

    def __init__(self, store: ShardStore, *, keeps_pixels: bool = True) -> None:
        self.store, self.keeps_pixels = store, keeps_pixels
        self.hits = self.misses = 0
        self.crops: dict[str, int] = {}  # of the images of the batch that was processed last, by digest
        self.levels: torch.Tensor | None = None  # (3, 256), of the pixels of that batch if they are bytes
        self.gives_levels = True  # until a processor turns out to make numbers of them
        self._settings = ""  # the digest of the last that was asked for
        self._merges: dict[str, dict[str, str] | None] = {}  # settings -> output -> how it is put together
        self._tables: dict[str, list[codec.Lattice]] = {}

    @contextmanager
    def serving(self, processor: Any, pictures: Mapping[int, str], blank: frozenset[str]) -> Iterator[None]:
        """Stand in for a processor's image processor; `pictures` are digests by id(image), pixels of `blank` are not wanted."""
        inner = processor.image_processor
        processor.image_processor = _Standin(inner, self, pictures, blank)
        try:
            yield
        finally:
            processor.image_processor = inner

    def process(
        self, inner: Any, rows: Any, options: Mapping[str, Any], pictures: Mapping[int, str], blank: frozenset[str]
    ) -> Any:
        """Return inner(rows, **options), from the cache where it can."""
        flat = _all_images(rows)
        nested = not flat and isinstance(rows, list | tuple) and all(map(_all_images, rows))
        if not (any(rows) if nested else flat and rows):
            return inner(rows, **options)
        images, rows = rows, [[image] for image in rows] if flat else rows
        self._settings = settings = processor_digest(inner, options)
        ways = self._ways(inner, options, rows, flat)
        if ways is None:
            return inner(images, **options)
        alone: dict[str, _Alone] = {}
        self.crops = {}
        for image in (image for row in rows for image in row):
            digest = pictures.get(id(image)) or image_digest(image)
            if digest not in alone:
                alone[digest] = self._alone(
                    inner, image, options, f"{digest}-{settings}", blank=digest in blank, flat=flat
                )
        tables = self._lattices(inner)
        table = _common_table(list(alone.values())) if self.gives_levels and ways.get(PIXELS) == "joined" else None
        self.levels = None if table is None else torch.from_numpy(tables[table])
        outputs = {digest: known.read(tables, as_levels=table is not None) for digest, known in alone.items()}
        self.crops = {digest: crops_of(output[PIXELS]) for digest, output in outputs.items()}
        found = [[outputs[pictures.get(id(image)) or image_digest(image)] for image in row] for row in rows]
        return BatchFeature({name: merge(way, name, found) for name, way in ways.items()})

    def _alone(
        self, inner: Any, image: Image.Image, options: Mapping[str, Any], key: str, *, blank: bool, flat: bool
    ) -> _Alone:
        tables = self._lattices(inner)
        entry = self.store.get(key) if self.keeps_pixels or blank else None
        if entry is not None:
            self.hits += 1
            tensors, about = entry
            return _Alone(about["outputs"], tensors, has_pixels=not blank)
        self.misses += 1
        output = dict(inner([image] if flat else [[image]], **options))
        tensors = {}
        kept = output if self.keeps_pixels else {**output, PIXELS: _blank(output[PIXELS])}
        packed = {name: codec.pack(value, tables, tensors) for name, value in kept.items()}
        self.store.put(key, tensors, {"outputs": packed, "size": image.size})
        return _Alone(packed, tensors, self.keeps_pixels, output)

    def size_of(self, digest: str) -> tuple[int, int] | None:
        """Return the width and height of an image of which this is known, by the digest of its file."""
        about = self.store.about(f"file{digest}-{self._settings}")
        return None if about is None else tuple(about["size"])

    def _lattices(self, inner: Any) -> list[codec.Lattice]:
        if self._settings not in self._tables:
            self._tables[self._settings] = codec.lattices(inner.to_dict())
        return self._tables[self._settings]

    def _ways(self, inner: Any, options: Mapping[str, Any], rows: Any, flat: bool) -> dict[str, str] | None:
        """Return how outputs of images alone make that of all, None when in no known way; tried once a process.

        Rows of several images, and gaps where rows have none, are tried apart: LLaVA-OneVision tiles a row's only image.
        A processor that is given a flat list has no rows.
        """
        gaps, several = any(not row for row in rows), any(len(row) > 1 for row in rows)
        known = f"{self._settings} {gaps} {several} {flat}"
        if known not in self._merges:
            rng = np.random.default_rng(0)
            first, second, third = (
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                for width, height in PROBE_SIZES
            )
            rows = [
                [first, second] if several else [first],
                *([[], []] if gaps else []),
                [third],
            ]  # not an image a row
            self._merges[known] = find_merges(
                lambda rows: dict(inner([image for row in rows for image in row] if flat else rows, **options)), rows
            )
            if self._merges[known] is None:
                logger.warning(
                    f"What {type(inner).__name__} makes of an image depends on those beside it"
                    f"{' in its row' if several else ''}, so it is not cached{' in rows of several images' if several else ''}."
                )
        return self._merges[known]


@dataclass
class _Alone:
    """What is known of one image: how its outputs are stored, and themselves where the processor has just made them."""

    kept: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    has_pixels: bool  # among the tensors, and wanted
    output: Output | None = None

    def read(self, tables: list[codec.Lattice], *, as_levels: bool) -> Output:
        """Return the outputs, pixels as levels if asked."""
        if self.output is not None and not as_levels:
            return self.output
        rest = {name: codec.unpack(value, tables, self.tensors) for name, value in self.kept.items() if name != PIXELS}
        tensors = self.tensors if self.has_pixels else None
        return {PIXELS: codec.unpack(self.kept[PIXELS], tables, tensors, as_levels=as_levels), **rest}


def _common_table(images: Sequence[_Alone]) -> int | None:
    tables = {codec.table_of(image.kept[PIXELS]) if image.has_pixels else None for image in images}
    return tables.pop() if len(tables) == 1 else None


class _Standin:
    """An image processor that asks the cache first."""

    def __init__(self, inner: Any, cache: ImageCache, pictures: Mapping[int, str], blank: frozenset[str]) -> None:
        self._inner, self._cache, self._pictures, self._blank = inner, cache, pictures, blank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        return self._cache.process(self._inner, images, options, self._pictures, self._blank)


def _all_images(images: Any) -> bool:
    return isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images)


def _blank(pixels: Any) -> Any:
    """Return ones in arrays of the same shapes; a tower that drops black pictures does not drop these."""
    if isinstance(pixels, torch.Tensor):
        return torch.ones((), dtype=pixels.dtype).expand(pixels.shape)
    if isinstance(pixels, np.ndarray):
        return np.broadcast_to(np.ones((), pixels.dtype), pixels.shape)
    return type(pixels)(map(_blank, pixels))
