"""Losses that know what numbers mean: digits by their distance, coordinate tokens as boxes.

Cross entropy holds 9 to be as wrong as 4 where 3 is right, and a box one pixel off as wrong as one elsewhere. Both
losses here are for use beside it: they are 0 where the target is no number.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    >>> targets = torch.tensor([0, 2])

Letters: B rows of a tensor, T text tokens, M supervised tokens, V vocabulary, K digits or coordinates, N boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from hfcustom.losses.checks import check_ids, check_number, check_whole
from hfcustom.losses.context import LossContext
from hfcustom.losses.contract import IGNORE, Batch, liked_labels, row_ids, term, token_loss
from hfcustom.naming import unknown

METRICS = ("mse", "wasserstein")
SMALLEST_AREA = 1e-7  # a tenth of a pixel in a grid of 1000 by 1000


# ---- digits ---------------------------------------------------------------------------------------------------------


def _ids_of_digits(processor: Any) -> dict[str, Any]:
    return {"digit_ids": processor.tokenizer.convert_tokens_to_ids(list("0123456789"))}


@token_loss(example=_ids_of_digits)
def digit_distance(
    logits: torch.Tensor, targets: torch.Tensor, digit_ids: Sequence[int], metric: str = "wasserstein"
) -> torch.Tensor:
    """sum_i p_i |v_y - i| ("wasserstein") or (v_y - sum_i p_i i)^2 ("mse"), where y is a number; p over numbers only.

    Number token loss, NTL-WAS and NTL-MSE, of Zausinger et al. 2024, https://arxiv.org/abs/2411.02083. `digit_ids` are
    the ids of "0", "1", ... in order: tokenizer.convert_tokens_to_ids(list("0123456789")); a tokenizer that writes 0
    to 999 as one token each takes all thousand.

    >>> digit_distance(logits, targets, digit_ids=[0, 1, 2])  # 0.1142 * 1 + 0.0420 * 2, (2 + 1 + 0) / 3
    tensor([0.1982, 1.0000])
    >>> digit_distance(logits, targets, digit_ids=[0, 1, 2], metric="mse")  # 0.1982^2, (2 - 1)^2
    tensor([0.0393, 1.0000])
    """
    cure = "those of '0', '1', ... in order: tokenizer.convert_tokens_to_ids(list('0123456789'))"
    check_ids("digit_distance", "digit_ids", digit_ids, logits.shape[-1], cure)
    if metric not in METRICS:
        raise ValueError(unknown("metric of loss 'digit_distance':", metric, METRICS))
    ids = torch.as_tensor(digit_ids, device=targets.device)  # (K,)
    values = torch.arange(len(ids), device=targets.device, dtype=logits.dtype)  # (K,)
    is_target = targets[:, None] == ids  # (M, K)
    wanted = (is_target * values).sum(-1, keepdim=True)  # (M, 1)
    probabilities = logits[:, ids].softmax(-1)  # (M, K)
    if metric == "mse":
        distances = (wanted[:, 0] - probabilities @ values).square()  # (M,)
    else:
        distances = (probabilities * (values - wanted).abs()).sum(-1)  # (M,)
    return distances.masked_fill(~is_target.any(-1), 0.0)


# ---- boxes ----------------------------------------------------------------------------------------------------------


def find_boxes(batch: Batch, first_id: int, num_ids: int) -> torch.Tensor:
    """Return where the boxes of a batch are, (N, 4), as indices into the flattened (B, T - 1) of predicted positions.

    A box is four coordinate tokens in succession, all supervised. A longer run within a row of data holds several; the
    one to three tokens that are left over at its end are none.
    """
    labels = liked_labels(batch)[:, 1:]  # (B, T-1)
    coordinate = ((labels >= first_id) & (labels < first_id + num_ids)).flatten()  # (B (T-1),)
    rows = row_ids(batch).to(labels.device)[:, 1:].flatten()
    continues = torch.zeros_like(coordinate)
    continues[1:] = coordinate[1:] & coordinate[:-1] & (rows[1:] == rows[:-1])
    places = torch.arange(len(coordinate), device=labels.device)[coordinate]  # (number of coordinates,)
    run = (coordinate & ~continues).cumsum(0)[places] - 1  # the run that each belongs to
    lengths = torch.bincount(run)
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(len(places), device=labels.device) - starts[run]
    return places[within < lengths[run] // 4 * 4].view(-1, 4)


def count_boxes(batch: Batch, first_id: int, num_ids: int) -> int:
    """Count the boxes of a batch."""
    _check_coordinates(first_id, num_ids)
    return len(find_boxes(batch, first_id, num_ids))


def _check_coordinates(first_id: Any, num_ids: Any, vocabulary_size: int = 2**31) -> None:
    check_whole("box", "first_id", first_id, 0, vocabulary_size - 2)
    check_whole("box", "num_ids", num_ids, 2, vocabulary_size - first_id)


def _ids_of_text(processor: Any) -> dict[str, Any]:
    """Take the longest run of ids without a special token for coordinates, so that any four words in succession are a box."""
    specials = sorted({-1, *processor.tokenizer.all_special_ids, len(processor.tokenizer)})
    before, after = max(pairwise(specials), key=lambda pair: pair[1] - pair[0])
    return {"first_id": before + 1, "num_ids": after - before - 1}


@term(count=count_boxes, example=_ids_of_text)
def box(
    context: LossContext, first_id: int, num_ids: int, l1_weight: float = 5.0, giou_weight: float = 2.0
) -> tuple[torch.Tensor, int]:
    """l1_weight |b - t|_1 + giou_weight (1 - GIoU(b, t)) a box: b the expected corners, t the target's.

    Generalised IoU: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630. The weights: DETR, Carion et al. 2020,
    https://arxiv.org/abs/2005.12872, whose L1 is of centre and size, where this is of corners. Boxes are four
    coordinate tokens in succession (`find_boxes`), as in Pix2Seq, https://arxiv.org/abs/2109.10852, and PaliGemma,
    https://arxiv.org/abs/2407.07726: ids first_id to first_id + num_ids - 1 mean 0 to 1, and four of them two opposite
    corners, x y x y or y x y x, which gives the same. Expected is sum_k softmax(z over these ids)_k k / (num_ids - 1).

    >>> predicted, target = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    >>> box_distances(predicted, target, 5.0, 2.0)  # 5 * 0.5 + 2 * (1 - 0.5)
    tensor([3.5000])
    """
    check_number("box", "l1_weight", l1_weight, low=0)
    check_number("box", "giou_weight", giou_weight, low=0)
    _check_coordinates(first_id, num_ids, context.head.vocabulary_size(context.supervised.hidden))
    supervised = (context.labels[:, 1:] != IGNORE).flatten()  # (B (T-1),)
    boxes = find_boxes(context.batch, first_id, num_ids).to(supervised.device)  # (N, 4)
    tokens = (supervised.cumsum(0) - 1)[boxes].to(context.hidden_states.device)  # (N, 4) of the M supervised tokens
    ids = torch.arange(first_id, first_id + num_ids, device=tokens.device)  # (K,)
    logits = context.logits_of(ids)  # (M, K)
    values = torch.linspace(0, 1, num_ids, dtype=logits.dtype, device=tokens.device)  # (K,)
    predicted = logits[tokens].softmax(-1) @ values  # (N, 4)
    target = values[context.supervised.targets[tokens] - first_id]  # (N, 4)
    return box_distances(predicted, target, l1_weight, giou_weight).sum(), len(boxes)


def box_distances(predicted: torch.Tensor, target: torch.Tensor, l1_weight: float, giou_weight: float) -> torch.Tensor:
    """Return the weighted L1 and generalised IoU distance of boxes, (N, 4) twice -> (N,)."""
    l1 = (predicted - target).abs().sum(-1)
    return l1_weight * l1 + giou_weight * (1 - generalised_iou(predicted, target))


def generalised_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the generalised IoU of boxes, (N, 4) twice -> (N,), from -1 to 1.

    The four numbers are two opposite corners, whichever; a box without an area overlaps with nothing.
    """
    (low, high), (other_low, other_high) = _corners(first), _corners(second)  # (N, 2) each
    overlap = _area(torch.maximum(low, other_low), torch.minimum(high, other_high))  # (N,)
    hull = _area(torch.minimum(low, other_low), torch.maximum(high, other_high))  # (N,)
    union = _area(low, high) + _area(other_low, other_high) - overlap  # (N,)
    return overlap / union.clamp(min=SMALLEST_AREA) - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def _corners(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)
