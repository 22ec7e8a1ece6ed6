"""attention_pooling: each window of tokens pooled by attention, its mean asking."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.attention import CrossAttention, check_heads
from hfcustom.connectors.grids import Grid, WindowReduction, window_mean


class AttentionPooling(WindowReduction):
    """Pool `size` x `size` neighbours by multi-head attention whose query is their mean.

    Queries start at zero, values and output as the identity: at first every neighbour counts the same, so that a pretrained
    model sees what average_pool shows it (size=1: exactly no connector). Beyond the border of a grid that size does not
    divide there is nothing to attend to. Molmo pools so between its tower and its projector, here it follows the projector.
    Source: Molmo, https://arxiv.org/abs/2409.17146, section 2.
    """

    def __init__(self, hidden_size: int, size: int = 2, num_heads: int = 8) -> None:
        super().__init__(size)
        check_heads(self.name(), hidden_size, num_heads)
        self.attention = CrossAttention(hidden_size, num_heads)
        nn.init.zeros_(self.attention.q_proj.weight)
        for layer in (self.attention.v_proj, self.attention.o_proj):
            nn.init.eye_(layer.weight)
        for layer in (self.attention.q_proj, self.attention.v_proj, self.attention.o_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        windows, inside = self.windows(features, grid)
        queries = window_mean(windows, inside)[:, :, None]  # (P, M, 1, D)
        return self.attention(queries, windows, inside[:, None, None])[:, :, 0]  # (P, M, D)
