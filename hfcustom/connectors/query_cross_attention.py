"""query_cross_attention: queries, one cross-attention, one MLP."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.attention import CrossAttention, ImageQueries, check_heads, start_at_zero
from hfcustom.connectors.grids import Grid


class QueryCrossAttention(nn.Module):
    """Read any number of tokens into `num_queries` by one cross-attention, then an MLP.

    start="average" lets each query start as the mean of a region of the crop, to which the MLP adds what the attention
    found, nothing at first: the start is an average pool (ImageQueries in attention.py). start="random" is Aria's form:
    learned queries with a deviation of 0.02, no residual path, so that all that leaves comes through the attention, and
    nothing is known of the image before training.
    Source: Aria, https://arxiv.org/abs/2410.05993, section 2; transformers/models/aria, AriaProjector.
    """

    def __init__(self, hidden_size: int, num_queries: int = 64, num_heads: int = 8, start: str = "average") -> None:
        super().__init__()
        check_heads("query_cross_attention", hidden_size, num_heads)
        self.queries = ImageQueries("query_cross_attention", hidden_size, num_queries, start, std=0.02)
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.norm_tokens = nn.LayerNorm(hidden_size)
        self.attention = CrossAttention(hidden_size, num_heads)
        down = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU(), down)
        if self.queries.average:
            start_at_zero(down)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        queries = self.queries(features, grid)  # (P, M, D)
        found = self.mlp(self.attention(self.norm_queries(queries), self.norm_tokens(features)))  # (P, M, D)
        return queries + found if self.queries.average else found

    def num_tokens_out(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Return the number of queries, whatever comes in."""
        return len(self.queries.weight)

    def grid_out(self, grid: Grid) -> Grid:
        """Return how the queries lie."""
        return self.queries.grid_out(grid)
