"""Terms that keep a model near its frozen reference: the model given as such, or this one with its adapter off.

features (S, D) of the model and of the reference -> a distance an image token, or a supervised token.
Letters: M supervised tokens, P crops, N tokens a crop, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from hfcustom.losses.chunked import accumulation_dtype
from hfcustom.losses.context import LossContext
from hfcustom.losses.contract import liked_labels, term
from hfcustom.naming import unknown


@term(count="image_tokens")
def image_alignment(context: LossContext, distance: str = "mse") -> tuple[torch.Tensor, float | torch.Tensor]:
    """Mean over D of (v - v')^2 for each image token, or 1 - cos(v, v') with distance="cosine".

    v is what the connector hands to the language model, v' what the reference's does. Keeping old outputs on new data is
    Learning without Forgetting, https://arxiv.org/abs/1606.09282, eq. 2; doing so to features, with a squared distance, is
    FitNets, https://arxiv.org/abs/1412.6550, eq. 3.

    >>> from types import SimpleNamespace
    >>> reference = SimpleNamespace(features=torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    >>> features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> context = SimpleNamespace(features=features, reference=reference, check_trains=lambda what, tensors: None)
    >>> image_alignment(context)  # 0, (1^2 + 2^2) / 2
    (tensor(2.5000), 2)
    >>> image_alignment(context, distance="cosine")  # 0, 1
    (tensor(1.), 2)
    """
    context.check_trains("image features", [context.features])
    return _distance(context.features.flatten(0, -2), context.reference.features.flatten(0, -2), distance)


@term(count="tokens")
def hidden_alignment(context: LossContext, distance: str = "mse") -> tuple[torch.Tensor, float | torch.Tensor]:
    """Mean over D of (h - h')^2 for each supervised token, or 1 - cos(h, h') with distance="cosine".

    h is the hidden state that predicts the token, h' the reference's. Sources as for `image_alignment`.

    >>> from types import SimpleNamespace
    >>> states = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])]
    >>> both = [SimpleNamespace(select=lambda labels, h=h: SimpleNamespace(hidden=h)) for h in states]
    >>> context = SimpleNamespace(select=both[0].select, reference=both[1], batch={"labels": None})
    >>> hidden_alignment(context)  # 0, (1^2 + 2^2) / 2
    (tensor(2.5000), 2)
    """
    labels = liked_labels(context.batch)
    return _distance(context.select(labels).hidden, context.reference.select(labels).hidden, distance)


def _distance(own: torch.Tensor, reference: torch.Tensor, distance: str) -> tuple[torch.Tensor, int]:
    """Add up the distances of tokens, (S, D), (S, D) -> ()."""
    if own.shape != reference.shape:
        raise ValueError(
            f"The model's features are {tuple(own.shape)}, the reference's {tuple(reference.shape)}: an alignment compares "
            "them one by one. Take a reference of the same sizes and the same connector."
        )
    if distance not in DISTANCES:
        raise ValueError(unknown("distance", distance, DISTANCES))
    own = own.to(accumulation_dtype(own))
    return DISTANCES[distance](own, reference.to(own)).sum(), len(own)


def _cosine(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(own, reference, dim=-1)  # (S,)


def _mean_square(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (own - reference).square().mean(-1)  # (S,)


DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"cosine": _cosine, "mse": _mean_square}
