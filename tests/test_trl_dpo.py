"""trl's DPOTrainer bypasses a custom model's forward; with honour_model() its log probabilities come from it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from conftest import Family
from datasets import Dataset
from test_trainer import STEPS, trainer_options
from test_trl import counting, logged
from training import relative_distance, weights

import hfcustom
from hfcustom.doctor.patient import picture
from hfcustom.trl_log_probs import score

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

METRICS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy")


@cache
def pairs() -> Dataset:
    """Return rows of preferences over pictures, answers of several lengths."""
    rows = []
    for seed in range(16):
        prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is number {seed}?"}]}
        ]
        answers = [
            [{"role": "assistant", "content": [{"type": "text", "text": "word " * (1 + n)}]}] for n in (seed % 5, 3)
        ]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "images": [picture(seed)]})
    return Dataset.from_list(rows)


def dpo(model: Any, family: Family, folder: Path, reference: Any = None, **options: Any) -> Any:
    """Return trl's trainer as a user would build it."""
    given = {name: options.pop(name) for name in ("peft_config",) if name in options}
    arguments = {
        **trainer_options(folder, 1),
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": None,
        **options,
    }
    return trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(**arguments),
        train_dataset=pairs(),
        eval_dataset=pairs().select(range(4)),
        processing_class=family.processor,
        **given,
    )


def test_without_overrides_training_is_trl_s_own_and_calls_forward(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = internvl.model(), internvl.model()
    start = weights(ours)
    stock = dpo(theirs, internvl, tmp_path / "stock", internvl.model())
    assert len(hfcustom.why_bypassed(stock)) == 2
    calls = counting(ours, monkeypatch)
    stock.train()
    assert not calls
    trainer = dpo(ours, internvl, tmp_path / "ours", internvl.model())
    assert hfcustom.honour_model(trainer) is trainer
    assert hfcustom.why_bypassed(trainer) == []
    trainer.train()
    assert len(calls) == 2 * STEPS  # of the model and its reference
    for name in METRICS:
        assert logged(trainer, name) == pytest.approx(logged(stock, name), rel=1e-4, abs=1e-6), name
    assert relative_distance(weights(ours), weights(theirs), start) < 1e-3


def test_an_override_counts(internvl: Family, tmp_path: Path) -> None:
    """Of half the temperature, answers' log probabilities are those of the class's own logits; trl alone misses it."""

    class Sharp(type(internvl.model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 2.0 * outputs.logits
            return outputs

    found = {}
    for name, honoured in (("trl", False), ("honoured", True)):
        model = internvl.model(Sharp)
        trainer = dpo(model, internvl, tmp_path / name, internvl.model())
        if honoured:
            hfcustom.honour_model(trainer)
        batch = trainer.data_collator([dict(row) for row in pairs().select(range(4))])
        mask = batch.pop("completion_mask")
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        found[name] = trainer.model(**batch, labels=labels, fused_lm_head=True).log_probs
        logits = Sharp.forward(model, **batch).logits
        expected = score(SimpleNamespace(logits=logits, get=lambda name: None), labels).log_probs
    assert torch.allclose(found["honoured"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["trl"], expected, rtol=1e-2)


def test_lora_without_a_reference_model(internvl: Family, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = hfcustom.lora(internvl.model(), "language", rank=2)
    twin = copy.deepcopy(model)
    trainer = hfcustom.honour_model(dpo(model, internvl, tmp_path / "ours"))
    stock = dpo(twin, internvl, tmp_path / "stock")
    trainer.train()
    stock.train()
    assert logged(trainer) == pytest.approx(logged(stock), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-4)


def test_every_field_is_trl_s(internvl: Family, tmp_path: Path) -> None:
    trainer = dpo(internvl.model(), internvl, tmp_path, internvl.model(), use_weighting=True)
    batch = trainer.data_collator([dict(row) for row in pairs().select(range(4))])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    theirs = trainer.model(**batch, labels=labels, fused_lm_head=True)
    hfcustom.honour_model(trainer)
    ours = trainer.model(**batch, labels=labels, fused_lm_head=True)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-5), name


def test_a_batch_without_labels_is_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    scored = score(SimpleNamespace(logits=logits, get=lambda name: None), torch.full((2, 3), -100))
    scored.log_probs.sum().backward()
    assert not scored.log_probs.any() and logits.grad is not None and not logits.grad.any()


def test_a_loss_that_would_have_no_effect_is_refused(internvl: Family, tmp_path: Path) -> None:
    trainer = dpo(internvl.model(loss="focal"), internvl, tmp_path, internvl.model())
    with pytest.raises(ValueError, match="loss='focal' has no effect: DPOTrainer .* loss={'dpo': 1.0, ...}"):
        hfcustom.honour_model(trainer)


def test_experts_whose_forward_gives_no_aux_loss_are_told_so(internvl: Family, tmp_path: Path) -> None:
    trainer = hfcustom.honour_model(dpo(internvl.model(), internvl, tmp_path, internvl.model()))
    batch = trainer.data_collator([dict(row) for row in pairs().select(range(2))])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with pytest.raises(ValueError, match="returns no aux_loss, .* set router_aux_loss_coef=0.0"):
        trainer.model(**batch, labels=labels, fused_lm_head=True, output_router_logits=True)
