"""Multi-head attention of some tokens to others, and the queries that ask, as the connectors use them."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.grids import Grid, average_to, layout
from hfcustom.naming import unknown

STARTS = ("average", "random")


def check_heads(name: str, hidden_size: int, num_heads: int) -> None:
    """Raise ValueError when the heads do not share the hidden size."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"{name} num_heads={num_heads} does not divide the hidden size {hidden_size}.")


class ImageQueries(nn.Module):
    """`num_queries` queries of each crop, (P, M, D), for a connector that reads any number of tokens into so many.

    start="average": the mean of a region of the crop's tokens each, plus a learned part that starts at zero. The regions
    lie in rows and columns like the tokens, in the proportions nearest to theirs. A connector that adds to them what its
    layers find, nothing at first, starts as an average pool, from which a pretrained model can go on. Averages as queries:
    TokenPacker, https://arxiv.org/abs/2407.02392; average pooling to any number of tokens in the place of learned queries,
    which learn slowly what lies where: DeCo, https://arxiv.org/abs/2405.20985.
    start="random": learned alone, knowing nothing of the image before training.
    """

    def __init__(self, name: str, hidden_size: int, num_queries: int, start: str, std: float = 1.0) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"{name} num_queries={num_queries}; it must be at least 1.")
        if start not in STARTS:
            raise ValueError(unknown(f"{name} start:", start, STARTS))
        self.average = start == "average"
        self.weight = nn.Parameter(torch.zeros(num_queries, hidden_size))
        if not self.average:
            nn.init.normal_(self.weight, std=std)

    def forward(self, features: torch.Tensor, grid: Grid | None) -> torch.Tensor:
        learned = self.weight.expand(len(features), -1, -1)  # (P, M, D)
        return average_to(features, len(self.weight), grid) + learned if self.average else learned

    def grid_out(self, grid: Grid) -> Grid:
        """Return how the queries lie for tokens in this grid: as their regions, or in a row."""
        return layout(len(self.weight), grid) if self.average else (1, len(self.weight))


def start_at_zero(*layers: nn.Linear) -> None:
    """Let layers at the end of a residual path add nothing at first."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class CrossAttention(nn.Module):
    """Attend from queries (..., M, D) to tokens (..., N, D_tokens): -> (..., M, D); `mask` is True where one may look."""

    def __init__(self, hidden_size: int, num_heads: int, token_size: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(token_size or hidden_size, hidden_size)
        self.v_proj = nn.Linear(token_size or hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (
            self._heads(x) for x in (self.q_proj(queries), self.k_proj(tokens), self.v_proj(tokens))
        )  # (..., heads, M or N, D/heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.o_proj(attended.transpose(-3, -2).flatten(-2))  # (..., M, D)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
