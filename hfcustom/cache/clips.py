"""ClipCache: what a video processor made of each video, computed once and read back bit for bit.

[(F, H, W, 3) uint8, ...], as hfcustom/data/videos.py hands videos to a processor -> the processor's own output, put together
from what it makes of each video alone, as pictures.py does for images. The frames of a video are chosen and decoded as ever:
the key is made of their pixels, and of where they lie in the video.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from hfcustom.cache import codec
from hfcustom.cache.fingerprint import processor_digest
from hfcustom.cache.merging import Output, find_merges, merge
from hfcustom.cache.store import ShardStore

logger = logging.get_logger("hfcustom")
METADATA = "video_metadata"  # what a processor is told of its videos, and some of them return
PROBES = ((203, 150, 4), (90, 311, 4), (64, 64, 4))  # made-up videos: width, height, frames
MORE_FRAMES = 2  # of each probe than of the one before it, where videos have different numbers of frames
Clip = tuple[np.ndarray, Mapping[str, Any]]  # the frames, and where they lie


class ClipCache:
    """What a processor makes of videos, in a store."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.hits = self.misses = 0
        self._merges: dict[str, dict[str, str] | None] = {}  # settings -> output -> how it is put together

    @contextmanager
    def serving(self, processor: Any) -> Iterator[None]:
        """Stand in for a processor's video processor; one that has none, as without torchvision, is left as it is."""
        inner = vars(processor).get("video_processor")
        if inner is None:
            yield
            return
        processor.video_processor = _Standin(inner, self)
        try:
            yield
        finally:
            processor.video_processor = inner

    def process(self, inner: Any, videos: Any, options: Mapping[str, Any]) -> Any:
        """Return inner(videos, **options), from the cache where it can."""
        told: Any = options.get(METADATA)
        if not _all_clips(videos) or not _all_told(told, len(videos)):
            return inner(videos, **options)
        others = {name: value for name, value in options.items() if name != METADATA}
        settings = processor_digest(inner, others)
        ways = self._ways(inner, others, videos, settings)
        clips = list(zip(videos, told, strict=True))
        if ways is None:
            return inner(videos, **options)
        found = [[self._alone(inner, clip, others, f"{_digest(clip)}-{settings}")] for clip in clips]
        if len(found) == 1:
            return BatchFeature(found[0][0])
        return BatchFeature({name: merge(way, name, found) for name, way in ways.items()})

    def _alone(self, inner: Any, clip: Clip, options: Mapping[str, Any], key: str) -> Output:
        tables = codec.lattices(inner.to_dict())
        entry = self.store.get(key)
        if entry is not None:
            self.hits += 1
            tensors, about = entry
            output = {name: codec.unpack(value, tables, tensors) for name, value in about["outputs"].items()}
            told = about["metadata"]
            return output if told is None else {**output, METADATA: [VideoMetadata(**fields) for fields in told]}
        self.misses += 1
        output = _run(inner, [clip], options)
        about = _about(output, tables, tensors := {})
        self.store.put(key, tensors, about)
        return output

    def _ways(
        self, inner: Any, options: Mapping[str, Any], videos: Sequence[np.ndarray], settings: str
    ) -> dict[str, str] | None:
        """Return how outputs of videos alone make that of all, None when in no known way; tried once a process."""
        ragged, several = len({len(video) for video in videos}) > 1, len(videos) > 1
        known = f"{settings} {ragged} {several}"
        if known not in self._merges:
            rows = [[probe] for probe in _probes(MORE_FRAMES if ragged else 0)[: None if several else 1]]
            ways = find_merges(lambda rows: _run(inner, [clip for row in rows for clip in row], options), rows)
            self._merges[known] = ways if ways is not None and _can_be_kept(inner, rows[0][0], options) else None
            if self._merges[known] is None:
                logger.warning(
                    f"What {type(inner).__name__} makes of a video {'depends on those beside it' if several else 'cannot be kept'}"
                    f", so videos are not cached{' where a micro-batch has several' if several else ''}."
                )
        return self._merges[known]


class _Standin:
    """A video processor that asks the cache first."""

    def __init__(self, inner: Any, cache: ClipCache) -> None:
        self._inner, self._cache = inner, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, videos: Any, **options: Any) -> Any:
        return self._cache.process(self._inner, videos, options)


def _run(inner: Any, clips: Sequence[Clip], options: Mapping[str, Any]) -> Output:
    videos, told = zip(*clips, strict=True)
    return dict(inner(list(videos), **{METADATA: list(map(dict, told))}, **options))


def _about(output: Output, tables: list[codec.Lattice], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return an output as JSON, its arrays in `tensors`; TypeError for what cannot be stored."""
    packed = {name: codec.pack(value, tables, tensors) for name, value in output.items() if name != METADATA}
    if METADATA not in output:
        return {"outputs": packed, "metadata": None}
    told = [dict(found) for found in output[METADATA]]
    if json.loads(json.dumps(told)) != told:
        raise TypeError(METADATA)
    return {"outputs": packed, "metadata": told}


def _can_be_kept(inner: Any, clip: Clip, options: Mapping[str, Any]) -> bool:
    try:
        _about(_run(inner, [clip], options), codec.lattices(inner.to_dict()), {})
    except (TypeError, ValueError):
        return False
    return True


def _all_clips(videos: Any) -> bool:
    listed = isinstance(videos, list) and bool(videos)
    return listed and all(isinstance(video, np.ndarray) and video.ndim == 4 for video in videos)


def _all_told(told: Any, count: int) -> bool:
    return isinstance(told, list) and len(told) == count and all(isinstance(found, Mapping) for found in told)


def _digest(clip: Clip) -> str:
    """Return the digest of the pixels of a video's frames and of where they lie in it."""
    frames, told = clip
    found = hashlib.sha256(f"{frames.dtype} {frames.shape} ".encode())
    found.update(np.ascontiguousarray(frames).data)
    found.update(json.dumps(dict(told), sort_keys=True, default=str).encode())
    return f"clip{found.hexdigest()[:32]}"


def _probes(more: int) -> list[Clip]:
    rng = np.random.default_rng(0)
    clips: list[Clip] = []
    for at, (width, height, least) in enumerate(PROBES):
        count = least + at * more
        told = {"fps": 1.0, "total_num_frames": count, "duration": float(count), "frames_indices": list(range(count))}
        clips.append((rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8), told))
    return clips
