"""What the tests of every registered loss share: a family, a model and a batch on which the loss has something to say.

A loss added to the package is picked up by name; tensors of the batch that it asks for come from MAKERS, any other name is
a random number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from conftest import Family

from hfcustom.families import load_family
from hfcustom.losses import IGNORE, LOSSES, Loss

IMAGES = (1, 1, 0, 0, 2, 2, 1, 1)  # of each row; neighbours are the pairs of preference losses
CUTS = {"4x2": [4, 4], "2x4": [2] * 4, "uneven": [2, 6]}


def family_name(loss: Loss) -> str:
    """Return a family on which the loss has an effect."""
    return "aria" if "router_logits" in loss.outputs else "internvl"


def family_of(name: str) -> Family:
    """Return the family to try a loss on."""
    family = family_name(LOSSES[name])
    return Family(family, load_family(family))


def spec_of(name: str, family: Family) -> dict[str, Any]:
    """Return a config of one loss with the options that its registration says to test with."""
    return {name: {"weight": 1.0, **LOSSES[name].example_options(family.processor)}}


def model_of(name: str, family: Family, loss: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model in training mode, with the teacher, reference and modules that the loss may want."""
    model = family.model(loss=spec_of(name, family) if loss is None else loss)
    if LOSSES[name].prepare is not None:
        LOSSES[name].prepare(model)
    if dtype == torch.float64:  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    if "teacher" in LOSSES[name].inputs:
        model.set_teacher(family.model(seed=1).to(dtype))
    if LOSSES[name].is_term:
        model.set_reference(family.model(seed=2).to(dtype))
    return model.to(dtype).train()


def batch_of(name: str, family: Family, images: Sequence[int] = IMAGES) -> dict[str, torch.Tensor]:
    """Return a batch with a row for each number of images, and the tensors that the loss asks for."""
    batch = family.batch(list(images))
    generator = torch.Generator().manual_seed(0)
    for tensor in sorted(LOSSES[name].tensors):
        made = MAKERS.get(tensor, lambda batch, generator: torch.rand(len(batch["labels"]), generator=generator))
        value = made(batch, generator)
        if value is not None:
            batch[tensor] = value
    return batch


def token_weights(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(batch["labels"].shape, generator=generator).masked_fill(batch["labels"] == IGNORE, 0)


def preference(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    return torch.tensor([1.0, -1.0] * (len(batch["labels"]) // 2))


def auxiliary_labels(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    return torch.arange(len(batch["labels"])) % 2


def nothing(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> None:
    """Leave out what the model's teacher or reference computes instead."""


MAKERS: dict[str, Callable[[Mapping[str, torch.Tensor], torch.Generator], torch.Tensor | None]] = {
    "auxiliary_labels": auxiliary_labels,
    "preference": preference,
    "previous_tokens": nothing,
    "reference_log_probs": nothing,
    "teacher": nothing,
    "teacher_ids": nothing,
    "teacher_log_probs": nothing,
    "token_weights": token_weights,
}


def without_labels(name: str, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch in which nothing is labelled, token or row; a number that is none is NaN."""
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    if "auxiliary_labels" in batch:
        none = float("nan") if name == "auxiliary_regression" else IGNORE
        empty["auxiliary_labels"] = torch.full(batch["auxiliary_labels"].shape, none)
    return empty


def cut(
    batch: Mapping[str, torch.Tensor], sizes: Sequence[int], images: Sequence[int] = IMAGES
) -> list[dict[str, Any]]:
    """Cut a batch into micro-batches of whole rows; what is not of one entry a row is of one entry a crop."""
    num_rows = len(batch["labels"])
    num_crops = len(batch["pixel_values"]) // sum(images) if "pixel_values" in batch else 0
    pieces, row, crop = [], 0, 0
    for size in sizes:
        taken = sum(images[row : row + size]) * num_crops
        piece = {}
        for key, value in batch.items():
            if key in ("pixel_values", "pixel_mask"):
                if taken:
                    piece[key] = value[crop : crop + taken]
            else:
                assert len(value) == num_rows, key
                piece[key] = value[row : row + size]
        pieces.append(piece)
        row, crop = row + size, crop + taken
    return pieces


def packed(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the rows of a right-padded batch in one row whose position_ids restart, which transformers keeps apart."""
    keep = batch["attention_mask"].bool()
    rows: dict[str, torch.Tensor] = {}
    for key, value in batch.items():
        if key == "attention_mask":
            rows["position_ids"] = (batch["attention_mask"].cumsum(1) - 1)[keep][None]
        elif value.shape[:2] == keep.shape and key != "pixel_values":
            rows[key] = value[keep][None]
        else:
            rows[key] = value
    return rows


def left_padded(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a right-padded batch with its padding on the left."""
    mask = batch["attention_mask"]
    shifts = (mask.shape[1] - mask.sum(1)).tolist()
    rolled = {
        key: torch.stack([row.roll(shift, 0) for row, shift in zip(value, shifts, strict=True)])
        if value.shape[:2] == mask.shape
        else value
        for key, value in batch.items()
    }
    rolled["position_ids"] = (rolled["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return rolled


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the gradients there are."""
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4
) -> None:
    """Compare each parameter's gradient with its own size; one a million times smaller than all of them is rounding."""
    size = float(torch.stack([value.norm() for value in expected.values()]).norm()) if expected else 0.0
    for key in expected.keys() | found.keys():
        some = expected.get(key, found.get(key))
        mine, theirs = (grads.get(key, torch.zeros_like(some)) for grads in (found, expected))
        assert float((mine - theirs).norm()) <= rtol * float(theirs.norm()) + 1e-6 * size, key
