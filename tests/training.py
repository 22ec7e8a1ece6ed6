"""What the training tests share: rows with answers of very unequal length, short configs, runs, distances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import Family, chat_row
from torch import nn
from torch.nn import functional as F

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.losses import LOSSES
from hfcustom.train import TrainResult, fit, make_accelerator, train_step
from hfcustom.train_config import TrainConfig

IMAGES = (1, 0, 2, 1, 0, 0, 1, 0)
ANSWER_WORDS = (1, 40, 2, 30, 1, 1, 50, 3)
TERMS = {"cross_entropy": 1.0, "z_loss": 1e-3, "image_size": 0.1}  # two token losses and a term


@contextmanager
def user_losses() -> Iterator[None]:
    """Register what a user would write, a token loss `margin`, terms `image_size` and `noted`; forget them at the end."""
    before = dict(LOSSES)

    @hfcustom.token_loss
    def margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        best = logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)
        return F.softplus(best - logits.gather(-1, targets[:, None])[:, 0])

    @hfcustom.term(count="image_tokens")
    def image_size(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        size = context.image_features.square().mean(-1)
        return size.sum(), size.numel()

    @hfcustom.term(count="rows")
    def noted(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        if PartialState().is_main_process:  # as where one rank alone has an image
            context.record("seen", context.num_rows, 1)
        return -context.row_log_probs.sum(), context.num_rows

    yield
    LOSSES.clear()
    LOSSES.update(before)


def uneven_rows(images: Sequence[int] = IMAGES, words: Sequence[int] = ANSWER_WORDS) -> list[dict[str, Any]]:
    """Return rows of chat_row with answers of the given numbers of words."""
    rows = [chat_row(count, seed) for seed, count in enumerate(images)]
    for row, length in zip(rows, words, strict=True):
        row["messages"][-1]["content"] = " ".join(str(at % 10) for at in range(length))
    return rows


def short_config(folder: Path, **options: Any) -> TrainConfig:
    """Return the config of a run of three steps of eight rows that logs each step."""
    defaults = {"max_steps": 3, "batch_size": 8, "lr": 1e-3, "warmup_steps": 0, "log_steps": 1}
    return TrainConfig(output_dir=str(folder), **{**defaults, **options})


def train(model: nn.Module, family: Family, folder: Path, rows: Any = None, **options: Any) -> TrainResult:
    """Run fit() with short_config()."""
    extra = {name: options.pop(name) for name in ("evaluate", "processor") if name in options}
    processor = extra.pop("processor", family.processor)
    return fit(model, processor, uneven_rows() if rows is None else rows, short_config(folder, **options), **extra)


def curve(result: TrainResult, name: str = "loss") -> list[float]:
    """Return one number of every log line that has it."""
    return [entry[name] for entry in result.history if name in entry]


def add_dropout(model: nn.Module, share: float) -> None:
    """Drop a share of the attention weights in training."""
    names = ("attention_dropout", "dropout")
    found = [
        (module, name) for module in model.modules() for name in names if isinstance(vars(module).get(name), float)
    ]
    assert found, f"no module has one of {names}"
    for module, name in found:
        setattr(module, name, share)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def relative_distance(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Return how far two results of training lie apart, as a share of how far training went.

    One number over all weights, because Adam turns the rounding of a gradient that is zero (the bias of Qwen2's keys)
    into a step of full size.
    """
    return _norm(first, second) / _norm(first, start)


def _norm(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return float(torch.stack([(first[name] - second[name]).norm() for name in first]).norm())


# ---- one step in float64, where the cut of a step leaves no rounding to hide behind ---------------------------------

Rows = Sequence[dict[str, Any]]
Step = tuple[dict[str, float], dict[str, torch.Tensor]]


def cut_batches(family: Family, rows: Rows, size: int, columns: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return micro-batches of `size` rows in float64, each with its part of the columns."""
    collate, batches = Collator(family.processor), []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        batch = collate(rows[part]) | {name: values[part] for name, values in columns.items()}
        batches.append({name: value.double() if value.is_floating_point() else value for name, value in batch.items()})
    return batches


def pad_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with its padding on the other side."""
    width, lengths = batch["input_ids"].shape[1], batch["attention_mask"].sum(1)
    rolled = dict(batch)
    for name in ("input_ids", "attention_mask", "labels"):
        rows = zip(batch[name], lengths, strict=True)
        rolled[name] = torch.stack([row.roll(width - int(length)) for row, length in rows])
    rolled["position_ids"] = (rolled["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return rolled


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with all rows in one, (1, total), told apart by position_ids that restart."""
    real, packed = batch["attention_mask"].bool(), dict(batch)
    for name in ("input_ids", "labels"):
        packed[name] = batch[name][real][None]
    packed["position_ids"] = (real.cumsum(1) - 1)[real][None]
    del packed["attention_mask"]
    return packed


def run_step(model: nn.Module, batches: Sequence[dict[str, Any]]) -> Step:
    """Return each loss's value and every gradient of one step of train_step over micro-batches."""
    config = TrainConfig(max_grad_norm=0)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        gradients.update({name: gradient.clone() for name, gradient in named})

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer.register_step_pre_hook(keep)
    accelerator = make_accelerator(config)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    report = train_step(model, batches, optimizer, accelerator, config)
    return {name: float(value) for name, value in report.losses.items()}, gradients


def assert_same_step(first: Step, second: Step, rtol: float = 1e-8) -> None:
    """Values and every gradient are equal; a gradient that one step lacks is zero in the other."""
    assert first[0] == pytest.approx(second[0], rel=rtol)
    norm = torch.stack([gradient.norm() for gradient in first[1].values()]).norm()
    for name in first[1].keys() | second[1].keys():
        mine, theirs = (step[1].get(name, torch.zeros(())) for step in (first, second))
        assert float((mine - theirs).norm()) < rtol * float(norm), name
