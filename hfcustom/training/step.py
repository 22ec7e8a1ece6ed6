"""One optimiser step: micro-batches -> forward and backward each, their gradients together clipped, the weights updated.

Each loss is divided by its count over the whole step (hfcustom/training/step_plan.py), however the step is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from hfcustom import randomness
from hfcustom.cache.levels import on_device
from hfcustom.cache.run import serving
from hfcustom.data.collate import Batch
from hfcustom.distributed import zero
from hfcustom.distributed.reduction import Reduction
from hfcustom.distributed.sharding import is_sharded, no_sync
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.losses import NonFiniteError, count_all_tokens, real_tokens
from hfcustom.parts import part_table, unwrap
from hfcustom.train_config import TrainConfig
from hfcustom.training.checkpoint import last_good
from hfcustom.training.memory import NoMemoryError, out_of_memory
from hfcustom.training.norms import part_norms
from hfcustom.training.offload import offloading
from hfcustom.training.spikes import Share, shares_of
from hfcustom.training.splitting import Progress, Splitter
from hfcustom.training.step_plan import is_blank, plan_step

logger = logging.get_logger("hfcustom")


@dataclass
class StepReport:
    """This rank's share of one step: each loss's sum / (count over the whole step), what terms recorded besides."""

    at: int = 0  # the step, counted from 0, as weights are scheduled by
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # sum and count, (2,) each
    tokens: int = 0
    positions: int = 0  # tokens and padding
    images: int = 0
    source_tokens: dict[str, int] = field(default_factory=dict)  # of a mixture
    grad_norm: torch.Tensor | float = 0.0
    part_norms: Mapping[str, torch.Tensor | float] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)  # of each micro-batch in the loss

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Count what a micro-batch holds."""
        self.tokens += count_all_tokens(batch)
        self.positions += real_tokens(batch).numel()
        if isinstance(batch, Batch):
            self.images += batch.images
            for name, tokens in batch.source_tokens.items():
                self.source_tokens[name] = self.source_tokens.get(name, 0) + tokens


@dataclass
class Accumulated:
    """The gradients of a step lie in the parameters; this is what is known of it besides."""

    report: StepReport
    batches: Sequence[Mapping[str, Any]]
    losses: list[torch.Tensor]  # of each micro-batch


@overload
def train_step(
    model: nn.Module, batches: Sequence[Any], optimizer: Any, accelerator: Accelerator, config: TrainConfig
) -> StepReport: ...


@overload
def train_step(
    model: nn.Module,
    batches: Sequence[Any],
    optimizer: Any,
    accelerator: Accelerator,
    config: TrainConfig,
    splitter: Splitter | None,
) -> StepReport | None: ...


def train_step(
    model: nn.Module,
    batches: Sequence[Any],
    optimizer: Any,
    accelerator: Accelerator,
    config: TrainConfig,
    splitter: Splitter | None = None,
) -> StepReport | None:
    """Run one optimiser step over micro-batches: count, forward and backward each, clip, update.

    A `splitter` cuts those that memory is not enough for. None where it has left out every row of the step.
    """
    attempt = partial(accumulate, model, accelerator, config)
    with zero.one_exchange(model):
        done = attempt(batches) if splitter is None else splitter.run(attempt, batches)
    if done is None:
        return None
    report = done.report
    report.shares = shares_of(done.batches, done.losses)
    report.part_norms, norm_of_all = _norms(model, optimizer, accelerator, config)
    report.grad_norm = norm_of_all
    losses = {name: float(value) for name, value in report.losses.items()}
    norm = float(norm_of_all)
    if not all(map(math.isfinite, (norm, *losses.values()))):
        raise NonFiniteError(
            f"The gradient's norm is {norm}, the losses are {losses}; the step was not applied."
            f"{_suspects(done.batches, done.losses)}"
        )
    with _naming_the_optimizer(config):
        if zero.is_engine(model):
            zero.step(model)
        else:
            optimizer.step()
    optimizer.zero_grad()
    return report


def _norms(
    model: Any, optimizer: Any, accelerator: Accelerator, config: TrainConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the gradient's norms by part and as a whole, and clip it, which DeepSpeed does in its step."""
    if zero.is_engine(model):
        norms = zero.part_norms(model)
        return norms if len(norms) > 1 else {}, torch.linalg.vector_norm(torch.stack([*norms.values()]))
    parts = part_norms(optimizer)
    return parts, accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)


@contextmanager
def _naming_the_optimizer(config: TrainConfig) -> Iterator[None]:
    """Say of memory that runs out in the optimizer's step that no smaller micro-batch would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise NoMemoryError(
            "Memory ran out in the optimizer's step, which a smaller micro-batch does not change; some weights may be updated, "
            "others not. What helps: --optimizer adamw_8bit or paged_adamw_8bit, LoRA, FSDP; `hfcustom plan` says how much each of "
            f"them saves. {last_good(Path(config.output_dir) / 'checkpoints')}"
        ) from error


def accumulate(
    model: nn.Module,
    accelerator: Accelerator,
    config: TrainConfig,
    batches: Sequence[Mapping[str, Any]],
    progress: Progress | None = None,
) -> Accumulated:
    """Run forward and backward of each micro-batch of a step; `progress` follows them."""
    progress = progress or Progress(Reduction(model))
    done, core = Accumulated(StepReport(), batches, []), unwrap(model)
    report = done.report
    plan = plan_step(core, batches, accelerator)  # before the batches are moved: asking a GPU for a count takes a wait
    for progress.micro, batch in enumerate(batches):
        last = progress.micro == len(batches) - 1
        with nullcontext() if last else no_sync(model, accelerator), _naming_rows(batch):
            core.loss_values, core.loss_metrics = {}, {}
            with offloading(core, config), serving(core, batch):
                if is_blank(batch):
                    loss = _run_blank(model, batch, plan[progress.micro], accelerator)
                else:
                    loss = model(**on_device(batch, accelerator.device), **plan[progress.micro]).loss
            if last:
                progress.reduction.begins(loss)
            done.losses.append(loss.detach())
            if is_blank(batch):
                _backward(loss, core, batch, accelerator)
                continue
            report.add_batch(batch)
            _check_losses(core, plan[progress.micro]["loss_counts"])
            # DDP averages gradients over ranks, the divisors count all of them.
            _backward(loss * accelerator.num_processes, core, batch, accelerator)
        for name, value in core.loss_values.items():
            report.losses[name] = report.losses.get(name, 0.0) + value.mean
        for name, sum_and_count in core.loss_metrics.items():
            report.metrics[name] = report.metrics.get(name, 0.0) + sum_and_count
    progress.reduction.ended()
    for name in plan[0]["loss_counts"]:  # a rank of blank micro-batches alone has a share of 0
        report.losses.setdefault(name, torch.zeros((), device=accelerator.device))
    return done


def _check_losses(core: Any, asked: Mapping[str, float]) -> None:
    if core.loss_values.keys() != asked.keys():
        names = ", ".join(asked)
        raise ValueError(
            f"{type(core).__name__}.forward computed its loss without the configured {names}. Call "
            "super().forward(labels=...) in it, and write the loss as a token loss or a term."
        )


def _backward(loss: torch.Tensor, core: Any, batch: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Run the backward pass; a batch of text alone has none where only what sees images is trained."""
    if loss.requires_grad:
        zero.backward(loss, accelerator)
        return
    trained = ", ".join(row.part for row in part_table(core) if row.trainable)
    text_alone = isinstance(batch, Batch) and not batch.images
    if not text_alone:
        raise ValueError(
            f"Nothing that is trained ({trained}) has a way to the loss of a batch with images. Train another part too, or "
            "look at what is overridden behind it; `hfcustom doctor` with --check gradients shows each part."
        )
    if accelerator.num_processes > 1 and not (isinstance(batch, Batch) and batch.idle):
        raise ValueError(
            f"A batch of rows without images has no gradient where only {trained} is trained, and other processes wait for it. "
            "Train on rows with images, or another part too."
        )
    logger.warning_once(
        f"Rows without images teach nothing where only {trained} is trained; they are counted, not more."
    )


@contextmanager
def _naming_rows(batch: Mapping[str, Any]) -> Iterator[None]:
    """Name the rows of a micro-batch in which a loss has found by itself that it is no number."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} The step was not applied.{_rows_to_look_at([batch])}") from error


def _suspects(batches: Sequence[Mapping[str, Any]], losses: Sequence[torch.Tensor]) -> str:
    """Return which rows a loss that is no number came from, where their names are known: this rank's all, if every loss is one."""
    wrong = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    return _rows_to_look_at(wrong or batches)


def _rows_to_look_at(batches: Sequence[Mapping[str, Any]]) -> str:
    names = [row for batch in batches if isinstance(batch, Batch) for row in batch.rows]
    return f" Look at {', '.join(names)}." if names else ""


def _run_blank(
    model: nn.Module, batch: Mapping[str, Any], plan: Mapping[str, Any], accelerator: Accelerator
) -> torch.Tensor:
    """Run a micro-batch that counts for nothing, as other ranks run theirs: a loss of 0 with a gradient of 0.

    Of a sharded model the very same parameters have to get one, so that it is run to its losses.
    """
    core, before = unwrap(model), randomness.rng_state()
    if is_sharded(core):
        counts = {"loss_counts": core.loss_counts([batch]), "step_summaries": {}}
        value = model(**on_device(batch, accelerator.device), **{**plan, **counts}).loss
    else:
        inputs = on_device(batch, accelerator.device, without=("labels",))
        if isinstance(core, CustomDualEncoder):
            value = model(**inputs).logits_per_image
        else:  # one token reaches every weight
            value = model(**inputs, **({} if core.ignores_logits_to_keep else {"logits_to_keep": 1})).logits
    randomness.set_rng_state(before)  # a resumed run may run another batch as a blank
    zero: torch.Tensor = value.float().sum() * 0.0
    return zero
