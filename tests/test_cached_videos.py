"""Tests of hfcustom/cache/clips.py: what a video processor made is read back bit for bit, and nothing stale ever is."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, picture
from test_cache import assert_same, caches_for, count_runs, frozen, step
from test_video_rows import FRAMES, beside, reads_videos, row, with_videos
from training import curve, short_config
from transformers import BatchFeature
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

import hfcustom
from hfcustom.cache.clips import ClipCache
from hfcustom.cache.features import FeatureCache
from hfcustom.cache.levels import on_device
from hfcustom.cache.pictures import ImageCache
from hfcustom.cache.refusals import video_token_id, why_no_videos, why_tower_only
from hfcustom.cache.run import Caches
from hfcustom.cache.store import ShardStore
from hfcustom.data.collate import Collator
from hfcustom.data.messages import read_row
from hfcustom.families import family_names
from hfcustom.train import fit

NAMES = [name for name in family_names() if reads_videos(name)]
ALONE = ("molmo2", "nemotron_h_omni")  # take one video a call, or count on from one video to the next
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")


class Halves:
    """A video processor: the mean of each frame's rows, filled up to the longest video where `pads`."""

    def __init__(self, scale: float = 0.5, *, pads: bool = True, mixes: bool = False) -> None:
        self.scale, self.pads, self.mixes, self.runs = scale, pads, mixes, 0

    def to_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def __call__(self, videos: list[np.ndarray], video_metadata: Any = None, **options: Any) -> BatchFeature:
        self.runs += len(videos)
        means = [torch.from_numpy(video.mean((1, 2)) * self.scale).float() for video in videos]  # (F, C)
        longest = max(map(len, means))
        padded = [torch.cat([mean, mean.new_zeros(longest - len(mean), 3)]) for mean in means]
        if self.mixes:
            padded = [each - padded[0] for each in padded]
        told = [VideoMetadata(**about) for about in video_metadata]
        grids = torch.tensor([[len(video), *video.shape[1:3]] for video in videos])
        return BatchFeature({"pixels": torch.stack(padded), "grid": grids, "video_metadata": told})


class Taker:
    """What has a video processor."""

    def __init__(self, video_processor: Any) -> None:
        self.video_processor = video_processor


def clip(frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 8, 6, 3), dtype=np.uint8)


def told(video: np.ndarray, fps: float = 2.0) -> dict[str, Any]:
    return {"fps": fps, "total_num_frames": 90, "duration": 45.0, "frames_indices": list(range(len(video)))}


def ask(cache: ClipCache, inner: Any, videos: list[np.ndarray], fps: float = 2.0) -> Any:
    taker = Taker(inner)
    with cache.serving(taker):
        assert taker.video_processor.scale == inner.scale
        found = taker.video_processor(videos, video_metadata=[told(video, fps) for video in videos], pad=True)
    assert taker.video_processor is inner
    return found


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert torch.equal(found["pixels"], expected["pixels"]) and torch.equal(found["grid"], expected["grid"])
    assert found["video_metadata"] == expected["video_metadata"]


def test_a_video_is_processed_once_and_another_one_is_not_taken_for_it(tmp_path: Path) -> None:
    inner, store = Halves(), ShardStore(tmp_path, "videos", 1e12)
    videos = [clip(4, 0), clip(6, 1)]
    plain = inner(videos, video_metadata=list(map(told, videos)))
    cache = ClipCache(store)
    for asked in (videos, videos, videos[::-1], videos[:1]):
        assert_equal(ask(cache, inner, asked), inner(asked, video_metadata=list(map(told, asked))))
    assert (cache.misses, cache.hits) == (2, 5)
    store.flush()
    inner.runs = 0
    later = ClipCache(ShardStore(tmp_path, "videos", 1e12))
    assert_equal(ask(later, inner, videos), plain)
    assert (later.misses, later.hits) == (0, 2)
    changed = videos[0].copy()
    changed[1, 2, 3, 0] ^= 1
    ask(later, inner, [changed])
    ask(later, inner, videos[:1], fps=3.0)
    assert later.misses == 2
    assert_equal(ask(later, Halves(0.25), videos), Halves(0.25)(videos, video_metadata=list(map(told, videos))))
    assert later.misses == 4


def test_a_processor_whose_videos_depend_on_each_other_is_run_as_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfcustom"), "propagate", True)
    inner, cache = Halves(mixes=True), ClipCache(ShardStore(tmp_path, "videos", 1e12))
    videos = [clip(4, 0), clip(4, 1)]
    for _ in range(2):
        assert_equal(ask(cache, inner, videos), inner(videos, video_metadata=list(map(told, videos))))
    assert cache.misses == 0
    assert caplog.text.count("What Halves makes of a video depends on those beside it") == 1


@needs_torchvision
@pytest.mark.parametrize("name", NAMES)
def test_processed_videos_change_no_bit(name: str, families: dict[str, Family], tmp_path: Path) -> None:
    processor = with_videos(families[name])
    shown = [row(FRAMES), row(answer="A dog."), row(FRAMES[1:] + FRAMES[:1], answer="A hen.")]
    rows = [read_row(each, f"row {at}") for at, each in enumerate(shown[: 1 if name in ALONE else 3])]
    plain = Collator(processor)(rows)
    videos = sum(len(example.videos) for example in rows)
    for time in range(3):
        images, clips = (ShardStore(tmp_path, kind, 1e12) for kind in ("images", "videos"))
        cache = ClipCache(clips)
        found = Collator(processor, caches=Caches(ImageCache(images), clips=cache))(rows)
        assert found.keys() == plain.keys()
        found = on_device(found, torch.device("cpu"))
        assert not [name for name in plain if not torch.equal(found[name], plain[name])]
        assert (cache.misses, cache.hits) == ((videos, 0) if time == 0 else (0, videos))
        clips.flush()
        images.flush()


@needs_torchvision
@pytest.mark.parametrize("name", NAMES)
def test_cached_features_of_videos_change_no_bit(name: str, families: dict[str, Family], tmp_path: Path) -> None:
    family = families[name]
    model, processor = frozen(family), with_videos(family)
    if why := why_tower_only(model) or why_no_videos(model, processor):
        caches = caches_for(model, tmp_path, no_videos=why)
        with pytest.raises(
            ValueError, match="row has a video, and cache_features keeps images only: .*set video_as_images=True"
        ):
            Collator(processor, caches=caches)([read_row(row(FRAMES), "row")])
        return
    both = row(FRAMES[3:7] + FRAMES[:4], FRAMES)
    both["messages"][0]["content"].insert(0, {"type": "image"})
    both["images"] = [picture(5)]
    shown = [row(FRAMES)] if name in ALONE else [row(FRAMES), beside(), row(answer="A dog."), both]
    rows = [read_row(each, f"row {at}") for at, each in enumerate(shown)]
    plain, runs = step(model, Collator(processor)(rows)), count_runs(model)
    for time in range(2):
        caches = caches_for(model, tmp_path, video_placeholder=video_token_id(model))
        assert caches.features is not None
        with FeatureCache(model, caches.features).installed():
            collate = Collator(processor, caches=caches)
            for _ in range(2):
                assert_same(step(model, collate(rows)), plain)
        assert len(runs) == (1 if name in ALONE else 2), f"pass {time}: each kind once, then never again"
    other = [read_row(row(FRAMES[::-1]), "row")]
    with FeatureCache(model, caches.features).installed():
        collate = Collator(processor, caches=caches)
        assert not torch.equal(step(model, collate(other))[0], step(model, Collator(processor)(rows[:1]))[0])
        ran = len(runs)
        processor.video_processor = copy.copy(processor.video_processor)
        processor.video_processor.rescale_factor = 1 / 100
        assert_same(step(model, collate(other)), step(model, Collator(processor)(other)))
        assert len(runs) == ran + 2, "another setting, other features"


@needs_torchvision
@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "qwen2_vl"])
def test_a_run_with_cached_videos_is_the_run_without(name: str, families: dict[str, Family], tmp_path: Path) -> None:
    family = families[name]
    processor, start = with_videos(family), family.model()
    rows = [row(FRAMES), row(FRAMES[::-1], answer="A hen."), row(answer="A dog.")]

    def run(out: str, **options: Any) -> list[float]:
        sizes = {"batch_size": 4} if "packing" in options else {"batch_size": 2, "micro_batch_size": 2}
        config = short_config(tmp_path / out, max_steps=4, **sizes, **options)
        return curve(fit(copy.deepcopy(start), processor, [*rows, beside()], config))

    plain = run("plain")
    assert run("first", cache_images=str(tmp_path / "cache")) == plain
    assert run("second", cache_images=str(tmp_path / "cache")) == plain
    hfcustom.freeze(start, ["vision", "connector"])
    if name == "internvl":
        with pytest.raises(ValueError, match="cache_features keeps images only: CustomInternVL"):
            run("features", cache_features=str(tmp_path / "cache"))
        return
    plain = run("frozen")
    for time in range(2):
        options = {"packing": True, "pack_tokens": 4096} if time else {}
        expected = run("packed", **options) if time else plain
        folders = {"cache_images": str(tmp_path / "cache"), "cache_features": str(tmp_path / f"features{time}")}
        assert run(f"cached {time}", **folders, **options) == expected
        assert run(f"again {time}", **folders, **options) == expected
