"""A loader over a stream with an item for each step of this rank, taken up where an earlier one stopped.

Step s comes from loading process s mod their number, which reads its own share of the stream in order, and carries with it
where that process stands after it. So a checkpoint knows the position of the steps that were trained on, whatever has been
loaded ahead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
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
from hfcustom.training.signals import ignore_stop_signals

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
        self.positions: Mapping[int, State] = dict(positions)
        self.wanted: Collection[int] = range(rows_per_step)
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
                rows = [self._row(cursor, at in self.wanted) for at in range(self.rows_per_step)]
                with row_random(self.seed, "collate", step, self.rank):
                    found = self.collate(rows)
                found.position, found.epoch = (worker, cursor.state()), cursor.epoch
                yield found

    def again(self, step: int, places: Collection[int], positions: Mapping[int, State]) -> StepStream:
        """Return one of these steps as it is read, not collated: as many rows as it has, None for those of no such place."""
        found = copy.copy(self)
        found.collate = lambda rows: StepBatches(list(rows))
        found.steps, found.positions, found.wanted = range(step, step + 1), positions, places
        return found

    def _row(self, cursor: Any, wanted: bool) -> Any:
        try:
            cursor.advance()
            if not wanted:
                return None
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
        self.steps, self.num_workers = steps, num_workers

    def __iter__(self) -> Watched:
        return Watched(self.loader, self.watch)

    def read_again(self, step: int, places: Collection[int], position: State | None) -> list[Any]:
        """Read rows of a step once more, from where its loading process stood before it, in processes of the same shares.

        As many as it has; those that are none of `places` are None.
        """
        positions = {} if position is None else {step % max(self.num_workers, 1): position}
        again = self.steps.again(step, places, positions)
        if not self.num_workers:  # `datasets` keeps where it stands in what two readers of one process would share
            again.stream = copy.deepcopy(again.stream)
        loader = StreamLoader(again, self.num_workers)
        with closing(iter(loader)) as steps:
            rows: list[Any] = next(steps).batches
        return rows
