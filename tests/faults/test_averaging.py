"""The running average of the weights: what it is, where it is used, and that a checkpoint has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from conftest import Family
from safetensors.torch import load_file
from tiny_run import Run
from training import train, weights

import hfcustom
from hfcustom.exits import CheckpointError
from hfcustom.runs.folder import model_bytes
from hfcustom.training import averaging
from hfcustom.training.averaging import Average

DECAY = 0.25  # beyond what the warm-up allows after the first step
STEPS = 3


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def trained_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a saved model or adapter."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_evaluated_and_published_while_the_weights_themselves_are_trained(
    lora: bool, internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def model() -> Any:
        return hfcustom.lora(internvl.model(), rank=2) if lora else internvl.model()

    averaged = model()
    start, seen = weights(averaged), []

    def evaluate(core: Any, step: int) -> dict[str, float]:
        seen.append(weights(averaged))
        return {}

    options: dict[str, Any] = {"save_steps": 1, "keep_checkpoints": STEPS}
    without = train(model(), internvl, tmp_path / "plain", **options)
    options |= {"eval_steps": 1, "evaluate": evaluate}
    result = train(averaged, internvl, tmp_path / "ema", ema_decay=DECAY, **options)
    assert [line["loss"] for line in result.history if "loss" in line] == [
        line["loss"] for line in without.history if "loss" in line
    ]
    expected = start
    for step in range(1, STEPS + 1):
        raw = trained_in(checkpoint(tmp_path / "ema", step) / "model")
        others = trained_in(checkpoint(tmp_path / "plain", step) / "model")
        assert all(torch.equal(raw[name], others[name]) for name in raw)
        now = saved_names(raw, start)
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in start}
        kept = load_file(checkpoint(tmp_path / "ema", step) / f"{averaging.STEM}.safetensors")
        assert kept.keys() == start.keys() == seen[step - 1].keys()
        for name in start:
            torch.testing.assert_close(kept[name], expected[name], rtol=1e-6, atol=1e-7)
            assert torch.equal(kept[name], seen[step - 1][name])
    published = saved_names(trained_in(result.model_dir), start)
    assert all(torch.equal(published[name], kept[name]) for name in start)
    assert all(torch.equal(value, kept[name]) for name, value in weights(averaged).items())
    assert f"ema_decay={DECAY}: a running average of" in capsys.readouterr().out
    assert not (tmp_path / "ema" / ".model.averaged").exists()
    told = json.loads((result.model_dir / "hfcustom.json").read_text())["training"][-1]
    assert told["averaged"] == {"decay": DECAY, "steps": STEPS} and told["settings"]["ema_decay"] == DECAY
    assert "running average over 3 steps, with a decay of 0.25" in (result.model_dir / "README.md").read_text()
    raw_record = json.loads((checkpoint(tmp_path / "ema", STEPS) / "model" / "hfcustom.json").read_text())
    assert "averaged" not in raw_record["training"][-1]


def saved_names(saved: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return saved tensors under the names that they have in the model in memory, which peft's differ from."""
    return {name: saved[name.replace(".default.", ".")] for name in like if name.replace(".default.", ".") in saved}


def test_a_run_with_average_and_noise_resumes_bit_equal(tmp_path: Path) -> None:
    run, options = Run(workers=0, source=None), {"ema_decay": 0.9, "neftune_alpha": 5.0, "max_steps": 4}
    tiny_run.train(run, tmp_path / "unbroken", keep_checkpoints=4, **options)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(checkpoint(tmp_path / "cut", step))
    shutil.rmtree(tmp_path / "cut" / "model")
    tiny_run.train(run, tmp_path / "cut", keep_checkpoints=4, resume=True, **options)
    ends = [tiny_run.end_of(tmp_path / name) for name in ("unbroken", "cut")]
    assert ends[0] == ends[1] and f"{averaging.STEM}.safetensors" in ends[0]
    tiny_run.train(run, tmp_path / "cut", keep_checkpoints=4, resume=True, **options)  # finished: published anew
    assert tiny_run.end_of(tmp_path / "cut") == ends[0]


def test_it_may_begin_or_end_at_a_resume_that_accepts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(workers=0, source=None)
    tiny_run.train(run, tmp_path, max_steps=1)
    began = trained_in(checkpoint(tmp_path, 1) / "model")
    accepted: dict[str, Any] = {"resume": True, "allow_change": ["ema_decay"]}
    tiny_run.train(run, tmp_path, max_steps=2, ema_decay=0.9, **accepted)
    told = capsys.readouterr().out
    assert "ema_decay: None -> 0.9" in told and "holds no average of the weights; it begins here" in told
    now, kept = (
        trained_in(checkpoint(tmp_path, 2) / "model"),
        load_file(checkpoint(tmp_path, 2) / f"{averaging.STEM}.safetensors"),
    )
    for name, value in saved_names(began, kept).items():
        expected = 2 / 11 * value + 9 / 11 * saved_names(now, kept)[name]
        torch.testing.assert_close(kept[name], expected, rtol=1e-6, atol=1e-7)
    tiny_run.train(run, tmp_path, max_steps=3, **accepted)
    assert not (checkpoint(tmp_path, 3) / f"{averaging.STEM}.safetensors").exists()
    raw, published = (trained_in(folder) for folder in (checkpoint(tmp_path, 3) / "model", tmp_path / "model"))
    assert all(torch.equal(raw[name], published[name]) for name in raw)


def test_weights_are_back_after_an_error_while_the_average_is_in_place(internvl: Family) -> None:
    model = internvl.model()
    average = Average(model, 0.5, Accelerator())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before = weights(model)
    average.update()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert not all(torch.equal(value, before[name]) for name, value in weights(model).items())
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_other_weights_are_refused_and_coarse_ones_too(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    Average(model, 0.5, Accelerator()).save(tmp_path)
    hfcustom.freeze(model, "vision")
    with pytest.raises(CheckpointError, match=r"the trained parameters have changed since \(.*vision"):
        Average(model, 0.5, Accelerator()).load(tmp_path)
    with pytest.raises(ValueError, match="is trained in torch.bfloat16, too coarse for an average"):
        Average(internvl.model().bfloat16(), 0.5, Accelerator())


def test_room_for_it_is_looked_for(internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("hfcustom.training.checkpoint.check_room", lambda *values: asked.append(values))
    for decay in (None, 0.9):
        train(internvl.model(), internvl, tmp_path / str(decay), max_steps=1, ema_decay=decay)
    size = sum(p.numel() * 4 for p in internvl.model().parameters())
    assert asked[1][1] - asked[0][1] == size
    assert asked[0][-1] == 0 and asked[1][-1] == model_bytes(internvl.model())
