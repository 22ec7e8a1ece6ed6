"""Pictures put together again from the patches that image processors cut them into, bit for bit.

A family whose tower is given patches hands them to connectors that look at pictures, one function for each order of patches.
Letters: F frames, C channels, H W pixels, R rows and S columns of patches, p pixels of a patch a side.
"""

from __future__ import annotations

import torch

from hfcustom.connectors import Grid


def from_merged(patches: torch.Tensor, frames: int, grid: Grid, patch: int, merge: int) -> torch.Tensor:
    """Qwen's order, merge x merge neighbours one after another: (F * R * S, C * pictures * p * p) -> (F, C, H, W).

    A frame is of several pictures, equal ones where it is an image; of those of a video the first is returned.
    """
    rows, columns = grid
    cells = patches.view(frames, rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)[..., 0, :, :]
    return cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, 3, rows * patch, columns * patch)


def from_rows(patches: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """Nemotron's order, row by row, channels first: (F * R * S, C * p * p) -> (F, C, H, W)."""
    rows, columns = grid
    cells = patches.view(-1, rows, columns, 3, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, rows * patch, columns * patch)


def from_pixels(patches: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """Molmo 2's order, row by row, channels last: (F, R * S, p * p * C) -> (F, C, H, W)."""
    rows, columns = grid
    cells = patches.view(-1, rows, columns, patch, patch, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * patch, columns * patch)


def from_strip(strip: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """MiniCPM's order, patches side by side in one strip, row by row: (C, p, R * S * p) -> (1, C, H, W)."""
    rows, columns = grid
    cells = strip.unflatten(2, (rows, columns, patch))  # (C, p, R, S, p)
    return cells.permute(0, 2, 1, 3, 4).reshape(1, -1, rows * patch, columns * patch)


def rows_of_merged(features: torch.Tensor, grid: Grid, merge: int) -> torch.Tensor:
    """Bring features from Qwen's order into rows: (F, R * S, D) -> the same shape."""
    rows, columns = grid
    cells = features.unflatten(1, (rows // merge, columns // merge, merge, merge))
    return cells.transpose(2, 3).flatten(1, 4)


def merged_of_rows(features: torch.Tensor, grid: Grid, merge: int) -> torch.Tensor:
    """Bring features from rows into Qwen's order: (F, R * S, D) -> the same shape."""
    rows, columns = grid
    cells = features.unflatten(1, (rows // merge, merge, columns // merge, merge))
    return cells.transpose(2, 3).flatten(1, 4)
