"""The optimizer of a run: parameters in groups of a part and a decay, each part at its own rate, and the schedule.

trainable parameters -> AdamW, in 8 bits or paged to the CPU if asked for (bitsandbytes). Parts are those of hfcustom/parts.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hfcustom.exits import ConfigError
from hfcustom.parts import PartMap, check_parts, find_parts
from hfcustom.train_config import TrainConfig

KINDS = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}  # bitsandbytes'


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, grouped by part (learning rate) and kind (weight decay).

    Biases, norms and embeddings have no decay. Raises ValueError where nothing is trainable, or where a rate or a decay is
    for a part of which nothing is; ConfigError for an optimizer that needs a package or a GPU that is not there.
    """
    parts = find_parts(model)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.part_of(name)
        decayed = parameter.ndim >= 2 and "embed" not in name
        rate, matrix_decay = rate_and_decay(config, part)
        decay = matrix_decay if decayed else 0.0
        group = groups.setdefault((part, decay), {"params": [], "weight_decay": decay, "part": part})
        group["peak_lr"] = group["lr"] = rate
        group["params"].append((name, parameter))  # with its name, which a checkpoint compares
    if not groups:
        raise ConfigError(
            "No parameter is trainable: unfreeze a part, attach LoRA, or load an adapter with load_adapter(trainable=True)."
        )
    _check_effect(config, parts, {part for part, _ in groups})
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(list(groups.values()), betas=betas, fused=True)
    kind: Any = _of_bitsandbytes(config.optimizer)
    optimizer: torch.optim.Optimizer = kind(list(groups.values()), betas=betas)
    return optimizer


def rate_and_decay(config: TrainConfig, part: str) -> tuple[float, float]:
    """Return a part's peak learning rate and the weight decay of its matrices; a connector's rate is for new modules too."""
    named = {"vision": config.vision_lr, "connector": config.connector_lr, "new": config.connector_lr}
    own = {**{name: rate for name, rate in named.items() if rate is not None}, **config.part_lr}
    return own.get(part, config.lr), config.part_weight_decay.get(part, config.weight_decay)


def _check_effect(config: TrainConfig, parts: PartMap, trained: set[str]) -> None:
    for flag, own in (("part_lr", config.part_lr), ("part_weight_decay", config.part_weight_decay)):
        for part in check_parts(own, parts.present()):
            if part not in trained:
                raise ConfigError(f"{flag}={own!r} has no effect on {part!r}: no parameter of it is trainable.")
    for rate, part in ((config.vision_lr, "vision"), (config.connector_lr, "connector")):
        if rate is not None and not trained & ({part, "new"} if part == "connector" else {part}):
            raise ConfigError(f"{part}_lr={rate} has no effect: no parameter of the {part} is trainable.")


def _of_bitsandbytes(name: str) -> type[torch.optim.Optimizer]:
    if name.startswith("paged") and not torch.cuda.is_available():
        raise ConfigError(
            f"optimizer={name} keeps its state on the CPU for a GPU that has too little memory, and there is no GPU here; use "
            f"{'adamw_8bit' if '8bit' in name else 'adamw'}."
        )
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise ConfigError(f"optimizer={name} needs bitsandbytes: pip install 'hfcustom[quantize]'.") from error
    kind: type[torch.optim.Optimizer] = getattr(bitsandbytes.optim, KINDS[name])
    return kind


def set_lr(optimizer: torch.optim.Optimizer, step: int, max_steps: int, config: TrainConfig) -> None:
    """Set every group's learning rate for a step: linear warm-up, then the schedule down to min_lr_ratio."""
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    elif config.schedule == "constant":
        factor = 1.0
    else:
        done = (step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        factor = config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
