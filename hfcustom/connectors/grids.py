"""Grids of image tokens, averages over their regions, and the connectors that reduce `size` x `size` neighbours of one to a single token.

Letters: P crops, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from hfcustom.naming import snake_case

Grid = tuple[int, int]  # rows, columns


class WindowReduction(nn.Module):
    """Base of connectors that make one token of `size` x `size` neighbours, in a square crop or in a known grid."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"{self.name()} size={size}; it must be at least 1.")
        self.size = size

    @classmethod
    def name(cls) -> str:
        """Return the connector's name in a config."""
        return snake_case(cls.__name__)

    def num_tokens_out(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Return (side / size)^2 of a square crop; a grid that size does not divide keeps smaller cells at its borders."""
        if self.size == 1:
            return num_tokens
        return math.prod(self.grid_out(grid or self.square(num_tokens)))

    def grid_out(self, grid: Grid) -> Grid:
        """Return the rows and columns after the reduction."""
        return -(-grid[0] // self.size), -(-grid[1] // self.size)

    def square(self, num_tokens: int) -> Grid:
        """Return the sides of a square crop; ValueError when it is none, or none that size divides."""
        side = math.isqrt(num_tokens)
        if side**2 != num_tokens or side % self.size:
            raise ValueError(
                f"{self.name()} size={self.size} needs a square grid whose side it divides; got {num_tokens} tokens a crop."
            )
        return side, side

    def windows(self, features: torch.Tensor, grid: Grid | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut (P, N, D) into windows (P, M, size*size, D), row by row; (M, size*size) is True inside the grid."""
        if self.size == 1:
            return features[:, :, None], features.new_ones((features.shape[1], 1), dtype=torch.bool)
        grid = grid or self.square(features.shape[1])
        inside = features.new_ones((1, grid[0] * grid[1], 1), dtype=torch.bool)
        return self._cut(features, grid), self._cut(inside, grid)[0, :, :, 0]

    def _cut(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        image = tokens.unflatten(1, grid)  # (P, rows, columns, D)
        image = nn.functional.pad(image, (0, 0, 0, -grid[1] % self.size, 0, -grid[0] % self.size))
        cells = image.unflatten(2, (-1, self.size)).unflatten(1, (-1, self.size))  # (P, R, size, C, size, D)
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (P, M, size*size, D)


def alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Return the places of equal entries, a list for each kind, in the order of their first."""
    places: dict[Hashable, list[int]] = {}
    for at, kind in enumerate(kinds):
        places.setdefault(kind, []).append(at)
    return list(places.values())


def layout(count: int, grid: Grid) -> Grid:
    """Return rows and columns of `count` tokens whose proportions are nearest to a grid's."""
    wanted = math.log(grid[0] / grid[1])
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted))


def average_to(features: torch.Tensor, count: int, grid: Grid | None) -> torch.Tensor:
    """Average a grid's tokens region by region, the regions in rows and columns: (P, N, D) -> (P, count, D).

    Without a grid, tokens that can be a square are one; others lie in a row.
    """
    if grid is None:
        side = math.isqrt(features.shape[1])
        grid = (side, side) if side**2 == features.shape[1] else (1, features.shape[1])
    image = features.float().transpose(1, 2).unflatten(2, grid)  # (P, D, rows, columns)
    means = nn.functional.adaptive_avg_pool2d(image, layout(count, grid))
    return means.flatten(2).transpose(1, 2).to(features.dtype)  # (P, count, D)


def window_mean(windows: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Average what lies inside the grid: (P, M, size*size, D) -> (P, M, D)."""
    return windows.sum(2) / inside.sum(-1, keepdim=True).to(windows.dtype)
