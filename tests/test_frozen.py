"""The reference of a preference loss: the model itself without its adapter, another model, or a cached column."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from pairs import IMAGES, pair_batch, perturb, unpadded
from peft import LoraConfig
from torch import nn
from training import add_dropout
from transformers import AutoModelForImageTextToText

import hfcustom
from hfcustom.losses import adapters_off, frozen_context
from hfcustom.parts import unwrap
from hfcustom.train import checkpoint_activations

LOG_2 = 0.6931471805599453
FORMS: dict[str, dict[str, Any]] = {
    "language": {},
    "language and head": {"parts": ["language", "head"]},
    "vision": {"parts": ["vision", "language"]},
    "connector in full": {"train": ["connector"]},
    "connector and head in full": {"train": ["connector", "head"]},
}


def with_lora(model: Any, moved: bool = True, **options: Any) -> Any:
    """Attach LoRA; `moved` as if it had been trained."""
    wrapped = hfcustom.lora(model, **{"rank": 2, **options})
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return wrapped.train()


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that a reference pass might leave changed."""
    core = unwrap(model)
    adapted = {name: module for name, module in core.named_modules() if "_disable_adapters" in dir(module)}
    assert adapted
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "off": {name: module.disable_adapters for name, module in adapted.items()},
        "active": {name: copy.copy(module.active_adapter) for name, module in adapted.items()},
        "pass": core._pass,
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def batch(internvl: Family) -> dict[str, torch.Tensor]:
    return pair_batch(internvl, IMAGES[:3])


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_starts_at_log_2(internvl: Family, form: str, batch: dict[str, torch.Tensor]) -> None:
    model = with_lora(internvl.model(loss="dpo"), moved=False, **FORMS[form])
    assert float(model(**batch).loss.detach()) == pytest.approx(LOG_2, abs=1e-7)


def test_a_fresh_adapter_starts_at_log_2_in_every_family(family: Family) -> None:
    model = with_lora(family.model(loss="dpo"), moved=False)
    assert float(model(**pair_batch(family, IMAGES[:2])).loss.detach()) == pytest.approx(LOG_2, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_adapter_off_is_the_base_and_all_is_as_it_was(
    internvl: Family, form: str, batch: dict[str, torch.Tensor]
) -> None:
    base = internvl.model(loss="dpo")
    twin = copy.deepcopy(base)
    model = with_lora(base, **FORMS[form])
    core, before = unwrap(model), state(model)
    found = frozen_context(core, "reference", batch, batch["labels"]).row_log_probs
    assert state(model) == before
    expected = twin.loss_context(batch, batch["labels"]).row_log_probs.detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    own = core.loss_context(batch, batch["labels"]).row_log_probs
    assert not torch.allclose(found, own, atol=1e-2), "the adapter makes no difference"
    assert own.requires_grad and not found.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_adapter_off_another_model_and_a_cached_column_are_one_reference(
    internvl: Family, form: str, batch: dict[str, torch.Tensor]
) -> None:
    base = internvl.model(loss="dpo")
    twin = copy.deepcopy(base)
    column = twin.loss_context(batch, batch["labels"]).row_log_probs.detach()
    model = with_lora(base, **FORMS[form])
    results = []
    for way in ("adapter off", "another model", "column"):
        if way == "another model":
            unwrap(model).set_reference(twin)
        more = {"reference_log_probs": column} if way == "column" else {}
        if way == "column":
            twin.lm_head.weight.data.zero_()  # it is not asked
        model.zero_grad()
        loss = model(**batch, **more).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_every_trained_weight_gets_the_gradient_of_the_policy_alone(
    internvl: Family, batch: dict[str, torch.Tensor]
) -> None:
    model = with_lora(internvl.model(loss="dpo"), parts=["language", "head"], train=["connector"])
    model(**batch).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained


def test_dropout_is_off_in_the_reference_and_on_in_the_policy(
    internvl: Family, batch: dict[str, torch.Tensor]
) -> None:
    base = internvl.model(loss="dpo")
    expected = copy.deepcopy(base).loss_context(batch, batch["labels"]).row_log_probs.detach()
    model = with_lora(base, parts=["language", "head"], dropout=0.5)
    add_dropout(model, 0.5)
    core = unwrap(model)
    random = torch.get_rng_state()
    found = frozen_context(core, "reference", batch, batch["labels"])
    torch.testing.assert_close(found.row_log_probs, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), random), "the reference drew random numbers"
    first, second = (core.loss_context(batch, batch["labels"]).row_log_probs for _ in range(2))
    assert not torch.allclose(first, second)


def test_what_the_head_of_a_reference_does_is_done_in_eval_mode_too(
    internvl: Family, batch: dict[str, torch.Tensor]
) -> None:
    class Dropped(internvl.model_class):  # type: ignore[misc, name-defined]
        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().compute_logits(nn.functional.dropout(hidden_states, 0.5, self.training))

    core = unwrap(with_lora(internvl.model(Dropped, loss="dpo")))
    first, second = (frozen_context(core, "reference", batch, batch["labels"]).row_log_probs for _ in range(2))
    assert torch.equal(first, second)


def test_seams_and_hooks_are_in_effect_in_the_reference(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    calls: list[str] = []

    class Seen(internvl.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            calls.append("vision")
            return features * 1.5

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append("hidden")
            return hidden_states * 0.5

    base = internvl.model(Seen, loss="dpo")
    twin = copy.deepcopy(base)
    expected = twin.loss_context(batch, batch["labels"]).row_log_probs.detach()
    model = with_lora(base, train=["connector"])
    unwrap(model).get_decoder().register_forward_hook(lambda *args: calls.append("hook"))
    calls.clear()
    found = frozen_context(unwrap(model), "reference", batch, batch["labels"]).row_log_probs
    assert calls == ["vision", "hidden", "hook"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    model(**batch).loss.backward()
    assert calls[3:] == ["vision", "hidden", "hook"] * 2


@pytest.mark.parametrize("form", ["language", "language and head", "connector and head in full"])
def test_gradient_checkpointing_changes_nothing(
    internvl: Family, form: str, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcustom.losses.chunked.CHUNK_ELEMENTS", 1)  # the head's chunks are recomputed too
    results = []
    for recompute in (False, True):
        model = with_lora(internvl.model(loss="dpo"), **FORMS[form])
        if recompute:
            checkpoint_activations(unwrap(model))
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_is_its_own_reference(
    internvl: Family, tmp_path: Path, bits: Any, batch: dict[str, torch.Tensor]
) -> None:
    internvl.model(loss="dpo").save_pretrained(tmp_path)
    config = hfcustom.quantization_config(tmp_path, bits)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    expected = base.eval().loss_context(batch, batch["labels"]).row_log_probs.detach()
    model = with_lora(base, moved=False)
    # on a CPU, bitsandbytes dequantises in training mode and multiplies integers in eval mode
    assert float(model(**batch).loss.detach()) == pytest.approx(LOG_2, abs=1e-3 if bits == "8bit" else 1e-6)
    perturbed = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in perturbed:
            parameter.add_(0.05)
    before = state(model)
    found = frozen_context(unwrap(model), "reference", batch, batch["labels"]).row_log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert state(model) == before


def test_several_adapters_stay_as_they_are(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    base = internvl.model(loss="dpo")
    expected = copy.deepcopy(base).loss_context(batch, batch["labels"]).row_log_probs.detach()
    model = with_lora(base)
    model.add_adapter("idle", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    before = state(model)
    found = frozen_context(unwrap(model), "reference", batch, batch["labels"]).row_log_probs
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert state(model) == before
    model.set_adapter("idle")
    before = state(model)
    found = frozen_context(unwrap(model), "reference", batch, batch["labels"]).row_log_probs
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert state(model) == before


def test_an_adapter_that_is_off_already_stays_off(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    model = with_lora(internvl.model(loss="dpo"))
    with model.disable_adapter():
        before = state(model)
        assert float(model(**batch).loss.detach()) == pytest.approx(LOG_2, abs=1e-6)
        assert state(model) == before
    assert not any(state(model)["off"].values())


@pytest.mark.parametrize("form", FORMS)
def test_an_error_inside_leaves_all_as_it_was(internvl: Family, form: str, batch: dict[str, torch.Tensor]) -> None:
    model = with_lora(internvl.model(loss="dpo"), **FORMS[form])
    core, before = unwrap(model), state(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = core.get_decoder().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        frozen_context(core, "reference", batch, batch["labels"])
    assert state(model) == before
    with pytest.raises(RuntimeError, match="out of memory"), adapters_off(core):
        fail()
    assert state(model) == before
    handle.remove()
    assert model(**batch).loss.requires_grad


def test_modules_put_into_eval_mode_by_hand_stay_there(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    model = with_lora(internvl.model(loss="dpo"))
    unwrap(model).model.vision_tower.eval()
    before = state(model)
    model(**batch)
    assert state(model) == before


# ---- references that are none ---------------------------------------------------------------------------------------


def test_without_a_reference_the_cures_are_named(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    message = r"needs a reference, and Custom.* has none. Train with LoRA.*set_reference.*reference_log_probs"
    with pytest.raises(ValueError, match=message):
        internvl.model(loss="dpo").train()(**batch)


def unfreeze_connector(model: Any) -> None:
    unwrap(model).model.multi_modal_projector.requires_grad_(True)


def unfreeze_a_base_layer(model: Any) -> None:
    layer = next(module for name, module in unwrap(model).named_modules() if name.endswith("q_proj.base_layer"))
    layer.bias.requires_grad_(True)


@pytest.mark.parametrize("unfreeze", [unfreeze_connector, unfreeze_a_base_layer])
def test_a_reference_that_would_train_along_is_refused(
    internvl: Family, unfreeze: Callable[[Any], None], batch: dict[str, torch.Tensor]
) -> None:
    model = with_lora(internvl.model(loss="dpo"))
    unfreeze(model)
    with pytest.raises(ValueError, match=r"is trained outside of the adapter.*Name its part in lora\(model, train"):
        model(**batch)
    model(**batch, reference_log_probs=torch.zeros(6))


def test_a_cached_column_of_another_length_is_an_error(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"reference_log_probs are \(2,\) for 6 rows.*cache_reference makes them"):
        internvl.model(loss="dpo").train()(**batch, reference_log_probs=torch.zeros(2))


def test_a_reference_sees_none_of_the_losses_own_tensors(
    internvl: Family, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own config names other losses, by which it cannot know them."""

    @hfcustom.term(count="rows", columns=("score",))
    def scored(context: hfcustom.LossContext) -> Any:
        return (context.reference.row_log_probs * context.batch["score"]).sum() + 0 * context.hidden_states.sum(), 6

    model = internvl.model(loss="scored").train()
    reference = internvl.model(loss="cross_entropy")
    model.set_reference(reference)
    seen: list[set[str]] = []
    stock = type(reference).stock_class().forward
    monkeypatch.setattr(
        type(reference).stock_class(), "forward", lambda self, **inputs: (seen.append(set(inputs)), stock(self, **inputs))[1]
    )  # fmt: skip
    model(**batch, score=torch.ones(6))
    assert len(seen) == 2 and not any({"score", "preference", "labels"} & names for names in seen)


def test_packed_rows_have_the_same_reference(internvl: Family, batch: dict[str, torch.Tensor]) -> None:
    """In eval mode transformers fills a cache by default, and with one takes packed rows for a single one."""
    core = unwrap(with_lora(perturb(internvl.model(loss="dpo"))))
    packed = unpadded(batch)
    found = frozen_context(core, "reference", packed, packed["labels"]).row_log_probs
    expected = frozen_context(core, "reference", batch, batch["labels"]).row_log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for core_mode in (core.eval(), core.train()):
        losses = [core_mode(**form).loss for form in (batch, packed)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
