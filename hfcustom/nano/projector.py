"""The projector: neighbouring patches become one token of the language model, (P, N, D_vision) -> (P, N / s^2, D).

Pixel shuffle moves a square of s x s patches into the channels (its rows first), a Linear brings them to the language
model's width. Source: Idefics3, https://arxiv.org/abs/2408.12637, section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Projector(nn.Module):
    """Pixel shuffle and one Linear without a bias."""

    def __init__(self, vision_width: int, text_width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(vision_width * scale**2, text_width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        cells = math.isqrt(patches.shape[1]) // self.scale
        grid = patches.unflatten(1, (cells, self.scale, cells, self.scale))  # (P, rows, s, columns, s, D_vision)
        squares = grid.transpose(2, 3).flatten(3).flatten(1, 2)  # (P, rows * columns, s * s * D_vision)
        return self.proj(squares)  # (P, rows * columns, D)
