"""fit(): the training loop, an Accelerate loop to read and to change.

rows -> batches (hfcustom/data/) -> train_step -> log (hfcustom/console.py), checkpoints (hfcustom/training/checkpoint.py).
One optimiser step sees `batch_size` rows, whatever the number of processes and micro-batches they are cut into, and each
loss is divided by its count over all of them, so that the cut changes neither loss nor gradient.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed
from torch import nn
from transformers.utils import logging

from hfcustom import randomness
from hfcustom.cache.run import Caches, check_caches, open_caches, use_caches
from hfcustom.connectors.added_tower import check_weights
from hfcustom.console import TrainLog, out
from hfcustom.custom_model import CustomModel, check_registered
from hfcustom.data.captions import CaptionCollator
from hfcustom.data.collate import Collator
from hfcustom.data.feed import Feed, Steps, as_rows
from hfcustom.data.packing import make_packer
from hfcustom.data.sighted import sighted
from hfcustom.distributed import sharding, zero
from hfcustom.distributed.ranks import check_processes, explained, process_state, wait_at_most
from hfcustom.distributed.shared_work import evaluating
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.exits import EXIT_PREEMPTED, ConfigError
from hfcustom.losses import loss_columns, token_columns
from hfcustom.naming import unknown
from hfcustom.noise import set_noise
from hfcustom.parts import unwrap
from hfcustom.record import begin_run, run_of
from hfcustom.runs.folder import run_folder
from hfcustom.train_config import TrainConfig
from hfcustom.training import checkpoint
from hfcustom.training.averaging import Average
from hfcustom.training.costliest import Trial
from hfcustom.training.coverage import every_part_learns
from hfcustom.training.offload import check_offloading
from hfcustom.training.optimizers import make_optimizer, set_lr
from hfcustom.training.signals import StopRequest
from hfcustom.training.splitting import Splitter
from hfcustom.training.step import StepReport as StepReport
from hfcustom.training.step import train_step
from hfcustom.training.work import watching_work

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

    `evaluate(model, step)` returns named numbers for the log every `eval_steps`; every process calls it, and hfcustom.over_ranks
    shares its work. Raises TypeError for a model that is not
    custom, ValueError for a config out of range, a class that is not registered, no rows, a batch size that the processes
    cannot share and a model of which nothing is trainable, RowError for a row that cannot be used.
    """
    config, rows = _checked(model, config, evaluate), as_rows(rows)
    accelerator = make_accelerator(config)
    with run_folder(config, accelerator), explained(config.output_dir), counting_steps(unwrap(model)):
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
    model, optimizer = sharding.prepare(model, make_optimizer(model, config), accelerator, config)
    state = checkpoint.Checkpoints(config, accelerator, model, optimizer, processor, feed)
    start = state.resume() if config.resume else state.begin()
    run = begin_run(core, run_of(state.unwrapped, config, feed), config.resume) if accelerator.is_main_process else {}
    spikes = state.spikes.record_in(run)
    collate = make_ready(feed, model, processor, config, accelerator)
    trial = Trial(model, optimizer, feed, copy.copy(collate), accelerator, config)
    cut, packer = trial.settle(cut, make_packer(core, config))
    steps = Steps(lambda first: feed.loader(collate, range(first, max_steps), cut, packer), start, feed.watch)
    bad_rows = feed.bad_rows(start)
    splitter = Splitter(model, optimizer, feed, bad_rows, accelerator, config)
    state.restore_rng()  # after the iterator exists: making one draws random numbers
    model.train()
    step, stopped = start, False
    with (
        closing(steps),
        StopRequest() as stop,
        feed.watch.naming_deaths(),
        every_part_learns(model, optimizer),
        use_caches(core, feed.caches, accelerator),
        watching_work(model, config, accelerator) as work,
        TrainLog(config, accelerator, weighted, start, max_steps, state.history, feed.source_names, core, work) as log,
        splitter.noting(log, run, trial.halved),
    ):
        log.restore_window(state.pending)
        while step < max_steps and not stopped:
            set_lr(optimizer, step, max_steps, config)
            core.loss_step = step
            batches = spikes.left(step + 1, feed.next_batches(steps, bad_rows))
            with log.counting(batches):
                report = train_step(model, batches, optimizer, accelerator, config, splitter) if batches else None
            if spikes.found(step + 1, report, log):
                step = spikes.go_back(step + 1, state, steps, bad_rows, log)
                continue
            run["steps"] = step = step + 1
            if report is not None:
                state.average.update()
            log.step(step, report, optimizer)
            if evaluate is not None and _due(step, config.eval_steps):
                log.metrics(step, run_evaluation(model, evaluate, step, run, state.average))
            stopped = stop.agreed(accelerator)
            if _due(step, config.save_steps) or stopped or step == max_steps:
                state.save(step, log.history, log.pending())
    finished = step >= max_steps
    return TrainResult(step, not finished, log.history, state.publish() if finished else state.model_dir())


def set_up(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> None:
    """Give a model the run's precision, noise, recomputation, and its companions the run's device; tell FSDP its blocks."""
    core = unwrap(model)
    check_offloading(config, accelerator)
    if sharding.uses_fsdp(accelerator):
        sharding.check_shardable(model, config)
        sharding.name_blocks(model, accelerator)
    if zero.uses_zero(accelerator):
        zero.check_model(model, config)
    set_precision(model, config)
    set_noise(core, config.neftune_alpha)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    for companion in core.companions.values():
        companion.to(accelerator.device)


def make_ready(
    feed: Feed, model: nn.Module, processor: Any, config: TrainConfig, accelerator: Accelerator
) -> Collator | CaptionCollator:
    """Open what a run's rows are read through, its caches included; return the collator."""
    core = unwrap(model)
    feed.sighted = sighted(core, model, accelerator)
    feed.caches = open_caches(model, processor, config, accelerator)
    return make_collator(core, processor, config, feed.first_columns(core.losses()), feed.caches)


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
        raise ConfigError(f"eval_steps={config.eval_steps} and evaluate={evaluate} have an effect only together.")
    check_caches(model, config)
    check_weights(core)
    chosen = copy.copy(config)  # replace() would forget where its options came from
    chosen.precision = choose_precision(model, config)
    return chosen


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the Accelerator of a run: its precision, its trackers, and DDP that lets a batch of text skip the tower."""
    sharding.check_launcher()
    process_state()
    for name in config.trackers:
        if name not in LoggerType.list():
            raise ConfigError(unknown("tracker", name, LoggerType.list()))
    known = set(LoggerType.list()) - {LoggerType.ALL.value, *map(str, get_available_trackers())}
    if missing := known.intersection(config.trackers):  # Accelerate would go on without them
        names = " ".join(sorted(missing))
        raise ConfigError(f"trackers={config.trackers}: {names} not installed; pip install it, or leave it out.")
    deepspeed = zero.plugin(config) if zero.is_asked_for() else None
    mixed_precision = "bf16" if config.precision == "bf16" and deepspeed is None else "no"
    before = AcceleratorState._shared_state.get("_mixed_precision", mixed_precision)
    if before != mixed_precision or deepspeed is not None:
        sharding.forget_precision()  # an earlier run of this process had another one
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        deepspeed_plugin=deepspeed,
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
        raise ConfigError(f"accelerate was launched with mixed_precision={launched!r}; fit() trains in bf16 or fp32.")
    return "bf16" if launched == "bf16" or _low_precision(model) else "fp32"


def _low_precision(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)]


def set_precision(model: nn.Module, config: TrainConfig) -> None:
    """Keep trained weights in float32 under bf16 autocast, where a bfloat16 weight would lose small updates.

    Raises ValueError when 16-bit weights are to be used without autocast.
    """
    low = _low_precision(model)
    if low and config.precision == "fp32":
        raise ConfigError(
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
        raise ConfigError(
            f"batch_size={config.batch_size} rows cannot be shared by {num_processes} processes{cut}; choose a multiple "
            f"of {num_processes * (given or 1)}."
        )
    return micro, per_rank // micro


def run_evaluation(
    model: nn.Module, evaluate: Evaluate, step: int, run: dict[str, Any], average: Average
) -> dict[str, float]:
    """Evaluate a model, as the average of its weights if there is one; the record of the run has the newest numbers.

    There are no gradients, and training's random state is not moved.
    """
    model.eval()
    before = randomness.rng_state()
    with average.in_place(), torch.no_grad(), sharding.gathered(model), evaluating():
        metrics = {name: float(value) for name, value in evaluate(unwrap(model), step).items()}
    randomness.set_rng_state(before)
    model.train()
    run["evaluation"] = {"step": step, "values": metrics}
    return metrics


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
