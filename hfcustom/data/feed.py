"""Feed: the rows that a run trains on, with a length or as a stream, and where the run stands in them.

Rows with a length need no position: which of them a step sees follows from the step (hfcustom/data/order.py). Of a stream
each rank keeps where its loading processes stand, and a checkpoint has it in stream-<rank>.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hfcustom.cache.run import Caches
from hfcustom.console import show_cut
from hfcustom.data.checks import kind_of
from hfcustom.data.collate import Batch
from hfcustom.data.columns import column_report
from hfcustom.data.messages import Example
from hfcustom.data.mixtures import Mixture
from hfcustom.data.order import StepLoader, step_loader
from hfcustom.data.packing import Packer
from hfcustom.data.sighted import Sighted
from hfcustom.data.sources import Examples, RowsWithColumns, as_examples
from hfcustom.data.steps import Attempts, BadRows, Lockstep, StepBatches, StepCollator, agree_on_batches
from hfcustom.data.stream_loader import StepStream, StreamLoader
from hfcustom.data.streams import State, Stream, StreamMixture, check_shards, first_row
from hfcustom.data.watch import Watch
from hfcustom.distributed.sharding import uses_fsdp
from hfcustom.losses import WeightedLoss, loss_columns, token_columns
from hfcustom.randomness import row_random
from hfcustom.train_config import TrainConfig

Rows = Examples | Stream | StreamMixture


class Feed:
    """Rows of one run, shared by all ranks; ValueError for a stream that the config cannot share or end."""

    def __init__(self, rows: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        self.rows = as_rows(rows)
        self.config = config
        self.accelerator = accelerator
        self.caches: Caches | None = None  # whose images are not decoded
        self.sighted: Sighted | None = None  # where a batch of text has no gradient
        self.positions: dict[int, State] = {}  # of this rank's loading processes, after the last step trained on
        self.epoch = 0
        self.watch = Watch(config.num_workers, config.row_seconds)
        self.lockstep = Lockstep(accelerator)
        self.cut_before: Callable[[list[Batch]], list[Batch]] = (
            list  # what makes smaller ones of a step's micro-batches
        )
        self._loader: StepLoader | StreamLoader | None = None
        self._cut_shown = False
        self.kind: str | None = None  # of the first row
        self._before: State | None = None  # where the loading process of the last step stood before it
        if not isinstance(self.rows, Examples):
            self._check_stream(self.rows)

    def _check_stream(self, stream: Stream | StreamMixture) -> None:
        if self.config.max_steps is None:
            raise ValueError("The rows are a stream, which has no length, so that max_steps must say when to stop.")
        if self.config.exclude is not None:
            raise ValueError(
                f"exclude={self.config.exclude} has no effect on a stream, whose rows have no fixed names; use on_bad_row=skip."
            )
        facts = check_shards(stream, self.accelerator.num_processes, self.config.num_workers)
        for fact in [*facts, *batched_maps(stream)]:
            self.accelerator.print(fact)

    @property
    def num_rows(self) -> int | None:
        """How many rows there are; None of a stream."""
        return len(self.rows) if isinstance(self.rows, Examples) else None

    @property
    def max_steps(self) -> int:
        """The steps of the run."""
        return self.config.max_steps or math.ceil(self.config.epochs * len(self.rows) / self.config.batch_size)  # type: ignore[arg-type]

    @property
    def mixture(self) -> Mixture | None:
        """The mixture that the rows are, perhaps with columns added to them."""
        rows = self.rows.rows if isinstance(self.rows, RowsWithColumns) else self.rows
        return rows if isinstance(rows, Mixture) else None

    @property
    def weights(self) -> dict[str, float]:
        """The sources of a mixture with their weights, nothing where there is one."""
        rows = self.mixture or self.rows
        return dict(rows.weights) if isinstance(rows, Mixture | StreamMixture) else {}

    @property
    def source_names(self) -> list[str]:
        """The sources of a mixture, whose shares of the tokens are logged."""
        if isinstance(self.rows, Examples):
            return list(self.mixture.sources) if self.mixture else []
        return list(self.rows.parts()) if isinstance(self.rows, StreamMixture) else []

    @cached_property
    def fingerprint(self) -> str:
        """What tells the data from others."""
        with row_random(self.config.seed, "fingerprint"):
            return self.rows.fingerprint()

    def order(self) -> dict[str, Any]:
        """Return what, with the step, decides which rows come next."""
        order = {"batch_size": self.config.batch_size, "seed": self.config.seed, "data": self.fingerprint}
        if isinstance(self.rows, Examples):
            return order | {"rows": len(self.rows)}
        return order | {"processes": self.accelerator.num_processes, "num_workers": self.config.num_workers}

    def save(self, folder: Path) -> None:
        """Write where this rank stands in a stream."""
        if not isinstance(self.rows, Examples):
            path = folder / f"stream-{self.accelerator.process_index}.json"
            path.write_text(json.dumps({"epoch": self.epoch, "positions": self.positions}) + "\n")

    def load(self, folder: Path) -> None:
        """Go to where this rank stood in a stream."""
        if not isinstance(self.rows, Examples):
            state = json.loads((folder / f"stream-{self.accelerator.process_index}.json").read_text())
            self.epoch = state["epoch"]
            self.positions = {int(worker): position for worker, position in state["positions"].items()}

    def loader(
        self,
        collate_rows: Callable[[Sequence[Any]], Batch],
        steps: range,
        cut: tuple[int, int],
        packer: Packer | None = None,
    ) -> StepLoader | StreamLoader:
        """Return a loader of this rank's steps; `cut` is (rows of a micro-batch, micro-batches of a rank's step).

        A `packer` cuts the rank's rows by tokens instead.
        """
        config, ranks = self.config, (self.accelerator.process_index, self.accelerator.num_processes)
        skip = config.on_bad_row == "skip"
        self._collate = StepCollator(collate_rows, cut[0], skip_bad_rows=skip, packer=packer, kind=self.kind)
        self._step = steps.start - 1
        if not isinstance(self.rows, Examples):
            stream = StepStream(
                self.rows,
                self._collate,
                steps=steps,
                rows_per_step=cut[0] * cut[1],
                rank=ranks[0],
                world_size=ranks[1],
                seed=config.seed,
                positions=self.positions,
                skip_bad_rows=skip,
                watch=self.watch,
            )
            self._loader = StreamLoader(stream, config.num_workers)
            return self._loader
        rows = self.rows if self.caches is None else self.caches.lazy_rows(self.rows)
        self._loader = step_loader(
            usable_rows(rows, config),
            self._collate,
            steps=steps,
            micro_batch_size=cut[0],
            accumulation=cut[1],
            rank=ranks[0],
            world_size=ranks[1],
            seed=config.seed,
            num_workers=config.num_workers,
            draw=self.mixture.step_rows if self.mixture else None,
            watch=self.watch,
        )
        return self._loader

    def collate_again(self, groups: Sequence[Sequence[int]]) -> list[Batch]:
        """Return rows of the step that `next_batches` gave last, by their places, in micro-batches of these groups.

        They are read once more, with the random numbers that they had.
        """
        assert self._loader is not None, "there is a step"
        places = {place for group in groups for place in group}
        if isinstance(self._loader, StreamLoader):
            rows = self._loader.read_again(self._step, places, self._before)
        else:
            rows = self._loader.read_again(self._step, places)
        batches = []
        with row_random(self.config.seed, "collate", self._step, self.accelerator.process_index):
            for group in groups:
                batches.append(self._collate.together([rows[place] for place in group]))
                batches[-1].places = group
        return batches

    def first_columns(self, losses: Sequence[WeightedLoss]) -> Mapping[str, Any]:
        """Return the columns of the first row that can be read, and say for each source what becomes of its columns."""
        first = {name: self._first(rows) for name, rows in self._sources().items()}
        self.kind = kind_of(next(iter(first.values())))
        for name, example in first.items():
            asked = [*loss_columns(losses, example.columns), *token_columns(losses, example.columns)]
            self.accelerator.print(f"{name + ': ' if len(first) > 1 else ''}{column_report(example, asked)}")
        return next(iter(first.values())).columns

    def _first(self, rows: Rows) -> Example:
        config = self.config if rows is self.rows else replace(self.config, exclude=None)  # the list is of all sources
        return first_example(rows, config)

    def _sources(self) -> dict[str, Rows]:
        if isinstance(self.rows, StreamMixture):
            return dict(self.rows.parts())
        return dict(self.rows.sources) if isinstance(self.rows, Mixture) else {"": self.rows}

    def bad_rows(self, start: int) -> BadRows:
        """Return the record of rows that are left out, in output_dir/bad_rows.jsonl; a run resumed at `start` goes on with it."""
        listed = Path(self.config.output_dir) / "bad_rows.jsonl"
        limits = {"rows_per_step": self.config.batch_size, "resumed_at": start}
        return BadRows(self.accelerator, self.num_rows, self.config.max_bad_share, listed, **limits)

    def next_batches(self, steps: Iterator[StepBatches], bad_rows: BadRows) -> list[Batch]:
        """Return this rank's micro-batches of the next step, as many as every other rank has; none if no row can be used."""
        found = next(steps)
        if found.cut is not None:
            show_cut(found.cut, not self._cut_shown and self.accelerator.is_main_process)
            self._cut_shown = True
        self._step += 1
        if found.position is not None:
            self._before = self.positions.get(found.position[0])
            self.positions[found.position[0]] = found.position[1]
        if found.epoch > self.epoch:
            self.epoch = found.epoch
            self.accelerator.print(f"The stream has ended and begins again: epoch {self.epoch + 1}.")
        bad_rows.tell(found.notes)
        if self.config.on_bad_row == "skip":
            bad_rows.take(found.skipped)
        return self.agreed(self.cut_before(found.batches))

    def agreed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return micro-batches that every rank can run beside those of the others; all of them have to ask."""
        batches = agree_on_batches(batches, self.accelerator)
        if uses_fsdp(self.accelerator):
            return self.lockstep.align(batches)
        return batches if self.sighted is None else self.sighted.align(batches)


class Steps:
    """The steps of a loader from one on, and from an earlier one again; to be closed."""

    def __init__(self, loader: Callable[[int], Iterable[StepBatches]], start: int, watch: Watch) -> None:
        self.loader = loader
        self.watch = watch
        self.items: Any = iter(loader(start))

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> StepBatches:
        return next(self.items)

    def restart(self, step: int) -> None:
        """Read again from a step on."""
        self.items.close()
        self.watch.forget()
        self.items = iter(self.loader(step))

    def close(self) -> None:
        """End the loading processes."""
        self.items.close()


def as_rows(rows: Any) -> Rows:
    """Return rows of any sequence, or of an IterableDataset of `datasets`, as what a run can train on.

    Raises TypeError for what is neither, ValueError for no rows and for a stream that could not be resumed.
    """
    if isinstance(rows, Stream | StreamMixture):
        return rows
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, str):
        return _iterable_dataset(rows)
    if not len(rows):
        raise ValueError("There are no rows to train on.")
    return as_examples(rows)


def _iterable_dataset(rows: Any) -> Stream:
    """Return a data set without length as a stream; TypeError for anything else."""
    import datasets

    if not isinstance(rows, datasets.IterableDataset):
        raise TypeError(
            f"rows is a {type(rows).__name__}; pass hfcustom.load_rows('rows.jsonl'), a list, a data set, or for what has no "
            "length a datasets.IterableDataset (its from_generator makes one of a function), which can be resumed."
        )
    if has_buffer(rows._ex_iterable):
        raise ValueError(
            "rows were shuffled by IterableDataset.shuffle, whose buffer is lost when a run is resumed. Leave it out, and pass "
            "hfcustom.data.streams.Stream(rows, shuffle_buffer=1000), which goes on exactly."
        )
    return Stream(rows.decode(False) if rows.features is not None else rows)


def has_buffer(iterable: Any) -> bool:
    """Whether rows pass through a shuffle buffer of `datasets` (5.2.0), which its own state does not say."""
    parts = vars(iterable)
    inner = [*parts.get("ex_iterables", []), *([parts["ex_iterable"]] if "ex_iterable" in parts else [])]
    return type(iterable).__name__ == "BufferShuffledExamplesIterable" or any(map(has_buffer, inner))


def batched_maps(stream: Stream | StreamMixture) -> list[str]:
    """Return what cannot be exact about resuming streams that a function changes batch by batch (`datasets` 5.2.0)."""

    def batched(iterable: Any) -> bool:
        parts = vars(iterable)
        inner = [*parts.get("ex_iterables", []), *([parts["ex_iterable"]] if "ex_iterable" in parts else [])]
        return bool(parts.get("batched") and parts.get("function")) or any(map(batched, inner))

    return [
        f"{name}: rows pass a map(batched=True). What is random in its function is drawn anew where a run is resumed within a "
        "batch; leave batched=True out for rows that are the same."
        for name, part in stream.parts().items()
        if batched(part.data._ex_iterable)
    ]


def usable_rows(rows: Examples, config: TrainConfig) -> Attempts:
    """Return rows as a run reads them: bad ones skipped where it is told to, excluded ones not read."""
    return Attempts(rows, skip_bad_rows=config.on_bad_row == "skip", exclude=config.exclude)


def first_example(rows: Any, config: TrainConfig) -> Example:
    """Return the first row that a run can use; RowError if it may skip none and the first cannot be read, or none can."""
    rows = as_rows(rows)
    if not isinstance(rows, Examples):
        return first_row(rows, config.on_bad_row == "skip")
    with row_random(config.seed, "first"):  # a look that moves nothing of what training draws
        return usable_rows(rows, config).first()
