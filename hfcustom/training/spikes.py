"""Spikes of the loss: a step whose loss lies far above those before it is named with its rows, and may be gone back from.

losses of the last steps -> limit = median + spike_factor * max(1.48 MAD, 5 % of the median), and none of them is higher. 1.48 MAD
is the standard deviation of what is normal without its outliers (Leys et al. 2013); the 5 % keep a loss that hardly moves from
crying wolf, the highest loss keeps rows of a rare and harder kind from it. To rewind is to load the last checkpoint and to pass over the step that spiked, as PaLM was trained (Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, section 5.1). Steps keep their numbers, rows and learning rates, so that a run is a function of
which steps it skips, and the list of them lies in the checkpoint beside the losses: a killed run goes back where an unbroken one does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from hfcustom.commit import write_json
from hfcustom.data.collate import Batch
from hfcustom.exits import EXIT_NUMERIC, RunError
from hfcustom.losses import IGNORE, WeightedLoss
from hfcustom.record import public
from hfcustom.train_config import TrainConfig
from hfcustom.training.step_plan import is_blank

if TYPE_CHECKING:
    from hfcustom.console import TrainLog
    from hfcustom.data.feed import Steps
    from hfcustom.data.steps import BadRows
    from hfcustom.train import StepReport
    from hfcustom.training.checkpoint import Checkpoints

logger = logging.get_logger("hfcustom")
FILE = "spikes.json"
NORMAL, FLAT, SHOWN = 1.4826, 0.05, 8  # MAD -> standard deviation; share of the median; rows in a message


class Share(NamedTuple):
    """The share of a micro-batch in the loss of a step."""

    loss: torch.Tensor  # of all micro-batches together: the step's
    tokens: int  # what it is divided by, about: supervised ones
    rows: list[str]


def shares_of(batches: Sequence[Any], losses: Sequence[torch.Tensor]) -> list[Share]:
    """Return what each micro-batch has to do with the loss of a step; blank ones have nothing."""
    return [
        Share(loss, _supervised(batch), _rows(batch))
        for batch, loss in zip(batches, losses, strict=True)
        if not is_blank(batch)
    ]


class SpikeError(RunError, FloatingPointError):
    """A loss far above those before it; what was saved before it is as it was."""

    exit_code = EXIT_NUMERIC


def limit_of(losses: Sequence[float], factor: float) -> float:
    """Return the loss beyond which a step is a spike.

    >>> limit_of([2.0, 2.1, 1.9, 2.2, 1.8], 10.0)  # 2.0 + 10 * 1.4826 * 0.1
    3.4826
    >>> limit_of([2.0, 2.1, 1.9, 2.2, 5.0], 10.0)  # such a loss is nothing new
    5.0
    """
    middle = median(losses)
    spread = median(abs(loss - middle) for loss in losses)
    return max(*losses, middle + factor * max(NORMAL * spread, FLAT * abs(middle)))


class Spikes:
    """The losses of the last steps of one run, and the steps that it skips; every rank decides alike, from their common loss."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, weighted: Sequence[WeightedLoss]) -> None:
        self.config = config
        self.accelerator = accelerator
        self.weighted = weighted
        self.losses: list[float] = []
        self.skipped: dict[int, list[str]] = {}  # step -> its rows, of all ranks, known once it was skipped
        self.rewinds = 0
        self.run: dict[str, Any] = {}

    def record_in(self, run: dict[str, Any]) -> Spikes:
        """Name what is skipped in the record of the run, too; return these spikes."""
        self.run = run
        self._record()
        return self

    def _record(self) -> None:
        if self.skipped:
            self.run["skipped"] = {str(step): [public(row) for row in rows] for step, rows in self.skipped.items()}

    # ---- finding ----------------------------------------------------------------------------------------------------

    def left(self, step: int, batches: list[Any]) -> list[Any]:
        """Return a step's micro-batches; none of a step that is skipped, of which the rows are named."""
        if step not in self.skipped:
            return batches
        rows = [row for batch in batches if not is_blank(batch) for row in _rows(batch)]
        self.skipped[step] = gather_object(rows) if self.accelerator.num_processes > 1 else rows
        self._record()
        self.accelerator.print(f"step {step} is skipped: {_named(self.skipped[step])}")
        return []

    def found(self, step: int, report: StepReport | None, log: TrainLog) -> bool:
        """Look at a step's loss; whether the run is to go back. SpikeError where it is to end."""
        if report is None or not self.config.spike_factor:
            return False
        loss = self._total(step, report)
        limit, before = self._limit(), len(self.losses)
        spiked = loss > limit
        if spiked:
            rows = self._suspects(report, limit)
            usual = median(self.losses)
            text = (
                f"step {step}: the loss is {loss:.4g}, that of the {before} steps before it {usual:.4g} (median; a spike is above "
                f"{limit:.4g}). Look at {_named(rows)}."
            )
            self._tell(step, text, rows, log)
        self.losses = [*self.losses, loss][-self.config.spike_window :]
        return spiked and self.config.on_spike == "rewind"

    def _limit(self) -> float:
        enough = 2 * len(self.losses) >= self.config.spike_window
        return limit_of(self.losses, self.config.spike_factor) if enough else float("inf")

    def _total(self, step: int, report: StepReport) -> float:
        own = sum(item.weight_at(step - 1) * float(report.losses[item.loss.name]) for item in self.weighted)
        if self.accelerator.num_processes == 1:
            return own
        total = torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(total, "sum"))

    def _suspects(self, report: StepReport, limit: float) -> list[str]:
        """Return the rows of micro-batches whose own mean is a spike, the highest first; all of the step where none is."""
        own = [(float(share.loss), share.tokens, share.rows) for share in report.shares]
        everyone = gather_object(own) if self.accelerator.num_processes > 1 else own
        tokens = sum(count for _, count, _ in everyone)
        means = [(loss * tokens / count, rows) for loss, count, rows in everyone if count]
        high = [pair for pair in means if pair[0] > limit] or means
        return [row for _, rows in sorted(high, key=lambda pair: -pair[0]) for row in rows]

    def _tell(self, step: int, text: str, rows: list[str], log: TrainLog) -> None:
        mode = self.config.on_spike
        log.fault("spike", step=step, text=text, rows=rows)
        if mode == "warn":
            if self.accelerator.is_main_process:
                logger.warning(text)
            return
        if mode == "stop":
            raise SpikeError(f"{text} on_spike=stop ends the run; nothing of this step is saved.")
        if self.rewinds >= self.config.spike_rewinds:
            raise SpikeError(
                f"{text} The run has gone back {self.rewinds} times already, as often as spike_rewinds allows; skipped were steps "
                f"{_steps(self.skipped)}. Resume with a lower rate, or leave those rows out."
            )
        self.accelerator.print(text)

    # ---- going back -------------------------------------------------------------------------------------------------

    def go_back(self, step: int, state: Checkpoints, steps: Steps, bad_rows: BadRows, log: TrainLog) -> int:
        """Load a checkpoint, skip the step that spiked from now on, and return the checkpoint's step."""
        skipped, rewinds = self.skipped, self.rewinds + 1
        blamed = to_skip(step, skipped)
        start = state.go_back(blamed[0], step)  # these losses, too
        if start is None:
            raise SpikeError(
                f"step {step}: save_steps={self.config.save_steps} has left no checkpoint yet to go back to."
            )
        blamed = range(max(start + 1, blamed[0]), step + 1)
        self.skipped = dict(sorted({**skipped, **{at: [] for at in blamed}}.items()))
        self.rewinds = rewinds
        steps.restart(start)
        state.restore_rng()  # after the iterator exists
        log.rewind(start, state.history, state.pending)
        bad_rows.steps = start
        words = f"steps {blamed[0]} to {step} are" if len(blamed) > 1 else f"step {step} is"
        self.accelerator.print(
            f"Going back to step {start}; {words} skipped (rewind {rewinds} of {self.config.spike_rewinds})."
        )
        log.fault("rewound", step=step, to=start, skipped=list(blamed))
        return start

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what is needed to find the same spikes again."""
        if self.accelerator.is_main_process:
            content = {"losses": self.losses, "skipped": self.skipped, "rewinds": self.rewinds}
            write_json(folder / FILE, content)

    def load(self, folder: Path) -> None:
        """Go on where a checkpoint stood; one of an earlier version has seen no losses."""
        content: Mapping[str, Any] = {}
        if (folder / FILE).is_file():
            content = json.loads((folder / FILE).read_text())
        self.losses = list(content.get("losses", ()))[-self.config.spike_window :]
        self.skipped = {int(step): list(rows) for step, rows in content.get("skipped", {}).items()}
        self.rewinds = int(content.get("rewinds", 0))


def to_skip(step: int, skipped: Mapping[int, Any]) -> range:
    """Return the steps to skip for a spike at `step`: it, and more where the one before is skipped.

    A spike that follows what was skipped was not of its rows: an earlier step has thrown the weights. So the stretch doubles,
    backwards.

    >>> to_skip(37, {}), to_skip(38, {37: []}), to_skip(39, {36: [], 37: [], 38: []})
    (range(37, 38), range(36, 39), range(33, 40))
    """
    first = step
    while first - 1 in skipped:
        first -= 1
    return range(max(1, first - (step - first)), step + 1)


def _rows(batch: Any) -> list[str]:
    return list(batch.rows) if isinstance(batch, Batch) else []


def _supervised(batch: Mapping[str, Any]) -> int:
    """Count what a micro-batch is divided by, about: its supervised tokens, its rows where there are no labels."""
    labels = batch.get("labels")
    return len(batch["input_ids"]) if labels is None else int((labels != IGNORE).sum())


def _named(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return (", ".join(rows[:SHOWN]) or "rows without a name") + more


def _steps(skipped: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(skipped)))
