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
from hfcustom.parts import unwrap
from hfcustom.plan.batches import batch_tokens
from hfcustom.plan.simulation import Ledger, Simulation, simulate
from hfcustom.plan.state import PartMemory, memory_by_part, named_memory
from hfcustom.plan.weights import without_weights
from hfcustom.train import choose_precision, make_accelerator, make_optimizer, set_up, split_batch, train_step

Build = Callable[[Any], tuple[Any, Any]]  # config -> model, processor
MakeBatch = Callable[[Any, Any, Any], Batch]  # core, processor, config -> a micro-batch


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

    def total(self, what: str) -> int:
        """Return weights, adapters, gradients or optimizer over all parts."""
        return sum(int(vars(part)[what]) for part in self.parts)


def measure(config: Any, build: Build, make_batch: MakeBatch) -> Measured:
    """Run a step of a planned run on a simulated device; errors as the recipe's own, and those of the batch."""
    config = copy.copy(config)
    config.trackers, config.cache_images, config.cache_features = [], None, None
    with simulate() as (simulation, ledger):
        with without_weights():
            model, processor = build(config)
        with _disable_current_modes():
            batch = make_batch(unwrap(model), processor, config)
        return _run(model, batch, config, simulation, ledger)


def _run(model: Any, batch: Batch, config: Any, simulation: Simulation, ledger: Ledger) -> Measured:
    core = unwrap(model)
    config.precision = choose_precision(model, config)
    accelerator = make_accelerator(config)
    set_up(model, config, accelerator)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    prepared.train()
    core.loss_step = 0
    _make_state(optimizer)
    own: dict[str, list[torch.Tensor]] = {"weights": [tensor for _, tensor in named_memory(core)]}
    own["weights"] += [tensor for other in core.companions.values() for _, tensor in named_memory(other)]
    own["optimizer"] = [value for values in optimizer.state.values() for value in values.values()]
    for name, value in batch.items():
        batch[name] = simulation.without_values(value) if value.is_floating_point() else value
    own["batch"] = list(batch.values())
    for kind, tensors in own.items():
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                ledger.mark(tensor, kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda own: ledger.mark(own.grad, "gradients"))
    gc.collect()
    ledger.forget_peak()
    accumulation = 2 if config.packing else min(2, split_batch(config, config.gpus)[1])
    train_step(prepared, [batch] * accumulation, optimizer, accelerator, config)
    return Measured(
        class_name=type(core).__name__,
        precision=config.precision,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        parts=memory_by_part(model, optimizer),
        parameters=[_bytes_of(parameter, optimizer) for parameter in model.parameters()],
        largest_unit=_largest_unit(core, optimizer),
        batch=batch_tokens(batch),
        micro_batches=accumulation,
        peak=ledger.peak,
        at_peak={kind: size for kind, size in ledger.at_peak.items() if size},
        activations=ledger.most.get("activations", 0),
    )


def _make_state(optimizer: Any) -> None:
    """Have an optimiser make its state, as its first step does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _bytes_of(parameter: nn.Parameter, optimizer: Any) -> ParameterBytes:
    size = parameter.numel() * parameter.element_size()
    state = optimizer.state.get(parameter, {})
    held = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    return ParameterBytes(
        parameter.shape[0] if parameter.ndim else 1, size, size if parameter.requires_grad else 0, held
    )


def _largest_unit(core: Any, optimizer: Any) -> ParameterBytes:
    """Return what is gathered at once: blocks that transformers says must stay whole, and the rest around them."""
    whole = set(core._no_split_modules or ())
    blocks = [module for module in core.modules() if type(module).__name__ in whole]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    units = [list(block.parameters()) for block in blocks]
    units.append([parameter for parameter in core.parameters() if id(parameter) not in inside])
    sums = []
    for unit in units:
        found = [_bytes_of(parameter, optimizer) for parameter in unit]
        sums.append(
            ParameterBytes(1, *(sum(getattr(one, name) for one in found) for name in ("weights", "gradients")), 0)
        )
    return max(sums, key=lambda unit: unit.weights + unit.gradients)


def share(size: int, rows: int, gpus: int) -> int:
    """Return a GPU's share of a tensor that is cut along its first dimension."""
    return math.ceil(rows / gpus) * (size // rows) if rows else 0
