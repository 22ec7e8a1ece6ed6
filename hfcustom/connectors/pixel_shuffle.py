"""pixel_shuffle: neighbouring tokens side by side in one wide token, and one matrix back to the model's width."""

from __future__ import annotations

import torch
from torch import nn

from hfcustom.connectors.grids import Grid, WindowReduction


class PixelShuffle(WindowReduction):
    """Put `size` x `size` neighbours' channels side by side and map them to one token without a bias.

    The matrix starts as the average of the neighbours, so that a pretrained model sees at first what average_pool shows it;
    size=1 starts as the identity. Beyond the border of a grid that size does not divide stand zeros.
    Sources: InternVL 1.5, https://arxiv.org/abs/2404.16821; Idefics3, https://arxiv.org/abs/2408.12637; SmolVLM,
    https://arxiv.org/abs/2504.05299 (transformers/models/idefics3, Idefics3Connector: the matrix without a bias).
    """

    def __init__(self, hidden_size: int, size: int = 2) -> None:
        super().__init__(size)
        self.proj = nn.Linear(size**2 * hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.eye(hidden_size).repeat(1, size**2) / size**2)  # (D, size*size*D)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        windows, _ = self.windows(features, grid)
        return self.proj(windows.flatten(2))  # (P, M, D)
