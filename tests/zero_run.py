"""Runs of fit() with DeepSpeed's ZeRO, two processes over gloo on the CPU: tests/test_zero.py starts them.

    torchrun --nproc_per_node 2 tests/zero_run.py FOLDER

Accelerate ignores DeepSpeed on a CPU. `as_on_gpus` only tells it that the processes have GPUs, after it has set them up on the CPU: all
that follows is Accelerate's own code and DeepSpeed's.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import distributed_run
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from conftest import RECIPES
from sharded_fit import (
    BITS,
    CASES,
    by_adamw,
    contrastive,
    from_step_two,
    in_full,
    of_frozen_tower,
    on_bf16,
    on_quantised,
    run,
    with_caches,
    with_lora,
)

from hfcustom import train
from hfcustom.exits import ConfigError
from hfcustom.losses import NonFiniteError

SILENT: dict[str, Any] = {"eval_steps": None}


def as_on_gpus() -> None:
    """Let Accelerate train with DeepSpeed from here on, as `accelerate launch` with the shipped config would."""
    train.process_state()
    os.environ.pop("ACCELERATE_USE_CPU", None)
    config = str(RECIPES / "accelerate/deepspeed_8.yaml")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "x.py"]))
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    own = ("ACCELERATE_DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")
    os.environ.update({key: value for key, value in environment.items() if key.startswith(own)})
    train.AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled for minutes


def said(build: Any, folder: Path, **options: Any) -> str:
    """Return what fit() refuses with, empty if it does not."""
    try:
        run(build, folder, **SILENT, **options)
    except (ConfigError, NonFiniteError) as error:
        return str(error)
    return ""


def not_finite(seed: int = 0) -> Any:
    model = in_full(seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.inf
    return model


def trained_before(folder: Path) -> str:
    model = in_full()
    run(lambda: model, folder / "first", max_steps=1, **SILENT)
    return said(lambda: model, folder / "second")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    as_on_gpus()
    rank = train.process_state().process_index
    found: dict[str, Any] = {
        "full": run(in_full, folder / "full"),
        "full resumed": run(lambda: in_full(1), from_step_two(folder / "full", folder / "again"), resume=True),
        "from one": run(lambda: in_full(1), from_step_two(folder / "one", folder / "on"), resume=True),
        "lora": run(with_lora, folder / "lora", **SILENT),
        "contrastive": run(contrastive, folder / "contrastive", max_steps=1, **SILENT),
        "bf16": run(in_full, folder / "bf16", precision="bf16", max_steps=2, **SILENT),
        "not finite": said(not_finite, folder / "not finite"),
        "trained before": trained_before(folder / "twice"),
    }
    found["lora resumed"] = run(with_lora, from_step_two(folder / "lora", folder / "lora2"), resume=True, **SILENT)
    found["lora bf16"] = run(on_bf16, folder / "lora bf16", max_steps=2, **SILENT)
    for bits in BITS:
        build = partial(on_quantised, folder / f"base {bits}", bits)
        found[bits] = run(build, folder / bits, max_steps=2, **SILENT)
    found["caches"] = run(of_frozen_tower, folder / "caches", **with_caches(folder / "cached"), **SILENT)
    for name in CASES:
        ended = distributed_run.run(by_adamw(name), folder / "cases" / name)
        found[name] = {"history": ended["history"]}
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "1"
    found["stage 1"] = run(in_full, folder / "stage 1")
    torch.save(found, folder / f"fit-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
