"""Checkpoints: resuming continues as if nothing had happened, damage costs one save, nothing in them is code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Family
from safetensors.torch import load_file, save_file
from torch import nn
from training import add_dropout, curve, short_config, train, uneven_rows, weights
from transformers.utils import logging

import hfcustom
from hfcustom import commit, randomness
from hfcustom.data.feed import Feed
from hfcustom.exits import SaveError
from hfcustom.train_config import TrainConfig
from hfcustom.training import checkpoint, optimizer_state

PERCEIVER = {"name": "perceiver_resampler", "num_queries": 4, "num_heads": 4}


def full(family: Family) -> Any:
    model = family.model()
    add_dropout(model, 0.3)
    return model


def with_lora(family: Family) -> Any:
    """LoRA with dropout, and a new connector that is trained in full beside it."""
    return hfcustom.lora(family.model(connector=PERCEIVER), rank=2, dropout=0.3)


KINDS: dict[str, Callable[[Family], Any]] = {"full": full, "LoRA and a new connector": with_lora}


def without_rates(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return a history without what depends on the machine's speed."""
    return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in history]


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(
    internvl: Family, tmp_path: Path, build: Callable[[Family], Any], num_workers: int
) -> None:
    processor = build(internvl).match_processor(internvl.module.tiny_processor())
    options = {"max_steps": 6, "micro_batch_size": 4, "num_workers": num_workers, "processor": processor}
    unbroken = build(internvl)
    expected = train(unbroken, internvl, tmp_path / "unbroken", save_steps=4, **options)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000006")
    resumed = build(internvl)
    torch.manual_seed(123)
    result = train(resumed, internvl, tmp_path / "broken", resume=True, **options)
    assert without_rates(result.history) == without_rates(expected.history)
    assert curve(result) == curve(expected) and len(curve(result)) == 6
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    moved = weights(build(internvl))
    assert all(not torch.equal(moved[name], value) for name, value in weights(resumed).items() if "lora_B" in name)


def test_a_log_window_that_a_stop_cuts_in_two_is_logged_whole(internvl: Family, tmp_path: Path) -> None:
    terms = {"cross_entropy": 1.0, "z_loss": 1e-3}
    options: dict[str, Any] = {"max_steps": 6, "log_steps": 3, "save_steps": 4, "micro_batch_size": 4}
    expected = train(internvl.model(loss=terms), internvl, tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
    result = train(internvl.model(loss=terms), internvl, tmp_path, resume=True, **options)
    assert without_rates(result.history) == without_rates(expected.history)


def test_resuming_with_another_loss_starts_its_log_afresh(internvl: Family, tmp_path: Path) -> None:
    train(internvl.model(loss="focal"), internvl, tmp_path, max_steps=2, log_steps=3, save_steps=1)
    state = tmp_path / "checkpoints" / "step-000001" / "state.json"
    assert json.loads(state.read_text())["pending"][0]["losses"].keys() == {"focal"}
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    result = train(internvl.model(), internvl, tmp_path, max_steps=3, log_steps=3, resume=True)
    assert result.step == 3 and len(result.history) == 1


def test_metrics_after_the_checkpoint_are_written_anew(internvl: Family, tmp_path: Path) -> None:
    train(internvl.model(), internvl, tmp_path, max_steps=4, save_steps=2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    train(internvl.model(), internvl, tmp_path, max_steps=4, resume=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_resuming_nothing_starts_at_the_beginning_and_says_so(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(internvl.model(), internvl, tmp_path, resume=True).step == 3
    assert f"Nothing to resume in {tmp_path / 'checkpoints'}; starting at step 0." in capsys.readouterr().out
    assert train(internvl.model(), internvl, tmp_path, resume=True).step == 3
    assert "step 3. Nothing is left to train: max_steps is 3." in capsys.readouterr().out


@pytest.mark.parametrize("max_steps", [3, 2])
def test_resuming_a_finished_run_publishes_and_is_no_interruption(
    internvl: Family, tmp_path: Path, max_steps: int
) -> None:
    expected = train(internvl.model(), internvl, tmp_path)
    shutil.rmtree(tmp_path / "model")
    model = internvl.model(seed=1)
    result = train(model, internvl, tmp_path, max_steps=max_steps, resume=True)
    assert (result.step, result.interrupted) == (3, False)
    assert result.history == expected.history
    assert (tmp_path / "model" / "model.safetensors").is_file()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())


def test_weight_decay_and_rates_may_change_between_runs(internvl: Family, tmp_path: Path) -> None:
    """Decay decides how parameters are grouped, and so their order in the optimizer's state."""
    train(internvl.model(), internvl, tmp_path, max_steps=2, schedule="constant")
    options: dict[str, Any] = {"max_steps": 3, "weight_decay": 0.0, "lr": 1e-12, "beta2": 0.95, "schedule": "constant"}
    train(internvl.model(), internvl, tmp_path, resume=True, **options)
    before, after = (named_moments(tmp_path, step) for step in (2, 3))
    assert before.keys() == after.keys() and len(before) > 50
    for name, (squares, steps) in after.items():
        assert float(steps) == 3
        assert bool((squares >= 0.95 * before[name][0] * (1 - 1e-6)).all()), name


def named_moments(folder: Path, step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (second moment, steps) by parameter name of a checkpoint."""
    place = folder / "checkpoints" / f"step-{step:06d}"
    tensors = load_file(place / "optimizer.safetensors")
    groups = json.loads((place / "optimizer.json").read_text())["param_groups"]
    names = {
        index: name for group in groups for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    kept = [index for index in names if f"{index}.step" in tensors]
    return {names[index]: (tensors[f"{index}.exp_avg_sq"], tensors[f"{index}.step"]) for index in kept}


def only(model: Any, part: str) -> Any:
    """Train one layer's matrices."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


@pytest.mark.parametrize(
    ("then", "now", "first"),
    [
        ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", r"layers\.0\.mlp\.up_proj"),  # as many, of the same shape
        ("layers.0.mlp", "layers.0", r"layers\.0\.input_layernorm"),
        ("", "language", r"lm_head"),
    ],
)
def test_other_trainable_parameters_are_an_error_that_names_one(
    internvl: Family, tmp_path: Path, then: str, now: str, first: str
) -> None:
    train(only(internvl.model(), then), internvl, tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match=rf"trained parameters have changed .*{first}.* freeze and LoRA as then"):
        train(only(internvl.model(), now), internvl, tmp_path, max_steps=2, resume=True)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"connector": PERCEIVER}, r"missing \['custom_connector\."),
        ({"connector": PERCEIVER}, {}, r"missing \[\], unexpected \['custom_connector\."),
    ],
    ids=["a module more", "a module less"],
)
def test_another_architecture_is_an_error_that_names_what_differs(
    internvl: Family, tmp_path: Path, then: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    first, second = (internvl.model(**config) for config in (then, now))
    processors = [model.match_processor(internvl.module.tiny_processor()) for model in (first, second)]
    train(first, internvl, tmp_path, max_steps=1, processor=processors[0])
    with pytest.raises(RuntimeError, match=f"does not fit the model: {message}"):
        train(second, internvl, tmp_path, max_steps=2, resume=True, processor=processors[1])


def test_lora_of_another_rank_is_an_error(internvl: Family, tmp_path: Path) -> None:
    train(hfcustom.lora(internvl.model(), rank=2), internvl, tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(hfcustom.lora(internvl.model(), rank=4), internvl, tmp_path, max_steps=2, resume=True)


# ---- damage ---------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(bytes(content))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "edited": edit,
    "a file missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"state.json": '),
    "empty": empty,
}


@pytest.fixture
def two_checkpoints(internvl: Family, tmp_path: Path) -> Path:
    """A run with checkpoints at steps 2 and 4, which replacing files does not reach through hard links."""
    train(internvl.model(), internvl, tmp_path, max_steps=4, save_steps=2)
    shutil.rmtree(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    internvl: Family, two_checkpoints: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = (two_checkpoints / "metrics.jsonl").read_text().splitlines()
    damage(two_checkpoints / "checkpoints" / "step-000004")
    capsys.readouterr()
    result = train(internvl.model(), internvl, two_checkpoints, max_steps=4, save_steps=2, resume=True)
    printed = capsys.readouterr().out
    assert "step-000004 is damaged or incomplete: set aside as damaged-step-000004." in printed
    assert f"Resuming from {two_checkpoints / 'checkpoints' / 'step-000002'}, step 2." in printed
    assert curve(result) == [json.loads(line)["loss"] for line in expected]


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(internvl: Family, two_checkpoints: Path) -> None:
    checkpoints = two_checkpoints / "checkpoints"
    edit(checkpoints / "step-000004")
    options: dict[str, Any] = {"max_steps": 3, "keep_checkpoints": 1, "resume": True}
    assert train(internvl.model(), internvl, two_checkpoints, **options).model_dir.is_dir()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["damaged-step-000004", "step-000003"]


def test_when_all_are_damaged_the_run_starts_afresh_and_names_them(
    internvl: Family, two_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        truncate(two_checkpoints / "checkpoints" / f"step-{step:06d}")
    train(internvl.model(), internvl, two_checkpoints, max_steps=2, resume=True)
    printed = capsys.readouterr().out
    assert all(f"damaged-step-{step:06d}" in printed for step in (2, 4)) and "starting at step 0" in printed


def test_the_newest_is_found_by_number_not_by_spelling(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        with commit.atomic_folder(tmp_path / f"step-{step:06d}") as partial:
            (partial / "state.json").write_text("{}")
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


@pytest.mark.parametrize("failing", ["save_file", "write_json", "write_manifest"])
def test_a_failure_while_saving_leaves_the_checkpoint_before(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    homes: dict[str, Any] = {"save_file": optimizer_state, "write_json": checkpoint, "write_manifest": commit}
    home = homes[failing]
    working = getattr(home, failing)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        if "step-000004" in "".join(map(str, args)):
            raise OSError("No space left on device")
        working(*args, **kwargs)

    monkeypatch.setattr(home, failing, full_disk)
    with pytest.raises(SaveError, match=r"disk full: need .* step 4, have .*step-000002; continue with --resume"):
        train(internvl.model(), internvl, tmp_path, max_steps=4, save_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    model = internvl.model()
    assert train(model, internvl, tmp_path, max_steps=4, save_steps=2, resume=True).step == 4
    unbroken = internvl.model()
    train(unbroken, internvl, tmp_path / "unbroken", max_steps=4)
    assert all(torch.equal(weights(unbroken)[name], value) for name, value in weights(model).items())


def test_a_failure_while_publishing_leaves_the_model_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "model", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(commit, "_link_or_copy", full_disk)
    with pytest.raises(OSError, match="No space left"):
        commit.replace_folder(new, old)
    assert (old / "config.json").read_text() == "model"
    monkeypatch.undo()
    commit.replace_folder(new, old)
    assert (old / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


# ---- an occupied folder ---------------------------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_and_overwrite_starts_afresh(internvl: Family, two_checkpoints: Path) -> None:
    checkpoints = two_checkpoints / "checkpoints"
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(ValueError, match=r"already holds checkpoints.*--resume.*--overwrite.*--output-dir"):
        train(internvl.model(), internvl, two_checkpoints)
    assert sorted(checkpoints.rglob("*")) == before
    result = train(internvl.model(), internvl, two_checkpoints, overwrite=True, save_steps=2)
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000002", "step-000003"]
    assert len(result.history) == len((two_checkpoints / "metrics.jsonl").read_text().splitlines()) == 3


# ---- what is in them ------------------------------------------------------------------------------------------------

HARMLESS = {".html", ".json", ".jsonl", ".safetensors", ".jinja", ".txt", ".md"}


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_nothing_in_a_run_is_a_pickle(internvl: Family, tmp_path: Path, build: Callable[[Family], Any]) -> None:
    model = build(internvl)
    processor = model.match_processor(internvl.module.tiny_processor())
    train(model, internvl, tmp_path, max_steps=1, processor=processor)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= HARMLESS
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")]
    manifest = json.loads((tmp_path / "checkpoints" / "step-000001" / "manifest.json").read_text())
    inside = {
        path.relative_to(tmp_path / "checkpoints" / "step-000001").as_posix() for path in files if "step-" in str(path)
    }
    assert set(manifest) == inside - {"manifest.json"}


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        normal = [random.gauss(0, 1), np.random.standard_normal()]  # each keeps a second number for the next call
        return [float(torch.rand(())), random.random(), np.random.rand(), *normal, float(torch.randn(()))]

    draw()
    randomness.save_rng(tmp_path / "rng.safetensors")
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert draw() != expected[0]
    randomness.load_rng(tmp_path / "rng.safetensors")
    assert [draw(), draw()] == expected


def test_each_gpu_gets_its_own_random_state_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    states = [torch.full((8,), at, dtype=torch.uint8) for at in range(12)]
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    randomness.save_rng(tmp_path / "rng.safetensors")
    randomness.load_rng(tmp_path / "rng.safetensors")
    assert [int(state[0]) for state in restored] == list(range(12))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_comes_back(tmp_path: Path, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    first, second = (nn.Linear(3, 2) for _ in range(2))
    optimizers = [make(list(module.parameters())) for module in (first, second)]
    inputs = torch.randn(4, 3)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()

    for _ in range(2):
        step(first, optimizers[0])
    second.load_state_dict(first.state_dict())
    optimizer_state.save_optimizer(optimizers[0], tmp_path)
    optimizer_state.load_optimizer(optimizers[1], tmp_path)
    for _ in range(2):
        step(first, optimizers[0])
        step(second, optimizers[1])
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_is_a_model_that_loads(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    config: TrainConfig = short_config(tmp_path)
    accelerator, optimizer = Accelerator(), torch.optim.SGD(model.parameters())
    feed = Feed(uneven_rows(), config, accelerator)
    state = checkpoint.Checkpoints(config, accelerator, model, optimizer, internvl.processor, feed)
    folder = state.save(7, [], [])
    assert folder.name == "step-000007" and commit.manifest_holds(folder)
    loaded = internvl.model_class.from_pretrained(folder / "model")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    save_file({"x": torch.ones(1)}, folder / "model" / "model.safetensors")
    assert not commit.manifest_holds(folder)


@pytest.mark.parametrize(
    "changed", [{"batch_size": 4}, {"seed": 1}, {"rows": uneven_rows()[:6]}], ids=["batch size", "seed", "rows"]
)
def test_a_resumed_run_sees_the_rows_it_has_not_seen(
    changed: dict[str, Any], internvl: Family, tmp_path: Path
) -> None:
    train(internvl.model(), internvl, tmp_path, max_steps=1)
    with pytest.raises(
        ValueError, match=rf"was trained with .*, this run has .*'{next(iter(changed))}': .*--overwrite"
    ):
        train(internvl.model(), internvl, tmp_path, max_steps=2, resume=True, **changed)


def test_saving_draws_no_bar_into_that_of_training(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    active = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        train(internvl.model(), internvl, tmp_path, save_steps=1, max_steps=2, ema_decay=0.9)
        printed = capsys.readouterr()
        assert "Writing model shards" not in printed.out + printed.err
        internvl.model().save_pretrained(tmp_path / "by hand")
        assert "Writing model shards" in capsys.readouterr().err
    finally:
        if not active:
            logging.disable_progress_bar()
