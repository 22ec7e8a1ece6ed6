"""Sharded models train as unsharded ones in every family; the configs and the SLURM script of recipes/accelerate/ are sound."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import RECIPES, ROOT, Family
from sharded_run import CASES
from test_distributed import two_ranks
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from hfcustom.sharding import block_classes, is_sharded, name_blocks, whole

CONFIGS = sorted(path.name for path in (RECIPES / "accelerate").glob("*.yaml"))
SHARDED = [
    name for name in CONFIGS if "FSDP" in (RECIPES / "accelerate" / name).read_text().split("distributed_type")[1]
]


# ---- a step of two processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("sharded")
    two_ranks(folder, "sharded_run.py")
    found: dict[str, dict[str, float]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_trains_as_a_whole_one(results: dict[str, dict[str, float]], case: str) -> None:
    found = results[case]
    assert found["norm"] > 0
    assert found["apart"] < 2e-3 * found["moved"], found


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
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / "accelerate" / name), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    with patch_environment(**{key: value for key, value in environment.items() if value is not None}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
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
