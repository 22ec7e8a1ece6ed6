"""Auxiliary heads: values against loops over rows, heads that learn and are saved, and what is wrong is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Family
from torch import nn

import hfcustom
from hfcustom.losses import find_loss

LABELS = {
    "auxiliary_classification": torch.tensor([2, -100, 0]),
    "auxiliary_regression": torch.tensor([0.5, torch.nan, -2.0]),
}


def with_head(internvl: Family, outputs: int) -> Any:
    """Return the class a user would write."""

    @hfcustom.register
    class WithHead(internvl.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.auxiliary_head = nn.Linear(config.get_text_config().hidden_size, outputs)
            self.post_init()

    return WithHead


def outputs_of(name: str) -> int:
    return 3 if name == "auxiliary_classification" else 1


def naive(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor, pooling: str) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden, terms = model.model(**inputs, use_cache=False).last_hidden_state, []
    for row, length, label in zip(hidden, batch["attention_mask"].sum(1).tolist(), labels, strict=True):
        pooled = row[length - 1] if pooling == "last" else row[:length].mean(0)
        answer = model.auxiliary_head(pooled)
        if label.is_floating_point() and not label.isnan():
            terms.append((answer[0] - label) ** 2)
        elif not label.is_floating_point() and label != -100:
            terms.append(-answer.softmax(0)[label].log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_value_and_gradient_equal_a_loop_over_rows(internvl: Family, name: str, pooling: str) -> None:
    batch, model_class = internvl.batch([1, 0, 2]), with_head(internvl, outputs_of(name))
    reference, model = internvl.model(model_class), internvl.model(model_class, loss={name: {"pooling": pooling}})
    expected = naive(reference, batch, LABELS[name], pooling)
    expected.backward()
    loss = model.train()(**batch, auxiliary_labels=LABELS[name]).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert model.loss_values[name].count == 2
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if other.grad is not None and other.grad.norm() > 1e-6:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", LABELS)
def test_the_head_is_trained_and_saved_with_an_adapter(internvl: Family, name: str, tmp_path: Path) -> None:
    model_class = with_head(internvl, outputs_of(name))
    model = hfcustom.lora(internvl.model(model_class, loss={"cross_entropy": 1.0, name: 0.5}), rank=2)
    model.train()(**internvl.batch([1, 0, 2]), auxiliary_labels=LABELS[name]).loss.backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("auxiliary_head.modules_to_save" in key for key in trained) and any("lora_B" in key for key in trained)
    plain = internvl.model(model_class, loss=name)
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(
        model_class.from_pretrained(tmp_path).auxiliary_head.weight, plain.auxiliary_head.weight
    )


def test_bfloat16_stays_near_float32(internvl: Family) -> None:
    for name, labels in LABELS.items():
        model = internvl.model(with_head(internvl, outputs_of(name)), loss=name)
        batch = internvl.batch([1, 0, 2]) | {"auxiliary_labels": labels}
        exact, low = model(**batch).loss, model.to(torch.bfloat16)(**batch).loss
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, exact, rtol=3e-2, atol=2e-2)


def test_whole_numbers_are_numbers_too() -> None:
    batch = {"labels": torch.zeros(2, 4), "auxiliary_labels": torch.tensor([3, -100])}
    model: Any = SimpleNamespace(placeholder_token_id=0)
    assert find_loss("auxiliary_regression").count_in(batch, model) == 2


CLASSES, NUMBERS = LABELS
WRONG: dict[str, tuple[str, dict[str, Any], int, torch.Tensor | None, str]] = {
    # name, options, outputs of the head, labels, message
    "no column": (CLASSES, {}, 3, None, "no auxiliary_labels: give the rows a column.*fit.. does by itself"),
    "shape": (CLASSES, {}, 3, torch.zeros(3, 2), r"auxiliary_labels are \(3, 2\).*one number a row of data, \(3,\)"),
    "floats": (CLASSES, {}, 3, torch.zeros(3), "whole numbers .*not torch.float32.*Use auxiliary_regression"),
    "too high": (
        CLASSES,
        {},
        3,
        torch.tensor([0, 3, 1]),
        "hold the class 3; 'auxiliary_head' has 3 outputs, .*0 to 2",
    ),
    "negative": (CLASSES, {}, 3, torch.tensor([0, -1, 1]), "hold the class -1.*-100"),
    "outputs": (NUMBERS, {}, 2, torch.zeros(3), "'auxiliary_head' has 2 outputs; auxiliary_regression needs one"),
    "pooling": (CLASSES, {"pooling": "first"}, 3, LABELS[CLASSES], "Unknown pooling 'first'.*Allowed: last, mean"),
    "head": (CLASSES, {"head": "heads"}, 3, LABELS[CLASSES], "has no module 'heads'.*set self.heads = nn.Linear"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told(internvl: Family, wrong: str) -> None:
    name, options, outputs, labels, message = WRONG[wrong]
    model = internvl.model(with_head(internvl, outputs), loss={name: options}).train()
    batch = internvl.batch([0, 0, 1]) | ({} if labels is None else {"auxiliary_labels": labels})
    with pytest.raises(ValueError, match=message):
        model(**batch)
