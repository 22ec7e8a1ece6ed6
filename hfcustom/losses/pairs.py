"""Losses of pairs, an image and its text among all others, without the (N, N) similarities of a batch.

own vectors (n, D), everyone's (N, D), scale, bias -> logits (C, N) of a chunk of rows -> one value a row (n,). A chunk's
logits are computed again in the backward pass, so that they exist once and for no longer than they are used. `gather_rows`
makes everyone's vectors out of those of each process, `share_of_step` is exact where everyone's were computed beforehand.

A pair loss is a plain function of rows of logits, float32 whatever the model's dtype:

    (logits (C, N), positives (C,)) -> (C,)          positives: which column is a row's own

Letters: n pairs of this process, N pairs of all, C rows of a chunk, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F

from hfcustom.losses.chunked import accumulation_dtype, chunks, recomputed
from hfcustom.naming import unknown

RowFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PairLoss:
    """A registered pair loss; `both_ways` averages it over images among texts and texts among images."""

    name: str
    function: RowFunction
    both_ways: bool
    bias: float | None = None  # what a learned bias starts from in a model that has none; None where it has no effect


PAIR_LOSSES: dict[str, PairLoss] = {}  # filled by the decorator


def pair_loss(function: RowFunction | None = None, *, both_ways: bool = True, bias: float | None = None) -> Any:
    """Register a function (logits (C, N), positives (C,)) -> (C,) under its own name, as a loss of contrastive encoders.

    The fields are those of `PairLoss`. Raises ValueError when the name belongs to another function.
    """
    if function is None:
        return lambda decorated: pair_loss(decorated, both_ways=both_ways, bias=bias)
    taken = PAIR_LOSSES.get(function.__name__)
    if taken is not None and _origin(taken.function) != _origin(function):
        raise ValueError(
            f"The pair loss {function.__name__!r} belongs to {_origin(taken.function)}; rename {_origin(function)}."
        )
    PAIR_LOSSES[function.__name__] = PairLoss(function.__name__, function, both_ways, bias)
    return function


def _origin(function: RowFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def find_pair_loss(name: Any) -> PairLoss:
    """Return a registered pair loss; ValueError for anything but the name of one, with the nearest."""
    if not isinstance(name, str) or name not in PAIR_LOSSES:
        cure = "Decorate your own with @hfcustom.pair_loss, and import its file first."
        raise ValueError(unknown("loss of a contrastive encoder:", name, [*PAIR_LOSSES, "stock"], cure))
    return PAIR_LOSSES[name]


@pair_loss
def contrastive(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits) at the row's own column: InfoNCE. CLIP, https://arxiv.org/abs/2103.00020, figure 3.

    >>> contrastive(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # log(e + 1) - 1
    tensor([0.3133])
    """
    return F.cross_entropy(logits, positives, reduction="none")


@pair_loss(both_ways=False, bias=-10.0)
def sigmoid_contrastive(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """-sum_j log sigmoid(z_j logits_j), z = 1 at the row's own column, else -1. SigLIP, https://arxiv.org/abs/2303.15343, eq. 1.

    >>> sigmoid_contrastive(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # log(1 + 1/e) + log(1 + 1)
    tensor([1.0064])
    """
    own = torch.arange(logits.shape[1], device=logits.device) == positives[:, None]  # (C, N)
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum(1)


def pair_values(
    loss: PairLoss,
    own: torch.Tensor,
    everyone: torch.Tensor,
    start: int,
    scale: torch.Tensor | float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a loss of pairs (n, 2, D), image and text, among everyone's (N, 2, D), where they begin at `start`: (n,)."""
    images, texts = own.unbind(1)
    values = _row_values(loss.function, images, everyone[:, 1], start, scale, bias)  # (n,)
    if loss.both_ways:
        values = (values + _row_values(loss.function, texts, everyone[:, 0], start, scale, bias)) / 2
    return values


def share_of_step(
    loss: PairLoss,
    own: torch.Tensor,
    everyone: torch.Tensor,
    start: int,
    scale: torch.Tensor | float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over own pairs (n, 2, D) among everyone's (N, 2, D), without gradient but for own vectors: ().

    `everyone` holds the own vectors themselves from `start` on. The gradient to own vectors is that of everyone's sum, since
    others' losses hold them too; to scale and bias it is that of own pairs. So values and gradients of the batches of a
    step add up to those of one batch (GradCache, Gao et al. 2021, https://arxiv.org/abs/2101.06983).
    """
    total = _sum(loss, own, everyone, start, scale, bias)
    fixed = [value.detach() if isinstance(value, torch.Tensor) else value for value in (scale, bias)]
    end = start + len(own)
    for first, rows in ((0, everyone[:start]), (end, everyone[end:])):
        others = _sum(loss, rows, everyone, first, *fixed)
        total = total + (others - others.detach())
    return total


def _sum(loss: PairLoss, own: torch.Tensor, everyone: torch.Tensor, start: int, *affine: Any) -> torch.Tensor:
    values = pair_values(loss, own, everyone, start, *affine) if len(own) else own  # a sum of nothing keeps the graph
    return values.sum()


@torch.no_grad()
def count_matches(own: torch.Tensor, everyone: torch.Tensor, start: int) -> torch.Tensor:
    """Count the images of own pairs (n, 2, D) that are nearer to their own text than to any of everyone's (N, 2, D): ().

    Where k texts are equally near, as one that stands in the step k times, its own counts 1/k: the chance of choosing it.
    """
    images, texts = own[:, 0], everyone[:, 1].t()
    found = own.new_zeros(())
    with torch.autocast(own.device.type, enabled=False):
        for rows in chunks(len(own), len(everyone)):
            cosines = images[rows] @ texts  # (C, N)
            near = cosines >= cosines.amax(1, keepdim=True) - SAME  # (C, N)
            found += (near.diagonal(start + rows.start) / near.sum(1)).sum()
    return found


SAME = 1e-5  # what cosines of the same two vectors, each computed twice in float32, may differ by


def _row_values(
    function: RowFunction,
    own: torch.Tensor,
    others: torch.Tensor,
    start: int,
    scale: torch.Tensor | float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    def evaluate(rows: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            dtype = accumulation_dtype(rows)
            logits = rows.to(dtype) @ others.to(dtype).t() * scale  # (C, N)
            return function(logits if bias is None else logits + bias, positives)

    positives = torch.arange(start, start + len(own), device=own.device)  # (n,)
    return torch.cat([recomputed(evaluate, own[rows], positives[rows]) for rows in chunks(len(own), len(others))])


# ---- the pairs of all processes -------------------------------------------------------------------------------------


def gather_rows(own: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the rows of all processes, (n, ...) -> (N, ...), and where this one's begin; gradients flow to each.

    Every process has to call it, with any number of rows; what each gets back is the sum of all processes' gradients.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return own, 0
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.zeros_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    start = sum(sizes[: distributed.get_rank()])
    return _Gather.apply(own, sizes, start), start


class _Gather(torch.autograd.Function):
    """Rows of this process (n, ...) -> of all, (N, ...)."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, sizes: list[int], start: int) -> torch.Tensor:
        ctx.own = slice(start, start + len(own))
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        pieces = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[ctx.own], None, None
