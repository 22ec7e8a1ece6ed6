"""Time what the caches save: a training step with and without cached features, and an image's processor time by epoch.

    python benchmarks/cache.py
    python benchmarks/cache.py --task tiny --images 2 --side 60

Steps (LoRA, batches and weights as training_step.py's, of a task with fewer layers) are interleaved, one of each in a round; the first, which fills the
cache, is not counted. Images are JPEG files of 8:13 in rows of one, cut into 13 tiles by InternVL3's processor. Time is
processor seconds, the least of all rounds, and for images the mean of an epoch, from the file to pixels, text left out. Prints tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from hfcustom.naming import unknown
from hfcustom.options import parse
from tasks import TASKS


@dataclass(kw_only=True)
class CacheBenchConfig:
    """Sizes; each annotation is the flag's help."""

    task: Annotated[str, "the step's task, as in training_step.py: T, B or tiny"] = "B"
    layers: Annotated[int, "layers that the task's tower and language model are cut to, with a head of 16,384 ids"] = 3
    dtype: Annotated[Literal["float32", "bfloat16"], "weights of the step"] = "float32"
    rounds: Annotated[int, "measured steps of each variant, and epochs with a full cache"] = 3
    images: Annotated[int, "image files"] = 8
    side: Annotated[int, "the shorter side of each image in pixels"] = 800
    threads: Annotated[int, "processor threads"] = 1

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        names = ("layers", "rounds", "images", "side", "threads")
        wrong = [f"{name}={getattr(self, name)} must be positive" for name in names if getattr(self, name) < 1]
        return wrong + ([] if self.task in TASKS else [unknown("task", self.task, TASKS)])


if __name__ == "__main__":
    CONFIG = parse(CacheBenchConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfcustom.cache.features import FeatureCache, Picture
from hfcustom.cache.pictures import ImageCache
from hfcustom.cache.run import Caches
from hfcustom.cache.store import ShardStore
from hfcustom.console import show_table
from hfcustom.data.collate import Collator
from hfcustom.data.sources import Examples
from hfcustom.families.internvl import published_processor
from hfcustom.parts import unwrap
from tasks import Job, Task
from variants import batch_of, ours
from worker import Meter, create_state

# ---- a training step ------------------------------------------------------------------------------------------------


def time_steps(config: CacheBenchConfig, folder: Path) -> None:
    """Print time and memory of a step that runs the tower and of one that reads its features."""
    full = TASKS[config.task]
    text, vision = (replace(shape, layers=config.layers) for shape in (full.text, full.vision))
    task = replace(full, vocabulary=min(full.vocabulary, 16_384), text=text, vision=vision)
    job = Job("ours", "cross_entropy", True, task, config.dtype, "cpu")
    bench = ours(job)
    create_state(bench.optimizer)
    core = unwrap(bench.model)
    cache = FeatureCache(core, ShardStore(folder, "features", 1e12))
    steps = {"computed": bench.step, "cached": cached_step(bench.step, cache, batch_of(job), task)}
    for step in steps.values():
        step()
    used: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(config.rounds):
        for name, step in steps.items():
            meter = Meter()
            step()
            used[name].append(meter.read())
    seconds, gigabytes = (
        {name: min(run[what] for run in runs) for name, runs in used.items()} for what in ("cpu_s", "memory_gb")
    )
    rows = [
        (
            name,
            f"{seconds[name]:.3f}",
            f"{seconds['computed'] / seconds[name]:.2f}x",
            f"{gigabytes[name]:.3f}",
            f"{gigabytes['computed'] / max(gigabytes[name], 1e-9):.2f}x",
        )
        for name in steps
    ]
    show_table(("image features", "cpu s a step", "faster", "GB", "smaller"), rows)


def cached_step(
    step: Callable[[], Any], cache: FeatureCache, batch: dict[str, torch.Tensor], task: Task
) -> Callable[[], Any]:
    """Return the same step with its images known to the cache; the pixels themselves are random."""
    pictures = len(batch["pixel_values"])

    def run() -> Any:
        known = [Picture(str(at), task.image_tokens) for at in range(pictures)]
        with cache.installed(), cache.serving(known):
            cache.core.feature_cache = None  # the batch of the step names no pictures of its own
            return step()

    return run


# ---- an image -------------------------------------------------------------------------------------------------------


def time_images(config: CacheBenchConfig, folder: Path) -> None:
    """Print the processor time from file to batch, in an epoch that fills a cache and in those that read it."""
    rows = make_rows(config, folder)
    plain = Caches()
    ways: dict[str, Callable[[], Caches]] = {
        "no cache": lambda: plain,
        "cache_images": lambda: Caches(ImageCache(ShardStore(folder, "images", 1e12))),
        "cache_features": lambda: Caches(
            ImageCache(ShardStore(folder, "layouts", 1e12), keeps_pixels=False),
            KnownFeatures(folder, "features", 1e12),
            placeholder=published_processor().image_token_id,
            pixels_wanted=False,
        ),
    }
    shown = []
    for name, make in ways.items():
        caches = make()
        epochs = [epoch(rows, caches) for _ in range(config.rounds + 1)]
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / config.images / 1e6
        shown.append((name, f"{1e3 * epochs[0]:.1f}", f"{1e3 * min(epochs[1:]):.2f}", f"{size:.2f}"))
        for path in folder.rglob("*.safetensors"):
            path.unlink()
    show_table(("one image", "first epoch, ms", "next epochs, ms", "MB in the cache"), shown)


class KnownFeatures(ShardStore):
    """Features of no size, known from the second epoch on: only the collator's time counts here."""

    def get(self, key: str) -> Any:
        """Return an entry, and make one for the next time."""
        found = super().get(key)
        if found is None:
            self.put(key, {"features": torch.zeros(1)})
        return found


def make_rows(config: CacheBenchConfig, folder: Path) -> Examples:
    """Return rows of one JPEG file each, smooth noise so that they have a photograph's size."""
    rng, rows = np.random.default_rng(0), []
    for at in range(config.images):
        coarse = Image.fromarray(rng.integers(0, 256, (config.side // 8, config.side // 5, 3), dtype=np.uint8))
        image = coarse.resize((config.side * 13 // 8, config.side), Image.Resampling.BICUBIC)
        image.save(folder / f"{at}.jpg", quality=90)
        messages = [
            {"role": "user", "content": [{"type": "image"}, "What is it?"]},
            {"role": "assistant", "content": "noise"},
        ]
        rows.append({"messages": messages, "images": [f"{at}.jpg"]})
    return Examples(rows, root=folder)


def epoch(rows: Examples, caches: Caches) -> float:
    """Return the processor seconds an image of loading all rows and of all that the processor does with images."""
    processor, lazy = published_processor(), caches.lazy_rows(rows)
    collate, stock, seconds = Collator(processor, caches=caches), processor._process_images, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        began = time.process_time()
        found = stock(*args, **kwargs)
        seconds += time.process_time() - began
        return found

    vars(processor)["_process_images"] = timed
    for at in range(len(rows)):
        began = time.process_time()
        row = lazy[at]
        seconds += time.process_time() - began
        collate([row])
    if caches.images is not None:
        caches.images.store.flush()
    return seconds / len(rows)


def main(config: CacheBenchConfig) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        time_images(config, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        time_steps(config, Path(folder))


if __name__ == "__main__":
    main(CONFIG)
