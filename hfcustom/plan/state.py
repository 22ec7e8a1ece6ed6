"""State: the bytes that weights, adapters, gradients and the optimiser's state take, by part; of a real model or one without values.

model, optimizer -> [PartMemory, ...]. Every tensor is counted by its storage, once: a tied head takes nothing, and what
bitsandbytes keeps beside a packed weight (scales, code books) belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfcustom.parts import find_parts, unwrap

QUANT_STATE = ("absmax", "code", "offset")


@dataclass
class PartMemory:
    """Bytes of one part; `weights` include buffers and frozen copies, `adapters` are LoRA's matrices, `average` that of ema_decay."""

    part: str
    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    dtypes: str = ""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.average


def memory_by_part(
    model: Any, optimizer: torch.optim.Optimizer | None = None, average: Mapping[str, torch.Tensor] | None = None
) -> list[PartMemory]:
    """Count a model as it is trained, after a step: the optimiser's state, and a gradient for whatever has such a state.

    `average` is that of the trained weights, by name (hfcustom/training/averaging.py).
    """
    core = unwrap(model)
    part_map = find_parts(model)
    rows = {part: PartMemory(part) for part in part_map.present()}
    dtypes: dict[str, set[str]] = {part: set() for part in rows}
    seen: set[int] = set()
    owners: dict[int, str] = {}
    for name, tensor in named_memory(model):
        part = part_map.find(name) or "other"
        row = rows.setdefault(part, PartMemory(part))
        size = _new_bytes(tensor, seen)
        if ".lora_" in name:
            row.adapters += size
        else:
            row.weights += size
        if isinstance(tensor, nn.Parameter) and size:
            dtypes.setdefault(part, set()).add(str(tensor.dtype).removeprefix("torch."))
            owners[id(tensor)] = part
            row.gradients += size if optimizer is not None and optimizer.state.get(tensor) else 0
    for parameter, values in optimizer.state.items() if optimizer is not None else ():
        row = rows[owners[id(parameter)]]
        row.optimizer += sum(_new_bytes(value, seen) for value in values.values() if isinstance(value, torch.Tensor))
    for name, value in (average or {}).items():
        rows[part_map.part_of(name)].average += _new_bytes(value, seen)
    for name, companion in core.companions.items():
        rows[name] = PartMemory(name, weights=sum(_new_bytes(tensor, seen) for _, tensor in named_memory(companion)))
    for part, found in dtypes.items():
        rows[part].dtypes = ", ".join(sorted(found))
    return list(rows.values())


def named_memory(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that a model keeps, with its path: parameters, buffers, and what quantised weights carry along."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        holders = [vars(module).get("state"), module.weight, vars(module.weight).get("quant_state")]
        holders.append(getattr(holders[-1], "state2", None))
        for holder in (holder for holder in holders if holder is not None):
            for name in ("CB", "SCB", *QUANT_STATE):
                tensor = getattr(holder, name, None)
                if isinstance(tensor, torch.Tensor):
                    yield f"{path}.weight", tensor


def _new_bytes(tensor: torch.Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()
