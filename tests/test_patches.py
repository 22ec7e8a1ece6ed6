"""What a connector that looks at pictures is given in each family: those of the image processor, bit for bit, as they lie."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, chat_row, picture
from torch import nn

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.ragged import RaggedImages

SIZES = [(70, 28), (42, 42), (28, 70), (42, 42)]  # width and height
CUTS = {  # where a processor cuts finished pictures into patches: a method, or a function of its module
    "minicpmv4_6": "reshape_by_patch",
    "molmo2": "batch_pixels_to_patches",
    "nemotron_h_omni": "convert_image_to_patches",
    "qwen2_5_omni": "patchify",
    "qwen2_5_vl": "patchify",
    "qwen2_vl": "patchify",
}
PADS = ("idefics2", "mistral3", "pixtral")  # to the size of the largest


class Looks(nn.Module):
    """Looks at pictures, keeps what it was given, and changes nothing."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.seen: list[tuple[torch.Tensor, torch.Tensor, Any]] = []

    def forward(self, features: Any, pixel_values: Any, grid: Any = None) -> Any:
        if isinstance(features, list):
            self.seen += zip(features, pixel_values, grid, strict=True)
        else:
            assert features.shape[-1] == self.hidden_size
            self.seen.append((features, pixel_values, grid))
        return features

    def num_tokens_out(self, num_tokens: int, grid: Any = None) -> int:
        return num_tokens


KINDS: dict[str, dict[str, Any]] = {
    "before": {},
    "before in lists": {"takes_lists": True},
    "behind": {"after_projector": True},
    "behind in lists": {"after_projector": True, "takes_lists": True},
}


def looking(family: Family, kind: str) -> Any:
    """Return a model with a connector that looks, before the projector or behind it."""
    hfcustom.connector(type("LooksAround", (Looks,), KINDS[kind]))
    return family.corrected(connector="looks_around")


def row(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    return chat_row(len(sizes)) | {"images": [picture(at, size) for at, size in enumerate(sizes)]}


def finished_pictures(family: Family, images: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the pictures, (3, H, W), that a processor makes of images one by one, before it cuts or pads them."""
    processor, found = family.processor.image_processor, []
    if family.name in PADS:
        for image in images:
            pixels = processor([image], return_tensors="pt")["pixel_values"]
            found.extend(pixels.reshape(-1, *pixels.shape[-3:]))
        return found
    cut = CUTS[family.name]
    inside = hasattr(processor, cut)
    holder = type(processor) if inside else sys.modules[type(processor).__module__]
    stock = getattr(holder, cut)

    def note(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()][inside]
        pixels = torch.as_tensor(np.asarray(given)).float()
        pixels = pixels.movedim(-1, -3) if family.name == "molmo2" else pixels  # channels last there
        found.extend(pixels.reshape(-1, *pixels.shape[-3:]))
        return stock(*args, **kwargs)

    monkeypatch.setattr(holder, cut, note)
    for image in images:
        processor([image], return_tensors="pt")
    return found


def keys(pictures: list[torch.Tensor]) -> list[tuple[Any, bytes]]:
    return sorted((tuple(picture.shape), picture.numpy().tobytes()) for picture in pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_that_the_processor_made(
    family: Family, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "connector" in family.model_class.lacks:
        return
    model = looking(family, kind)
    example = row(SIZES[:1] if family.name == "llava_onevision" else SIZES)  # which tiles a row's only image
    batch = dict(Collator(model.match_processor(copy.deepcopy(family.processor)))([example]))
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(logits, family.corrected()(**batch).logits)
    seen = [picture for _, pictures, _ in model.custom_connector.seen for picture in pictures]
    if family.name in (*CUTS, *PADS):
        expected = finished_pictures(family, example["images"], monkeypatch)
    else:  # one after another, with slots for pictures that there are not in some families
        pixels = batch["pixel_values"]
        expected = [picture for picture in pixels.reshape(-1, *pixels.shape[-3:]) if picture.any()]
    if family.name == "idefics2":  # whose tower leaves out what makes no whole patch
        expected = [p[:, : p.shape[1] // 7 * 7, : p.shape[2] // 7 * 7] for p in expected]
    assert keys(seen) == keys(expected)
    crops = sum(len(features) for features, _, _ in model.custom_connector.seen)
    assert crops == len(seen) or (kind.startswith("behind") and isinstance(model, RaggedImages) and crops < len(seen))


def test_features_lie_as_the_pictures_do(family: Family) -> None:
    """A feature depends most on the pixels of its own place, so that a second tower's can be put beside it."""
    if not issubclass(family.model_class, RaggedImages) or family.name not in (*CUTS, *PADS):
        return  # crops of one size, patches row by row
    model = looking(family, "before in lists")
    batch = dict(Collator(family.processor)([row(SIZES)]))
    batch["pixel_values"].requires_grad_()
    model(**batch)
    for at, (features, _, grid) in enumerate(model.custom_connector.seen):
        if grid is None:
            assert family.name == "molmo2"  # whose crops are squares
            return
        assert features.shape[1] == grid[0] * grid[1]
        for place in {0, 1, grid[1], features.shape[1] - 2}:
            score = features[0, place].square().sum()
            (gradient,) = torch.autograd.grad(score, batch["pixel_values"], retain_graph=True)
            changed = model.pictures_of_images(batch | {"pixel_values": gradient})[at].abs().sum(1)  # (1, H, W)
            cells = nn.functional.adaptive_avg_pool2d(changed, grid)
            assert int(cells.flatten().argmax()) == place, (at, place, grid)
