"""Mixtures: several sources with weights, {source: weight}, as one.

Row n of the endless stream of a mixture is a function of (weights, seed, n) alone. The stream is cut into blocks of BLOCK
rows, of which each source has its share to a whole row, spread evenly with jitter; so any step has close to its share of
each. A source gives its own rows epoch by epoch: all of them once before any comes again.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hfcustom.data.order import permutation
from hfcustom.data.sources import Examples
from hfcustom.exits import ConfigError

BLOCK = 10_000  # rows; the shares are exact to one in so many


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a mixture as given; ValueError for none, and for one that is not positive and finite."""
    if not weights:
        raise ConfigError("The mixture is empty; give at least one source: {'rows.jsonl': 1.0}.")
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ConfigError(
                f"The weight of {name} is {weight!r}; it must be a positive number. Leave the source out for 0."
            )
    for name, weight in weights.items():
        if weight * BLOCK < sum(weights.values()):
            raise ConfigError(
                f"The weight of {name} is {weight!r}, less than one row in {BLOCK}; leave the source out."
            )
    return dict(weights)


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """Return what logs call each source: the last part of a path, unless two end alike."""
    names = {source: Path(source).name if Path(source).exists() else source for source in sources}
    taken = list(names.values())
    return {source: name if taken.count(name) == 1 else source for source, name in names.items()}


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many rows of a block each source gives: shares of BLOCK, rounded so that they add up."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(int), 1)
    order = np.argsort(counts - exact, kind="stable")  # the largest remainder first
    for at in order[: BLOCK - int(counts.sum())]:
        counts[at] += 1
    counts[np.argmax(counts)] -= counts.sum() - BLOCK  # sources that were raised to one row
    return tuple(counts.tolist())


@lru_cache(maxsize=4)
def _block(counts: tuple[int, ...], block: int, seed: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return which source gives each row of a block, and the how manieth of that source's rows it is in the block."""
    generator = np.random.default_rng([*seed, block])
    times = [(np.arange(count) + generator.random(count)) / count for count in counts]
    sources = np.repeat(np.arange(len(counts)), counts)
    order = sources[np.argsort(np.concatenate(times), kind="stable")]
    numbers = np.empty(BLOCK, dtype=int)
    for source, count in enumerate(counts):
        numbers[order == source] = np.arange(count)
    return order.tolist(), numbers.tolist()


def drawn(weights: Sequence[float], at: int, seed: tuple[int, ...]) -> tuple[int, int]:
    """Return the source of row `at` of a mixture, and how many rows it has given before."""
    counts = block_counts(weights)
    block, offset = divmod(at, BLOCK)
    order, numbers = _block(counts, block, seed)
    source = order[offset]
    return source, block * counts[source] + numbers[offset]


class Mixture(Examples):
    """The rows of several sources, one after the other, and `step_rows`: which of them each step sees."""

    def __init__(self, sources: Mapping[str, Examples], weights: Mapping[str, float]) -> None:
        self.sources = dict(sources)
        self.weights = check_weights({name: weights[name] for name in sources})
        self.rows: list[tuple[str, Examples]] = list(self.sources.items())
        self.starts = np.cumsum([0, *(len(rows) for _, rows in self.rows)]).tolist()
        self.epochs: dict[int, tuple[tuple[int, int], array[int]]] = {}  # of each source, the one it is in

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[str, Examples, int]:
        index = range(len(self))[index]
        at = int(np.searchsorted(self.starts, index, side="right")) - 1
        name, rows = self.rows[at]
        return name, rows, index - self.starts[at]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        name, rows, offset = self._place(index)
        return replace(rows[offset], source=name)

    def name_of(self, index: int) -> str:
        """Return what messages call a row."""
        _, rows, offset = self._place(index)
        return rows.name_of(offset)

    def fingerprint(self) -> str:
        """Return what tells the sources, their weights and their order from others."""
        return json.dumps([[name, self.weights[name], rows.fingerprint()] for name, rows in self.rows])

    def step_rows(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Return the row indices of one optimiser step, in order."""
        weights = list(self.weights.values())
        return [
            self._row(*drawn(weights, at, (seed,)), seed) for at in range(step * batch_size, (step + 1) * batch_size)
        ]

    def _row(self, source: int, number: int, seed: int) -> int:
        epoch, at = divmod(number, len(self.rows[source][1]))
        key = (epoch, seed)
        if source not in self.epochs or self.epochs[source][0] != key:
            own_seed = seed * len(self.rows) + source
            self.epochs[source] = key, permutation(len(self.rows[source][1]), epoch, own_seed)
        return int(self.starts[source] + self.epochs[source][1][at])
