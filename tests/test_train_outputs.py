"""Around fit()'s steps: evaluation, log, trackers, mistakes said before anything runs, and what is left on disk."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, chat_row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import TERMS, add_dropout, curve, train, uneven_rows, user_losses

from hfcustom.data.messages import RowError


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with user_losses():
        yield


# ---- evaluation, log, trackers --------------------------------------------------------------------------------------


class Jittered(Sequence[dict[str, Any]]):
    """Rows that a user augments with the global generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: Any) -> Any:
        row = chat_row(index % 2, index)
        row["messages"][-1]["content"] = f"{random.random()} {np.random.rand()} {float(torch.rand(()))}"
        return row


def test_evaluating_does_not_move_the_training(internvl: Family, tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(model: Any, step: int) -> dict[str, Any]:
        assert not model.training and not torch.is_grad_enabled()
        assert type(model) is internvl.model_class
        seen.append(step)
        return {"drawn": torch.rand(7).sum(), "noise": np.float32(np.random.rand()), "more": random.random()}

    results = []
    for options in ({}, {"evaluate": evaluate, "eval_steps": 2}):
        model = internvl.model()
        add_dropout(model, 0.3)
        results.append(train(model, internvl, tmp_path / str(len(results)), Jittered(), max_steps=5, **options))
        assert model.training
    assert seen == [2, 4]
    assert curve(results[1]) == curve(results[0])
    assert [entry["step"] for entry in results[1].history if "drawn" in entry] == [2, 4]


def test_dropout_is_on_in_training(internvl: Family, tmp_path: Path) -> None:
    dropped = internvl.model()
    add_dropout(dropped, 0.3)
    with_it, without = (train(m, internvl, tmp_path / str(id(m))) for m in (dropped, internvl.model()))
    assert curve(with_it) != curve(without)


def test_an_evaluation_that_is_no_number_stops_no_training(internvl: Family, tmp_path: Path) -> None:
    result = train(internvl.model(), internvl, tmp_path, evaluate=lambda model, step: {"x": math.nan}, eval_steps=3)
    assert result.step == 3 and math.isnan(curve(result, "x")[0])


def test_log_lines_are_means_of_their_window_and_terms_sum_to_the_total(internvl: Family, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 7, "micro_batch_size": 4}
    each = train(internvl.model(loss=TERMS), internvl, tmp_path / "each", **options).history
    result = train(internvl.model(loss=TERMS), internvl, tmp_path / "windows", log_steps=3, **options)
    lines = [json.loads(line) for line in (tmp_path / "windows" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, window in zip(lines, ([0, 1, 2], [3, 4, 5], [6]), strict=True):
        for name in ("loss", *TERMS):
            assert line[name] == pytest.approx(sum(each[at][name] for at in window) / len(window), rel=1e-6)
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in TERMS.items()), rel=1e-6)
        assert line["grad_norm"] == each[window[-1]]["grad_norm"]
        assert line["tokens_per_s"] > 0 and line["images_per_s"] > 0


def test_rates_that_differ_are_logged_by_part(internvl: Family, tmp_path: Path) -> None:
    line = train(internvl.model(), internvl, tmp_path, max_steps=1, vision_lr=1e-5).history[0]
    assert {name: value for name, value in line.items() if name.startswith("lr")} == {
        "lr_vision": 1e-5,
        "lr_connector": 1e-3,
        "lr_language": 1e-3,
        "lr_head": 1e-3,
    }


def test_tensorboard_gets_every_number(internvl: Family, tmp_path: Path) -> None:
    result = train(internvl.model(loss=TERMS), internvl, tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "hfcustom")).Reload()
    for name in ("loss", *TERMS, "lr", "grad_norm"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [1, 2, 3]
        assert [event.value for event in found] == pytest.approx(curve(result, name), rel=1e-6)


def test_a_tracker_that_is_unknown_or_not_installed_is_an_error(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="Unknown tracker 'tensorbored'. Did you mean 'tensorboard'"):
        train(internvl.model(), internvl, tmp_path, trackers=["tensorbored"])
    monkeypatch.setattr("hfcustom.train.get_available_trackers", list)
    with pytest.raises(ValueError, match=r"trackers=\['tensorboard'\]: tensorboard not installed; pip install it"):
        train(internvl.model(), internvl, tmp_path, trackers=["tensorboard"])


# ---- before anything runs, and what is left behind ------------------------------------------------------------------

MISTAKES = {
    "unknown loss": ({"loss": "focall"}, {}, r"Unknown loss 'focall'. Did you mean 'focal'"),
    "unknown option": ({"loss": {"focal": {"gama": 1}}}, {}, "option of loss 'focal': 'gama'"),
    "out of range": ({}, {"log_steps": 0, "lr": -1}, "lr=-1 must be positive; log_steps=0 must be positive"),
    "batch": ({}, {"micro_batch_size": 3}, "batch_size=8 rows cannot be shared"),
    "rate": ({}, {"connector_lr": -1.0}, "connector_lr=-1.0 must be positive"),
}


@pytest.mark.parametrize(("model", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_an_error_before_anything_runs(
    internvl: Family, tmp_path: Path, model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    class Untouched(Sequence[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("a row was read")

    with pytest.raises(ValueError, match=message):
        train(internvl.model(**model), internvl, tmp_path / "out", Untouched(), **options)
    assert not (tmp_path / "out").exists()


def test_a_row_that_cannot_be_used_is_named(internvl: Family, tmp_path: Path) -> None:
    rows = uneven_rows()
    rows[5]["messages"].pop()
    with pytest.raises(RowError, match="row 5: no assistant turn"):
        train(internvl.model(), internvl, tmp_path / "no answer", rows)
    with pytest.raises(RowError, match=r"row \d: \d+ tokens, more than max_length=40"):
        train(internvl.model(), internvl, tmp_path / "long", max_length=40)


def test_epochs_say_how_many_steps(internvl: Family, tmp_path: Path) -> None:
    result = train(internvl.model(), internvl, tmp_path, max_steps=None, epochs=1.2, batch_size=4)
    assert result.step == 3  # 9.6 rows in steps of 4
    assert not result.interrupted


FILES = ["config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"]
FILES = sorted([*FILES, "README.md", "chat_template.jinja", "hfcustom.json", "tokenizer_config.json"])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [5]),
        ({"save_steps": 2}, [4, 5]),
        ({"save_steps": 1, "keep_checkpoints": 3}, [3, 4, 5]),
        ({"save_steps": 5, "keep_checkpoints": 1}, [5]),
    ],
)
def test_the_output_folder(internvl: Family, tmp_path: Path, options: dict[str, Any], kept: list[int]) -> None:
    model = internvl.model()
    result = train(model, internvl, tmp_path, max_steps=5, batch_size=2, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "model",
        "report.html",
        "run.json",
    ]
    steps = [f"step-{step:06d}" for step in kept]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == steps
    assert result.model_dir == tmp_path / "model"
    assert sorted(path.name for path in result.model_dir.iterdir()) == FILES
    for step in steps:
        names = sorted(path.name for path in (tmp_path / "checkpoints" / step).iterdir())
        assert names == [
            "manifest.json",
            "model",
            "optimizer.json",
            "optimizer.safetensors",
            "rng-0.safetensors",
            "spikes.json",
            "state.json",
        ]
    loaded = internvl.model_class.from_pretrained(result.model_dir)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
