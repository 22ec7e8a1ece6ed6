"""hfcustom plan: its numbers against those of real training: weights, gradients and optimiser to the byte, the peak to 15 %."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, Family
from test_recipes import stock_checkpoint

from hfcustom.parts import unwrap
from hfcustom.plan.config import Recipe, read_plan
from hfcustom.plan.measure import Measured, measure
from hfcustom.plan.state import memory_by_part, named_memory
from hfcustom.train import choose_precision, make_accelerator, make_optimizer, set_up, split_batch, train_step
from hfcustom.training.averaging import Average

WAYS = {
    "full": [],
    "recomputed": ["--gradient-checkpointing"],
    "accumulated": ["--micro-batch-size", "1"],
    "bf16, averaged, with noise": ["--precision", "bf16", "--ema-decay", "0.9", "--neftune-alpha", "5"],
    "lora, averaged": ["--lora", "--ema-decay", "0.9"],
    "lora, bf16, recomputed": ["--lora", "--dtype", "bfloat16", "--gradient-checkpointing"],
    "8 bits": ["--lora", "--load-in", "8bit"],
    "4 bits": ["--lora", "--load-in", "4bit"],
}


def planned(folder: Path, *options: str) -> tuple[Any, Recipe]:
    given = ["--model", str(folder / "stock"), "--data", str(folder / "rows.jsonl"), "--batch-size", "2", *options]
    return read_plan(given, "")


def of_plan(config: Any, recipe: Recipe) -> Measured:
    return measure(config, recipe.build, recipe.batches)


class RealRun:
    """The same run for real: two steps, the second under the profiler, which hears of every allocation."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        config = copy.copy(config)
        self.model, processor = recipe.build(config)
        core = unwrap(self.model)
        batch, *_ = recipe.batches(core, processor, config)
        config.precision = choose_precision(self.model, config)
        accelerator = make_accelerator(config)
        set_up(self.model, config, accelerator)
        model, self.optimizer = accelerator.prepare(self.model, make_optimizer(self.model, config))
        self.average = Average(self.model, config.ema_decay, accelerator).values
        model.train()
        core.loss_step = 0
        batches = [batch] * min(2, split_batch(config, config.gpus)[1])
        self.gradients: dict[int, int] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count)
        train_step(model, batches, self.optimizer, accelerator, config)
        held = [tensor for _, tensor in named_memory(core)] + list(batch.values())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held += [value for value in states if isinstance(value, torch.Tensor)] + list(self.average.values())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        with allocations() as sizes:
            train_step(model, batches, self.optimizer, accelerator, config)
        self.peak = sum(storages.values()) + most(sizes)

    def _count(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients[id(parameter)] = parameter.grad.numel() * parameter.grad.element_size()


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Collect the sizes of what torch's CPU allocator gives, and of what it gets back, as negative ones."""
    sizes: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    events = profiler.profiler.kineto_results.events()
    found = sorted((event.start_ns(), at) for at, event in enumerate(events) if event.name() == "[memory]")
    sizes += [events[at].nbytes() for _, at in found]


def most(sizes: list[int]) -> int:
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def check(config: Any, recipe: Recipe) -> float:
    """Compare a plan with the real run; return the peak's error."""
    first = measure(config, recipe.build, lambda *given: recipe.batches(*given)[:1])
    plan, real = first, RealRun(config, recipe)
    assert list(map(astuple, plan.parts)) == list(
        map(astuple, memory_by_part(real.model, real.optimizer, real.average))
    )
    assert plan.total("average") == (4 * plan.trainable if config.ema_decay else 0)
    assert plan.total("gradients") == sum(real.gradients.values())
    assert plan.trainable == sum(parameter.numel() for parameter in real.model.parameters() if parameter.requires_grad)
    error = plan.peak / real.peak - 1
    print(f"ERROR {plan.class_name} {error:+.4f}")
    assert abs(error) < 0.15
    return error


def test_every_family_takes_what_was_planned(family: Family, tmp_path: Path) -> None:
    check(*planned(stock_checkpoint(family, tmp_path)))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "full"])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("llava_next", "mllama")])
def test_every_way_of_training_takes_what_was_planned(
    name: str, way: str, families: dict[str, Family], tmp_path: Path
) -> None:
    check(*planned(stock_checkpoint(families[name], tmp_path), *WAYS[way]))
