"""A run small enough to be killed hundreds of times: rows with a random transform, loading processes, dropout, LoRA.

What it ends with is compared bit for bit, so `end_of` takes in everything that a checkpoint holds but the speed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Family
from PIL import Image
from training import add_dropout, short_config, uneven_rows

import hfcustom
from hfcustom.families import load_family
from hfcustom.train import TrainResult, fit

STEPS = 6
FAMILY = Family("internvl", load_family("internvl"))


def draw_torch() -> float:
    return float(torch.rand(()))


def draw_from_the_rows_seed() -> float:
    return float(np.random.default_rng(hfcustom.row_seed()).random())


SOURCES: dict[str, Callable[[], float]] = {
    "torch": draw_torch,
    "numpy": np.random.rand,
    "python": random.random,
    "row_seed": draw_from_the_rows_seed,
}


@dataclass(frozen=True)
class Run:
    """What differs between the runs; `source` is where the transform of rows draws from, None for no transform."""

    workers: int = 2
    source: str | None = "torch"
    stream: bool = False
    lora: bool = True
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        parts = [f"{self.workers} workers", self.source or "fixed", "stream" if self.stream else "map"]
        return ", ".join([*parts, "LoRA" if self.lora else "full", self.optimizer])


def transform(row: dict[str, Any], source: str | None) -> dict[str, Any]:
    """Return a row as a user's own code would change it: pictures mirrored and dimmed by chance."""
    if source is None:
        return row
    images = []
    for image in row["images"]:
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels[:, ::-1] if SOURCES[source]() < 0.5 else pixels
        images.append(Image.fromarray((pixels * (0.5 + 0.5 * SOURCES[source]())).astype(np.uint8)))
    return {**row, "images": images}


class Transformed(Sequence[Any]):
    """Rows that are transformed each time they are read."""

    def __init__(self, rows: Sequence[Any], source: str | None) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return transform(self.rows[index], self.source)


def streamed(source: str | None) -> Any:
    """Return the same rows as a stream of four shards, transformed by map()."""
    import datasets

    data = datasets.IterableDataset.from_generator(shard_rows, gen_kwargs={"shards": [0, 1, 2, 3]})
    return data.map(transform, fn_kwargs={"source": source})


def shard_rows(shards: list[int]) -> Any:
    for shard in shards:
        yield from uneven_rows()[2 * shard : 2 * shard + 2]


def build(run: Run) -> Any:
    """Return the model with dropout, the same for the same seed."""
    model = FAMILY.model()
    if run.lora:
        return hfcustom.lora(model, rank=2, dropout=0.3)
    add_dropout(model, 0.3)
    return model


def train(run: Run, folder: Path, **options: Any) -> TrainResult:
    """Train in this process."""
    defaults: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "save_steps": 1}
    defaults |= {"num_workers": run.workers, "optimizer": run.optimizer}
    rows = streamed(run.source) if run.stream else Transformed(uneven_rows(), run.source)
    return fit(build(run), FAMILY.processor, rows, short_config(folder, **{**defaults, **options}))


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def end_of(folder: Path) -> dict[str, Any]:
    """Return what a run ended with: hashes of weights, optimizer and generators, and each step's loss to the last bit."""
    last = newest(folder)
    names = ["optimizer.safetensors", *sorted(f"model/{path.name}" for path in (last / "model").glob("*.safetensors"))]
    names += sorted(path.name for pattern in ("rng-*", "ema.*", "spikes.*") for path in last.glob(pattern))
    found: dict[str, Any] = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names}
    history = json.loads((last / "state.json").read_text())["history"]
    found["losses"] = [
        (line["step"], line["loss"].hex(), line["grad_norm"].hex()) for line in history if "loss" in line
    ]
    found["step"] = last.name
    published = folder / "model"
    found["published"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(published.glob("*.safetensors"))
    }
    return found
