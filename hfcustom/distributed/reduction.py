"""DDP's exchange of gradients in one step, such that a rank whose memory runs out keeps no other waiting.

DistributedDataParallel exchanges buffers in the first forward of a step, and gradients while the last backward runs. A rank that
fails somewhere between has to take part all the same: buffers are exchanged before the step, and a failed rank lets the
hooks that its backward has not reached fire with zeros, which ends the exchange as the reducer (torch 2.13) expects it. What all
ranks then hold is thrown away. Ranks that share weights (FSDP, ZeRO) meet in every layer, which nothing here can make up for.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def meets_at_the_end(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether no rank waits for another before the last backward of a step."""
    return accelerator.num_processes == 1 or isinstance(model, DistributedDataParallel)


class Reduction:
    """The exchange of one step; does nothing where there is one process."""

    def __init__(self, model: nn.Module) -> None:
        self.ddp: Any = model if isinstance(model, DistributedDataParallel) else None
        self.root: torch.Tensor | None = None  # the loss whose backward exchanges gradients
        self.versions: dict[int, int | None] = {}

    def share_buffers(self) -> None:
        """Do now what DDP would do in the step's first forward."""
        if self.ddp is not None:
            # Also where the attempt before has failed before its first forward.
            self.ddp.require_forward_param_sync = True
            if self.ddp.will_sync_module_buffers():
                self.ddp._sync_buffers()
            self.ddp.require_forward_param_sync = False

    def begins(self, loss: torch.Tensor) -> None:
        """Note that the next backward is the one that exchanges gradients, and where they stand."""
        if self.ddp is not None:
            self.root = loss
            self.versions = {id(parameter): _version(parameter) for parameter in self._parameters()}

    def ended(self) -> None:
        """Note that the backward has run."""
        self.root = None

    def missing(self) -> list[nn.Parameter]:
        """Return the parameters that the failed backward of this rank has not reached, and let go of its graph."""
        if self.ddp is None or not self.versions:  # gradients are exchanged anew, all of them
            return []
        used = set() if self.root is None else _reached(self.root)
        self.root = None
        waiting = [p for p in self._parameters() if id(p) in used and _version(p) == self.versions[id(p)]]
        return waiting

    def end_with_zeros(self, missing: list[nn.Parameter]) -> None:
        """Take this rank's part in what other ranks still wait for."""
        if self.ddp is None:
            return
        if not self.versions:  # no backward has begun: one parameter stands for all, which count as unused
            missing = [min(self._parameters(), key=lambda parameter: parameter.numel())]
            self.ddp.reducer.prepare_for_backward([missing[0].sum() * 0])
        zeros = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in missing]
        torch.autograd.backward(missing, zeros)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.ddp.module.parameters() if parameter.requires_grad]


def _version(parameter: nn.Parameter) -> int | None:
    """Return what changes with a parameter's gradient."""
    return None if parameter.grad is None else parameter.grad._version


def _reached(root: torch.Tensor) -> set[int]:
    """Return the ids of the parameters that a backward from `root` gives a gradient to."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [root.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "AccumulateGrad" in node.name():
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found
