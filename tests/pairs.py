"""What the preference tests share: pairs of rows as the collator lays them out, packed rows, another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conftest import Family, chat_row
from torch import nn

from hfcustom.data.collate import Collator

IMAGES = (1, 0, 2, 1, 0, 1, 1, 0)  # of each pair
WORDS = ((3, 9), (1, 1), (20, 2), (4, 5), (1, 30), (2, 2), (7, 1), (5, 6))  # of a chosen and a rejected answer


def answered(row: dict[str, Any], words: int, shift: int) -> dict[str, Any]:
    """Return a row with another answer, of so many words."""
    answer = {"role": "assistant", "content": " ".join(str((at * shift + at + shift) % 10) for at in range(words))}
    return {**row, "messages": [*row["messages"][:-1], answer]}


def pair_rows(images: Sequence[int], first: int = 0) -> list[dict[str, Any]]:
    """Return a row with a chosen and a rejected answer for each number of images, counted from `first`."""
    rows = []
    for at, count in enumerate(images, start=first):
        row = chat_row(count, seed=at)
        answers = [answered(row, words, shift)["messages"] for shift, words in enumerate(WORDS[at])]
        rows.append({"chosen": answers[0], "rejected": answers[1], "images": row["images"]})
    return rows


def pair_batch(family: Family, images: Sequence[int], first: int = 0) -> dict[str, torch.Tensor]:
    """Return [chosen 0, rejected 0, chosen 1, ...] of pairs with so many images, counted from `first`."""
    return dict(Collator(family.processor)(pair_rows(images, first)))


def unpadded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch's rows packed into one: no padding, positions that restart, no attention mask."""
    rows = [mask.bool() for mask in batch["attention_mask"]]
    packed = {name: value for name, value in batch.items() if name != "attention_mask"}
    for name in ("input_ids", "labels"):
        packed[name] = torch.cat([values[row] for values, row in zip(batch[name], rows, strict=True)])[None]
    packed["position_ids"] = torch.cat([torch.arange(int(row.sum())) for row in rows])[None]
    return packed


def perturb(model: nn.Module, size: float = 0.02) -> Any:
    """Move all weights a little, the same way each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size)
    return model
