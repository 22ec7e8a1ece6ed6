"""Multi-head attention of some tokens to others, as the connectors use it."""

from __future__ import annotations

import torch
from torch import nn


def check_heads(name: str, hidden_size: int, num_heads: int) -> None:
    """Raise ValueError when the heads do not share the hidden size."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"{name} num_heads={num_heads} does not divide the hidden size {hidden_size}.")


def check_queries(name: str, num_queries: int) -> None:
    """Raise ValueError when there would be no token left."""
    if num_queries < 1:
        raise ValueError(f"{name} num_queries={num_queries}; it must be at least 1.")


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
