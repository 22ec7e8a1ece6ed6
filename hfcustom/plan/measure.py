"""One training step of a planned run, without values: the code that trains, and what it takes of memory.

config, build -> Measured. `build` is the recipe's own: it loads and adapts the model. From there on set_up(), make_optimizer(),
Accelerator.prepare() and train_step() of hfcustom/train.py run as they do in fit().
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from hfcustom.data.collate import Batch
from hfcustom.distributed.sharding import block_classes
from hfcustom.parts import unwrap
from hfcustom.plan.batches import batch_tokens
from hfcustom.plan.simulation import ELSEWHERE, Ledger, simulate
from hfcustom.plan.state import PartMemory, memory_by_part, named_memory
from hfcustom.plan.weights import without_weights
from hfcustom.train import choose_precision, make_accelerator, make_optimizer, set_up, split_batch, train_step
from hfcustom.training.averaging import Average

Build = Callable[[Any], tuple[Any, Any]]  # config -> model, processor
MakeBatches = Callable[
    [Any, Any, Any], list[Batch]
]  # core, processor, config -> micro-batches, of which any may cost most


@dataclass(frozen=True)
class ParameterBytes:
    """What one parameter takes, and its first dimension, along which FSDP cuts it."""

    rows: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Measured:
    """What one training step of one GPU takes, in bytes."""

    class_name: str
    precision: str
    trainable: int  # parameters
    parts: list[PartMemory]
    parameters: list[ParameterBytes]
    largest_unit: ParameterBytes  # what FSDP and ZeRO-3 gather at once: the largest block, or all outside of blocks
    batch: dict[str, int]
    micro_batches: int  # of the step that was run: 1, or 2 where gradients wait for more
    peak: int
    at_peak: dict[str, int]
    activations: int  # the most there were at any moment
    offloaded: int  # of them in the CPU's memory

    def total(self, what: str) -> int:
        """Return weights, adapters, gradients, optimizer or average over all parts."""
        return sum(int(vars(part)[what]) for part in self.parts)


def measure(config: Any, build: Build, make_batches: MakeBatches) -> Measured:
    """Run a step of a planned run on a simulated device; errors as the recipe's own, and those of the batch."""
    config = copy.copy(config)
    config.trackers, config.cache_images, config.cache_features = [], None, None
    with simulate() as ledger:
        with without_weights():
            model, processor = build(config)
        with _disable_current_modes():
            batches = make_batches(unwrap(model), processor, config)
        return _run(model, batches, config, ledger)


def _run(model: Any, batches: list[Batch], config: Any, ledger: Ledger) -> Measured:
    core = unwrap(model)
    config.precision = choose_precision(model, config)
    accelerator = make_accelerator(config)
    set_up(model, config, accelerator)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    average = Average(model, config.ema_decay, accelerator).values
    prepared.train()
    core.loss_step = 0
    kept = [tensor for model in (core, *core.companions.values()) for _, tensor in named_memory(model)]
    for tensor in kept:
        ledger.mark(tensor, "weights")
    for value in average.values():
        ledger.mark(value, "average")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda own: ledger.mark(own.grad, "gradients"))
    accumulation = 2 if config.packing else min(2, split_batch(config, config.gpus)[1])
    most = max(
        (_step(prepared, optimizer, [batch] * accumulation, accelerator, config, ledger) for batch in batches),
        key=lambda step: sum(step.at_peak.values()),
    )
    return Measured(
        class_name=type(core).__name__,
        precision=config.precision,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        parts=memory_by_part(model, optimizer, average),
        parameters=[_bytes_of(parameter, optimizer) for parameter in model.parameters()],
        largest_unit=_largest_unit(core, optimizer),
        batch=most.batch,
        micro_batches=accumulation,
        peak=sum(most.at_peak.values()),
        at_peak={kind: size for kind, size in most.at_peak.items() if size},
        activations=most.activations,
        offloaded=most.offloaded,
    )


@dataclass(frozen=True)
class Step:
    """What one training step took."""

    batch: dict[str, int]
    at_peak: dict[str, int]
    activations: int
    offloaded: int


def _step(model: Any, optimizer: Any, batches: list[Batch], accelerator: Any, config: Any, ledger: Ledger) -> Step:
    """Run a step; its peak is that of a run that goes on, in which the optimiser's state is there from the start."""
    for tensor in batches[0].values():
        ledger.mark(tensor, "batch")
    gc.collect()
    ledger.forget_peak()
    before: dict[str, int] = {}
    most: dict[str, int] = {}

    def at_step(*_: Any) -> None:
        before.update(ledger.at_peak)
        most.update(ledger.most)
        ledger.forget_peak()

    hook = optimizer.optimizer.register_step_pre_hook(at_step)
    train_step(model, batches, optimizer, accelerator, config)
    hook.remove()
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor):
                ledger.mark(value, "optimizer")
    before["optimizer"] = ledger.alive["optimizer"]
    at_peak = max((before, ledger.at_peak), key=lambda kinds: sum(kinds.values()))
    activations, offloaded = (max(most.get(kind, 0), ledger.most.get(kind, 0)) for kind in ("activations", ELSEWHERE))
    return Step(batch_tokens(batches[0]), at_peak, activations, offloaded)


def _bytes_of(parameter: nn.Parameter, optimizer: Any) -> ParameterBytes:
    size = parameter.numel() * parameter.element_size()
    state = optimizer.state.get(parameter, {})
    held = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    return ParameterBytes(parameter.shape[0] if parameter.ndim else 1, size, size if held else 0, held)


def _largest_unit(core: Any, optimizer: Any) -> ParameterBytes:
    """Return what is gathered at once: blocks that transformers says must stay whole, and the rest around them."""
    whole = block_classes(core)
    blocks = [module for module in core.modules() if type(module).__name__ in whole]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    units = [list(block.parameters()) for block in blocks]
    units.append([parameter for parameter in core.parameters() if id(parameter) not in inside])
    sums = []
    for unit in units:
        found = [_bytes_of(parameter, optimizer) for parameter in unit]
        sums.append(ParameterBytes(1, sum(one.weights for one in found), sum(one.gradients for one in found), 0))
    return max(sums, key=lambda unit: unit.weights + unit.gradients)


def share(size: int, rows: int, gpus: int) -> int:
    """Return a GPU's share of a tensor that is cut along its first dimension."""
    return math.ceil(rows / gpus) * (size // rows) if rows else 0
