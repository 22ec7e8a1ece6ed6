"""Which rows each optimiser step sees, as a function of (seed, step) alone.

The rows form an endless stream of epochs, each a permutation drawn from (seed, epoch). Step s takes rows
[s * G, (s + 1) * G) of it, G = rows of a step, and cuts them by micro-batch and rank; so the same step has the same rows
for any number of processes, micro-batches and data-loading workers, and a resumed run needs no state but its step.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from hfcustom.data.watch import Watch, Watched
from hfcustom.randomness import row_random
from hfcustom.training.signals import ignore_stop_signals


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
    watch: Watch | None = None,
) -> StepLoader:
    """Return a loader with an item for each step: what `collate` makes of this rank's rows, one micro-batch after another.

    `draw(step, batch_size, seed)` gives the rows of a step in place of `step_rows`.
    """
    batch_size = micro_batch_size * accumulation * world_size
    firsts = [(micro * world_size + rank) * micro_batch_size for micro in range(accumulation)]
    places = [at for first in firsts for at in range(first, first + micro_batch_size)]

    def pick(step: int) -> Pick:
        order = step_rows(len(rows), step, batch_size, seed) if draw is None else draw(step, batch_size, seed)
        return Pick(step, [(step * batch_size + place, order[place]) for place in places])

    reader = StepReader(rows, collate, (seed, rank), watch or Watch(num_workers, math.inf))
    return StepLoader(reader, pick, steps, num_workers)


@dataclass(frozen=True)
class Pick:
    """This rank's rows of a step: each with its place in the run's order, which says epoch and row in one, and its index."""

    step: int
    rows: list[tuple[int, int]]


class StepReader:
    """Picks -> what is collated of them; what is random in a row or in collating follows from its place (row_random)."""

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[Any], Any], seeds: tuple[int, int], watch: Watch
    ) -> None:
        self.rows = rows
        self.collate = collate
        self.seed, self.rank = seeds
        self.watch = watch

    def __getitems__(self, pick: Pick) -> Any:
        """Read and collate a step, as torch asks a data set that takes a batch at once."""
        rows = self.read(pick)
        with row_random(self.seed, "collate", pick.step, self.rank):
            return self.collate(rows)

    def read(self, pick: Pick, places: Collection[int] | None = None) -> list[Any]:
        """Read the rows of a step; those that are none of `places` stay None."""
        wanted = range(len(pick.rows)) if places is None else places
        return [self._row(*row) if at in wanted else None for at, row in enumerate(pick.rows)]

    def _row(self, place: int, at: int) -> Any:
        with self.watch.reading(lambda: self._name(at)), row_random(self.seed, "row", place):
            return self.rows[at]

    def _name(self, at: int) -> str:
        return self.rows.name_of(at) if isinstance(self.rows, Named) else f"row {at}"


@runtime_checkable
class Named(Protocol):
    """Rows that messages call by a name."""

    def name_of(self, index: int) -> str:
        """Return what messages call a row."""


class StepLoader:
    """Iterable over the steps of one rank, in order."""

    def __init__(self, reader: StepReader, pick: Callable[[int], Pick], steps: range, num_workers: int) -> None:
        self.watch = reader.watch
        self.reader, self.pick = reader, pick
        self.loader: DataLoader[Any] = DataLoader(
            reader,  # type: ignore[arg-type]  # torch asks for __getitems__ alone
            batch_sampler=_Once(map(pick, steps)),  # type: ignore[arg-type]  # anything that is iterated over
            collate_fn=as_it_is,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(reader.seed),  # draws its workers' seed here, not from training's
            worker_init_fn=ignore_stop_signals,
        )

    def __iter__(self) -> Watched:
        return Watched(self.loader, self.watch)

    def read_again(self, step: int, places: Collection[int]) -> list[Any]:
        """Read rows of a step once more, in this process: as many as it has, those that are none of `places` None."""
        return self.reader.read(self.pick(step), places)


def as_it_is(item: Any) -> Any:
    """Collate what is collated already."""
    return item


class _Once:
    """An iterator as a batch sampler."""

    def __init__(self, picks: Iterator[Pick]) -> None:
        self.picks = picks

    def __iter__(self) -> Iterator[Pick]:
        return self.picks
