"""Token losses and log-probabilities without the (B, T, V) logits, with gradients computed where the logits are.

hidden (M, D), head -> for each chunk of C tokens: logits (C, V) float32 -> values and dL/dlogits, in place, slice by slice
-> gradients of hidden and head. The logits of a chunk exist once, are read back from cache for whatever function the
user wrote, and cost three matrix products, two with a frozen head; nothing is computed again in the backward pass.

That holds for a head that is a plain Linear. Any other (LoRA, 8 bits, capped or scaled logits, a hook) is called as the
module it is and computed again in the backward pass, chunk by chunk, which is right for whatever it does. So is any head
in float16, whose loss scale must be applied before gradients are rounded.
The gradient of softmax cross entropy is p - onehot; that it can be formed in the forward pass is the observation of
Liger Kernel (https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).
Letters: M supervised tokens, C tokens of a chunk, D hidden, V vocabulary, K losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hfcustom.losses.config import WeightedLoss
from hfcustom.losses.values import token_values
from hfcustom.seams import Seam

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32
SLICE_ELEMENTS = 2**20  # logits that a function sees at once on a CPU: 4 MiB, which stays in cache

CPU_BLOCK = 1024  # rows of the head that a CPU multiplies at once: 1.4 times faster than all, as they stay in cache

Module = Callable[[torch.Tensor], torch.Tensor]
Inputs = Mapping[str, Any]  # name -> (M, ...), or what can be sliced like it


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: the callable, and the Linear that it is when it is no more than that."""

    module: Module
    linear: nn.Linear | None = None

    @classmethod
    def of(cls, module: Module) -> Head:
        """Return the head for a callable, recognising a plain Linear."""
        return cls(module, module if isinstance(module, nn.Linear) and is_plain_linear(module) else None)

    def vocabulary_size(self, hidden: torch.Tensor) -> int:
        """Return V."""
        if self.linear is not None:
            return self.linear.out_features
        with torch.no_grad():
            return self.logits(hidden[:0]).shape[-1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states: (..., D) -> (..., V)."""
        return self.module(hidden)


def is_plain_linear(module: nn.Linear) -> bool:
    """Whether a module is nn.Linear itself with dense weights and nothing attached that a direct product would skip.

    A seam may be: the one on a head only keeps the stock forward from running it, and is over when a loss is evaluated.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    attached = [hook for registered in hooks for hook in registered.values() if not isinstance(hook, Seam)]
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not attached
    )


@dataclass(frozen=True)
class Work:
    """What is to be summed over the tokens: losses, and what one unit of each adds to the total (weight / divisor)."""

    targets: torch.Tensor  # (M,)
    losses: Sequence[WeightedLoss]
    scales: torch.Tensor  # (K,)
    inputs: Inputs = field(default_factory=dict)

    def part(self, rows: slice) -> Work:
        """Return the work on some of the tokens."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return Work(self.targets[rows], self.losses, self.scales, inputs)


def token_loss_total(head: Head, hidden: torch.Tensor, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum_k scales[k] * sums[k], with gradients to `hidden` and the head, and the sums (K,), without."""
    if not work.losses or not len(work.targets):
        zero = hidden[:0].sum().to(accumulation_dtype(hidden))  # keeps the graph
        return zero, zero.detach().expand(len(work.losses))
    if head.linear is not None and product_dtype(hidden) != torch.float16:  # its loss scale has to come first
        weight, bias = head.linear.weight, head.linear.bias
        if torch.is_grad_enabled():
            return _LinearLoss.apply(hidden, weight, bias, work)
        return _linear_loss(hidden, weight, bias, work, product_dtype(hidden), (False, False, False))[:2]
    return _any_head_loss(head, hidden, work)


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 for a model in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunks(num_tokens: int, vocabulary_size: int) -> Iterator[slice]:
    """Yield slices of tokens whose logits number at most CHUNK_ELEMENTS (16 tokens at least)."""
    size = max(16, CHUNK_ELEMENTS // vocabulary_size)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a Linear would multiply: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


# ---- a plain Linear head --------------------------------------------------------------------------------------------


class _LinearLoss(torch.autograd.Function):
    """hidden (M, D), weight (V, D), bias (V,) -> total (), sums (K,); the gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.work, ctx.dtype = work, product_dtype(hidden)
        ctx.save_for_backward(hidden, weight, bias)
        total, sums, ctx.gradients = _linear_loss(hidden, weight, bias, work, ctx.dtype, ctx.needs_input_grad[:3])
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward pass through the same graph
            hidden, weight, bias = ctx.saved_tensors
            gradients = _linear_loss(hidden, weight, bias, ctx.work, ctx.dtype, ctx.needs_input_grad[:3])[2]
        if scale.device.type != "cpu" or scale.item() != 1:
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*gradients, None)


def _linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    work: Work,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """Return the total, the sums (K,), and the gradients of hidden, weight and bias where they are wanted."""
    with torch.autocast(hidden.device.type, enabled=False):
        accumulate = accumulation_dtype(hidden)
        sums = torch.zeros(len(work.losses), dtype=accumulate, device=hidden.device)
        gradients = _Gradients(hidden, weight, bias, wanted)
        states, matrix = hidden.to(dtype), weight.to(dtype)  # (M, D), (V, D)
        tile: torch.Tensor | None = None
        for rows in chunks(len(states), len(matrix)):
            tile = _logits(states[rows], matrix, bias, accumulate, tile)  # (C, V)
            factors = token_values(tile, work.part(rows), sums, any(wanted), SLICE_ELEMENTS)  # (C,); tile: slopes
            if any(wanted):
                gradients.add(states[rows], matrix, tile, factors, rows)
        return (sums * work.scales.to(sums)).sum(), sums, gradients.finished()


def _logits(
    states: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    accumulate: torch.dtype,
    tile: torch.Tensor | None,
) -> torch.Tensor:
    """Return the logits (C, V) of a chunk in the accumulation dtype, in the memory of the last chunk where it fits."""
    if matrix.dtype == accumulate:
        logits = states.new_empty(len(states), len(matrix)) if tile is None else tile[: len(states)]  # (C, V)
        block = CPU_BLOCK if logits.device.type == "cpu" else len(matrix)
        for start in range(0, len(matrix), block):
            ids = slice(start, start + block)
            torch.mm(states, matrix[ids].t(), out=logits[:, ids])
        return logits if bias is None else logits.add_(bias.to(accumulate))
    logits = torch.mm(states, matrix.t())  # (C, V), rounded as the head rounds
    logits = logits if bias is None else logits.add_(bias.to(logits.dtype))
    return logits.to(accumulate) if tile is None else tile[: len(states)].copy_(logits)


class _Gradients:
    """Gradients of hidden (M, D), weight (V, D) and bias (V,), those that are wanted, added up over chunks.

    The head's are added up in float32 where there are several chunks, as 16 bits would lose small ones.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Sequence[bool]
    ) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.wants_weight, self.wants_bias = wanted[1], bias is not None and wanted[2]
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.dtypes = (weight.dtype, None if bias is None else bias.dtype)

    def add(
        self, states: torch.Tensor, matrix: torch.Tensor, tile: torch.Tensor, factors: torch.Tensor | None, rows: slice
    ) -> None:
        """Add those of a chunk, of which `tile` is dL/dlogits up to a factor a token: (C, V), (C,)."""
        slopes = tile.to(matrix.dtype)  # (C, V)
        if self.hidden is not None:
            product = torch.mm(slopes, matrix)  # (C, D)
            self.hidden[rows] = product if factors is None else product * factors[:, None]
        if self.wants_weight:
            scaled = states if factors is None else (states * factors[:, None]).to(matrix.dtype)  # (C, D)
            if self.weight is None:
                self.weight = torch.mm(slopes.t(), scaled)  # (V, D)
            elif self.weight.dtype == tile.dtype == slopes.dtype:
                self.weight.addmm_(slopes.t(), scaled)
            else:
                self.weight = self.weight.to(tile.dtype).add_(torch.mm(slopes.t(), scaled))
        if self.wants_bias:
            own = tile.sum(0) if factors is None else factors @ tile  # (V,)
            self.bias = own if self.bias is None else self.bias.add_(own)

    def finished(self) -> list[torch.Tensor | None]:
        """Return the three gradients in their tensors' own dtypes."""
        head = zip((self.weight, self.bias), self.dtypes, strict=True)
        return [self.hidden, *(None if gradient is None else gradient.to(dtype) for gradient, dtype in head)]


# ---- any other head -------------------------------------------------------------------------------------------------


class _TileLoss(torch.autograd.Function):
    """logits (C, V) -> total (), sums (K,), for logits that autograd has to follow into their head."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.dtype = logits.dtype
        with torch.autocast(logits.device.type, enabled=False):
            tile = logits.to(accumulation_dtype(logits), copy=True)  # the head's backward may need its output
            sums = torch.zeros(len(work.losses), dtype=tile.dtype, device=tile.device)
            factors = token_values(tile, work, sums, ctx.needs_input_grad[0], SLICE_ELEMENTS)
        ctx.save_for_backward(tile if factors is None else tile.mul_(factors[:, None]))  # which checkpoint() drops
        ctx.mark_non_differentiable(sums)
        return (sums * work.scales.to(sums)).sum(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * scale).to(ctx.dtype), None  # (C, V)


def _any_head_loss(head: Head, hidden: torch.Tensor, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    def evaluate(states: torch.Tensor, part: Work) -> tuple[torch.Tensor, torch.Tensor]:
        return _TileLoss.apply(head.logits(states), part)

    pieces = [
        recomputed(evaluate, hidden[rows], work.part(rows))
        for rows in chunks(len(hidden), head.vocabulary_size(hidden))
    ]
    totals, sums = zip(*pieces, strict=True)
    return torch.stack(totals).sum(), torch.stack(sums).sum(0)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose intermediate tensors are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


# ---- log-probabilities, for losses of whole answers -----------------------------------------------------------------


def token_log_probs(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log p(target) of each token, (M, D), (M,) -> (M,) float32, differentiable.

    What a preference loss needs: two matrix products with a plain, frozen head, four when the head is trained.
    """
    if not len(targets):
        return hidden[:, 0].to(accumulation_dtype(hidden))
    if head.linear is not None and product_dtype(hidden) != torch.float16:
        return _LinearLogProbs.apply(hidden, head.linear.weight, head.linear.bias, targets)

    def evaluate(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.logits(states)  # (C, V)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(accumulation_dtype(logits))
            return logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)  # (C,)

    rows = chunks(len(hidden), head.vocabulary_size(hidden))
    return torch.cat([recomputed(evaluate, hidden[part], targets[part]) for part in rows])


def logits_of(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of K tokens of the vocabulary, (M, D), (K,) -> (M, K) float32 or better, differentiable.

    A plain Linear multiplies by their K rows only; any other head computes all V logits, a chunk of tokens at a time.
    """
    ids = ids.to(hidden.device)

    def evaluate(states: torch.Tensor) -> torch.Tensor:
        logits = head.logits(states)[:, ids]  # (C, K)
        return logits.to(accumulation_dtype(logits))

    if not len(hidden):
        return hidden[:, :1].expand(0, len(ids)).to(accumulation_dtype(hidden))
    if head.linear is None:
        parts = chunks(len(hidden), head.vocabulary_size(hidden))
        return torch.cat([recomputed(evaluate, hidden[rows]) for rows in parts])  # (M, K)
    bias = None if head.linear.bias is None else head.linear.bias[ids]
    logits = nn.functional.linear(hidden, head.linear.weight[ids], bias)  # (M, K)
    return logits.to(accumulation_dtype(logits))


class _LinearLogProbs(torch.autograd.Function):
    """hidden (M, D), weight (V, D), bias (V,), targets (M,) -> log p(target) (M,).

    d log p / d hidden = W[target] - softmax W does not depend on what the loss makes of log p, so it is formed in the
    forward pass and scaled in the backward pass; the head's gradient needs the scale first, and the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        ctx.dtype = dtype = product_dtype(hidden)
        accumulate = accumulation_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            values = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
            slopes = torch.empty_like(hidden, dtype=accumulate) if ctx.needs_input_grad[0] else None
            states, matrix, tile = hidden.to(dtype), weight.to(dtype), None
            for rows in chunks(len(states), len(matrix)):
                tile = _logits(states[rows], matrix, bias, accumulate, tile)  # (C, V)
                values[rows], factors = _to_log_prob_slopes(tile, targets[rows], dtype)
                if slopes is not None:
                    slopes[rows] = torch.mm(tile.to(dtype), matrix) * factors[:, None]  # (C, D)
        ctx.save_for_backward(hidden, weight, bias, targets, slopes)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, slopes = ctx.saved_tensors
        own = None if slopes is None else (slopes * gradient[:, None]).to(hidden.dtype)
        if not any(ctx.needs_input_grad[1:3]):
            return own, None, None, None
        gradients = _Gradients(hidden, weight, bias, [False, *ctx.needs_input_grad[1:3]])
        states, matrix, tile = hidden.to(ctx.dtype), weight.to(ctx.dtype), None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(states), len(matrix)):
                tile = _logits(states[rows], matrix, bias, gradient.dtype, tile)
                _, factors = _to_log_prob_slopes(tile, targets[rows], ctx.dtype)
                gradients.add(states[rows], matrix, tile, gradient[rows] * factors, rows)
        return own, *gradients.finished()[1:], None


def _to_log_prob_slopes(
    tile: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(target) (C,), and put its slopes in the place of the logits (C, V), up to the factors (C,) returned.

    The target's own slope, 1 - p, is formed before anything is rounded to `dtype`: where the model is sure, W[target] and
    the mean of W under p are nearly the same, and their difference would be mostly rounding.
    """
    wanted = targets[:, None]  # (C, 1)
    target_logits = tile.gather(1, wanted)[:, 0]  # (C,)
    top = tile.amax(-1, keepdim=True)  # (C, 1)
    sums = tile.sub_(top).exp_().sum(-1)  # (C,)
    values = target_logits - top[:, 0] - sums.log()
    tile.scatter_add_(1, wanted, -sums[:, None])  # sum * (softmax - onehot)
    if dtype == torch.float16:  # which a sum over a large vocabulary overflows
        tile.div_(sums[:, None])
        sums = torch.ones_like(sums)
    return values, -1 / sums
