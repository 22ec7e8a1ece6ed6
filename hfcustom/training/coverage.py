"""Gradient coverage while training starts: a part that is to be trained and gets no gradient stops the run.

with every_part_learns(model, optimizer): ...  looks at gradients before the first optimiser steps, until each part that has
trainable parameters and was run has had one. Nothing is looked at after that. `hfcustom doctor` asks the same beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hfcustom.distributed import zero
from hfcustom.distributed.sharding import is_sharded, local_part
from hfcustom.exits import ConfigError
from hfcustom.parts import find_parts, unwrap

logger = logging.get_logger("hfcustom")
PATIENCE = 3  # steps of zeros: behind a gate that starts at zero, the gradient is zero until the gate has moved


@contextmanager
def every_part_learns(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Raise ConfigError before a step in which a part was run and none of its trainable parameters has a gradient.

    Zeros are given three steps. A step without a supervised token is not counted. It is a warning where every loss is a term,
    which may look at image features alone (a head that nothing asks for learns nothing, as it should), and where no part has
    a gradient (a loss with a margin may be content).
    """
    watched = _Watch(model)
    hooks = watched.hooks()
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
    if zero.is_engine(model):
        hooks.append(zero.LookHook(watched.look))
    else:
        hooks.append(inner.register_step_pre_hook(lambda *_: watched.look()))
    try:
        yield
    finally:
        for remove in hooks:
            remove.remove()


class _Watch:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.parts = model, find_parts(model)
        trainable: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                trainable.setdefault(self.parts.part_of(name), []).append((name, parameter))
        self.waiting = {part: parameters for part, parameters in trainable.items() if part != "other"}
        self.zeros = dict.fromkeys(self.waiting, 0)
        self.ran: set[str] = set()

    def hooks(self) -> list[Any]:
        core, found = unwrap(self.model), []
        modules = dict(core.named_modules())
        for part in self.waiting:
            for path in self.parts.paths[part]:
                if path in modules:
                    found.append(modules[path].register_forward_hook(self._noting(part)))
        return found

    def _noting(self, part: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self.ran.add(part)

        return note

    def look(self) -> None:
        """Take parts that have a gradient off the list; raise for one that should have."""
        if not self.waiting:
            return
        seen = self._seen()
        learning = {part for part in self.waiting if seen[f"learning {part}"]}
        idle = not learning and len(self.waiting) == len(self.zeros)  # no part has ever had a gradient
        if idle and not seen["counted"]:
            return self.ran.clear()  # nothing was asked of it
        for part in sorted(self.waiting.keys() - learning):
            if not seen[f"ran {part}"]:
                continue
            self.zeros[part] += 1
            reached = seen[f"reached {part}"]
            if (not reached and not idle) or self.zeros[part] >= PATIENCE:
                self._tell(part, reached, idle)
        for part in learning:
            del self.waiting[part]
        self.ran.clear()

    def _seen(self) -> dict[str, bool]:
        """Return what this step has shown; of a sharded model on any rank, as each has a part of every gradient."""
        seen = {"counted": any(value.count for value in unwrap(self.model).loss_values.values())}
        for part, parameters in self.waiting.items():
            seen[f"ran {part}"] = part in self.ran
            seen[f"reached {part}"] = any(p.grad is not None for _, p in parameters)
            seen[f"learning {part}"] = any(_has_gradient(p) for _, p in parameters)
        if is_sharded(self.model) or zero.is_engine(self.model):
            device = next(unwrap(self.model).parameters()).device
            flags = torch.tensor([float(flag) for flag in seen.values()], device=device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            seen = dict(zip(seen, flags.bool().tolist(), strict=True))
        return seen

    def _tell(self, part: str, reached: bool, idle: bool) -> None:
        message = self._message(part, reached)
        if not idle and not all(item.loss.is_term for item in unwrap(self.model).losses()):
            raise ConfigError(message)
        logger.warning(message)
        del self.waiting[part]

    def _message(self, part: str, reached: bool) -> str:
        parameters = self.waiting[part]
        what = f"a gradient of 0 in each of {PATIENCE} steps" if reached else "no gradient"
        why = "multiplied by zero" if reached else "detached, computed under no_grad, or left out"
        return (
            f"The part {part!r} is to be trained ({len(parameters)} tensors, {parameters[0][0]} first) and was run, but has "
            f"{what}: on the way to the loss its output is {why}. Freeze it, or look at what is overridden behind it; "
            "`hfcustom doctor` with --check gradients shows each part."
        )


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(local_part(parameter.grad).any())
