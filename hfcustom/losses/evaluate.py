"""Evaluate the configured losses of one batch: sums, shares of the total, and the gradient's graph.

LossContext -> total (), {name: LossValue}. Token losses go through one pass over chunks of logits together
(hfcustom/losses/chunked.py); each term is a function of the context.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfcustom.losses.chunked import Work, accumulation_dtype, token_loss_total
from hfcustom.losses.config import WeightedLoss
from hfcustom.losses.context import LossContext, Supervised
from hfcustom.losses.contract import liked_labels
from hfcustom.losses.inputs import token_inputs
from hfcustom.losses.kernels import fused_cross_entropy
from hfcustom.losses.values import PROVEN, check_finite

Divisors = Mapping[str, float | torch.Tensor]


@dataclass(frozen=True)
class LossValue:
    """One loss in one batch: `share` is what it adds to the total, weight * sum / divisor."""

    sum: torch.Tensor  # ()
    count: float
    weight: float
    share: torch.Tensor  # ()


def evaluate(
    context: LossContext, losses: Sequence[WeightedLoss], divisors: Divisors | None = None, step: int | None = None
) -> tuple[torch.Tensor, dict[str, LossValue]]:
    """Return the total loss and the value of each named loss.

    `divisors` gives each loss's count over the whole optimiser step; without it, this batch is the step. `step` is the
    optimiser step, which scheduled weights depend on. A batch in which a loss has nothing to count adds zero, with a zero
    gradient.
    """
    counts = {item.loss.name: _count(context, item) for item in losses}
    divisors = counts if divisors is None else divisors
    weights = {item.loss.name: item.weight_at(step) for item in losses}
    values: dict[str, LossValue] = {}
    total = context.hidden_states[:0].sum().float()  # zero that keeps the graph

    def add(name: str, sum_: torch.Tensor, share: torch.Tensor) -> None:
        values[name] = LossValue(sum_.detach(), counts[name], weights[name], share.detach())

    tokens = [item for item in losses if not item.loss.is_term]
    if tokens:
        scales = torch.stack([_scale(weights[item.loss.name], divisors[item.loss.name], total) for item in tokens])
        share, sums = _token_losses(context, tokens, scales)
        total = total + share
        for item, sum_, scale in zip(tokens, sums, scales, strict=True):
            add(item.loss.name, sum_, sum_ * scale)
    for item in losses:
        if item.loss.is_term:
            sum_ = _term(context, item, counts[item.loss.name])
            share = sum_ * _scale(weights[item.loss.name], divisors[item.loss.name], total)
            total = total + share
            add(item.loss.name, sum_, share)
    return total, {item.loss.name: values[item.loss.name] for item in losses}


def _count(context: LossContext, item: WeightedLoss) -> float:
    return item.loss.count_in(context.batch, context.model.config.image_token_id, item.options)


def _scale(weight: float, divisor: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return weight / divisor (), and 0 where nothing is counted, without asking a device for the divisor."""
    count = torch.as_tensor(divisor, dtype=torch.float32, device=like.device)
    return torch.where(count == 0, 0.0, weight / count)


def _token_losses(
    context: LossContext, losses: Sequence[WeightedLoss], scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    liked = liked_labels(context.batch)
    chosen: Supervised = context.supervised if liked is context.batch["labels"] else context.select(liked)
    names = dict.fromkeys(name for item in losses for name in item.loss.inputs)
    inputs = token_inputs(context, liked, chosen, names) if names and len(chosen.targets) else {}
    work = Work(chosen.targets, losses, scales, inputs)
    fused = fused_cross_entropy(context.head, chosen.hidden, work)
    return token_loss_total(context.head, chosen.hidden, work) if fused is None else fused


def _term(context: LossContext, item: WeightedLoss, expected: float) -> torch.Tensor:
    """Return the sum of a term, checked."""
    loss = item.loss
    if expected == 0:
        return context.hidden_states[:0].sum().float()
    context.running = loss.name
    result = loss.function(context, **item.options)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"Term {loss.name!r} returned {type(result).__name__}; it must return (sum, count). Do not average: "
            "hfcustom divides by the count over the whole optimiser step."
        )
    total, count = result
    if not isinstance(total, torch.Tensor) or total.ndim != 0:
        found = f"shape {tuple(total.shape)}" if isinstance(total, torch.Tensor) else type(total).__name__
        raise ValueError(f"Term {loss.name!r} returned a sum of {found}; it must be a scalar tensor.")
    if not isinstance(count, int | float | torch.Tensor) or abs(float(count) - expected) > 1e-4 * expected:
        raise ValueError(
            f"Term {loss.name!r} summed over {count} items, but count={loss.count!r} finds {expected} in this batch. "
            "The divisor must be known before the forward pass: return that count, or give @term a function of the batch."
        )
    if loss.function not in PROVEN:
        check_finite(f"Term {loss.name!r}", total.detach())
        PROVEN.add(loss.function)
    return total.float() if total.dtype in (torch.bfloat16, torch.float16) else total


# ---- terms whose value for a row depends on the other rows of the step ----------------------------------------------


@torch.no_grad()
def summarise(context: LossContext, losses: Sequence[WeightedLoss]) -> dict[str, torch.Tensor]:
    """Return the summary of each term that has one, for one batch: {name: (n, ...)}."""
    found = {}
    for item in losses:
        if item.loss.summary is not None and _count(context, item):
            context.running = item.loss.name
            values = item.loss.summary(context, **_named(item))
            found[item.loss.name] = values.to(accumulation_dtype(values))
    return found


def _named(item: WeightedLoss) -> dict[str, Any]:
    assert item.loss.summary is not None
    wanted = list(inspect.signature(item.loss.summary).parameters)[1:]
    given = {name: option.default for name, option in item.loss.options().items()} | item.options
    return {name: given[name] for name in wanted}
