"""average_pool: the mean of `size` x `size` neighbouring tokens."""

from __future__ import annotations

import torch

from hfcustom.connectors.grids import Grid, WindowReduction, window_mean


class AveragePool(WindowReduction):
    """Average `size` x `size` neighbours of a square token grid, as Gemma 3's projector does before its product.

    No parameters; size=1 is the identity. Source: Gemma 3 report, https://arxiv.org/abs/2503.19786, section 2.
    """

    def __init__(self, hidden_size: int, size: int = 2) -> None:
        super().__init__(size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        return window_mean(*self.windows(features, grid))  # (P, M, D)
