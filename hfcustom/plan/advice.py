"""Advice: what could be changed in a planned run, each tried by itself in the same way, with what it would then take.

config, Measured -> [Advice, ...]; the last one is all together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfcustom.plan.measure import Measured
from hfcustom.plan.sharding import share_of

Measure = Callable[[Any], Measured]
SHARDED = (2, 4, 8)


@dataclass(frozen=True)
class Advice:
    """A change, the flags that make it, and the bytes that a GPU then needs."""

    change: str
    flags: str
    peak: int
    needed: int


def changes_of(config: Any, measured: Measured) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what could be changed: in words, in flags, in the config's fields."""
    fields = type(config).__dataclass_fields__
    rows = measured.batch["rows"]
    found: list[tuple[str, str, dict[str, Any]]] = []
    if not config.gradient_checkpointing:
        fact = {"gradient_checkpointing": True}
        found.append(("recompute layers in the backward pass", "--gradient-checkpointing", fact))
    if not config.offload_activations and config.shard == "none":
        fact = {"offload_activations": True}
        found.append(("activations in the CPU's memory meanwhile", "--offload-activations", fact))
    if config.packing and config.tokens is None:
        half = max(1, (config.pack_tokens or 4096) // 2)
        found.append(("packs of half the tokens", f"--pack-tokens {half}", {"pack_tokens": half}))
    elif rows > 1 and not config.packing:
        words = "micro-batches of 1 row, accumulated to the same step"
        found.append((words, "--micro-batch-size 1", {"micro_batch_size": 1}))
    if "lora" in fields:
        adapted: dict[str, Any] = {"lora": True} | {
            name: [] for name in ("attention_only", "freeze", "train") if name in fields
        }
        adapted |= {"last_layers": {}} if "last_layers" in fields else {}
        if not config.lora:
            found.append(("LoRA in place of full training", "--lora", adapted))
        if config.load_in is None:
            for bits in ("8bit", "4bit"):
                words = f"LoRA on a language model in {bits[0]} bits"
                found.append((words, f"--lora --load-in {bits}", {**adapted, "load_in": bits}))
    return found


def advise(config: Any, measured: Measured, measure: Measure, tell: Callable[[str], None]) -> list[Advice]:
    """Try each change, all of the strongest together, and sharing over more GPUs."""
    found: list[Advice] = []
    together: dict[str, Any] = {}
    flags: dict[str, str] = {}
    changes = changes_of(config, measured)
    for words, flag, fact in changes:
        found.append(_tried(config, words, flag, fact, measure, tell))
        together |= fact
        flags[next(iter(fact)) if len(fact) == 1 else "lora"] = flag
    if len(flags) > 1:
        found.append(_tried(config, "all of it", " ".join(flags.values()), together, measure, tell))
    if not any("int8" in part.dtypes for part in measured.parts):
        for gpus in SHARDED:
            if gpus > config.gpus:
                share = share_of(measured, gpus, "fsdp")
                words = f"shared by {gpus} GPUs with FSDP, batch_size {gpus // config.gpus} times as large"
                found.append(Advice(words, f"--gpus {gpus} --shard fsdp", share.peak, share.needed))
    return found


def _tried(
    config: Any, words: str, flags: str, fact: dict[str, Any], measure: Measure, tell: Callable[[str], None]
) -> Advice:
    tell(flags)
    changed = copy.copy(config)
    for name, value in fact.items():
        setattr(changed, name, value)
    share = share_of(measure(changed), config.gpus, config.shard)
    return Advice(words, flags, share.peak, share.needed)
