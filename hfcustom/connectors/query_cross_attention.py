"""query_cross_attention: learned queries, one cross-attention, one MLP."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.attention import CrossAttention, check_heads, check_queries


class QueryCrossAttention(nn.Module):
    """Read any number of tokens into `num_queries` learned ones by one cross-attention, then an MLP.

    As in Aria's projector neither has a residual path, so that all that leaves comes from the image. Queries start at
    random with a deviation of 0.02, layers as torch starts them: nothing is known of the image before training.
    Source: Aria, https://arxiv.org/abs/2410.05993, section 2; transformers/models/aria, AriaProjector.
    """

    def __init__(self, hidden_size: int, num_queries: int = 64, num_heads: int = 8) -> None:
        super().__init__()
        check_heads("query_cross_attention", hidden_size, num_heads)
        check_queries("query_cross_attention", num_queries)
        self.queries = nn.Embedding(num_queries, hidden_size)
        nn.init.normal_(self.queries.weight, std=0.02)
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.norm_tokens = nn.LayerNorm(hidden_size)
        self.attention = CrossAttention(hidden_size, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.norm_queries(self.queries.weight).expand(len(features), -1, -1)  # (P, M, D)
        return self.mlp(self.attention(queries, self.norm_tokens(features)))  # (P, M, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return the number of queries, whatever comes in."""
        return self.queries.num_embeddings
