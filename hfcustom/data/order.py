"""Which rows each optimiser step sees, as a function of (seed, step) alone.

The rows form an endless stream of epochs, each a permutation drawn from (seed, epoch). Step s takes rows
[s * G, (s + 1) * G) of it, G = rows of a step, and cuts them by micro-batch and rank; so the same step has the same rows
for any number of processes, micro-batches and data-loading workers, and a resumed run needs no state but its step.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader

from hfcustom.signals import ignore_stop_signals


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, epoch: int, seed: int) -> array[int]:
    """Return the permutation of an epoch."""
    return permutation(num_rows, epoch, seed)


def permutation(num_rows: int, epoch: int, seed: int) -> array[int]:
    """Draw the permutation of an epoch, 8 bytes a row."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch)
    return array("q", torch.randperm(num_rows, generator=generator).numpy().tobytes())


def step_rows(num_rows: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Return the row indices of one optimiser step, in order; a step may cross epochs."""
    first = step * batch_size
    return [epoch_order(num_rows, at // num_rows, seed)[at % num_rows] for at in range(first, first + batch_size)]


def step_loader(
    rows: Sequence[Any],
    collate: Callable[[Sequence[Any]], Any],
    *,
    steps: range,
    micro_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    num_workers: int,
    draw: Callable[[int, int, int], list[int]] | None = None,
) -> DataLoader[Any]:
    """Return a loader with an item for each step: what `collate` makes of this rank's rows, one micro-batch after another.

    `draw(step, batch_size, seed)` gives the rows of a step in place of `step_rows`.
    """

    def indices() -> Iterator[list[int]]:
        for step in steps:
            batch_size = micro_batch_size * accumulation * world_size
            order = step_rows(len(rows), step, batch_size, seed) if draw is None else draw(step, batch_size, seed)
            firsts = ((micro * world_size + rank) * micro_batch_size for micro in range(accumulation))
            yield [at for first in firsts for at in order[first : first + micro_batch_size]]

    return DataLoader(
        rows,  # type: ignore[arg-type]  # anything with __len__ and __getitem__
        batch_sampler=_Once(indices()),
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),  # the loader draws its workers' seed here, not from training's
        worker_init_fn=ignore_stop_signals,
    )


class _Once:
    """An iterator as a batch sampler."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches
