"""Pixels that stay bytes until they are where the model is: a quarter of the memory and of what loading processes send.

(P, 3, H, W) uint8 levels and their values, (3, 256), in the processor's own arithmetic (hfcustom/cache/codec.py) -> float32, bit
for bit what the processor made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device

from hfcustom.cache import codec
from hfcustom.data.collate import Batch

PIXELS = "pixel_values"


def on_device(batch: Mapping[str, Any], device: torch.device, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the tensors of a batch on a device, pixels as the processor made them."""
    sent: dict[str, Any] = send_to_device(
        {name: value for name, value in batch.items() if name not in without}, device
    )
    if isinstance(batch, Batch) and batch.levels is not None:
        sent[PIXELS] = look_up(sent[PIXELS], batch.levels)
    return sent


def look_up(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the values of levels: (..., 3, H, W) uint8, (3, 256) -> (..., 3, H, W) float32."""
    if codes.device.type == "cpu":
        return torch.from_numpy(codec.look_up(codes.contiguous().numpy(), "pictures", levels.numpy()))
    return look_up_by_index(codes, levels)


def look_up_by_index(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Do as look_up() in one kernel, which is slow on a CPU."""
    channels = torch.arange(3, device=codes.device).view(3, 1, 1)
    return levels.to(codes.device)[channels, codes.int()]  # (..., 3, H, W)


def same_levels(singles: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return batches whose pixels can be put together: as bytes if all of them have the same levels, else as floats."""
    known = [single.levels if isinstance(single, Batch) else None for single in singles if PIXELS in single]
    if all(found is None for found in known):
        return list(singles)
    if all(found is not None and torch.equal(found, known[0]) for found in known):  # type: ignore[arg-type]
        return list(singles)
    return [single.as_floats() if isinstance(single, Batch) else single for single in singles]
