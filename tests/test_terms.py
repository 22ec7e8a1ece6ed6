"""Terms of hidden states, images, routers and heads, in whole models: the cut of a step, padding and packing change nothing."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch
from conftest import Family
from training import IMAGES, assert_same_step, cut_batches, pack, pad_left, run_step, uneven_rows

from hfcustom.losses import LOSSES, alignment, auxiliary, experts, image_text
from hfcustom.train import checkpoint_activations

MODULES = (alignment, auxiliary, experts, image_text)
NAMES = [name for name, loss in LOSSES.items() if sys.modules[loss.function.__module__] in MODULES]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "auxiliary_classification": [{}, {"pooling": "mean"}],
    "hidden_alignment": [{"distance": "mse"}, {"distance": "cosine"}],
    "image_alignment": [{"distance": "mse"}, {"distance": "cosine"}],
    "moe_balance": [{}, {"top_k": 1, "scores": "sigmoid"}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]
COLUMNS = {
    "auxiliary_classification": torch.tensor([0, 2, -100, 1, 1, -100, 0, 2]),
    "auxiliary_regression": torch.tensor([0.5, 2.0, torch.nan, -1.0, 0.0, torch.nan, 0.3, 2.5]),
}
FEW_IMAGES = (1, 0, 0, 0, 2, 0, 0, 0)  # Aria's are 980 px
each_term = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def build(families: dict[str, Family], name: str, options: dict[str, Any]) -> tuple[Any, Family, list[Any], Any]:
    """Return a tiny model in float64 that the term can run in, its family, eight rows and the term's columns."""
    family = families["aria" if LOSSES[name].outputs else "internvl"]
    model, reference = (family.model(seed=seed, loss={name: options}) for seed in range(2))
    reference.config.loss = "cross_entropy"
    for prepare in filter(None, [LOSSES[name].prepare]):
        torch.manual_seed(0)
        prepare(model)
    if sys.modules[LOSSES[name].function.__module__] is alignment:
        model.set_reference(reference.double())
    images = FEW_IMAGES if family.name == "aria" else IMAGES
    columns = {"auxiliary_labels": COLUMNS[name]} if name in COLUMNS else {}
    if family.name == "aria":
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model.double(), family, uneven_rows(images), columns


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@each_term
def test_the_cut_of_a_step_changes_neither_value_nor_gradient(
    families: dict[str, Family], name: str, options: dict[str, Any]
) -> None:
    steps = {}
    for size in (8, 4, 2, 1):
        model, family, rows, columns = build(families, name, options)
        steps[size] = run_step(model, cut_batches(family, rows, size, columns))
    assert steps[8][0][name] and any(gradient.any() for gradient in steps[8][1].values())
    for size in (4, 2, 1):
        assert_same_step(steps[8], steps[size])


@each_term
@pytest.mark.parametrize("change", [pad_left, pack], ids=lambda change: change.__name__)
def test_padding_and_packing_change_neither_value_nor_gradient(
    families: dict[str, Family], name: str, options: dict[str, Any], change: Any
) -> None:
    model, family, rows, columns = build(families, name, options)
    (whole,) = cut_batches(family, rows, 8, columns)
    halves = cut_batches(family, rows, 4, columns)
    expected = run_step(model, [whole])
    assert_same_step(expected, run_step(model, [change(whole)]))
    assert_same_step(expected, run_step(model, [change(half) for half in halves]))


@each_term
def test_the_gradient_is_the_slope_along_a_random_direction(
    families: dict[str, Family], name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "float32", torch.float64
    )  # in which transformers' norms compute, whatever the model's dtype
    model, family, rows, columns = build(families, name, options)
    batches = cut_batches(family, rows, 4, columns)
    _, gradients = run_step(model, batches)
    generator = torch.Generator().manual_seed(0)
    direction = {
        key: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().square().mean().sqrt()
        for key, p in model.named_parameters()
    }
    values, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter += (2 if sign < 0 else 1) * sign * step * direction[key]
        values.append(run_step(model, batches)[0][name])
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(sum((gradients[key] * direction[key]).sum() for key in gradients)), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_anything_to_count_give_zero(families: dict[str, Family], name: str) -> None:
    model, family, rows, _ = build(families, name, {})
    text = uneven_rows([0] * 8)
    nothing = {"auxiliary_classification": -100, "auxiliary_regression": torch.nan}
    columns = {"auxiliary_labels": torch.full((8,), nothing[name])} if name in nothing else {}
    (batch,) = cut_batches(family, text, 8, columns)
    batch["labels"][:] = -100
    if LOSSES[name].count in ("all_tokens", "rows"):  # counted, supervised or not
        assert run_step(model, [batch])[0][name] > 0
        return
    losses, gradients = run_step(model, [batch, batch])
    assert losses == {name: 0.0}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_give_the_same_step(families: dict[str, Family], name: str) -> None:
    steps = []
    for enable in (False, True):
        model, family, rows, columns = build(families, name, {})
        if enable:
            checkpoint_activations(model)
        steps.append(run_step(model, cut_batches(family, rows, 4, columns)))
    assert_same_step(*steps)
