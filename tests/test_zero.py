"""DeepSpeed's ZeRO-1 and ZeRO-2 train as one process does, and their checkpoints are anybody's; what cannot be had is told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_run
import pytest
import sharded_fit
import torch
from conftest import ROOT, Family
from safetensors.torch import load_file
from test_distributed import free_port
from test_sharding import LOGGED, curve
from torch import nn
from training import short_config

from hfcustom.distributed import zero
from hfcustom.exits import ConfigError
from hfcustom.train import make_accelerator

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
Results = tuple[Path, list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Train in this process, then in two with DeepSpeed; return the folder, what each rank did, and what this one did."""
    folder = tmp_path_factory.mktemp("zero")
    alone = {
        "full": sharded_fit.run(sharded_fit.in_full, folder / "one"),
        "contrastive": sharded_fit.run(
            sharded_fit.contrastive, folder / "one contrastive", max_steps=1, eval_steps=None
        ),
        "bf16": sharded_fit.run(
            sharded_fit.in_full, folder / "one bf16", precision="bf16", max_steps=2, eval_steps=None
        ),
    }
    alone["lora bf16"] = sharded_fit.run(sharded_fit.on_bf16, folder / "one lora bf16", max_steps=2, eval_steps=None)
    for bits in sharded_fit.BITS:
        build = partial(sharded_fit.on_quantised, folder / f"base {bits} one", bits)
        alone[bits] = sharded_fit.run(build, folder / f"one {bits}", max_steps=2, eval_steps=None)
    alone["caches"] = sharded_fit.run(sharded_fit.of_frozen_tower, folder / "one caches", eval_steps=None)
    for name in sharded_fit.CASES:
        alone[name] = distributed_run.run(sharded_fit.by_adamw(name), folder / "one case" / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", free_port()]
    command += [ROOT / "tests/zero_run.py", folder]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **own, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return folder, [torch.load(folder / f"fit-{rank}.pt") for rank in range(2)], alone


@needs_deepspeed
def test_zero_trains_as_one_process(results: Results) -> None:
    _, ranks, alone = results
    for case in ("full", "stage 1"):
        assert curve(ranks[0][case], *LOGGED) == pytest.approx(curve(alone["full"], *LOGGED), rel=1e-5)
        assert curve(ranks[0][case], "said") == curve(alone["full"], "said")
        for name, weight in alone["full"]["weights"].items():
            torch.testing.assert_close(ranks[1][case]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert curve(ranks[0]["contrastive"], "loss", "grad_norm") == pytest.approx(
        curve(alone["contrastive"], "loss", "grad_norm"), rel=1e-4
    )
    for case in ("bf16", "lora bf16"):
        assert curve(ranks[0][case], "loss") == pytest.approx(curve(alone[case], "loss"), rel=2e-3)


@needs_deepspeed
@pytest.mark.parametrize("case", [*sharded_fit.CASES, *sharded_fit.BITS, "caches"])
def test_what_fit_can_do_it_does_under_zero(results: Results, case: str) -> None:
    """Packing, preferences, bad rows, packed weights, cached features; the average of the weights is in all runs above."""
    _, ranks, alone = results
    expected = curve(alone[case], "loss", "grad_norm")
    assert len(expected) >= 4
    assert curve(ranks[0][case], "loss", "grad_norm") == pytest.approx(expected, rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_zero_run_resumes_bit_equal(results: Results, case: str) -> None:
    for each in results[1]:
        unbroken, resumed = each[case], each[f"{case} resumed"]
        assert curve(resumed, "loss", "grad_norm", "said", "held_out") == curve(
            unbroken, "loss", "grad_norm", "said", "held_out"
        )
        assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in unbroken["weights"].items())


@needs_deepspeed
def test_a_run_goes_on_from_zero_on_one_process_and_from_one_under_zero(results: Results, tmp_path: Path) -> None:
    folder, ranks, alone = results
    shutil.copytree(folder / "full/checkpoints/step-000002", tmp_path / "checkpoints/step-000002")
    on_one = sharded_fit.run(lambda: sharded_fit.in_full(1), tmp_path, resume=True)
    for found in (on_one, ranks[0]["from one"]):
        assert curve(found, "loss", "held_out") == pytest.approx(curve(alone["full"], "loss", "held_out"), rel=1e-5)
        for name, weight in alone["full"]["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


@needs_deepspeed
def test_a_zero_checkpoint_is_written_as_that_of_one_process(results: Results) -> None:
    folder = results[0]
    own, one = (folder / name / "checkpoints/step-000002" for name in ("full", "one"))
    names = {path.relative_to(one).as_posix() for path in one.rglob("*")}
    assert {path.relative_to(own).as_posix() for path in own.rglob("*")} == names | {"rng-1.safetensors"}
    found, expected = (load_file(place / "optimizer.safetensors") for place in (own, one))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)


@needs_deepspeed
def test_what_goes_wrong_under_zero_is_told(results: Results) -> None:
    for each in results[1]:
        assert "the step was not applied" in each["not finite"]
        assert "trained with DeepSpeed by an earlier fit(); go on with one that is loaded" in each["trained before"]


# ---- what cannot be had ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"ZERO_STAGE": "3"},
            "zero_stage: 3; fit.. does stages 1 and 2.*--config_file recipes/accelerate/fsdp_8.yaml",
        ),
        ({"CONFIG_FILE": "ds.json"}, "deepspeed_config_file: ds.json.*Leave it out and set zero_stage"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: cpu.*set it to none.*fsdp_8.yaml"),
    ],
)
def test_what_the_launcher_asks_of_deepspeed_and_cannot_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ConfigError, match=said):
        make_accelerator(short_config(tmp_path))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "DeepSpeed, which cannot be imported.*pip install deepspeed, or launch with recipes/accelerate/fsdp_8"),
        (SimpleNamespace(DeepSpeedEngine=nn.Module), "exchange gradients once a step.*pip install -U deepspeed"),
    ],
)
def test_a_deepspeed_that_is_missing_or_old_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    with pytest.raises(ConfigError, match=said):
        make_accelerator(short_config(tmp_path))


def test_an_optimizer_of_bitsandbytes_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    model = families["internvl"].model()
    zero.check_model(model, short_config(tmp_path))
    with pytest.raises(ConfigError, match="optimizer=adamw_8bit of bitsandbytes cannot work.*gpus_8.yaml"):
        zero.check_model(model, short_config(tmp_path, optimizer="adamw_8bit"))
