"""Sum token losses over supervised positions in chunks of the vocabulary product.

hidden (M, D) -> logits of one chunk (C, V), float32 -> each loss's (C,) values -> sums (K,). A chunk's logits live only
while the chunk is evaluated; the backward pass recomputes them, so that any user-written loss costs the memory of one
chunk, whatever M and V. The head is called as a module, so a bias, a tied or quantised weight or a LoRA on it all count.
Letters: M supervised tokens, C tokens of a chunk, D hidden, V vocabulary, K losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from hfcustom.losses import WeightedLoss

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32


def token_loss_sums(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    losses: list[WeightedLoss],
) -> torch.Tensor:
    """Return the sum of each loss over all targets: (K,) float32, with gradients to `hidden` and the head."""
    sums = hidden.new_zeros(len(losses), dtype=torch.float32)  # (K,)
    if not losses or not len(targets):
        return sums + hidden[:0].sum().float()  # zero that keeps the graph

    def evaluate(chunk: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(chunk)  # (C, V)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            return torch.stack([_checked(item, logits, wanted).sum() for item in losses])  # (K,)

    size = max(16, CHUNK_ELEMENTS // vocabulary_size(head, hidden))
    if len(targets) <= size:
        return sums + evaluate(hidden, targets)
    for chunk, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled():
            sums = sums + checkpoint(evaluate, chunk, wanted, use_reentrant=False)
        else:
            sums = sums + evaluate(chunk, wanted)
    return sums


def vocabulary_size(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> int:
    """Return V, the width of the head's output."""
    with torch.no_grad():
        return head(hidden[:0]).shape[-1]


def _checked(item: WeightedLoss, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    values = item.loss.function(logits, targets, **item.options)
    shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
    if shape != tuple(targets.shape):
        raise ValueError(
            f"Token loss {item.loss.name!r} returned {shape} for {len(targets)} targets; it must return one value a target, "
            f"shape {tuple(targets.shape)}. Do not average (reduction='none'): hfcustom divides by the supervised tokens "
            "of the whole optimiser step."
        )
    if torch.is_grad_enabled() and logits.requires_grad and not values.requires_grad:
        raise ValueError(
            f"Token loss {item.loss.name!r} returned values without a gradient ({values.dtype}), so nothing would be learnt: "
            "compute them from the logits, without detach, argmax or a comparison alone."
        )
    return values
