"""Trackers over a crash: the resumed run goes on in the same one, with every step once.

TensorBoard is the real one. wandb and trackio are stand-ins with the signatures of wandb 0.31.0 and trackio 0.43.0, which do what the
real ones were seen to do: wandb drops a step that is not later than its last, trackio keeps both. Where they are installed
(pip install trackio), the real trackio is tried too.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import Family
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import short_config, uneven_rows

import hfcustom


def run(family: Family, folder: Path, stop_after: int | None = None, **options: Any) -> Any:
    """Train six steps with an evaluation every two and a checkpoint every three; break off where told."""

    def evaluate(model: Any, step: int) -> dict[str, float]:
        if step == stop_after:
            raise RuntimeError("pulled the plug")
        return {"score": float(step)}

    config = short_config(folder, **{"max_steps": 6, "batch_size": 2, "eval_steps": 2, "save_steps": 3, **options})
    torch.manual_seed(0)
    return hfcustom.fit(family.model(), family.processor, uneven_rows(), config, evaluate=evaluate)


def broken_and_resumed(family: Family, folder: Path, tracker: str, **options: Any) -> Any:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(family, folder, stop_after=4, trackers=[tracker])
    return run(family, folder, resume=True, trackers=[tracker], **options)


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "hfcustom"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_of_a_resumed_run_once(internvl: Family, tmp_path: Path) -> None:
    result = broken_and_resumed(internvl, tmp_path, "tensorboard")
    found = scalars(tmp_path)
    losses = [(line["step"], line["loss"]) for line in result.history if "loss" in line]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert found["loss"] == [(step, pytest.approx(value)) for step, value in losses]
    assert found["score"] == [(2, 2.0), (4, 4.0), (6, 6.0)]
    assert len(list((tmp_path / "hfcustom").glob("*/hparams.yml"))) == 1  # one run, not two


def test_a_run_that_starts_afresh_hides_the_one_before_from_tensorboard(internvl: Family, tmp_path: Path) -> None:
    run(internvl, tmp_path, trackers=["tensorboard"])
    run(internvl, tmp_path, trackers=["tensorboard"], overwrite=True, max_steps=2)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2]


# ---- W&B and trackio ------------------------------------------------------------------------------------------------


class Service:
    """What runs on after a process: the runs that a tracker knows, by id or name."""

    def __init__(self, key: str, once: bool) -> None:
        self.key, self.once = key, once
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.told: list[dict[str, Any]] = []

    def module(self, name: str) -> ModuleType:
        made = ModuleType(name)
        made.init = self.init  # type: ignore[attr-defined]
        made.config = SimpleNamespace(update=lambda values, allow_val_change: self.told.append(values))  # type: ignore[attr-defined]
        return made

    def init(self, project: str, **options: Any) -> Any:
        assert project == "hfcustom" and options.pop("resume") == "allow"
        assert set(options) <= {"id", "name"} and self.key in options
        lines = self.runs.setdefault(options[self.key], [])
        return SimpleNamespace(log=lambda values, step: self.log(lines, values, step), finish=lambda: None)

    def log(self, lines: list[tuple[int, dict[str, float]]], values: dict[str, float], step: int) -> None:
        if not self.once or not lines or step >= lines[-1][0]:
            lines.append((step, values))


@pytest.fixture
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(*{"wandb": ("id", True), "trackio": ("name", False)}[request.param])
    monkeypatch.setitem(sys.modules, request.param, made.module(request.param))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(request.param)])
    return made


@pytest.mark.parametrize(("service", "tracker"), [(name, name) for name in ("wandb", "trackio")], indirect=["service"])
def test_a_resumed_run_goes_on_in_the_run_that_the_tracker_has(
    service: Service, tracker: str, internvl: Family, tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    result = broken_and_resumed(internvl, folder, tracker, lr=2e-3)
    ((name, lines),) = service.runs.items()
    known = json.loads((folder / "trackers.json").read_text())[tracker]
    assert known[service.key] == name and known["name"].startswith("reader")
    assert [(step, set(values)) for step, values in lines] == [
        (line["step"], set(line) - {"step"}) for line in result.history
    ]
    again = next(values for step, values in lines if step == 4 and "loss" in values)
    expected = next(line for line in result.history if line["step"] == 4 and "loss" in line)
    assert again["loss"] == expected["loss"]  # sent by the first attempt, equal to what the second made
    assert [told["lr"] for told in service.told] == [1e-3, 2e-3]
    assert all(isinstance(value, int | float | str) for told in service.told for value in told.values())
    assert "sources" not in service.told[0]


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_a_run_that_starts_afresh_is_another_and_a_tracker_added_at_resume_misses_nothing(
    service: Service, internvl: Family, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(internvl, tmp_path, stop_after=4)
    run(internvl, tmp_path, resume=True, trackers=["wandb"])
    run(internvl, tmp_path, overwrite=True, trackers=["wandb"])
    first, second = service.runs.values()
    assert [step for step, values in first if "loss" in values] == [4, 5, 6]
    assert [step for step, values in second if "loss" in values] == [1, 2, 3, 4, 5, 6]


def test_names_given_to_wandb_from_outside_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hfcustom.runs.trackers import _new_name

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_NAME", "again")
    assert _new_name("wandb", tmp_path) == {"id": "mine", "name": "again"}


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_the_real_trackio_has_every_step_once(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    broken_and_resumed(internvl, tmp_path / "run", "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = [
            (step, json.loads(values)) for step, values in connection.execute("select step, metrics from metrics")
        ]
        names = {name for (name,) in connection.execute("select run_name from metrics")}
    assert [step for step, values in found if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for step, values in found if "score" in values] == [2, 4, 6]
    assert names == {json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]["name"]}
