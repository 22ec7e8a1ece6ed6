"""Token losses: gradients, special cases that must be cross entropy, a naive twin, and options that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from loss_cases import batch_of, model_of
from torch.nn import functional as F

from hfcustom.losses import LOSSES, Teacher, find_loss

TOKEN_LOSSES = sorted(name for name, loss in LOSSES.items() if not loss.is_term)
EXACT = [name for name in TOKEN_LOSSES if not LOSSES[name].surrogate]
M = 6


def inputs_of(name: str, targets: torch.Tensor, vocabulary_size: int) -> dict[str, Any]:
    """Return what a loss takes beside logits and targets, in float64."""
    inputs = {
        "previous_tokens": torch.stack([targets, targets.flip(0), targets.roll(1), targets.roll(2)], 1),  # (M, 4)
        "teacher": Teacher(vocabulary_size, logits=torch.randn(len(targets), vocabulary_size, dtype=torch.float64)),
        "token_weights": torch.rand(len(targets), dtype=torch.float64),
    }
    return {key: inputs[key] for key in find_loss(name).inputs}


@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_is_the_derivative(internvl: Family, name: str) -> None:
    processor = internvl.processor
    digits = processor.tokenizer("3 of 1", return_tensors="pt").input_ids[0]
    vocabulary_size = len(processor.tokenizer)
    targets = torch.cat([digits, torch.randint(0, vocabulary_size, (M - len(digits),))])
    logits = torch.randn(M, vocabulary_size, dtype=torch.float64, requires_grad=True)
    options = {**inputs_of(name, targets, vocabulary_size), **find_loss(name).example_options(processor)}
    assert torch.autograd.gradcheck(lambda x: find_loss(name).function(x, targets, **options), logits, fast_mode=True)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_certain_tokens_give_finite_values_and_gradients(internvl: Family, name: str) -> None:
    """Logits 200 apart: the others' probabilities are 0 in float32."""
    vocabulary_size = len(internvl.processor.tokenizer)
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    logits = torch.zeros(M, vocabulary_size)
    logits[torch.arange(M), targets.roll(1)] = 200.0
    logits.requires_grad_(True)
    inputs = {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs_of(name, targets, vocabulary_size).items()
    }
    values = find_loss(name).function(logits, targets, **inputs, **find_loss(name).example_options(internvl.processor))
    (slopes,) = torch.autograd.grad(values.sum(), logits)
    assert values.isfinite().all() and slopes.isfinite().all()


# ---- special cases --------------------------------------------------------------------------------------------------

AS_CROSS_ENTROPY: dict[str, dict[str, Any]] = {
    "confidence_penalty": {"beta": 0.0},
    "focal": {"gamma": 0.0},
    "label_smoothing": {"epsilon": 0.0},
    "poly1": {"epsilon": 0.0},
    "unlikelihood": {"alpha": 0.0},
    "weighted_cross_entropy": {"token_weights": torch.ones(M)},
}


@pytest.mark.parametrize("name", AS_CROSS_ENTROPY)
def test_at_its_neutral_option_it_is_cross_entropy(name: str) -> None:
    logits, targets = torch.randn(M, 9), torch.randint(0, 9, (M,))
    options = {**inputs_of(name, targets, 9), **AS_CROSS_ENTROPY[name]}
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(find_loss(name).function(logits, targets, **options), expected)


def test_the_gradient_of_dft_is_that_of_cross_entropy_times_the_probability() -> None:
    logits, targets = torch.randn(M, 9, requires_grad=True), torch.randint(0, 9, (M,))
    (slopes,) = torch.autograd.grad(find_loss("dft").function(logits, targets).sum(), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    chances = logits.softmax(-1).gather(1, targets[:, None])
    torch.testing.assert_close(slopes, plain * chances)


def test_entropy_is_that_of_torch_and_survives_ruled_out_tokens() -> None:
    logits = torch.randn(M, 9)
    logits[:, 4] = -torch.inf
    logits.requires_grad_(True)
    values = find_loss("entropy_regularisation").function(logits, torch.zeros(M, dtype=torch.long))
    torch.testing.assert_close(
        values, torch.distributions.Categorical(logits=logits[:, [0, 1, 2, 3, 5, 6, 7, 8]]).entropy()
    )
    (slopes,) = torch.autograd.grad(values.sum(), logits)
    assert slopes.isfinite().all()
    certain = logits.detach().scatter(1, torch.zeros(M, 1, dtype=torch.long), 50.0)
    assert float(find_loss("entropy_regularisation").function(certain, torch.zeros(M)).abs().max()) < 1e-6


# ---- unlikelihood ---------------------------------------------------------------------------------------------------


def naive_unlikelihood(
    logits: torch.Tensor, targets: torch.Tensor, previous: torch.Tensor, alpha: float
) -> list[float]:
    values = []
    for row, target, before in zip(logits.double(), targets.tolist(), previous.tolist(), strict=True):
        chances = row.softmax(-1)
        value = -chances[target].log()
        for token in set(before) - {-100, target}:
            value = value - alpha * (1 - chances[token]).log()
        values.append(float(value))
    return values


def test_unlikelihood_equals_a_loop_over_the_candidates() -> None:
    logits, targets = 3 * torch.randn(40, 12), torch.randint(0, 12, (40,))
    previous = torch.randint(0, 12, (40, 15))
    previous[torch.rand(40, 15) < 0.3] = -100
    previous[0] = -100
    values = find_loss("unlikelihood").function(logits, targets, previous, alpha=0.7)
    assert values.tolist() == pytest.approx(naive_unlikelihood(logits, targets, previous, 0.7), rel=1e-5)


def test_unlikelihood_of_a_token_that_is_certain_is_exact() -> None:
    """In float32 its 1 - p is 0; the loss is log of the rest's probability, and its gradient pushes the token down."""
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    values = find_loss("unlikelihood").function(logits, torch.tensor([1]), torch.tensor([[0]]))
    assert float(values.detach()) == pytest.approx(60.0 + 60.0 - torch.tensor(2.0).log().item())
    (slopes,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(slopes, torch.tensor([[2.0, -1.5, -0.5]]))


def test_unlikelihood_keeps_no_table_of_answers_times_vocabulary() -> None:
    """The graph holds (M, V) tensors as cross entropy does, and (M, L) ones, none of (M, L, V)."""
    vocabulary_size, saved = 50, list[int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    logits, targets = torch.randn(M, vocabulary_size, requires_grad=True), torch.randint(0, vocabulary_size, (M,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        find_loss("unlikelihood").function(logits, targets, torch.randint(0, vocabulary_size, (M, 20)))
    assert max(saved) <= M * vocabulary_size


# ---- in a model -----------------------------------------------------------------------------------------------------


def test_token_weights_weigh_each_token_and_divide_by_their_sum(internvl: Family) -> None:
    batch = batch_of("weighted_cross_entropy", internvl, [1, 0])
    model = model_of("weighted_cross_entropy", internvl)
    mixed = model(**batch).loss
    for weight in (1.0, 3.0):
        batch["token_weights"] = torch.full_like(batch["token_weights"], weight)
        torch.testing.assert_close(model(**batch).loss, internvl.model().train()(**batch_without(batch)).loss)
    assert float(mixed.detach()) != pytest.approx(float(model(**batch).loss.detach()), rel=1e-4)


def batch_without(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "token_weights"}


# ---- options --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "confidence_penalty",
        {"beta": "high"},
        "beta of loss 'confidence_penalty' is 'high'; it must be a finite number",
    ),
    ("focal", {"gamma": -1.0}, "gamma of loss 'focal' is -1.0; it must be a finite number from 0"),
    (
        "label_smoothing",
        {"epsilon": 1.5},
        "epsilon of loss 'label_smoothing' is 1.5; it must be a finite number from 0 to 1",
    ),
    ("poly1", {"epsilon": -1.5}, "epsilon of loss 'poly1' is -1.5; it must be a finite number from -1"),
    ("poly1", {"epsilon": float("nan")}, "epsilon of loss 'poly1' is nan; it must be a finite number from -1"),
    ("unlikelihood", {"alpha": True}, "alpha of loss 'unlikelihood' is True; it must be a finite number from 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_told_what_is_allowed(name: str, options: dict[str, Any], message: str) -> None:
    targets = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        find_loss(name).function(torch.randn(2, 5), targets, **inputs_of(name, targets, 5), **options)
