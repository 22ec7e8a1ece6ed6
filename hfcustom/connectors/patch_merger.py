"""patch_merger: neighbouring tokens through a norm and a two-layer MLP into one."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.grids import Grid, WindowReduction, window_mean


class PatchMerger(WindowReduction):
    """Normalise `size` x `size` neighbours, put them side by side, and map them to one token with a two-layer MLP.

    Qwen2-VL merges so inside its tower; here the result is added to the neighbours' mean and the second layer starts at
    zero, so that a pretrained model sees at first what average_pool shows it (size=1: exactly no connector). Beyond the
    border of a grid that size does not divide stand zeros. Source: Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1;
    transformers/models/qwen2_vl, PatchMerger.
    """

    def __init__(self, hidden_size: int, size: int = 2) -> None:
        super().__init__(size)
        merged = size**2 * hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(merged, merged)
        self.down = nn.Linear(merged, hidden_size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        windows, inside = self.windows(features, grid)
        side_by_side = (self.norm(windows) * inside[..., None]).flatten(2)  # (P, M, size*size*D)
        return window_mean(windows, inside) + self.down(nn.functional.gelu(self.up(side_by_side)))  # (P, M, D)
