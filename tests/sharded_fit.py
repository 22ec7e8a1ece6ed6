"""Runs of fit() whose model Accelerate shards (FSDP2), two processes over gloo: tests/sharded_run.py calls main() in each.

Accelerate ignores FSDP on a CPU. `as_on_gpus` only tells it that the processes have GPUs, after it has set them up on the CPU: all
that follows, from the config of recipes/accelerate/ to the wrapping and the optimizer's parameters, is its own code.
"""

from __future__ import annotations

import os
import shutil
import signal
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import distributed_run
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import RECIPES, Family, chat_row
from distributed_run import Case, case_rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import add_dropout, short_config

import hfcustom
from hfcustom import train
from hfcustom.distributed import spread
from hfcustom.distributed.sharding import is_sharded, whole
from hfcustom.exits import ConfigError, SaveError
from hfcustom.families import load_family
from hfcustom.losses import chunked

STEPS = 4
TIED = Family("smolvlm", load_family("smolvlm"))
BITS: tuple[Literal["8bit", "4bit"], ...] = ("8bit", "4bit")
ROWS = case_rows(Case(images=[1, 1, 2, 1, 0, 0, 0, 0]))  # a rank with images, one without
HELD_OUT = [chat_row(images, seed) for seed, images in enumerate([1, 1, 0, 0, 2])]
SAVING: dict[str, Any] = {"micro_batch_size": 4, "save_steps": 1, "max_steps": 2, "eval_steps": None}
OPTIONS: dict[str, Any] = {
    "ema_decay": 0.5,
    "micro_batch_size": 2,
    "schedule": "constant",
    "save_steps": 2,
    "max_steps": STEPS,
}
CASES = (
    "contrastive",
    "bad rows on both ranks, contrastive",
    "preferences",
    "packed rows",
)  # of tests/distributed_run.py


def launched_with(name: str) -> dict[str, str]:
    """Return what `accelerate launch` puts into the environment for a config of recipes/accelerate/."""
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / "accelerate" / name), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return {key: value for key, value in prepare_multi_gpu_env(arguments).items() if value is not None}


def as_on_gpus(config: str = "fsdp_8.yaml") -> None:
    """Let Accelerate shard what it prepares from here on, as a config says."""
    train.process_state()
    own = ("FSDP_", "ACCELERATE_USE_FSDP")
    os.environ.update({key: value for key, value in launched_with(config).items() if key.startswith(own)})
    train.AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def in_full(seed: int = 0) -> nn.Module:
    return TIED.model(seed=seed)  # type: ignore[no-any-return]


def with_lora(seed: int = 0) -> nn.Module:
    model = hfcustom.lora(in_full(seed), "language", rank=2, train="connector")
    add_dropout(model, 0.3)
    return model


def on_bf16(seed: int = 0) -> nn.Module:
    """LoRA on a base held in 16 bits, which must stay so."""
    return hfcustom.lora(in_full(seed).to(torch.bfloat16), "language", rank=2)


def on_quantised(folder: Path, bits: Literal["8bit", "4bit"]) -> nn.Module:
    """LoRA on a base whose matrices bitsandbytes has packed."""
    state = train.process_state()
    if state.is_main_process:
        in_full().save_pretrained(folder)
    state.wait_for_everyone()
    plan = hfcustom.quantization_config(folder, bits)
    return hfcustom.lora(TIED.model_class.from_pretrained(folder, quantization_config=plan), "language", rank=2)


def by_adamw(name: str) -> Case:
    """Return a case of tests/distributed_run.py with the optimizer that DeepSpeed shares out."""
    return replace(distributed_run.CASES[name], sgd=False)


def with_caches(folder: Path) -> dict[str, Any]:
    """Return the options that keep images and the features of a frozen tower."""
    return {"cache_images": str(folder / "images"), "cache_features": str(folder / "features")}


def of_frozen_tower(seed: int = 0) -> nn.Module:
    model = in_full(seed)
    hfcustom.train_only(model, ["language"])
    return model


def contrastive(seed: int = 0) -> nn.Module:
    """A term across the rows of a step, for which images are looked at outside of forward()."""
    return TIED.model(seed=seed, loss={"cross_entropy": 1.0, "contrastive": 0.5})  # type: ignore[no-any-return]


def evaluate(model: Any, step: int) -> dict[str, float]:
    """Return what the model says, as a number, and a loss on held-out rows by what a user would write."""
    answers = hfcustom.generate_answers(model, TIED.processor, HELD_OUT, batch_size=2, max_new_tokens=3)
    few = hfcustom.generate_answers(model, TIED.processor, HELD_OUT[:1], max_new_tokens=2)
    batches = [TIED.batch([1]), TIED.batch([2]), TIED.batch([1, 1])]
    losses = hfcustom.over_ranks(lambda batch: float(model(**batch).loss), batches)
    said = "|".join(answer.answer for answer in [*answers, *few])
    assert [answer.example.name for answer in answers] == [f"row {at}" for at in range(len(HELD_OUT))]
    return {"said": float(zlib.crc32(said.encode()) % 10**6), "held_out": sum(losses) / len(losses)}


def run(build: Callable[[], nn.Module], folder: Path, **options: Any) -> dict[str, Any]:
    """Train with fit(); return the log, what evaluation said, and the weights, whole."""
    model = build()
    config = short_config(folder, **{**OPTIONS, "eval_steps": 2, **options})
    result = train.fit(model, TIED.processor, ROWS, config, evaluate=evaluate if config.eval_steps else None)
    values = {name: whole(p).detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return {"history": result.history, "weights": values, "sharded": is_sharded(model)}


def from_step_two(source: Path, folder: Path) -> Path:
    """Begin a folder with the checkpoint of step 2 of another one, by rank 0; return the folder."""
    if train.process_state().is_main_process:
        shutil.copytree(source / "checkpoints/step-000002", folder / "checkpoints/step-000002")
    train.process_state().wait_for_everyone()
    return folder


def unlike_weights(folder: Path) -> str:
    """Let each rank begin with other weights; return what fit() says."""
    try:
        run(lambda: in_full(train.process_state().process_index), folder)
    except ConfigError as error:
        return str(error)
    return ""


def failing_on_rank_one(folder: Path) -> str:
    """Let a file of rank 1 fail in the second save; return what fit() says."""
    original, rank = spread.save_file, train.process_state().process_index

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        if rank == 1 and "step-000002" in str(path) and path.name.startswith("optimizer"):
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    spread.save_file = fail
    try:
        run(in_full, folder, **SAVING)
    except SaveError as error:
        return str(error)
    finally:
        spread.save_file = original
    return ""


def dying_on_rank_one(folder: Path) -> None:
    """Let rank 1 be killed while it writes its file of the second save; nothing is left to return."""
    original, rank = spread.save_file, train.process_state().process_index

    def die(tensors: Any, path: Path, **options: Any) -> None:
        original(tensors, path, **options)
        if rank == 1 and "step-000002" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    spread.save_file = die
    run(in_full, folder, **SAVING)


def spying_on_heads() -> list[bool]:
    """Return a list that grows with each loss: whether its head was the plain matrix that chunks are multiplied with."""
    seen: list[bool] = []
    original = chunked.Head.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, module: Any) -> Any:
        head = original(cls, module)
        seen.append(head.linear is not None)
        return head

    chunked.Head.of = classmethod(of)  # type: ignore[assignment,method-assign]
    return seen


def check_placements(folder: Path) -> None:
    """A tensor of files is cut as torch cuts it: along any dimension, uneven, empty on a rank, over a mesh of two dimensions."""
    tensors = {"uneven": torch.arange(15.0).view(5, 3), "one row": torch.arange(4.0).view(1, 4)}
    spread.write_spread(tensors, folder, "placed", Accelerator())
    found = spread.Spread(sorted(folder.glob("placed-*")))
    for shape, placements in (
        ((2,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((2, 1), [Replicate(), Shard(0)]),
        ((1, 2), [Shard(0), Shard(1)]),
    ):
        mesh = init_device_mesh("cpu", shape)
        for name, tensor in tensors.items():
            like = distribute_tensor(torch.zeros_like(tensor), mesh, placements)
            read = found.read_like(name, like)
            assert read.to_local().shape == like.to_local().shape  # type: ignore[attr-defined]
            assert torch.equal(whole(read), tensor), (name, shape, placements)


def main(folder: Path) -> None:
    check_placements(folder)
    as_on_gpus()
    rank, heads = train.process_state().process_index, spying_on_heads()
    tried: dict[str, Any] = {"resume": True, "try_costliest": True}  # which leaves nothing behind
    found: dict[str, Any] = {
        "full": run(in_full, folder / "full"),
        "full resumed": run(lambda: in_full(1), from_step_two(folder / "full", folder / "again"), **tried),
        "from one": run(lambda: in_full(1), from_step_two(folder / "one", folder / "on"), resume=True),
    }
    found["plain heads"] = all(heads) and len(heads) > 0
    silent: dict[str, Any] = {"eval_steps": None}
    found["lora"] = run(with_lora, folder / "lora", **silent)
    found["lora resumed"] = run(
        with_lora, from_step_two(folder / "lora", folder / "lora-again"), resume=True, **silent
    )
    as_on_gpus("fsdp_zero2_8.yaml")
    found["contrastive"] = run(contrastive, folder / "contrastive", max_steps=1, **silent)
    as_on_gpus()
    tracked: dict[str, Any] = {"trackers": ["tensorboard"], **silent}
    found["bf16"] = run(in_full, folder / "bf16", precision="bf16", max_steps=2, **tracked)
    for name in CASES:
        ended = distributed_run.run(distributed_run.CASES[name], folder / "cases" / name)
        found[name] = {"history": ended["history"]}
    found["unlike"] = unlike_weights(folder / "unlike")
    found["failed"] = failing_on_rank_one(folder / "failed")
    torch.save(found, folder / f"fit-{rank}.pt")
    dying_on_rank_one(folder / "killed")
