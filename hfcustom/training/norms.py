"""The gradient's norm by part: parameter groups of a whole step, reduced and not yet clipped -> {part: norm}."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def part_norms(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return the norm of the gradient of each part, whose squares sum to that of the whole; nothing where one part is trained.

    Every rank has to ask: of a model that FSDP2 has sharded, each holds a shard.
    """
    by_part: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        if "part" in group:
            found = by_part.setdefault(group["part"], [])
            found += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
    if len(by_part) < 2 or not any(by_part.values()):
        return {}
    return {part: _norm(gradients) for part, gradients in by_part.items()}


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not shards:
        return get_total_norm(whole)
    norm: torch.Tensor = get_total_norm(shards).full_tensor()  # type: ignore[attr-defined]
    return torch.linalg.vector_norm(torch.stack([norm, get_total_norm(whole).to(norm)])) if whole else norm
