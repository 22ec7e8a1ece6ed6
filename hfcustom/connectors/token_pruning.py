"""token_pruning: the tokens that differ most from the rest of their crop, and a learned say in it."""

from __future__ import annotations

import math

import torch
from torch import nn


class TokenPruning(nn.Module):
    """Keep `num_kept` tokens of each crop, or a share `keep_ratio` of them (a half by default), in their order.

    A token's score is its cosine distance from the mean of its crop, so that tokens of an even background go first, plus a
    learned part, Linear(LayerNorm(token)), which starts at zero. Scores are computed in float32 and equal ones are settled
    by position: the same features keep the same tokens. The choice itself has no gradient; a kept token does, and it is
    multiplied by 2 sigmoid(learned part), 1 at the start, through which the learned part is trained. keep_ratio=1.0
    keeps every token: exactly no connector until it is trained.

    The question has no say here: the connector sees the image alone. LongVU, from which the idea of spending fewer tokens
    on what is redundant comes, lets the question choose the frames that keep all their tokens, and compares frames
    (temporal_dedup does that). Source: LongVU, https://arxiv.org/abs/2410.17434, section 3.
    """

    def __init__(self, hidden_size: int, num_kept: int | None = None, keep_ratio: float | None = None) -> None:
        super().__init__()
        if num_kept is not None and keep_ratio is not None:
            raise ValueError(f"token_pruning num_kept={num_kept} and keep_ratio={keep_ratio} exclude each other.")
        if num_kept is not None and num_kept < 1:
            raise ValueError(f"token_pruning num_kept={num_kept}; it must be at least 1.")
        self.num_kept = num_kept
        self.keep_ratio = check_ratio("token_pruning", 0.5 if keep_ratio is None else keep_ratio)
        self.norm = nn.LayerNorm(hidden_size)
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        learned = self.score(self.norm(features))  # (P, N, 1)
        with torch.no_grad():
            tokens = features.float()
            novelty = 1 - nn.functional.cosine_similarity(tokens, tokens.mean(1, keepdim=True), -1)  # (P, N)
            kept = highest(novelty + learned[..., 0].float(), self.num_tokens_out(features.shape[1]))  # (P, M)
        return pick(features * (2 * learned.sigmoid()), kept)  # (P, M, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return how many tokens of a crop are kept; a smaller crop keeps them all."""
        return min(self.num_kept or math.ceil(self.keep_ratio * num_tokens), num_tokens)


def check_ratio(name: str, keep_ratio: float) -> float:
    """Return the share of tokens to keep; ValueError when it is none."""
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"{name} keep_ratio={keep_ratio}; it must be above 0 and at most 1.")
    return keep_ratio


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the `count` highest scores of each row, in ascending order: (P, N) -> (P, count)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


def pick(features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Gather tokens: (P, N, D), (P, M) -> (P, M, D)."""
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
