"""Sharded models train as unsharded ones in every family; the configs and the SLURM script of recipes/accelerate/ are sound."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_run
import pytest
import sharded_fit
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import RECIPES, ROOT, Family, assert_same_model
from peft import PeftModel
from sharded_fit import TIED, launched_with
from sharded_run import CASES
from test_distributed import two_ranks
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from training import short_config

from hfcustom.commit import damage
from hfcustom.distributed import sharding
from hfcustom.distributed.sharding import block_classes, check_shardable, is_sharded, name_blocks, whole
from hfcustom.exits import ConfigError
from hfcustom.train import make_accelerator
from hfcustom.training.checkpoint import complete_checkpoints

CONFIGS = sorted(path.name for path in (RECIPES / "accelerate").glob("*.yaml"))
SHARDED = [
    name for name in CONFIGS if "FSDP" in (RECIPES / "accelerate" / name).read_text().split("distributed_type")[1]
]


# ---- a step of two processes ----------------------------------------------------------------------------------------


Results = tuple[dict[str, dict[str, float]], Path, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Train in this process, then in two, of which one is killed at the very end; return steps, folder and what this one did."""
    folder = tmp_path_factory.mktemp("sharded")
    alone = {
        "full": sharded_fit.run(sharded_fit.in_full, folder / "one"),
        "contrastive": sharded_fit.run(
            sharded_fit.contrastive, folder / "one contrastive", max_steps=1, eval_steps=None
        ),
        "bf16": sharded_fit.run(
            sharded_fit.in_full, folder / "one bf16", precision="bf16", max_steps=2, eval_steps=None
        ),
    }
    for name in sharded_fit.CASES:
        alone[name] = distributed_run.run(distributed_run.CASES[name], folder / "one case" / name)
    two_ranks(folder, "sharded_run.py", code=-signal.SIGKILL)
    return json.loads((folder / "results.json").read_text()), folder, alone


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_trains_as_a_whole_one(results: Results, case: str) -> None:
    found = results[0][case]
    assert found["norm"] > 0
    assert found["apart"] < 2e-3 * found["moved"], found


# ---- fit() with a model that Accelerate shards: one run of two processes, looked at from all sides -------------------


@pytest.fixture(scope="module")
def ranks(results: Results) -> list[dict[str, Any]]:
    return [torch.load(results[1] / f"fit-{rank}.pt") for rank in range(2)]


def curve(run: dict[str, Any], *names: str) -> list[float]:
    return [entry[name] for entry in run["history"] for name in names if name in entry]


LOGGED = ("loss", "grad_norm", "grad_norm_vision", "grad_norm_language", "held_out")


def test_fit_trains_a_sharded_model_as_one_process_trains_a_whole_one(
    results: Results, ranks: list[dict[str, Any]]
) -> None:
    alone = results[2]
    assert ranks[0]["full"]["sharded"] and not alone["full"]["sharded"]
    assert curve(ranks[0]["full"], *LOGGED) == pytest.approx(curve(alone["full"], *LOGGED), rel=1e-5)
    for name, weight in alone["full"]["weights"].items():
        torch.testing.assert_close(ranks[1]["full"]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert curve(ranks[0]["contrastive"], "loss", "grad_norm") == pytest.approx(
        curve(alone["contrastive"], "loss", "grad_norm"), rel=1e-4
    )
    assert curve(ranks[0]["bf16"], "loss") == pytest.approx(curve(alone["bf16"], "loss"), rel=2e-3)
    assert all(each["plain heads"] for each in ranks)  # no chunk of a loss gathers the head anew


@pytest.mark.parametrize("case", sharded_fit.CASES)
def test_ranks_of_a_sharded_model_run_alike_whatever_their_rows_hold(
    results: Results, ranks: list[dict[str, Any]], case: str
) -> None:
    """Images on one rank alone, rows that cannot be read, terms across the rows of a step: where modules differ, shards hang."""
    expected = curve(results[2][case], "loss", "grad_norm")
    assert len(expected) == 2 * distributed_run.STEPS
    assert curve(ranks[0][case], "loss", "grad_norm") == pytest.approx(expected, rel=1e-5)


def test_weights_that_differ_between_ranks_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("models of different weights, which FSDP would mix" in each["unlike"] for each in ranks)


def test_evaluation_of_a_sharded_model_is_that_of_one_process(results: Results, ranks: list[dict[str, Any]]) -> None:
    said = curve(results[2]["full"], "said")
    assert len(said) == 2 and said[0] != said[1]
    assert curve(ranks[0]["full"], "said") == curve(ranks[1]["full"], "said") == said


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_sharded_run_resumes_bit_equal_on_as_many_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    for each in ranks:
        unbroken, resumed = each[case], each[f"{case} resumed"]
        assert curve(resumed, "loss", "grad_norm", "said", "held_out") == curve(
            unbroken, "loss", "grad_norm", "said", "held_out"
        )
        assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in unbroken["weights"].items())
    first, second = ranks
    assert all(torch.equal(weight, second[case]["weights"][name]) for name, weight in first[case]["weights"].items())


def test_a_run_goes_on_from_two_ranks_on_one_and_from_one_on_two(
    results: Results, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = curve(results[2]["full"], "loss", "held_out")
    shutil.copytree(results[1] / "full/checkpoints/step-000002", tmp_path / "checkpoints/step-000002")
    on_one = sharded_fit.run(lambda: sharded_fit.in_full(1), tmp_path, resume=True)
    for found in (on_one, ranks[0]["from one"]):
        assert curve(found, "loss", "held_out") == pytest.approx(expected, rel=1e-5)
        for name, weight in results[2]["full"]["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_each_sharded_checkpoint_is_what_from_pretrained_loads(results: Results, ranks: list[dict[str, Any]]) -> None:
    folder = results[1] / "full"
    assert len(list((folder / "model").glob("model-*-of-00002.safetensors"))) == 2
    model, (batch,) = TIED.model(seed=1), [TIED.batch([1, 0])]
    for name, weight in ranks[0]["full"]["weights"].items():
        model.get_parameter(name).data.copy_(weight)
    assert_same_model(TIED.model_class.from_pretrained(folder / "model"), model, batch)
    raw = [TIED.model_class.from_pretrained(folder / f"checkpoints/step-00000{step}/model") for step in (2, 4)]
    assert not any(equal_states(loaded, model) for loaded in raw)  # the published one is the average
    adapted = PeftModel.from_pretrained(sharded_fit.in_full(), results[1] / "lora/model")
    trained = {name.replace(".default", ""): weight for name, weight in ranks[0]["lora"]["weights"].items()}
    found = {name.replace(".default", ""): weight for name, weight in adapted.named_parameters()}
    assert trained and all(torch.equal(found[name], weight) for name, weight in trained.items())


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_damage_to_any_ranks_file_is_found(results: Results, tmp_path: Path) -> None:
    shutil.copytree(results[1] / "full/checkpoints/step-000004", tmp_path / "step-000004")
    files = sorted((tmp_path / "step-000004").rglob("*-of-*.safetensors"))
    assert [file.name[:5] for file in files] == ["ema-0", "ema-0", "model", "model", "optim", "optim"]
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert f"{file.name} is not what manifest.json says" in str(damage(tmp_path / "step-000004"))
        content[-1] ^= 1
        file.write_bytes(content)
    assert damage(tmp_path / "step-000004") is None


def test_a_save_that_fails_on_one_rank_or_kills_it_leaves_the_checkpoint_before(
    results: Results, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    for each in ranks:
        assert "disk full: need" in each["failed"] and "The last good checkpoint is" in each["failed"]
    for name in ("failed", "killed"):
        folder = results[1] / name / "checkpoints"
        assert [path.name for path in complete_checkpoints(folder)] == ["step-000001"]
        assert damage(folder / "step-000001") is None


# ---- what cannot be sharded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1; set it to 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing: true; set it to false, --gradient-checkpointing does the same",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "1"},
            "fsdp_cpu_ram_efficient_loading: true; set it to false",
        ),
    ],
)
def test_what_the_launcher_asks_for_and_cannot_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        make_accelerator(short_config(tmp_path))


def test_models_and_options_that_cannot_be_sharded_are_told(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families["internvl"].model()
    check_shardable(model, short_config(tmp_path))
    for options, said in (
        ({"optimizer": "adamw_8bit"}, "optimizer=adamw_8bit of bitsandbytes cannot work on sharded parameters"),
        (
            {"cache_features": "kept"},
            "cache_features='kept': a process that has its images there would not run the tower",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            check_shardable(model, short_config(tmp_path, **options))
    for parameter, said in (
        (nn.Parameter(torch.tensor(1.0)), "odd is a single number, which cannot be sharded"),
        (nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False), "odd is packed by bitsandbytes"),
    ):
        model.register_parameter("odd", parameter)
        with pytest.raises(ConfigError, match=f"{said}.*gpus_8.yaml"):
            check_shardable(model, short_config(tmp_path))
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match="sharded by an earlier fit.*loaded from its model_dir"):
        check_shardable(model, short_config(tmp_path))


# ---- which modules are sharded by themselves ------------------------------------------------------------------------


def test_blocks_are_layers_of_both_towers(family: Family) -> None:
    model = family.model()
    names = block_classes(model)
    holders = [module for module in model.modules() if type(module).__name__ in names]
    covered = sum(p.numel() for module in holders for p in module.parameters())
    assert names and covered > 0.2 * sum(p.numel() for p in model.parameters())
    assert not is_sharded(model)
    weight = model.get_input_embeddings().weight
    assert torch.equal(whole(weight), weight)


def test_accelerate_wraps_them_where_its_own_choice_names_what_is_not_there(families: dict[str, Family]) -> None:
    model = families["llava"].model()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=transformer_auto_wrap_policy)
    with pytest.raises(ValueError, match="Could not find the transformer layer class"):
        fsdp2_prepare_auto_wrap_policy(plugin, model)
    name_blocks(model, SimpleNamespace(distributed_type="NO"))
    name_blocks(
        model, SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None
    wrapped = {type(module).__name__ for module in model.modules() if policy(module)}
    assert wrapped == set(block_classes(model))


def test_a_model_without_blocks_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="Linear has no block to shard by itself: set _no_split_modules"):
        block_classes(nn.Linear(2, 2))


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_config(name: str) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / name))
    machines, _, processes = (re.search(r"[0-9x]+(?=\.yaml)", name) or ["1"])[0].rpartition("x")
    assert config.num_machines == int(machines or 1)
    assert config.num_processes == config.num_machines * int(processes)


@pytest.mark.parametrize("name", SHARDED)
def test_the_sharded_configs_ask_for_fsdp2(name: str) -> None:
    """What `accelerate launch` puts into the environment, and what a process makes of it."""
    with patch_environment(**launched_with(name)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is ("zero2" not in name)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None


FAKES = {  # what a cluster has: each writes down how it was called
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo first-host; true',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "accelerate": 'echo "accelerate $*" >> "$CALLS"; bash -c "$TRAINING" training -u recipes/finetune.py',
}
STOPS = 'trap "exit 7" USR1; echo up >> "$CALLS"; for i in $(seq 100); do sleep 0.1; done; exit 9'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    yield {
        **os.environ,
        "PATH": path,
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n",
    }


def submit(cluster: dict[str, str], training: str, stop: bool = False, **more: str) -> tuple[int, str]:
    """Run the script as SLURM does, with a training of bash's; return its exit code and what was called."""
    calls = Path(cluster["CALLS"])
    script = [str(RECIPES / "accelerate/slurm.sh"), "--config", "run.yaml"]
    running = subprocess.Popen(["bash", *script], env={**cluster, "TRAINING": training, **more}, cwd=ROOT)
    if stop:
        deadline = time.monotonic() + 30
        while not (calls.is_file() and "up" in calls.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGUSR1)
    return running.wait(timeout=60), calls.read_text()


def test_a_job_whose_time_is_over_is_queued_again_and_resumes(cluster: dict[str, str]) -> None:
    code, calls = submit(cluster, STOPS, stop=True)
    assert code == 7 and "scontrol requeue 7" in calls
    wanted = (
        "--machine_rank 0 --main_process_ip first-host --main_process_port 20007 recipes/finetune.py --config run.yaml"
    )
    assert f"accelerate launch --config_file recipes/accelerate/fsdp_4x8.yaml {wanted}\n" in calls
    code, calls = submit(cluster, "exit 0", SLURM_RESTART_COUNT="1")
    assert code == 0 and f"{wanted} --resume\n" in calls and calls.count("requeue") == 1


def test_a_job_that_fails_by_itself_is_not_queued_again(cluster: dict[str, str]) -> None:
    code, calls = submit(cluster, "exit 3")
    assert code == 3 and "requeue" not in calls
