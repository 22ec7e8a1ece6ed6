"""The caches of one run: opened from its config, asked by the collator, reported at the end.

rows -> collator: which images are known, processed only where they are not -> Batch.pictures -> forward with their features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hfcustom.base import CustomVLM
from hfcustom.cache.clips import ClipCache
from hfcustom.cache.features import FeatureCache, Picture, TowerCache, fingerprint
from hfcustom.cache.fingerprint import image_digest, processor_digest, video_digest
from hfcustom.cache.lazy import LazyRows, only_loaded
from hfcustom.cache.pictures import PIXELS, ImageCache
from hfcustom.cache.refusals import reads_pixels, video_token_id, why_no_videos, why_not_cached, why_tower_only
from hfcustom.cache.store import ShardStore, in_words, size_of
from hfcustom.parts import unwrap

if TYPE_CHECKING:
    from hfcustom.data.messages import Example
    from hfcustom.data.sources import Examples
    from hfcustom.train_config import TrainConfig


@dataclass
class Caches:
    """What the collator asks, in each loading process a copy."""

    images: ImageCache | None = None  # what the processor makes
    features: ShardStore | None = None  # what the model makes
    placeholder: int | None = None  # the id of an image token
    pixels_wanted: bool = True  # also of images whose features are known
    tower_only: str = ""  # why features are those of the tower, before the connector
    clips: ClipCache | None = None  # what the processor makes of videos
    video_placeholder: int | None = None  # the id of a video's token
    no_videos: str = ""  # why features of videos cannot be kept
    _known: list[Picture] = field(default_factory=list)
    _videos: list[Picture] = field(default_factory=list)

    def lazy_rows(self, rows: Examples) -> Examples:
        """Return rows whose known images are not decoded."""
        if self.images is None or not only_loaded(rows):
            return rows
        return LazyRows(rows, self.images.size_of)

    @contextmanager
    def serving(self, processor: Any, examples: Sequence[Example]) -> Iterator[None]:
        """Answer for the image processor while it runs on examples; ValueError for videos where their features cannot be kept."""
        self._videos = self._find_videos(processor, examples)
        if self.images is not None:
            self.images.levels = None
        digests = {id(image): image_digest(image) for example in examples for image in example.images}
        # An image alone in its row is another one than beside others: LLaVA-OneVision cuts only it into tiles.
        keys = [
            f"{digests[id(image)]}-{'alone' if len(example.images) == 1 else 'beside'}"
            for example in examples
            for image in example.images
        ]
        self._known = [Picture(key, found=None if self.features is None else self.features.get(key)) for key in keys]
        known = {picture.key.partition("-")[0] for picture in self._known if picture.found is not None}
        missing = {picture.key.partition("-")[0] for picture in self._known if picture.found is None}
        blank = frozenset() if self.pixels_wanted else frozenset(known - missing)
        clips = None if not any(example.videos for example in examples) else self.clips
        with (
            nullcontext() if self.images is None else self.images.serving(processor, digests, blank),
            nullcontext() if clips is None else clips.serving(processor),
        ):
            yield

    def _find_videos(self, processor: Any, examples: Sequence[Example]) -> list[Picture]:
        """Return the videos of a batch as the cache of features knows them."""
        shown = [example.name for example in examples if example.videos]
        if self.features is None or not shown:
            return []
        if self.no_videos:
            raise ValueError(
                f"{shown[0]} has a video, and cache_features keeps images only: {self.no_videos}. Leave cache_features out, or set "
                "video_as_images=True."
            )
        settings = processor_digest(processor.video_processor, {})
        keys = [f"{video_digest(video)}-{settings}" for example in examples for video in example.videos]
        return [Picture(key, found=self.features.get(key), is_video=True) for key in keys]

    @property
    def levels(self) -> torch.Tensor | None:
        """The values of the last pixels if they are bytes (hfcustom/cache/levels.py), (3, 256)."""
        return None if self.images is None else self.images.levels

    def lost_levels(self, features: Mapping[str, Any]) -> bool:
        """Whether a processor made other numbers of pixels that were bytes: it is to run again, and gets floats from then on."""
        lost = self.levels is not None and features[PIXELS].dtype != torch.uint8
        if lost:
            assert self.images is not None
            self.images.gives_levels = False
        return lost

    def pictures(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        replaced: Sequence[Sequence[Mapping[str, Any]]],
        examples: Sequence[Example],
    ) -> list[Picture]:
        """Return the images, then the videos, of the batch just processed with their tokens; ids (B, T), offsets (B, T, 2)."""
        if self.features is None:
            return []
        counts: list[int] = []
        lengths: list[int] = []
        for row, spans, records, example in zip(ids, offsets, replaced, examples, strict=True):
            if example.videos:
                lengths += _tokens_of_images(row == self.video_placeholder, spans, records, len(example.videos))
            counts += _tokens_of_images(row == self.placeholder, spans, records, len(example.images))
        crops = {} if self.images is None else self.images.crops
        for picture, tokens in zip(self._known, counts, strict=True):
            picture.tokens, picture.crops = tokens, crops.get(picture.key.partition("-")[0], 0)
        for video, tokens in zip(self._videos, lengths, strict=True):
            video.tokens = tokens
        return [*self._known, *self._videos]


def _tokens_of_images(
    placeholders: torch.Tensor, offsets: torch.Tensor, records: Sequence[Mapping[str, Any]], images: int
) -> list[int]:
    """Return the placeholders of each image of a row: those in what was written for it; (T,), (T, 2).

    A family that writes a run of images at once gives each as many, as Idefics2 does.
    """
    total = int(placeholders.sum())
    if images <= 1:
        return [total] * images
    starts, ends = (offsets[placeholders, at] for at in (0, 1))  # (image tokens,)
    spans = [record["new_span"] for record in records]
    found = [int(((starts >= first) & (ends <= last)).sum()) for first, last in spans]
    found = [tokens for tokens in found if tokens]
    return found if len(found) == images else [total // images] * images


def check_caches(model: Any, config: TrainConfig) -> None:
    """Raise ValueError, with the reason, where what a config asks for cannot be cached."""
    name = type(unwrap(model)).__name__
    if not isinstance(unwrap(model), CustomVLM) and (config.cache_images or config.cache_features):
        raise ValueError(
            f"cache_images and cache_features are for models that read images and write text, not for a {name}; leave them out."
        )
    if config.cache_features is not None and (why := why_not_cached(model)):
        raise ValueError(f"cache_features={config.cache_features!r} cannot be used: {why}.")


def open_caches(model: Any, processor: Any, config: TrainConfig, accelerator: Accelerator) -> Caches | None:
    """Open the caches that a config asks for, and say what they hold."""
    if config.cache_images is None and config.cache_features is None:
        return None
    core, max_bytes = unwrap(model), config.max_cache_gb * 1e9
    caches = Caches()
    if config.cache_features is not None:
        root = Path(config.cache_features)
        caches.tower_only = why_tower_only(model)
        digest = fingerprint(core, processor, config.precision, tower=bool(caches.tower_only))
        name = f"{'tower' if caches.tower_only else 'features'}-{digest}"
        caches.features = ShardStore(root, name, max_bytes)
        caches.placeholder, caches.pixels_wanted = core.placeholder_token_id, reads_pixels(core)
        caches.no_videos = why_no_videos(core, processor, caches.tower_only)
        caches.video_placeholder = None if caches.no_videos else video_token_id(core)
        caches.images = ImageCache(ShardStore(root, "layouts", max_bytes), keeps_pixels=False)
        ends = f" of the vision tower, since {caches.tower_only}" if caches.tower_only else ""
        accelerator.print(f"image features{ends}: {_opened(caches.features)}")
    if config.cache_images is not None:
        caches.images = ImageCache(ShardStore(Path(config.cache_images), "images", max_bytes))
        caches.clips = ClipCache(ShardStore(Path(config.cache_images), "videos", max_bytes))
        accelerator.print(f"processed images: {_opened(caches.images.store)}")
    return caches


def _opened(store: ShardStore) -> str:
    held, size = store.count(), size_of(store.folder)
    others = size_of(store.root) - size
    beside = f"; {in_words(others)} beside them are of other models or settings" if others > 1e6 else ""
    return f"{held:,} images in {store.folder} ({in_words(size)} of at most {in_words(store.max_bytes)}){beside}"


@contextmanager
def use_caches(core: Any, caches: Caches | None, accelerator: Accelerator) -> Iterator[None]:
    """Serve features while the model is trained, and report at the end what the caches held."""
    if caches is None:
        yield
        return
    kind = TowerCache if caches.tower_only else FeatureCache
    cache = None if caches.features is None else kind(core, caches.features)
    assert caches.images is not None
    with nullcontext() if cache is None else cache.installed():
        yield
    caches.images.store.flush()
    if caches.clips is not None:
        caches.clips.store.flush()
    accelerator.wait_for_everyone()
    if cache is not None:
        hits, misses = (sum(gather_object([count])) for count in (cache.hits, cache.misses))
        accelerator.print(f"image features: {_report(caches.features, hits, hits + misses)}")
    if caches.images.keeps_pixels:
        accelerator.print(f"processed images: {_report(caches.images.store)}")
    if caches.clips is not None and caches.clips.store.count():
        accelerator.print(f"processed videos: {_report(caches.clips.store, kind='videos')}")


def _report(store: ShardStore | None, hits: int = 0, asked: int = 0, kind: str = "images") -> str:
    assert store is not None
    share = f", {hits / asked:.0%} hits" if asked else ""
    return f"{store.count():,} {kind}, {in_words(size_of(store.folder))}{share}"


def serving(core: Any, batch: Any) -> Any:
    """Return a context in which the model knows the images of the batch that runs."""
    return nullcontext() if core.feature_cache is None else core.feature_cache.serving(batch.pictures)
