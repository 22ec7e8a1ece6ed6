"""transformers.Trainer trains a custom class to the same losses and weights as fit(), on the same rows in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Family
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from training import curve, relative_distance, train, uneven_rows, user_losses, weights
from transformers import Trainer, TrainingArguments

from hfcustom.data.collate import Collator
from hfcustom.data.order import step_rows

STEPS, ROWS, RATE = 3, 8, 1e-3
FEW_IMAGES = (1, 0, 0, 0, 1, 0, 0, 0)  # Aria's are 980 px


class InOrder(Trainer):
    """Trainer without shuffling."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with user_losses():
        yield


def trainer_curve(model: nn.Module, family: Family, rows: list[Any], folder: Path, accumulation: int) -> list[float]:
    """Train with Trainer on the rows in fit()'s order; return the logged losses."""
    order = [index for step in range(STEPS) for index in step_rows(len(rows), step, ROWS, seed=0)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    dataset: Any = [rows[index] for index in order]
    trainer = InOrder(model, arguments, data_collator=Collator(family.processor), train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_trainer_and_fit_agree(family: Family, tmp_path: Path, loss: str, accumulation: int) -> None:
    rows = uneven_rows(FEW_IMAGES)
    ours, theirs = family.model(loss=loss), family.model(loss=loss)
    start = weights(ours)
    options: dict[str, Any] = {"micro_batch_size": ROWS // accumulation, "lr": RATE, "schedule": "constant"}
    expected = curve(train(ours, family, tmp_path / "fit", rows, weight_decay=0.0, **options))
    found = trainer_curve(theirs, family, rows, tmp_path / "trainer", accumulation)
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative_distance(weights(theirs), weights(ours), start) < 1e-4


def test_trainer_and_fit_agree_on_a_term_when_a_batch_is_the_step(internvl: Family, tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "image_size": 0.5}
    ours, theirs = internvl.model(loss=loss), internvl.model(loss=loss)
    options: dict[str, Any] = {"lr": RATE, "schedule": "constant", "weight_decay": 0.0}
    expected = curve(train(ours, internvl, tmp_path / "fit", **options))
    found = trainer_curve(theirs, internvl, uneven_rows(), tmp_path / "trainer", 1)
    assert found == pytest.approx(expected, rel=1e-5)
