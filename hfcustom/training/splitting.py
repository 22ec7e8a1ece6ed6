"""Memory that runs out in the middle of a run: the micro-batch is cut in two, and the step is run again as if nothing had been.

micro-batches of a step -> the same step in smaller ones, with the same loss and gradient, since every divisor counts the whole
step. A failed attempt leaves nothing behind: gradients are cleared, buffers and random numbers are put back. Ranks agree
after each attempt, so that all of them run a step again where one has to, each with as many micro-batches. Rows are read once
more, from where the loading process had them (hfcustom/data/feed.py). A row that does not fit alone is left out where the
run may skip rows, and ends it where not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn

from hfcustom.data.collate import Batch
from hfcustom.data.feed import Feed
from hfcustom.data.findings import Finding
from hfcustom.data.packing import Size
from hfcustom.data.steps import BadRows
from hfcustom.distributed.reduction import Reduction, meets_at_the_end
from hfcustom.parts import unwrap
from hfcustom.runs.files import RunFiles
from hfcustom.train_config import TrainConfig
from hfcustom.training.checkpoint import last_good
from hfcustom.training.costliest import batch_size, describe_batch
from hfcustom.training.memory import NoMemoryError, StateBefore, out_of_memory
from hfcustom.training.step_plan import NoRoomForSummaryError, is_blank

if TYPE_CHECKING:
    from hfcustom.console import TrainLog
    from hfcustom.training.work import Work

Result = TypeVar("Result")
SHOWN = 4  # rows in a message


@dataclass
class Progress:
    """How far an attempt at a step has come."""

    reduction: Reduction
    micro: int | None = None  # the micro-batch that runs


@dataclass(frozen=True)
class Failure:
    """A micro-batch that memory was not enough for."""

    batch: str  # in words
    row: str  # its first row, all of it where it is one
    then: Literal["cut", "again", "out"]  # in two; once more as it is, with the caches empty; no more
    counts: bool  # rather than being run so that ranks stay together
    rank: int

    def __str__(self) -> str:
        return self.batch + (f", on rank {self.rank}" if self.rank >= 0 else "")


class Splitter:
    """What fit() gives to train_step(), so that a step fits into memory. All ranks make the same calls."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        feed: Feed,
        bad_rows: BadRows,
        accelerator: Accelerator,
        config: TrainConfig,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.feed = feed
        self.bad_rows = bad_rows
        self.accelerator = accelerator
        self.config = config
        self.again = config.split_on_oom and meets_at_the_end(model, accelerator)
        self.too_large: list[Size] = []  # of micro-batches that did not fit on this rank
        self.left_out: set[str] = set()
        self.alone: set[tuple[str, bool]] = set()  # rows that have failed alone in this step: memory may be in pieces
        self.cuts = 0
        self.files: RunFiles | None = None
        self.record: dict[str, Any] = {}
        self.work: Work | None = None
        feed.cut_before = self.cut_before

    # ---- a step -----------------------------------------------------------------------------------------------------

    def run(self, attempt: Callable[[Sequence[Any], Progress], Result], batches: Sequence[Any]) -> Result | None:
        """Return what an attempt at a step returns that memory is enough for; None where no row is left.

        Raises NoMemoryError for what cannot be made smaller.
        """
        self.alone.clear()
        while batches:
            before = StateBefore(unwrap(self.model)) if self.again else None
            result, failed = self._attempt(attempt, batches)
            if not self.again:
                if failed is not None:
                    raise NoMemoryError(self._message(self._failure(failed)))
                return result
            failures = self._of_all_ranks(None if failed is None else self._failure(failed))
            if not failures:
                return result
            result = None
            self.optimizer.zero_grad()
            assert before is not None
            before.restore()
            self._check(failures)
            batches = self.feed.agreed(self._smaller(batches, failed))
            if self.work is not None:
                self.work.begin(batches)
        return None

    def _attempt(
        self, attempt: Callable[[Sequence[Any], Progress], Result], batches: Sequence[Batch]
    ) -> tuple[Result | None, Batch | None]:
        """Return the attempt's result, and the micro-batch that failed, if one did."""
        progress = Progress(Reduction(self.model))
        if self.again:
            progress.reduction.share_buffers()
        try:
            return attempt(batches, progress), None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            everyone_knows = isinstance(error, NoRoomForSummaryError)
            micro = error.micro if isinstance(error, NoRoomForSummaryError) else progress.micro
        # Here, outside of the except clause, no traceback keeps the tensors of the attempt alive.
        missing = progress.reduction.missing()
        clear_device_cache(garbage_collection=True)
        if self.again and not everyone_knows:
            progress.reduction.end_with_zeros(missing)
        return None, None if micro is None else batches[micro]

    def _of_all_ranks(self, failure: Failure | None) -> list[Failure]:
        """Return what has failed anywhere."""
        if self.accelerator.num_processes > 1:
            failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
            if not float(self.accelerator.reduce(failed, "sum")):
                return []
            return [found for found in gather_object([failure]) if found is not None]
        return [] if failure is None else [failure]

    def _check(self, failures: Sequence[Failure]) -> None:
        """Say what has failed, leave rows out; NoMemoryError where that is not allowed or nothing can be made smaller."""
        skip = self.config.on_bad_row == "skip"
        for failure in failures:
            if failure.then == "out" and not (failure.counts and skip):
                raise NoMemoryError(self._message(failure))
        cut = [failure for failure in failures if failure.then == "cut"]
        self.cuts += len(cut)
        if cut and self.cuts == len(cut):
            self.accelerator.print(
                f"Out of memory: {cut[0]}. Such micro-batches are cut in two and run again; losses and gradients of the "
                "step stay the same. Smaller ones from the start (--micro-batch-size, --pack-tokens) would save the time."
            )
        self._note(failures)
        reason = "memory is not enough for it alone"
        if out := [failure for failure in failures if failure.then == "out"]:
            self.bad_rows.add([Finding(one.row, f"{one.row}: {reason} ({one.batch}).", "memory") for one in out])

    @contextmanager
    def noting(self, log: TrainLog, record: dict[str, Any], halved: Sequence[tuple[str, str]] = ()) -> Iterator[None]:
        """Note what is cut in the run's files and in its record, both of them the main process's; say at the end how often.

        `halved` are what a trial of the costliest batch has found not to fit, and what the run goes on with.
        """
        self.files, self.work, self.record = log.files, log.work, record
        for batch, size in halved:
            log.fault("halved", step=log.start, batch=batch, size=size)
        yield
        if self.cuts > 1:
            self.accelerator.print(f"Memory ran out {self.cuts} times; the micro-batch was cut in two each time.")

    def _note(self, failures: Sequence[Failure]) -> None:
        if self.accelerator.is_main_process and self.cuts:
            self.record["cut_for_memory"] = self.cuts
        for failure in failures:
            if self.files is not None:
                step = unwrap(self.model).loss_step
                self.files.fault("memory", step=step, batch=str(failure), then=failure.then)

    # ---- what does not fit ------------------------------------------------------------------------------------------

    def _failure(self, batch: Batch) -> Failure:
        names = list(dict.fromkeys(map(row_name, batch.rows))) if isinstance(batch, Batch) else []
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        words = f"{describe_batch(batch)} ({', '.join(names[:SHOWN])}{more})" if names else describe_batch(batch)
        rank = self.accelerator.process_index if self.accelerator.num_processes > 1 else -1
        name, counts = names[0] if names else "", not is_blank(batch)
        cut = counts and isinstance(batch, Batch) and len(batch.places) > 1
        return Failure(words, name, "cut" if cut else "out" if (name, counts) in self.alone else "again", counts, rank)

    def _smaller(self, batches: Sequence[Batch], failed: Batch | None) -> list[Batch]:
        """Return this rank's micro-batches with those as large as the one that failed in two, or without it if it is a row."""
        if failed is not None:
            failure = self._failure(failed)
            if failure.then == "out":
                self.left_out.add(failure.row)
            elif failure.then == "again":
                self.alone.add((failure.row, failure.counts))
            if failure.counts:
                self.too_large.append(batch_size(failed))
        return self.cut_before(batch for batch in batches if not is_blank(batch))

    def cut_before(self, batches: Iterable[Batch]) -> list[Batch]:
        """Cut micro-batches at least as large as one that did not fit, and drop rows that did not fit alone."""
        waiting, found = list(batches), []
        while waiting and self.too_large:
            batch = waiting.pop(0)
            if len(batch.places) == 1 and row_name(batch.rows[0]) in self.left_out:
                continue
            if len(batch.places) > 1 and any(_covers(batch_size(batch), size) for size in self.too_large):
                waiting = self.feed.collate_again(halves(batch.places)) + waiting
                continue
            found.append(batch)
        return found + waiting

    def _message(self, failure: Failure) -> str:
        """Say what did not fit, and what would help."""
        on_cpu = self.accelerator.device.type == "cpu"
        helps = [
            *([] if self.config.gradient_checkpointing else ["--gradient-checkpointing"]),
            *([] if self.config.offload_activations or on_cpu else ["--offload-activations"]),
            "LoRA",
            "8 or 4 bits",
            "fewer crops an image or a smaller --max-length",
            "FSDP",
        ]
        skip = ""
        if not self.again:
            helps.insert(0, "a smaller --micro-batch-size or --pack-tokens")
            off = "and split_on_oom is off"
            shared = "and ranks that share weights (FSDP, ZeRO) wait for each other in every layer, so that none can try again"
            why = shared if self.config.split_on_oom else off
        elif failure.counts:
            why, skip = (
                "and it is one row, which cannot be cut",
                " `--on-bad-row skip` leaves such rows out, named and counted.",
            )
        else:
            why = "though it computes no loss"
        where = last_good(Path(self.config.output_dir) / "checkpoints")
        return (
            f"Memory ran out at a micro-batch of {failure}, {why}. The step was not applied. What helps: "
            f"{', '.join(helps)}; `hfcustom plan` says how much each of them saves.{skip} {where}"
        )


def row_name(name: str) -> str:
    """Return the row of an answer: both answers of a pair are one row."""
    return name.removesuffix(", chosen").removesuffix(", rejected")


def halves(places: Sequence[int]) -> list[Sequence[int]]:
    """Return places in two groups."""
    middle = (len(places) + 1) // 2
    return [places[:middle], places[middle:]]


def _covers(size: Size, other: Size) -> bool:
    return size.tokens >= other.tokens and size.crops >= other.crops
