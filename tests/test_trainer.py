"""transformers.Trainer trains a custom class to the same losses and weights as fit(), on the same rows in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from training import curve, relative_distance, train, uneven_rows, user_losses, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

import hfcustom
from hfcustom import LossCallback
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


def rows_in_order(rows: list[Any]) -> list[Any]:
    """Return the rows of a run in fit()'s order."""
    return [rows[index] for step in range(STEPS) for index in step_rows(len(rows), step, ROWS, seed=0)]


def trainer_options(folder: Path, accumulation: int) -> dict[str, Any]:
    """Return the arguments with which Trainer, or trl's, makes the run of training.short_config()."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def make_trainer(
    model: nn.Module, family: Family, rows: list[Any], folder: Path, accumulation: int = 1, **options: Any
) -> Trainer:
    """Return a Trainer on the rows in fit()'s order."""
    given = {name: options.pop(name) for name in ("callbacks", "eval_dataset") if name in options}
    arguments = TrainingArguments(**{**trainer_options(folder, accumulation), **options})
    dataset: Any = rows_in_order(rows)
    collator = Collator(family.processor)
    return InOrder(model, arguments, data_collator=collator, train_dataset=dataset, **given)


def lines(trainer: Trainer) -> list[dict[str, float]]:
    """Return the log lines of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trainer_curve(model: nn.Module, family: Family, rows: list[Any], folder: Path, accumulation: int) -> list[float]:
    """Train with Trainer; return the logged losses."""
    trainer = make_trainer(model, family, rows, folder, accumulation)
    trainer.train()
    return [entry["loss"] for entry in lines(trainer)]


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


# ---- LossCallback: named losses in the log ------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Stand in for a tracker: keep what on_log is given, and the step that the model knew."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.steps: list[Any] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(model.loss_step)

    on_step_end = on_substep_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


TOKEN_LOSSES = {"cross_entropy": 1.0, "margin": 0.5}  # Trainer knows the divisor of both


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_named_losses_are_logged_as_fit_logs_them(
    internvl: Family, tmp_path: Path, accumulation: int, every: int
) -> None:
    options: dict[str, Any] = {"micro_batch_size": ROWS // accumulation, "schedule": "constant", "weight_decay": 0.0}
    ours = train(internvl.model(loss=TOKEN_LOSSES), internvl, tmp_path / "fit", log_steps=every, **options)
    recorder = Recorder()
    trainer = make_trainer(
        internvl.model(loss=TOKEN_LOSSES),
        internvl,
        uneven_rows(),
        tmp_path,
        accumulation,
        logging_steps=every,
        callbacks=[recorder],
    )
    LossCallback.add_to(trainer)
    trainer.train()
    assert len(lines(trainer)) == STEPS // every
    for name in ("loss", *TOKEN_LOSSES):
        assert [entry[name] for entry in lines(trainer)] == pytest.approx(curve(ours, name), rel=1e-5)
    for entry in lines(trainer):
        assert entry["cross_entropy"] + entry["margin_weighted"] == pytest.approx(entry["loss"], rel=1e-6)
        assert entry["margin_weighted"] == pytest.approx(0.5 * entry["margin"], rel=1e-6)
    named = [{key: entry[key] for key in ("margin", "margin_weighted")} for entry in lines(trainer)]
    assert [{key: entry[key] for key in named[0]} for entry in recorder.logs if "loss" in entry] == named
    assert recorder.steps == [step for step in range(STEPS) for _ in range(accumulation)]


def test_a_scheduled_weight_follows_the_step_as_in_fit(internvl: Family, tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "margin": {"weight": 0.5, "warmup_steps": 3}}
    ours, theirs = internvl.model(loss=loss), internvl.model(loss=loss)
    options: dict[str, Any] = {"micro_batch_size": 4, "schedule": "constant", "weight_decay": 0.0}
    result = train(ours, internvl, tmp_path / "fit", **options)
    trainer = make_trainer(theirs, internvl, uneven_rows(), tmp_path, 2)
    LossCallback.add_to(trainer)
    trainer.train()
    for name in ("loss", "margin_weighted"):
        assert [entry[name] for entry in lines(trainer)] == pytest.approx(curve(result, name), rel=1e-5)
    weights_used = [entry["margin_weighted"] / entry["margin"] for entry in lines(trainer)]
    assert weights_used == sorted(weights_used)
    assert weights_used[-1] > weights_used[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "stock"])
def test_one_loss_is_logged_under_its_name(internvl: Family, tmp_path: Path, loss: str) -> None:
    trainer = make_trainer(internvl.model(loss=loss), internvl, uneven_rows(), tmp_path, 2, callbacks=[LossCallback()])
    trainer.train()
    for entry in lines(trainer):
        assert entry[loss] == pytest.approx(entry["loss"], rel=1e-6)
        assert f"{loss}_weighted" not in entry


def test_an_evaluation_between_steps_is_not_logged_as_training(internvl: Family, tmp_path: Path) -> None:
    runs = []
    evaluation: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": uneven_rows()[:2]}
    for options in ({}, evaluation):
        model = internvl.model(loss=TOKEN_LOSSES)
        trainer = make_trainer(model, internvl, uneven_rows(), tmp_path, 2, logging_steps=3, **options)
        LossCallback.add_to(trainer)
        trainer.train()
        runs.append([entry["margin"] for entry in lines(trainer)])
    assert runs[0] == runs[1]


def test_a_loss_without_weight_is_logged_and_adds_nothing(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(loss={"cross_entropy": 1.0, "margin": 0.0})
    trainer = make_trainer(model, internvl, uneven_rows(), tmp_path, 2, callbacks=[LossCallback()])
    trainer.train()
    for entry in lines(trainer):
        assert entry["margin"] > 0
        assert (entry["margin_weighted"], entry["cross_entropy"]) == (0, pytest.approx(entry["loss"]))


def test_a_forward_that_computes_no_named_loss_is_noticed(internvl: Family, tmp_path: Path) -> None:
    trainer = make_trainer(
        internvl.model(), internvl, uneven_rows(), tmp_path, callbacks=[LossCallback()], label_smoothing_factor=0.1
    )
    with pytest.raises(RuntimeError, match=r"did not compute the losses of Custom.*why_bypassed\(trainer\) says what"):
        trainer.train()


def test_the_callback_refuses_a_stock_model(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(internvl.stock_class)
    trainer = make_trainer(model, internvl, uneven_rows(), tmp_path, callbacks=[LossCallback()])
    with pytest.raises(TypeError, match="named losses of a custom model; load the InternVLForCond"):
        trainer.train()


def test_trackers_that_would_see_nothing_are_warned_of(internvl: Family, tmp_path: Path) -> None:
    for add, warned in ((False, True), (True, False)):
        callbacks = [] if add else [LossCallback()]
        trainer = make_trainer(
            internvl.model(), internvl, uneven_rows(), tmp_path, callbacks=callbacks, report_to=["tensorboard"]
        )
        if add:
            assert LossCallback.add_to(trainer) is LossCallback.add_to(trainer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert any("LossCallback.add_to" in str(warning.message) for warning in caught) is warned


def test_what_a_term_records_is_logged_too(internvl: Family, tmp_path: Path) -> None:
    """The margin and accuracy of pairs, as fit() logs them."""
    pairs = [
        {"prompt": f"Number {at}?", "chosen": f"It is {at}.", "rejected": "No idea at all."}
        for at in range(ROWS * STEPS)
    ]
    logs = {}
    for name in ("fit", "trainer"):
        model = hfcustom.lora(internvl.model(loss={"dpo": {"weight": 1.0, "beta": 5.0}}), rank=2)
        if name == "fit":
            result = train(
                model, internvl, tmp_path / name, pairs, micro_batch_size=4, schedule="constant", weight_decay=0.0
            )
            logs[name] = result.history
        else:
            trainer = make_trainer(model, internvl, pairs, tmp_path, 1)
            LossCallback.add_to(trainer)
            trainer.train()
            logs[name] = lines(trainer)
    for key in ("loss", "dpo_margin", "dpo_accuracy"):
        assert [entry[key] for entry in logs["trainer"]] == pytest.approx(
            [entry[key] for entry in logs["fit"]], rel=1e-4, abs=1e-6
        )
    assert logs["fit"][-1]["dpo_margin"] > 0


@pytest.mark.parametrize(
    "loss", [{"image_size": 1.0}, {"cross_entropy": 1.0, "contrastive": 1.0}], ids=["own count", "across"]
)
def test_with_the_callback_terms_are_as_exact_as_in_fit(internvl: Family, tmp_path: Path, loss: Any) -> None:
    ours, theirs = internvl.model(loss=loss), internvl.model(loss=loss)
    start = weights(ours)
    options: dict[str, Any] = {"micro_batch_size": 2, "schedule": "constant", "weight_decay": 0.0}
    result = train(ours, internvl, tmp_path / "fit", **options)
    trainer = make_trainer(theirs, internvl, uneven_rows(), tmp_path, 4)
    LossCallback.add_to(trainer)
    LossCallback.add_to(trainer)  # a second time changes nothing
    trainer.train()
    assert [entry["loss"] for entry in lines(trainer)] == pytest.approx(curve(result), rel=1e-5)
    assert relative_distance(weights(theirs), weights(ours), start) < 1e-4


def test_a_callback_given_first_and_added_later_shows_steps_too(internvl: Family, tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "contrastive": 1.0}
    values = []
    for given in ([], [LossCallback()]):
        trainer = make_trainer(internvl.model(loss=loss), internvl, uneven_rows(), tmp_path, 8, callbacks=given)
        LossCallback.add_to(trainer)
        trainer.train()
        values.append([entry["contrastive"] for entry in lines(trainer)])
    assert values[0] == values[1] and values[0][0] > 0.1


def test_a_term_across_rows_says_when_it_sees_a_part_of_the_step(internvl: Family, tmp_path: Path) -> None:
    trainer = make_trainer(internvl.model(loss="contrastive"), internvl, uneven_rows(), tmp_path, 4)
    with pytest.raises(ValueError, match=r"contrastive compares all rows of a step.*LossCallback.add_to\(trainer\)"):
        trainer.train()


def test_the_step_of_an_earlier_run_schedules_no_later_one(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(loss={"cross_entropy": {"decay_steps": 2, "final_weight": 0.0}})
    train(model, internvl, tmp_path / "fit")
    assert model.loss_step is None
    with pytest.raises(ValueError, match="cross_entropy is scheduled, but nothing says which step this is"):
        make_trainer(model, internvl, uneven_rows(), tmp_path).train()
    trainer = make_trainer(model, internvl, uneven_rows(), tmp_path)
    LossCallback.add_to(trainer)
    trainer.train()
    assert model.loss_step is None
