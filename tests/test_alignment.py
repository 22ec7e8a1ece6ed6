"""Alignment with the frozen reference: values against loops, zero at the start, and what cannot be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from torch import nn

import hfcustom
from hfcustom.losses import find_loss

TERMS = ("image_alignment", "hidden_alignment")


def naive(own: torch.Tensor, reference: torch.Tensor, distance: str) -> float:
    total = 0.0
    for mine, theirs in zip(own.tolist(), reference.tolist(), strict=True):
        pairs = list(zip(mine, theirs, strict=True))
        if distance == "mse":
            total += sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        else:
            norms = [sum(a * a for a in vector) ** 0.5 for vector in (mine, theirs)]
            total += 1 - sum(a * b for a, b in pairs) / (norms[0] * norms[1])
    return total


def features(model: Any, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name == "image_alignment":
        return torch.cat(list(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return torch.cat([row[:-1][label[1:] != -100] for row, label in zip(hidden, batch["labels"], strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_values_equal_a_loop_over_tokens(internvl: Family, name: str, distance: str) -> None:
    batch, other = internvl.batch([2, 0, 1]), internvl.model(seed=1)
    model = internvl.model(loss={name: {"distance": distance}})
    model.set_reference(other)
    model(**batch)
    found = model.loss_values[name]
    expected = naive(features(model, batch, name), features(other, batch, name), distance)
    assert float(found.sum) == pytest.approx(expected, rel=1e-4)
    wanted = (batch["input_ids"] == model.config.image_token_id) if "image" in name else batch["labels"] != -100
    assert found.count == int(wanted.sum())


@pytest.mark.parametrize("name", TERMS)
def test_a_new_adapter_is_where_its_reference_is_and_leaves_it(family: Family, name: str) -> None:
    about_images = "image" in name
    model, batch = family.model(loss=name), family.batch([1, 0])
    linears = {
        model.stock_parts().find(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    parts = [
        part
        for part in ("vision", "connector", "language")
        if part in linears and (about_images or part == "language")
    ]
    model = hfcustom.lora(model, parts, rank=2)
    if parts == ["language"] and about_images:  # image features are embeddings, which LoRA leaves alone
        with pytest.raises(ValueError, match="would train nothing, because the image features carry no gradient"):
            model.train()(**batch)
        return
    assert float(model.train()(**batch).loss.detach()) == 0.0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) > 0
    assert any(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if "lora_A" in key)


def test_images_that_nothing_trains_are_an_error(internvl: Family) -> None:
    model = hfcustom.lora(internvl.model(loss={"cross_entropy": 1.0, "image_alignment": 1.0}), rank=2).train()
    with pytest.raises(ValueError, match="'image_alignment' would train nothing, because the image features carry no"):
        model(**internvl.batch([1]))
    with torch.no_grad():
        model(**internvl.batch([1]))


def test_what_cannot_be_compared_is_told(internvl: Family) -> None:
    model = internvl.model(loss="hidden_alignment").train()
    with pytest.raises(ValueError, match="needs a reference, .*set_reference"):
        model(**internvl.batch([1]))
    function = find_loss("image_alignment").function
    small, large = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)
    context = hfcustom.LossContext(model, {}, small, small, {}, image_features=small)
    context.reference = hfcustom.LossContext(model, {}, small, small, {}, image_features=large)
    with pytest.raises(ValueError, match=r"features are \(2, 3\), the reference's \(4, 3\)"):
        function(context)
    context.reference.image_features = small
    with pytest.raises(ValueError, match="distance 'cosin'. Did you mean 'cosine'"):
        function(context, distance="cosin")
