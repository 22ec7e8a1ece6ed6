"""Options that change between a run and its resumption: each is named; what is unsafe is refused; what is safe takes effect."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import finetune
import finetune_encoder
import pytest
import tiny_run
import torch
from conftest import Family
from safetensors.torch import load_file
from tiny_run import Run, Transformed
from training import train, uneven_rows

import hfcustom
from hfcustom import adapt
from hfcustom.commit import MANIFEST, write_manifest
from hfcustom.exits import CheckpointError, ConfigError
from hfcustom.train_config import TrainConfig
from hfcustom.training.resume import changed_options, options_of

RUN = Run(workers=0, source=None)
# another value for each option that decides what is trained
UNSAFE: dict[str, Any] = {
    "batch_size": 2,
    "seed": 1,
    "optimizer": "adamw_8bit",
    "precision": "bf16",
    "max_length": 500,
    "train_on": "last",
    "allowed_tokens": ["<|im_end|>"],
    "min_pixels": 10,
    "on_bad_row": "skip",
    "exclude": "bad_rows.jsonl",
    "ema_decay": 0.9,
    "neftune_alpha": 5.0,
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_run.train(RUN, folder, max_steps=2)
    return folder


@pytest.fixture
def begun(two_steps: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_option_is_refused_with_its_values_and_the_way_to_accept_it(name: str, begun: Path) -> None:
    (begun / "bad_rows.jsonl").write_text("")
    value = UNSAFE[name] if name != "exclude" else str(begun / "bad_rows.jsonl")
    with pytest.raises(ConfigError) as refused:
        tiny_run.train(RUN, begun, max_steps=4, resume=True, **{name: value})
    text = str(refused.value)
    assert f"{value!r}" in text and f"--allow-change {name}" in text and "--overwrite" in text
    assert refused.value.exit_code == 3


def test_every_option_is_either_safe_or_unsafe() -> None:
    options = {field.name for field in dataclasses.fields(TrainConfig) if field.init}
    assert options == TrainConfig.may_change | UNSAFE.keys() and not TrainConfig.may_change & UNSAFE.keys()


@pytest.mark.parametrize("config_class", [finetune.FinetuneConfig, finetune_encoder.FinetuneEncoderConfig])
def test_what_a_recipe_adds_is_unsafe_but_for_evaluating(config_class: Any, tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(config_class)}
    assert config_class.may_change <= names and config_class.may_change >= TrainConfig.may_change
    then = options_of(config_class(model="one", eval_rows=5))
    with pytest.raises(
        ConfigError, match=r"model: 'one' -> 'two'\n.*eval_rows: 5 -> 6\nmodel: what is left of the run"
    ):
        changed_options(then, config_class(model="two", eval_rows=6), tmp_path)
    assert "eval_rows: 5 -> 6" in changed_options(then, config_class(model="one", eval_rows=6), tmp_path)
    assert changed_options(then, config_class(model="one", eval_rows=5), tmp_path) == ""


@pytest.mark.parametrize("name", ["batch_size", "seed", "train_on", "min_pixels"])
def test_an_unsafe_option_that_is_accepted_takes_effect(
    name: str, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {name: UNSAFE[name], "allow_change": [name]}
    assert tiny_run.train(RUN, begun, max_steps=4, resume=True, **options).step == 4
    assert f"  {name}: " in capsys.readouterr().out
    state = json.loads((tiny_run.newest(begun) / "state.json").read_text())
    assert state["config"][name] == UNSAFE[name]


def test_another_optimizer_cannot_be_accepted(begun: Path) -> None:
    options = {"optimizer": "adamw_8bit", "allow_change": ["optimizer"]}
    with pytest.raises(CheckpointError, match="holds the state of AdamW, which AdamW8bit cannot go on with"):
        tiny_run.train(RUN, begun, max_steps=4, resume=True, **options)


def test_a_name_that_is_no_option_is_told() -> None:
    (problem,) = TrainConfig(resume=True, allow_change=["sed"]).problems()
    assert problem.startswith("Unknown option in allow_change 'sed'. Did you mean 'seed'?")
    assert TrainConfig(allow_change=["seed"]).problems() == ["allow_change=['seed'] has no effect without resume"]


def test_rates_and_the_schedule_take_effect_and_are_named(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"lr": 0.5, "schedule": "constant", "weight_decay": 0.3, "beta2": 0.5}
    result = tiny_run.train(RUN, begun, max_steps=3, resume=True, save_steps=5, **options)
    assert result.history[-1]["lr"] == 0.5
    printed = capsys.readouterr().out
    assert "Changed since then, and in effect from here:" in printed
    for line in (
        "lr: 0.001 -> 0.5",
        "schedule: 'cosine' -> 'constant'",
        "weight_decay: 0.01 -> 0.3",
        "max_steps: 2 -> 3",
    ):
        assert f"  {line}\n" in printed
    groups = json.loads((tiny_run.newest(begun) / "optimizer.json").read_text())["param_groups"]
    assert {group["lr"] for group in groups} == {0.5} and {group["weight_decay"] for group in groups} == {0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.5)}


def test_saving_and_logging_may_change(begun: Path) -> None:
    tiny_run.train(RUN, begun, max_steps=8, resume=True, save_steps=3, keep_checkpoints=9, log_steps=2, num_workers=1)
    assert sorted(path.name[-1] for path in (begun / "checkpoints").iterdir()) == ["1", "2", "3", "6", "8"]
    steps = [json.loads(line)["step"] for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 6, 8]


def test_other_rows_are_refused_unless_accepted(begun: Path) -> None:
    rows = uneven_rows()
    rows[3]["messages"][-1]["content"] = "another answer"
    with pytest.raises(ConfigError, match=r"other data: .*--allow-change data.*--overwrite"):
        train(tiny_run.build(RUN), tiny_run.FAMILY, begun, rows, batch_size=4, resume=True, max_steps=3)
    options = {"allow_change": ["data"], "batch_size": 4, "micro_batch_size": 2, "save_steps": 1}
    assert train(tiny_run.build(RUN), tiny_run.FAMILY, begun, rows, resume=True, **options).step == 3


def test_a_stream_cannot_be_shared_anew(tmp_path: Path) -> None:
    run = Run(workers=2, stream=True)
    tiny_run.train(run, tmp_path, max_steps=2)
    with pytest.raises(
        ConfigError, match=r"'num_workers': 2.*'num_workers': 1.*Resume with those values, or start"
    ) as told:
        tiny_run.train(run, tmp_path, max_steps=4, resume=True, num_workers=1, allow_change=["num_workers"])
    assert "--allow-change" not in str(told.value)


# ---- the base under an adapter --------------------------------------------------------------------------------------


def test_an_adapter_goes_on_only_on_its_own_base(begun: Path) -> None:
    other = hfcustom.lora(tiny_run.FAMILY.model(seed=1), rank=2, dropout=0.3)
    with pytest.raises(CheckpointError, match=r"trained on other weights: .* Load the base that it was trained on"):
        train(other, tiny_run.FAMILY, begun, Transformed(uneven_rows(), None), batch_size=4, resume=True, max_steps=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_loaded_only_onto_its_own_base(
    internvl: Family, begun: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    for seed in (0, 1):
        internvl.model(internvl.stock_class, seed).to(dtype).save_pretrained(tmp_path / f"base-{seed}")
    loaded = hfcustom.load_adapter(begun / "model", tmp_path / "base-0")
    assert loaded.peft_config
    for load in (hfcustom.load_adapter, adapt.merge_adapter):
        with pytest.raises(CheckpointError, match="trained on other weights"):
            load(begun / "model", tmp_path / "base-1")


def test_a_base_is_known_in_other_precisions_and_by_what_is_not_quantised(internvl: Family, begun: Path) -> None:
    names = json.loads((begun / "model" / "base_fingerprint.json").read_text())
    assert len(names) == 16 and any("embed" in name for name in names)
    model = internvl.model()
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert not linears & names.keys()


# ---- versions -------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **state: Any) -> None:
    path = tiny_run.newest(folder) / "state.json"
    content = json.loads(path.read_text()) | state
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    (path.parent / MANIFEST).unlink()
    write_manifest(path.parent)


def test_a_checkpoint_of_a_later_version_says_which(begun: Path) -> None:
    rewrite(begun, format=2, version="9.1")
    with pytest.raises(CheckpointError, match=r"is of format 2, written by hfcustom 9\.1; this version reads up to 1"):
        tiny_run.train(RUN, begun, max_steps=4, resume=True)


def test_a_checkpoint_from_before_options_were_kept_goes_on(begun: Path) -> None:
    expected = shutil.copytree(begun, begun.with_name("expected"))
    rewrite(begun, format=None, version=None, config=None)
    (tiny_run.newest(begun) / "model" / "base_fingerprint.json").unlink()
    (tiny_run.newest(begun) / MANIFEST).unlink()
    write_manifest(tiny_run.newest(begun))
    ends = []
    for folder in (begun, expected):
        tiny_run.train(RUN, folder, max_steps=4, resume=True)
        ends.append(load_file(tiny_run.newest(folder) / "model" / "adapter_model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
