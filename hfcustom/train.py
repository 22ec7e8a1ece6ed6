"""fit(): the training loop, an Accelerate loop to read and to change.

rows -> batches (hfcustom/data/) -> train_step -> log (hfcustom/console.py), checkpoints (hfcustom/checkpoint.py).
One optimiser step sees `batch_size` rows, whatever the number of processes and micro-batches they are cut into, and each
loss is divided by its count over all of them, so that the cut changes neither loss nor gradient.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed
from torch import nn
from transformers.utils import logging

from hfcustom import checkpoint, randomness
from hfcustom.cache.levels import on_device
from hfcustom.cache.run import Caches, check_caches, open_caches, serving, use_caches
from hfcustom.connectors.added_tower import check_weights
from hfcustom.console import TrainLog, out
from hfcustom.costliest import Trial
from hfcustom.coverage import every_part_learns
from hfcustom.custom_model import CustomModel, check_registered
from hfcustom.data.captions import CaptionCollator
from hfcustom.data.collate import Batch, Collator
from hfcustom.data.feed import Feed, Steps, as_rows
from hfcustom.data.packing import make_packer
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.exits import EXIT_PREEMPTED, ConfigError
from hfcustom.losses import NonFiniteError, count_all_tokens, loss_columns, real_tokens, token_columns
from hfcustom.naming import unknown
from hfcustom.noise import set_noise
from hfcustom.norms import part_norms
from hfcustom.optimizers import make_optimizer, set_lr
from hfcustom.parts import part_table, unwrap
from hfcustom.ranks import check_processes, explained, process_state, wait_at_most
from hfcustom.record import begin_run, run_of
from hfcustom.run_folder import run_folder
from hfcustom.sharding import name_blocks
from hfcustom.signals import StopRequest
from hfcustom.spikes import Share, shares_of
from hfcustom.step_plan import is_blank, plan_step
from hfcustom.train_config import TrainConfig

logger = logging.get_logger("hfcustom")
Evaluate = Callable[[Any, int], Mapping[str, float]]


@dataclass
class TrainResult:
    """What a run left behind; `history` has one mapping a log line."""

    step: int
    interrupted: bool
    history: list[dict[str, float]]
    model_dir: Path

    def exit_if_interrupted(self) -> None:
        """After a signal has stopped the run, say how to go on and leave with EXIT_PREEMPTED."""
        if self.interrupted:
            if process_state().is_main_process:
                out.print(f"Stopped after step {self.step}, which is saved; continue with --resume.")
            raise SystemExit(EXIT_PREEMPTED)


@dataclass
class StepReport:
    """This rank's share of one step: each loss's sum / (count over the whole step), what terms recorded besides."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # sum and count, (2,) each
    tokens: int = 0
    positions: int = 0  # tokens and padding
    images: int = 0
    source_tokens: dict[str, int] = field(default_factory=dict)  # of a mixture
    grad_norm: torch.Tensor | float = 0.0
    part_norms: dict[str, torch.Tensor] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)  # of each micro-batch in the loss

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Count what a micro-batch holds."""
        self.tokens += count_all_tokens(batch)
        self.positions += real_tokens(batch).numel()
        if isinstance(batch, Batch):
            self.images += batch.images
            for name, tokens in batch.source_tokens.items():
                self.source_tokens[name] = self.source_tokens.get(name, 0) + tokens


def fit(
    model: nn.Module,
    processor: Any,
    rows: Any,
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Train a custom model, bare or wrapped by peft, on rows of messages and images: a list, a data set, load_rows(...).

    A contrastive encoder is trained on rows of an image and its text.

    `evaluate(model, step)` returns named numbers for the log every `eval_steps`. Raises TypeError for a model that is not
    custom, ValueError for a config out of range, a class that is not registered, no rows, a batch size that the processes
    cannot share and a model of which nothing is trainable, RowError for a row that cannot be used.
    """
    config, rows = _checked(model, config, evaluate), as_rows(rows)
    accelerator = make_accelerator(config)
    with run_folder(config, accelerator), explained(config.output_dir):
        return _run(model, processor, rows, config, evaluate, accelerator)


def _run(
    model: nn.Module,
    processor: Any,
    rows: Any,
    config: TrainConfig,
    evaluate: Evaluate | None,
    accelerator: Accelerator,
) -> TrainResult:
    core, cut = unwrap(model), split_batch(config, accelerator.num_processes)
    feed = Feed(rows, config, accelerator)
    max_steps = feed.max_steps
    weighted = core.losses()  # an unknown loss is an error now, not after the first batch
    set_seed(config.seed, device_specific=True)
    set_up(model, config, accelerator)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    state = checkpoint.Checkpoints(config, accelerator, model, optimizer, processor, feed)
    start = state.resume() if config.resume else state.begin()
    run = begin_run(core, run_of(state.unwrapped, config, feed), config.resume) if accelerator.is_main_process else {}
    spikes = state.spikes.record_in(run)
    feed.caches = open_caches(model, processor, config, accelerator)
    collate = make_collator(core, processor, config, feed.first_columns(weighted), feed.caches)
    trial = Trial(model, optimizer, feed, copy.copy(collate), accelerator, config)
    cut, packer = trial.settle(cut, make_packer(core, config))
    steps = Steps(lambda first: feed.loader(collate, range(first, max_steps), cut, packer), start, feed.watch)
    bad_rows = feed.bad_rows(start)
    state.restore_rng()  # after the iterator exists: making one draws random numbers
    model.train()
    step, stopped = start, False
    with (
        closing(steps),
        StopRequest() as stop,
        feed.watch.naming_deaths(),
        counting_steps(core),
        every_part_learns(model, optimizer),
        use_caches(core, feed.caches, accelerator),
        TrainLog(config, accelerator, weighted, start, max_steps, state.history, feed.source_names, core) as log,
    ):
        log.restore_window(state.pending)
        while step < max_steps and not stopped:
            set_lr(optimizer, step, max_steps, config)
            core.loss_step = step
            batches = spikes.left(step + 1, feed.next_batches(steps, bad_rows))
            report = train_step(model, batches, optimizer, accelerator, config) if batches else None
            if spikes.found(step + 1, report, log):
                step = spikes.go_back(step + 1, state, steps, bad_rows, log)
                continue
            run["steps"] = step = step + 1
            if report is not None:
                state.average.update()
            log.step(step, report, optimizer)
            if evaluate is not None and _due(step, config.eval_steps):
                with state.average.in_place():
                    log.metrics(step, run_evaluation(model, evaluate, step, run))
            stopped = stop.agreed(accelerator)
            if _due(step, config.save_steps) or stopped or step == max_steps:
                state.save(step, log.history, log.pending())
    finished = step >= max_steps
    return TrainResult(step, not finished, log.history, state.publish() if finished else state.model_dir())


def set_up(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> None:
    """Give a model the run's precision, noise, recomputation, and its companions the run's device; tell FSDP its blocks."""
    core = unwrap(model)
    name_blocks(model, accelerator)
    set_precision(model, config)
    set_noise(core, config.neftune_alpha)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    for companion in core.companions.values():
        companion.to(accelerator.device)


@contextmanager
def counting_steps(core: Any) -> Iterator[None]:
    """Let scheduled weights and noise follow the steps of this run, and no longer: another loop has to set its own."""
    try:
        yield
    finally:
        core.loss_step, core.neftune_alpha = None, 0.0


def make_collator(
    core: Any, processor: Any, config: TrainConfig, given: Mapping[str, Any], caches: Caches | None = None
) -> Collator | CaptionCollator:
    """Return the collator that a run's model, options and losses ask for; `given` are the columns of a row."""
    if isinstance(core, CustomDualEncoder):
        for name in ("train_on", "allowed_tokens"):
            if (value := getattr(config, name)) != getattr(TrainConfig(), name):
                raise ValueError(
                    f"{name}={value!r} has no effect on a contrastive encoder, which has no labels; leave it out."
                )
        return core.make_collator(processor, config.max_length, config.min_pixels)
    losses = core.losses()
    return Collator(
        processor,
        config.max_length,
        loss_columns(losses, given),
        token_columns(losses, given),
        train_on=config.train_on,
        allowed_tokens=config.allowed_tokens,
        head_size=core.head_size(),
        caches=caches,
        min_pixels=config.min_pixels,
    )


def _checked(model: nn.Module, config: TrainConfig, evaluate: Evaluate | None) -> TrainConfig:
    """Check what fit() was given before anything runs; return the config with its precision decided."""
    if problems := config.problems():
        raise ConfigError("; ".join(problems))
    core = unwrap(model)
    if not isinstance(core, CustomModel):
        raise TypeError(f"fit() trains custom models; load the {type(core).__name__} with its family's custom class.")
    check_registered(core)
    if (evaluate is None) != (config.eval_steps is None):
        raise ValueError(f"eval_steps={config.eval_steps} and evaluate={evaluate} have an effect only together.")
    check_caches(model, config)
    check_weights(core)
    chosen = copy.copy(config)  # replace() would forget where its options came from
    chosen.precision = choose_precision(model, config)
    return chosen


def train_step(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    config: TrainConfig,
) -> StepReport:
    """Run one optimiser step over micro-batches: count, forward and backward each, clip, update."""
    report, core = StepReport(), unwrap(model)
    plan = plan_step(core, batches, accelerator)  # before the batches are moved: asking a GPU for a count takes a wait
    losses_by_batch: list[torch.Tensor] = []
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            core.loss_values, core.loss_metrics = {}, {}
            if is_blank(batch):
                losses_by_batch.append(_run_blank(model, batch, accelerator))
                _backward(losses_by_batch[-1], core, batch, accelerator)
                continue
            report.add_batch(batch)
            with serving(core, batch):
                loss = model(**on_device(batch, accelerator.device), **plan[micro]).loss
            if core.loss_values.keys() != plan[micro]["loss_counts"].keys():
                names = ", ".join(plan[micro]["loss_counts"])
                raise ValueError(
                    f"{type(core).__name__}.forward computed its loss without the configured {names}. Call "
                    "super().forward(labels=...) in it, and write the loss as a token loss or a term."
                )
            # DDP averages gradients over ranks, the divisors count all of them.
            _backward(loss * accelerator.num_processes, core, batch, accelerator)
            losses_by_batch.append(loss.detach())
        for name, value in core.loss_values.items():
            report.losses[name] = report.losses.get(name, 0.0) + value.mean
        for name, sum_and_count in core.loss_metrics.items():
            report.metrics[name] = report.metrics.get(name, 0.0) + sum_and_count
    report.shares = shares_of(batches, losses_by_batch)
    report.part_norms = part_norms(optimizer)
    report.grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    losses = {name: float(value) for name, value in report.losses.items()}
    if not all(map(math.isfinite, (report.grad_norm, *losses.values()))):
        norm = float(report.grad_norm)
        raise NonFiniteError(
            f"The gradient's norm is {norm}, the losses are {losses}; the step was not applied."
            f"{_suspects(batches, losses_by_batch)}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return report


def _backward(loss: torch.Tensor, core: Any, batch: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Run the backward pass; a batch of text alone has none where only what sees images is trained."""
    if loss.requires_grad:
        accelerator.backward(loss)
        return
    trained = ", ".join(row.part for row in part_table(core) if row.trainable)
    text_alone = isinstance(batch, Batch) and not batch.images
    if not text_alone:
        raise ValueError(
            f"Nothing that is trained ({trained}) has a way to the loss of a batch with images. Train another part too, or "
            "look at what is overridden behind it; `hfcustom doctor` with --check gradients shows each part."
        )
    if accelerator.num_processes > 1:
        raise ValueError(
            f"A batch of rows without images has no gradient where only {trained} is trained, and other processes wait for it. "
            "Train on rows with images, or another part too."
        )
    logger.warning_once(
        f"Rows without images teach nothing where only {trained} is trained; they are counted, not more."
    )


def _suspects(batches: Sequence[Mapping[str, Any]], losses: Sequence[torch.Tensor]) -> str:
    """Return which rows a loss that is no number came from, where their names are known: this rank's all, if every loss is one."""
    wrong = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    names = [row for batch in wrong or batches if isinstance(batch, Batch) for row in batch.rows]
    return f" Look at {', '.join(names)}." if names else ""


def _run_blank(model: nn.Module, batch: Mapping[str, Any], accelerator: Accelerator) -> torch.Tensor:
    """Run a micro-batch that counts for nothing, as other ranks run theirs: a loss of 0 with a gradient of 0."""
    inputs = on_device(batch, accelerator.device, without=("labels",))
    core = unwrap(model)
    with serving(core, batch):
        if isinstance(core, CustomDualEncoder):
            logits = model(**inputs).logits_per_image
        else:  # one token reaches every weight
            logits = model(**inputs, **({} if core.ignores_logits_to_keep else {"logits_to_keep": 1})).logits
    zero: torch.Tensor = logits.float().sum() * 0.0
    return zero


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the Accelerator of a run: its precision, its trackers, and DDP that lets a batch of text skip the tower."""
    process_state()
    for name in config.trackers:
        if name not in LoggerType.list():
            raise ValueError(unknown("tracker", name, LoggerType.list()))
    known = set(LoggerType.list()) - {LoggerType.ALL.value, *map(str, get_available_trackers())}
    if missing := known.intersection(config.trackers):  # Accelerate would go on without them
        names = " ".join(sorted(missing))
        raise ValueError(f"trackers={config.trackers}: {names} not installed; pip install it, or leave it out.")
    mixed_precision = "bf16" if config.precision == "bf16" else "no"
    if AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    check_processes(accelerator)
    wait_at_most(config.rank_seconds)
    return accelerator


def choose_precision(model: nn.Module, config: TrainConfig) -> Literal["fp32", "bf16"]:
    """Return the config's precision; without one, bf16 if the launcher asks for it or any weight is 16-bit."""
    if config.precision is not None:
        return config.precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise ValueError(f"accelerate was launched with mixed_precision={launched!r}; fit() trains in bf16 or fp32.")
    return "bf16" if launched == "bf16" or _low_precision(model) else "fp32"


def _low_precision(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)]


def set_precision(model: nn.Module, config: TrainConfig) -> None:
    """Keep trained weights in float32 under bf16 autocast, where a bfloat16 weight would lose small updates.

    Raises ValueError when 16-bit weights are to be used without autocast.
    """
    low = _low_precision(model)
    if low and config.precision == "fp32":
        raise ValueError(
            f"{len(low)} parameters are 16-bit ({low[0]} first) but precision is fp32: train with precision='bf16', or "
            "load the model with dtype='float32'."
        )
    for name in low:
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def checkpoint_activations(model: Any) -> None:
    """Recompute layers in the backward pass; transformers 5.23 renamed the method."""
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def split_batch(config: TrainConfig, num_processes: int) -> tuple[int, int]:
    """Return (rows of a micro-batch, micro-batches of a step); ValueError when batch_size cannot be cut so."""
    per_rank, rest = divmod(config.batch_size, num_processes)
    micro = config.micro_batch_size or per_rank
    if rest or per_rank == 0 or per_rank % micro:
        given = config.micro_batch_size
        cut = "" if given is None else f" in micro-batches of {given}"
        raise ValueError(
            f"batch_size={config.batch_size} rows cannot be shared by {num_processes} processes{cut}; choose a multiple "
            f"of {num_processes * (given or 1)}."
        )
    return micro, per_rank // micro


def run_evaluation(model: nn.Module, evaluate: Evaluate, step: int, run: dict[str, Any]) -> dict[str, float]:
    """Evaluate without gradients and without moving training's random state; the record of the run has the newest numbers."""
    model.eval()
    before = randomness.rng_state()
    with torch.no_grad():
        metrics = {name: float(value) for name, value in evaluate(unwrap(model), step).items()}
    randomness.set_rng_state(before)
    model.train()
    run["evaluation"] = {"step": step, "values": metrics}
    return metrics


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
