"""The loss contract, proven for every registered loss by enumeration: a loss added to the package is tested unseen."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loss_cases import (
    CUTS,
    assert_same_gradients,
    batch_of,
    cut,
    family_of,
    gradients,
    left_padded,
    model_of,
    packed,
    spec_of,
    without_labels,
)
from test_trl import sft
from transformers import Trainer, TrainingArguments

import hfcustom
from hfcustom.losses import IGNORE, LOSSES, chunked, context, total
from hfcustom.train import train_step
from hfcustom.train_config import TrainConfig

EVERY = sorted(LOSSES)
TOKEN_LOSSES = [name for name in EVERY if not LOSSES[name].is_term]


def step(name: str, batches: list[dict[str, Any]], dtype: torch.dtype = torch.float32, loss: Any = None) -> Any:
    """Return the total and the gradients of one training step whose optimiser does nothing."""
    model = model_of(name, family_of(name), loss, dtype)
    found: dict[str, Any] = {}

    class Look(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.update(gradients(model))

    optimizer = Look(model.parameters(), lr=0.0)
    config = TrainConfig(max_grad_norm=0.0)
    report = train_step(model, batches, optimizer, Accelerator(cpu=True), config)
    return float(report.losses[name]), found


def forward(name: str, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model = model_of(name, family_of(name))
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@cache
def baseline(name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and gradients of the loss's own batch."""
    return forward(name, batch_of(name, family_of(name)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)  # chunks of 16 tokens
    monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 1)  # slices of one


@pytest.mark.parametrize("name", EVERY)
def test_it_has_something_to_say_about_the_batch_it_is_tested_on(name: str) -> None:
    value, grads = baseline(name)
    assert value != 0 and any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("name", EVERY)
def test_value_and_every_gradient_equal_those_of_full_logits(
    name: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(name, family_of(name))
    value, grads = forward(name, batch)
    monkeypatch.setattr(total, "token_loss_total", naive_token_losses)
    monkeypatch.setattr(context, "token_log_probs", naive_log_probs)
    expected, wanted = forward(name, batch)
    assert value == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(grads, wanted)


def naive_token_losses(head: Any, hidden: torch.Tensor, work: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, and autograd."""
    logits = head.module(hidden).float()
    inputs = {key: value if torch.is_tensor(value) else value.evaluated() for key, value in work.inputs.items()}
    values = [
        item.loss.function(logits, work.targets, **{key: inputs[key] for key in item.loss.inputs}, **item.options)
        for item in work.losses
    ]
    sums = torch.stack([value.sum() for value in values])
    return (sums * work.scales).sum(), sums.detach()


def naive_log_probs(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return head.module(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("name", EVERY)
def test_however_a_step_is_cut_loss_and_gradient_are_the_same(name: str) -> None:
    batch = batch_of(name, family_of(name))
    whole, wanted = baseline(name)
    for label, sizes in CUTS.items():
        value, grads = step(name, cut(batch, sizes))
        assert value == pytest.approx(whole, rel=1e-5), label
        assert_same_gradients(grads, wanted, rtol=1e-3)


LAYOUTS = [(packed, name) for name in EVERY if family_of(name).name == "internvl"]  # Aria's: tests/test_terms.py
LAYOUTS += [(left_padded, name) for name in EVERY]


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
def test_packed_and_left_padded_rows_are_the_same_as_right_padded_ones(layout: Any, name: str) -> None:
    expected, wanted = baseline(name)
    value, grads = forward(name, layout(batch_of(name, family_of(name))))
    assert value == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(grads, wanted, rtol=1e-3)


def test_a_mask_that_causal_attention_makes_needless_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right padding in training needs no mask; left padding, evaluation and other attention do."""
    family = family_of("cross_entropy")
    batch, model = batch_of("cross_entropy", family), model_of("cross_entropy", family)
    seen: list[bool] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    model(**batch)
    model(**left_padded(batch))
    model.eval()(**batch)
    model.train().set_attn_implementation("eager")
    eager = model(**batch).loss
    assert seen == [False, True, True, True]
    torch.testing.assert_close(eager, torch.tensor(baseline("cross_entropy")[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_what_stands_at_ignored_labels_changes_nothing(name: str) -> None:
    """More padding, and other numbers in the padding."""
    batch = batch_of(name, family_of(name))
    expected, wanted = baseline(name)
    wider = {
        key: torch.cat([value, torch.zeros_like(value[:, :3])], 1)
        if value.shape[:2] == batch["labels"].shape
        else value
        for key, value in batch.items()
    }
    wider["labels"][:, -3:] = IGNORE
    value, grads = forward(name, wider)
    assert value == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(grads, wanted)


@pytest.mark.parametrize("name", [name for name in EVERY if LOSSES[name].count not in ("rows", "all_tokens")])
def test_nothing_to_count_gives_zero_and_a_zero_gradient(name: str) -> None:
    """Every batch has rows and tokens; what a loss counts otherwise may be missing."""
    family = family_of(name)
    batch = without_labels(name, batch_of(name, family, [0, 0]))
    value, grads = forward(name, batch)
    assert value == 0.0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_stays_near_float32(name: str) -> None:
    batch, family = batch_of(name, family_of(name)), family_of(name)
    exact = torch.tensor(baseline(name)[0])
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    low = model_of(name, family, dtype=torch.bfloat16)(**batch).loss
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("name", [name for name in EVERY if not LOSSES[name].surrogate])
def test_in_float64_the_gradient_is_the_derivative(name: str) -> None:
    """Finite differences with respect to hidden states, image features and router logits, of all that comes after."""
    family = family_of(name)
    batch = batch_of(name, family)
    model = model_of(name, family, dtype=torch.float64)
    seen = model.loss_context(
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}, batch["labels"]
    )
    leaves = [seen.hidden_states, seen.image_features, *(seen.outputs.get("router_logits") or ())]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def loss_at(*tensors: torch.Tensor) -> torch.Tensor:
        outputs = {**seen.outputs, "router_logits": tensors[2:]}
        context = replace(seen, hidden_states=tensors[0], image_features=tensors[1], outputs=outputs)
        return total.evaluate(context, model.losses())[0]

    loss = loss_at(*leaves)
    assert loss.dtype == torch.float64
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    for direction in (grads, noise):
        size = float(torch.stack([part.square().sum() for part in direction]).sum().sqrt())
        slope = sum(float((grad * part).sum()) for grad, part in zip(grads, direction, strict=True)) / size
        ends = []
        for sign in (1, -1):
            moved = [leaf.detach() + sign * 1e-5 / size * part for leaf, part in zip(leaves, direction, strict=True)]
            with torch.no_grad():
                ends.append(float(loss_at(*moved)))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_a_weight_scales_it_and_is_logged_beside_the_raw_value(name: str) -> None:
    family = family_of(name)
    batch, options = batch_of(name, family), spec_of(name, family)[name]
    loss = {name: {**options, "weight": 0.25}}
    model = model_of(name, family, loss if name == "cross_entropy" else {**loss, "cross_entropy": 1.0})
    loss_of_all = model(**batch).loss
    alone, _ = baseline(name)
    value = model.loss_values[name]
    assert float(value.sum) / value.count == pytest.approx(alone, rel=1e-5)
    assert float(value.share) == pytest.approx(0.25 * alone, rel=1e-5)
    assert float(loss_of_all.detach()) == pytest.approx(
        sum(float(v.share) for v in model.loss_values.values()), rel=1e-5
    )


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_evaluation_computes_it_too(name: str) -> None:
    batch = batch_of(name, family_of(name))
    model, expected = model_of(name, family_of(name)), baseline(name)[0]
    with torch.no_grad():
        outputs = model.eval()(**batch)
    assert float(outputs.loss) == pytest.approx(expected, rel=1e-5)
    assert outputs.logits.shape[:2] == batch["labels"].shape


def trainer_of(model: Any, family: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], remove_unused_columns=False)
    return Trainer(model, arguments)


def trl_of(model: Any, family: Any, folder: Path) -> Trainer:
    return hfcustom.honour_model(sft(model, family, folder))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # as in test_trl.py
@pytest.mark.parametrize("make", [trainer_of, trl_of])
@pytest.mark.parametrize("name", EVERY)
def test_trainer_and_trl_train_it_as_the_model_computes_it(name: str, make: Any, tmp_path: Path) -> None:
    family = family_of(name)
    batch = batch_of(name, family)
    expected, wanted = baseline(name)
    model = model_of(name, family)
    trainer = make(model, family, tmp_path)
    trainer.current_gradient_accumulation_steps = 1  # train() sets it
    num_items = (batch["labels"][:, 1:] != IGNORE).sum()
    loss = trainer.training_step(model, dict(batch), num_items_in_batch=num_items)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(gradients(model), wanted)
