"""perceiver_resampler: queries read any number of tokens, in residual blocks."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.attention import ImageQueries, check_heads, start_at_zero
from hfcustom.connectors.grids import Grid


class Resampler(nn.Module):
    """`num_queries` queries of a crop, and the blocks in which they read, for the connector called `name`."""

    def __init__(
        self, name: str, hidden_size: int, num_queries: int, num_layers: int, num_heads: int, start: str
    ) -> None:
        super().__init__()
        check_heads(name, hidden_size, num_heads)
        if num_layers < 1:
            raise ValueError(f"{name} num_layers={num_layers}; it must be at least 1, or nothing is read.")
        self.queries = ImageQueries(name, hidden_size, num_queries, start)
        average = self.queries.average
        self.blocks = nn.ModuleList(PerceiverBlock(hidden_size, num_heads, average) for _ in range(num_layers))
        self.norm = nn.Identity() if average else nn.LayerNorm(hidden_size)

    def read(self, features: torch.Tensor, grid: Grid | None, memory: torch.Tensor) -> torch.Tensor:
        """Let the queries of features (P, N, D) read a memory (P, N + others, D): -> (P, M, D)."""
        queries = self.queries(features, grid)  # (P, M, D)
        for block in self.blocks:
            queries = block(queries, memory)
        read: torch.Tensor = self.norm(queries)
        return read

    def num_tokens_out(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Return the number of queries, whatever comes in."""
        return len(self.queries.weight)

    def grid_out(self, grid: Grid) -> Grid:
        """Return how the queries lie."""
        return self.queries.grid_out(grid)


class PerceiverResampler(Resampler):
    """Read any number of tokens into `num_queries` by cross-attention, in residual blocks.

    start="average" lets each query start as the mean of a region of the crop, to which the blocks add what they find,
    nothing at first: the start is an average pool (ImageQueries in attention.py). start="random" is the paper's form,
    learned queries and a norm at the end, which know nothing of the image before training.
    Source: Flamingo, https://arxiv.org/abs/2204.14198, section 3.1 (keys and values are tokens and queries together).
    """

    def __init__(
        self,
        hidden_size: int,
        num_queries: int = 64,
        num_layers: int = 2,
        num_heads: int = 8,
        start: str = "average",
    ) -> None:
        super().__init__("perceiver_resampler", hidden_size, num_queries, num_layers, num_heads, start)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        return self.read(features, grid, features)


class PerceiverBlock(nn.Module):
    """Add to queries (P, M, D) what they find in tokens (P, N, D) and in each other, then a two-layer MLP."""

    def __init__(self, hidden_size: int, num_heads: int, starts_at_zero: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.norm_tokens = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.kv_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        down = nn.Linear(4 * hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), down)
        if starts_at_zero:
            start_at_zero(self.o_proj, down)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm_queries(queries)  # (P, M, D)
        memory = torch.cat([self.norm_tokens(tokens), normed], 1)  # (P, N+M, D)
        q = self._heads(self.q_proj(normed))  # (P, heads, M, D/heads)
        k, v = (self._heads(x) for x in self.kv_proj(memory).chunk(2, -1))  # (P, heads, N+M, D/heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (P, M, D)
        queries = queries + self.o_proj(attended)
        return queries + self.mlp(queries)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
