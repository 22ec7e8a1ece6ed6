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
from transformers.utils import logging

from hfcustom.losses.chunked import Work, accumulation_dtype, token_loss_total
from hfcustom.losses.config import WeightedLoss
from hfcustom.losses.context import LossContext, Supervised
from hfcustom.losses.contract import IGNORE, liked_labels
from hfcustom.losses.inputs import token_inputs
from hfcustom.losses.kernels import fused_cross_entropy
from hfcustom.losses.values import check_finite, is_proven, mark_proven

logger = logging.get_logger("hfcustom")

Divisors = Mapping[str, float | torch.Tensor]


@dataclass(frozen=True)
class LossValue:
    """One loss in one batch: `mean` is sum / divisor, so that those of a step's batches add up to the loss of the step."""

    sum: torch.Tensor  # ()
    count: float
    weight: float
    mean: torch.Tensor  # ()

    @property
    def share(self) -> torch.Tensor:
        """What the loss adds to the total."""
        return self.weight * self.mean


def evaluate(
    context: LossContext,
    losses: Sequence[WeightedLoss],
    divisors: Divisors | None = None,
    step: int | None = None,
    counts: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, LossValue]]:
    """Return the total loss and the value of each named loss.

    `divisors` gives each loss's count over the whole optimiser step; without it, this batch is the step. `step` is the
    optimiser step, which scheduled weights depend on; `counts` are those of this batch, where they are known. A batch in which a loss has nothing to count adds zero, with a zero
    gradient.
    """
    counts = counts or {item.loss.name: _count(context, item) for item in losses}
    divisors = counts if divisors is None else divisors
    weights = {item.loss.name: item.weight_at(step) for item in losses}
    values: dict[str, LossValue] = {}
    total = context.hidden_states[:0].sum().float()  # zero that keeps the graph

    tokens = [item for item in losses if not item.loss.is_term]
    units = {name: _unit(divisor, total) for name, divisor in divisors.items()}
    sums: dict[str, torch.Tensor] = {}
    if tokens:
        scales = torch.stack([weights[item.loss.name] * units[item.loss.name] for item in tokens])  # (K,)
        share, found = _token_losses(context, tokens, scales)
        total = total + share
        sums = dict(zip((item.loss.name for item in tokens), found, strict=True))
    for item in losses:
        name = item.loss.name
        if item.loss.is_term:
            sums[name] = _term(context, item, counts[name])
            total = total + weights[name] * units[name] * sums[name]
    for name, sum_ in sums.items():
        sum_ = sum_.detach()
        values[name] = LossValue(sum_, counts[name], weights[name], sum_ * units[name])
    return total, {item.loss.name: values[item.loss.name] for item in losses}


def spread_items(
    num_items: torch.Tensor | int, labels: torch.Tensor, counts: Mapping[str, float]
) -> dict[str, torch.Tensor | float]:
    """Spread a step's count of labels, all that transformers.Trainer knows, over every loss of a batch.

    Exact for losses that count supervised tokens. Another's own count over the step is unknown there unless LossCallback
    is added to the trainer, so each batch's mean is weighted by the batch's share of the labels.
    """
    num_labels = max(int((labels[:, 1:] != IGNORE).sum()), 1)
    return {name: num_items * (count / num_labels) for name, count in counts.items()}


def check_whole_step(losses: Sequence[WeightedLoss], labels: torch.Tensor, num_items: torch.Tensor | int) -> None:
    """Raise ValueError for a term across the rows of a step, of which this batch is only a part that sees no other."""
    across = [item.loss.name for item in losses if item.loss.summary is not None]
    if across and int(num_items) != int((labels[:, 1:] != IGNORE).sum()):
        raise ValueError(
            f"{', '.join(across)} compares all rows of a step, but this batch is a part of one. Call "
            "hfcustom.LossCallback.add_to(trainer), which shows the model each step whole, as fit() does."
        )


def refuse_preference(batch: Mapping[str, Any]) -> None:
    """Raise ValueError where the parent's own loss would imitate rejected answers."""
    if batch.get("preference") is not None:
        raise ValueError(
            "loss='stock' knows no rejected answers and would imitate them; choose 'cross_entropy' or a preference loss, or "
            "train on rows of messages."
        )


def _count(context: LossContext, item: WeightedLoss) -> float:
    return item.loss.count_in(context.batch, context.model, item.options)


def _unit(divisor: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return 1 / divisor (), and 0 where nothing is counted, without asking a device for the divisor."""
    count = torch.as_tensor(divisor, dtype=torch.float32, device=like.device)
    return torch.where(count == 0, 0.0, 1 / count)


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
    if not total.requires_grad and torch.is_grad_enabled() and context.hidden_states.requires_grad:
        logger.warning_once(
            f"Term {loss.name!r} has no gradient here, so it trains nothing: what it looks at is frozen, or detached."
        )
    if not is_proven(item):
        check_finite(f"Term {loss.name!r}", total.detach())
        mark_proven(item)
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
