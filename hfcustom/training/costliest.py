"""The costliest batch: which rows it is made of, and a trial of it before the first step, so that memory runs out at minute one.

rows -> the micro-batch of the longest of them -> forward and backward without a step. The trial leaves nothing behind:
random state, gradients and buffers are put back, so that a run with it is bit-equal to one without.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn

from hfcustom.cache.levels import on_device
from hfcustom.cache.run import serving, use_caches
from hfcustom.console import out
from hfcustom.data.collate import Batch
from hfcustom.data.feed import Feed
from hfcustom.data.findings import Finding
from hfcustom.data.messages import RowError
from hfcustom.data.packing import Packer, Size, size_of
from hfcustom.data.sources import Examples
from hfcustom.data.steps import Attempts
from hfcustom.distributed.sharding import no_sync
from hfcustom.distributed.zero import is_engine
from hfcustom.parts import unwrap
from hfcustom.train_config import TrainConfig
from hfcustom.training.memory import NoMemoryError, StateBefore, out_of_memory
from hfcustom.training.offload import offloading
from hfcustom.training.step_plan import plan_step

ROWS_READ = 256  # evenly spread over the data
ROWS_TRIED = 128  # of those, before a run
LAUNCHER = ("ACCELERATE_", "FSDP_", "LOCAL_", "MASTER_", "RANK", "TORCHELASTIC_", "WORLD_SIZE")  # of the environment
MOST_PACKED = 64  # of the longest rows, from which the fullest pack is made
Cut = tuple[int, int]  # rows of a micro-batch, micro-batches of a step


# ---- which rows -----------------------------------------------------------------------------------------------------


def costliest_batches(
    rows: Attempts, collate: Any, micro_batch_size: int, packer: Packer | None = None, most_rows: int = ROWS_READ
) -> list[Batch]:
    """Return the micro-batch with the most tokens, and where it is another one that with the most image crops.

    At most `most_rows` rows are read (0: all), evenly spread; RowError if none of them can be used.
    """
    count = min(len(rows), most_rows or len(rows))
    sizes: dict[int, Size] = {}
    reason = ""
    for at in dict.fromkeys(number * len(rows) // count for number in range(count)):
        found = rows[at]
        try:
            if isinstance(found, Finding):
                raise RowError(found.reason)
            sizes[at] = batch_size(collate([found]))
        except RowError as error:  # the run itself says it, counts it and stops where it is told to
            reason = reason or str(error)
    if not sizes:
        raise RowError(f"None of the {count} rows that were read can be used; the first says: {reason}")
    batches: list[Batch] = []
    for key in (_by_tokens, _by_crops):
        ranked = sorted(sizes, key=lambda at: key(sizes[at]), reverse=True)
        if packer is None:
            batch = collate([rows[at] for at in islice(cycle(ranked), micro_batch_size)])
        else:
            chosen = [rows[at] for at in ranked[:MOST_PACKED]]
            packs, _ = packer(collate, chosen, [collate([row]) for row in chosen])
            batch = max(packs, key=lambda pack: key(batch_size(pack)))
        if not batches or batch_size(batch).crops > batch_size(batches[0]).crops:
            batches.append(batch)
    return batches


def _by_tokens(size: Size) -> tuple[int, int]:
    return size.tokens, size.crops


def _by_crops(size: Size) -> tuple[int, int]:
    return size.crops, size.tokens


def batch_size(batch: Any) -> Size:
    """Return the tokens of a batch, padding included, and its image crops, or its images in families that take them whole."""
    crops = size_of({"attention_mask": torch.ones(1, 1), **batch}).crops
    return Size(batch["input_ids"].numel(), crops)


def describe_batch(batch: Any) -> str:
    """Return a batch's size in words."""
    rows, *_ = batch["input_ids"].shape
    crops = batch_size(batch).crops
    return f"{rows} x {batch['input_ids'].shape[1]:,} tokens, {crops} image crop{'' if crops == 1 else 's'}"


# ---- the trial ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a trial takes of a run that is about to begin."""

    model: nn.Module
    optimizer: Any
    feed: Feed
    collate: Any
    accelerator: Accelerator
    config: TrainConfig
    halved: list[tuple[str, str]] = field(default_factory=list)  # what did not fit, and what the run goes on with

    def wanted(self) -> bool:
        """Whether the run asks for one; by default where memory is a GPU's, of rows that can be looked up."""
        asked = self.config.try_costliest
        return self.accelerator.device.type != "cpu" if asked is None else asked

    def settle(self, cut: Cut, packer: Packer | None) -> tuple[Cut, Packer | None]:
        """Return how steps are cut so that the costliest micro-batch fits: as they were, or halved where the run allows that.

        Raises NoMemoryError, with advice, for one that does not fit.
        """
        if not self.wanted():
            return cut, packer
        if is_engine(self.model):
            self.accelerator.print("try_costliest: under DeepSpeed the costliest batch is not tried.")
            return cut, packer
        if not isinstance(self.feed.rows, Examples):
            self.accelerator.print(
                "try_costliest: rows of a stream cannot be looked up, so its costliest batch is not tried."
            )
            return cut, packer
        while True:
            batches = costliest_batches(self._rows(), self.collate, cut[0], packer, ROWS_TRIED)
            repeated = packer is not None or cut[1] > 1
            batch = next((batch for batch in batches if not self._fits(batch, repeated)), None)
            if batch is None:
                tried = " and ".join(map(describe_batch, batches))
                self.accelerator.print(f"costliest batch tried: {tried}{self._peak()}")
                return cut, packer
            smaller = self._halved(cut, packer, batch) if self.config.auto_micro_batch else None
            if smaller is None:
                raise NoMemoryError(self._message(batch))
            cut, packer = smaller
            size = f"{cut[0]} x {cut[1]} rows" if packer is None else f"packs of {packer.tokens:,} tokens"
            self.halved.append((describe_batch(batch), f"{size} a step and process"))
            self.accelerator.print("auto_micro_batch: {} do not fit; going on with {}.".format(*self.halved[-1]))

    def _rows(self) -> Attempts:
        assert isinstance(self.feed.rows, Examples)
        return Attempts(self.feed.rows, skip_bad_rows=True, exclude=self.config.exclude)

    def _fits(self, batch: Batch, repeated: bool) -> bool:
        """Run forward and backward as a step does, and put everything back; whether every rank had the memory."""
        core = unwrap(self.model)
        before, self_failed = StateBefore(core), False
        core.loss_step = 0
        self.model.train()
        try:
            with use_caches(core, self.feed.caches, self.accelerator):
                self._run([batch] * (2 if repeated else 1))  # gradients of the first wait while the second runs
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self_failed = True
        finally:
            self.optimizer.zero_grad()
            before.restore()
        if self_failed and self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        return not any(gather_object([self_failed]))

    def _run(self, batches: Sequence[Batch]) -> None:
        core, device = unwrap(self.model), self.accelerator.device
        ballast = torch.empty(self._missing_state(), dtype=torch.uint8, device=device)
        plan = plan_step(core, batches, self.accelerator)
        for micro, batch in enumerate(batches):
            with no_sync(self.model, self.accelerator):  # a rank without memory keeps nobody waiting
                with offloading(core, self.config), serving(core, batch):
                    loss = self.model(**on_device(batch, device), **plan[micro]).loss
                self.accelerator.backward(loss)
        del ballast

    def _missing_state(self) -> int:
        """Return the bytes that the optimiser will take from its first step on."""
        groups = self.optimizer.param_groups
        new = [p for group in groups for p in group["params"] if not self.optimizer.state.get(p)]
        inner = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        each = None if isinstance(inner, torch.optim.Optimizer) and type(inner).__module__.startswith("torch.") else 1
        return sum(2 * p.numel() * (each or p.element_size()) for p in new)

    def _halved(self, cut: Cut, packer: Packer | None, batch: Batch) -> tuple[Cut, Packer | None] | None:
        """Return half the micro-batches, None where a row is all there is."""
        if packer is not None:
            single = len(batch["input_ids"]) == 1 and not packs_several(batch)
            return None if single or packer.tokens <= 1 else (cut, replace(packer, tokens=packer.tokens // 2))
        if cut[0] == 1:
            return None
        divisor = next(number for number in range(2, cut[0] + 1) if cut[0] % number == 0)
        return (cut[0] // divisor, cut[1] * divisor), None

    def _peak(self) -> str:
        if self.accelerator.device.type != "cuda":
            return ""
        return f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU"

    def _message(self, batch: Batch) -> str:
        words = f"The costliest batch, {describe_batch(batch)}, does not fit into memory. No step was taken.\n{advice_for(self)}"
        if self.accelerator.num_processes > 1:  # the first rank to leave takes the others along
            self.accelerator.print(words)
            self.accelerator.wait_for_everyone()
        return words


def packs_several(batch: Batch) -> bool:
    """Whether a row of a batch is made of several."""
    positions = batch.get("position_ids")
    return positions is not None and int((positions == 0).sum()) > len(positions)


def advice_for(trial: Trial) -> str:
    """Return what to change: with the numbers of `hfcustom plan` where the program is a recipe, made in a process of its own."""
    known = "What helps: --auto-micro-batch, a smaller --micro-batch-size, --gradient-checkpointing, --offload-activations, LoRA, 8 or 4 bits, FSDP."
    command = plan_command(trial)
    if command is None or not trial.accelerator.is_main_process:
        return f"{known} `hfcustom plan` says how much each of them saves."
    words = shlex.join(["hfcustom", *command])
    out.print(f"Out of memory. Working out what would fit: {words}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    made = subprocess.run(
        [sys.executable, "-m", "hfcustom.cli", *command], capture_output=True, text=True, env=environment, check=False
    )
    if made.returncode not in (0, 1):
        return f"{known} {words} could not say how much each saves: {made.stderr.strip()}"
    return f"{known} {words} says:\n{made.stdout.strip()}"


def plan_command(trial: Trial) -> list[str] | None:
    """Return `hfcustom plan` with this program's own options; None where the program is no recipe."""
    program = Path(sys.argv[0])
    if (
        program.suffix != ".py"
        or not program.is_file()
        or "def load_model(" not in program.read_text(encoding="utf-8")
    ):
        return None
    command = ["plan", str(program), *sys.argv[1:], "--advice", "always"]
    accelerator = trial.accelerator
    if accelerator.num_processes > 1:
        command += ["--gpus", str(accelerator.num_processes)]
        command += ["--shard", "fsdp"] if accelerator.distributed_type == "FSDP" else []
        command += ["--shard", "zero2"] if accelerator.distributed_type == "DEEPSPEED" else []
    if accelerator.device.type == "cuda":
        command += ["--memory", f"{torch.cuda.get_device_properties(accelerator.device).total_memory / 2**30:.1f}"]
    return command
