"""A loss of the user's own: who divides, how it is named and found, and what a wrong one is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from loss_cases import cut
from torch.nn import functional as F

import hfcustom
from hfcustom.losses import LOSSES, find_loss, import_losses, parse_losses


@pytest.fixture(autouse=True)
def restore_registry() -> Iterator[None]:
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


@pytest.fixture
def image_energy() -> str:
    """A term that counts image tokens."""

    @hfcustom.term(count="image_tokens")
    def image_energy(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        energy = context.image_features.square().mean(-1)
        return energy.sum(), energy.numel()

    return "image_energy"


# ---- the contract, in a model ---------------------------------------------------------------------------------------


CUTS = {"8x1": [8], "4x2": [4, 4], "2x4": [2] * 4, "1x8": [1] * 8, "uneven": [1, 3, 4]}


@pytest.mark.parametrize("name", ["image_energy", "two of each kind"])
def test_however_a_step_is_cut_loss_and_gradient_are_the_same(internvl: Family, name: str, image_energy: str) -> None:
    mixed = {"focal": 0.5, "z_loss": 1e-2, image_energy: 0.1}
    images = [1, 0, 2, 1, 0, 3, 1, 1]
    batch = internvl.batch(images)
    results = {}
    for label, sizes in CUTS.items():
        model = internvl.model(loss=mixed if name == "two of each kind" else name).train()
        micro_batches = cut(batch, sizes, images)
        divisors = model.loss_counts(micro_batches)
        total = 0.0
        for micro_batch in micro_batches:
            loss = model(**micro_batch, loss_divisors=divisors).loss
            loss.backward()
            total += float(loss.detach())
        results[label] = (total, {key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    whole, grads = results.pop("8x1")
    for label, (total, cut_grads) in results.items():
        assert total == pytest.approx(whole, rel=1e-5), label
        for key, grad in grads.items():
            torch.testing.assert_close(cut_grads[key], grad, rtol=1e-3, atol=1e-6, msg=f"{label}: {key}")


@pytest.mark.parametrize("name", ["cross_entropy", "image_energy"])
def test_a_batch_with_nothing_supervised_gives_zero(family: Family, name: str, image_energy: str) -> None:
    batch = family.batch([0, 0])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = family.model(loss=name).train()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_named_terms_are_reported_and_sum_to_the_total(internvl: Family, image_energy: str) -> None:
    model = internvl.model(loss={"cross_entropy": 1.0, "focal": {"weight": 0.5, "gamma": 1.0}, image_energy: 0.1})
    loss = model.train()(**internvl.batch([2, 1])).loss
    values = model.loss_values
    assert list(values) == ["cross_entropy", "focal", "image_energy"]
    total = sum(value.weight * float(value.sum) / value.count for value in values.values())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)


def test_evaluation_computes_the_configured_loss_too(internvl: Family) -> None:
    batch = internvl.batch([1])
    model = internvl.model(loss="focal")
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) == pytest.approx(float(model.train()(**batch).loss), rel=1e-6)


def test_a_class_carries_its_loss_and_the_config_wins(internvl: Family, tmp_path: Path) -> None:
    class Focal(internvl.model_class):  # type: ignore[misc, name-defined]
        default_loss = "focal"

    assert internvl.model(Focal).config.loss == "focal"
    assert internvl.model(Focal, loss="z_loss").config.loss == "z_loss"
    hfcustom.register(Focal)
    internvl.model(Focal).save_pretrained(tmp_path)
    assert Focal.from_pretrained(tmp_path).config.loss == "focal"
    assert Focal.from_pretrained(tmp_path, loss={"z_loss": 1.0}).config.loss == {"z_loss": 1.0}


def test_num_items_in_batch_is_honoured_as_transformers_passes_it(family: Family) -> None:
    batch, model = family.batch([1, 0]), family.model().train()
    count = int((batch["labels"][:, 1:] != -100).sum())
    alone = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(4 * count)).loss, alone / 4)
    assert model.accepts_loss_kwargs


# ---- what a wrong loss is told --------------------------------------------------------------------------------------


def loss_of(internvl: Family, name: str) -> None:
    internvl.model(loss=name).train()(**internvl.batch([1]))


def test_a_token_loss_that_averages_is_refused(internvl: Family) -> None:
    @hfcustom.token_loss
    def averaged(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets)

    with pytest.raises(ValueError, match=r"'averaged' returned \(\) for \d+ targets.*Do not average"):
        loss_of(internvl, "averaged")


def test_a_term_that_returns_no_count_is_refused(internvl: Family) -> None:
    @hfcustom.term(count="rows")
    def uncounted(context: hfcustom.LossContext) -> Any:
        return context.hidden_states.mean()

    with pytest.raises(TypeError, match=r"'uncounted' returned Tensor; it must return \(sum, count\)"):
        loss_of(internvl, "uncounted")


def test_a_term_whose_count_is_not_the_declared_one_is_refused(internvl: Family) -> None:
    @hfcustom.term(count="image_tokens")
    def averaged_term(context: hfcustom.LossContext) -> Any:
        return context.image_features.mean(), 1

    with pytest.raises(ValueError, match=r"summed over 1 items, but count='image_tokens' finds \d+"):
        loss_of(internvl, "averaged_term")


def test_a_term_that_is_no_scalar_is_refused(internvl: Family) -> None:
    @hfcustom.term(count="rows")
    def vector(context: hfcustom.LossContext) -> Any:
        return context.hidden_states.sum((1, 2)), len(context.labels)

    with pytest.raises(ValueError, match=r"'vector' returned a sum of shape \(1,\)"):
        loss_of(internvl, "vector")


def test_unknown_names_suggest_the_nearest(internvl: Family) -> None:
    with pytest.raises(
        ValueError, match=r"Unknown loss 'crossentropy'. Did you mean 'cross_entropy'\? Allowed: .*focal"
    ):
        parse_losses("crossentropy")
    with pytest.raises(ValueError, match=r"option of loss 'focal': 'gama'. Did you mean 'gamma'"):
        parse_losses({"focal": {"weight": 1.0, "gama": 2.0}})
    with pytest.raises(ValueError, match=r"weight of loss 'focal' is 'high'; it must be a finite number"):
        parse_losses({"focal": "high"})
    with pytest.raises(ValueError, match="The loss is empty"):
        parse_losses({})
    with pytest.raises(ValueError, match=r"Unknown count 'token'. Did you mean 'tokens'"):
        hfcustom.term(count="token")


def test_a_taken_name_names_both_functions_and_the_same_function_is_harmless() -> None:
    def focal(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.sum(-1)

    with pytest.raises(
        ValueError, match=r"'focal' belongs to hfcustom.losses.token_losses.focal; rename .*test_losses.*focal"
    ):
        hfcustom.token_loss(focal)
    hfcustom.token_loss(find_loss("focal").function)
    with pytest.raises(TypeError, match="must take"):
        hfcustom.token_loss(lambda logits: logits)


def test_a_loss_from_a_file_needs_no_decorator(internvl: Family, tmp_path: Path) -> None:
    file = tmp_path / "my_losses_for_test.py"
    file.write_text("def squared(logits, targets):\n    return logits.gather(-1, targets[:, None])[:, 0] ** 2\n")
    try:
        assert import_losses({f"{file}:squared": 0.5, "z_loss": 1.0}) == {"squared": 0.5, "z_loss": 1.0}
        loss_of(internvl, import_losses(f"{file}:squared"))
        with pytest.raises(AttributeError, match=r"Unknown loss 'squarred'. Did you mean 'squared'"):
            import_losses(f"{file}:squarred")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            import_losses(f"{tmp_path}/none.py:squared")
    finally:
        sys.modules.pop("my_losses_for_test", None)


def test_a_config_imports_no_file(internvl: Family, tmp_path: Path) -> None:
    """A checkpoint's config.json must not be able to run code."""
    file = tmp_path / "hostile.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef fn(logits, targets): return logits[:, 0]\n")
    with pytest.raises(ValueError, match="Unknown loss .*hostile.py:fn.*import its file first"):
        loss_of(internvl, f"{file}:fn")
    assert not (tmp_path / "ran").exists()


def test_without_labels_a_model_needs_no_loss(internvl: Family) -> None:
    """What was trained on a loss of somebody's file generates, and teaches, where that file is not."""
    model, batch = internvl.model(loss={"from_somewhere": 1.0}), internvl.batch([1])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]
    student = internvl.model(loss="kl_distillation")
    student.set_teacher(model)
    assert float(student(**batch).loss.detach()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="Unknown loss 'from_somewhere'"):
        model(**batch)


def test_the_stock_loss_refuses_rejected_answers(internvl: Family) -> None:
    batch = {**internvl.batch([0, 0]), "preference": torch.tensor([1.0, -1.0])}
    with pytest.raises(ValueError, match="loss='stock' knows no rejected answers"):
        internvl.model(loss="stock")(**batch)


WRONG_TERMS: dict[str, Any] = {
    "float": (lambda context: (1.0, len(context.labels)), "a sum of float; it must be a scalar tensor"),
    "no count": (lambda context: (context.hidden_states.sum(), None), "summed over None items"),
    "half a count": (lambda context: (context.hidden_states.sum(), 1.5), "summed over 1.5 items"),
}


@pytest.mark.parametrize("wrong", WRONG_TERMS)
def test_a_term_that_returns_something_else_is_told(wrong: str, internvl: Family) -> None:
    function, message = WRONG_TERMS[wrong]
    function.__name__ = f"term_{wrong.replace(' ', '_')}"
    hfcustom.term(count="rows")(function)
    with pytest.raises(ValueError, match=message):
        loss_of(internvl, function.__name__)


def test_a_token_loss_without_a_gradient_is_told(internvl: Family) -> None:
    @hfcustom.token_loss
    def detached(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.detach().logsumexp(-1)

    with pytest.raises(ValueError, match="'detached' returned values without a gradient"):
        internvl.model(loss="detached").train()(**internvl.batch([1]))


def test_options_are_checked_before_the_first_batch() -> None:
    @hfcustom.token_loss
    def needy(logits: torch.Tensor, targets: torch.Tensor, power: float) -> torch.Tensor:
        return logits[:, 0] ** power

    @hfcustom.token_loss
    def open_ended(logits: torch.Tensor, targets: torch.Tensor, **options: float) -> torch.Tensor:
        return logits[:, 0] * options["scale"]

    with pytest.raises(ValueError, match="Loss 'needy' needs its option 'power'"):
        parse_losses("needy")
    assert parse_losses({"open_ended": {"scale": 2.0}})[0].options == {"scale": 2.0}
    with pytest.raises(ValueError, match="stands alone: loss='stock'"):
        parse_losses({"stock": 1.0, "z_loss": 1e-4})


def test_names_and_forms_that_cannot_be_registered() -> None:
    def lr(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]

    def weighted(logits: torch.Tensor, targets: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        return logits[:, 0]

    with pytest.raises(ValueError, match="cannot be named 'lr', which the log has already"):
        hfcustom.token_loss(lr)
    with pytest.raises(ValueError, match="'weighted' has an option 'weight'"):
        hfcustom.token_loss(weighted)
    with pytest.raises(TypeError, match=r"Write @hfcustom.term\(count='tokens'\)"):
        hfcustom.term(lambda context: (0, 0))


@pytest.mark.parametrize("loss", ["stock", "cross_entropy", {"cross_entropy": 1.0, "shipped_term": 1.0}], ids=str)
def test_nothing_supervised_is_zero_for_a_divisor_of_any_kind(internvl: Family, loss: Any) -> None:
    @hfcustom.term(count="image_tokens")
    def shipped_term(context: hfcustom.LossContext) -> Any:
        return context.image_features.float().sum(), context.image_features[..., 0].numel()

    batch = internvl.batch([0, 0])
    batch["labels"][:] = -100
    for divisor in (None, 0, torch.tensor(0)):
        model = internvl.model(loss=loss).train()
        value = model(**batch, num_items_in_batch=divisor).loss
        value.backward()
        assert float(value.detach()) == 0.0
