"""A loader over a stream with an item for each step of this rank, taken up where an earlier one stopped.

Step s comes from loading process s mod their number, which reads its own share of the stream in order, and carries with it
where that process stands after it. So a checkpoint knows the position of the steps that were trained on, whatever has been
loaded ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hfcustom.data.findings import Finding
from hfcustom.data.messages import RowError
from hfcustom.data.order import as_it_is
from hfcustom.data.steps import StepBatches
from hfcustom.data.streams import Share, State, Stream, StreamMixture
from hfcustom.data.watch import Watch, Watched
from hfcustom.randomness import row_random
from hfcustom.signals import ignore_stop_signals

UNWATCHED = Watch(64, math.inf)


class StepStream(IterableDataset[Any]):
    """The steps of one rank; in a loading process those of that process, and None for each turn that is not its own yet."""

    def __init__(
        self,
        stream: Stream | StreamMixture,
        collate: Callable[[Sequence[Any]], StepBatches],
        *,
        steps: range,
        rows_per_step: int,
        rank: int,
        world_size: int,
        seed: int,
        positions: Mapping[int, State],
        skip_bad_rows: bool,
        watch: Watch = UNWATCHED,
    ) -> None:
        self.stream = stream
        self.collate = collate
        self.steps = steps
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.positions = dict(positions)
        self.skip_bad_rows = skip_bad_rows
        self.watch = watch

    def __iter__(self) -> Iterator[StepBatches | None]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        cursor = self.stream.cursor(Share(self.rank, self.world_size, worker, num_workers), self.seed, self.watch.tick)
        if worker in self.positions:
            cursor.load(self.positions[worker])
        if worker < self.steps.start % num_workers:
            yield None
        for step in self.steps:
            if step % num_workers == worker:
                rows = [self._row(cursor) for _ in range(self.rows_per_step)]
                with row_random(self.seed, "collate", step, self.rank):
                    found = self.collate(rows)
                found.position, found.epoch = (worker, cursor.state()), cursor.epoch
                yield found

    def _row(self, cursor: Any) -> Any:
        try:
            cursor.advance()
            with self.watch.reading(cursor.last_name):
                return cursor.read()
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            return Finding.of(error, cursor.last_name())


class StreamLoader:
    """Iterable over the steps of one rank, in order."""

    def __init__(self, steps: StepStream, num_workers: int) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(steps.seed),  # not from training's, as in step_loader
            worker_init_fn=ignore_stop_signals,
        )
        self.watch = steps.watch

    def __iter__(self) -> Watched:
        return Watched(self.loader, self.watch)
