"""A whole optimiser step, looked at before its first forward: what each loss counts, and terms across its rows.

micro-batches of this rank -> for each, what forward() is to be told: {"loss_divisors", "loss_counts", "step_summaries"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hfcustom import randomness
from hfcustom.cache.levels import on_device
from hfcustom.cache.run import serving
from hfcustom.data.collate import Batch
from hfcustom.distributed.sharding import gathered, is_sharded
from hfcustom.losses import StepSummary
from hfcustom.training.memory import out_of_memory


class NoRoomForSummaryError(MemoryError):
    """Memory ran out in the first look at a step, on this rank at micro-batch `micro`, or on another; every rank raises it."""

    def __init__(self, micro: int | None) -> None:
        super().__init__(f"Memory ran out in the first look at a step, at micro-batch {micro}.")
        self.micro = micro


def plan_step(core: Any, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> list[dict[str, Any]]:
    """Look at a whole step first: return what forward() of each micro-batch is to be told about it."""
    names = [item.loss.name for item in core.losses()]
    counts = [dict.fromkeys(names, 0.0) if is_blank(batch) else core.loss_counts([batch]) for batch in batches]
    divisors = step_divisors(counts, accelerator)
    summaries = step_summaries(core, batches, accelerator)
    return [
        {"loss_divisors": divisors, "loss_counts": own, "step_summaries": found}
        for own, found in zip(counts, summaries, strict=True)
    ]


def step_divisors(counts: Sequence[Mapping[str, float]], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Add up each loss's counts over the micro-batches of all ranks; 1 where nothing counts."""
    local = [sum(count[name] for count in counts) for name in counts[0]]
    total = accelerator.reduce(torch.tensor(local, dtype=torch.float32, device=accelerator.device), "sum")
    return dict(zip(counts[0], total.where(total != 0, 1), strict=True))  # exact up to 2**24


def step_summaries(
    core: Any, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator
) -> list[dict[str, StepSummary]]:
    """Return forward's `step_summaries` for each micro-batch, from a first look at the step where a term asks for one.

    A term across rows, such as a contrastive loss, has its negatives in all micro-batches and ranks (the idea of GradCache,
    Gao et al. 2021, https://arxiv.org/abs/2101.06983). Random numbers are drawn again, so that dropout is the same.
    """
    alone = len(batches) == 1 and accelerator.num_processes == 1
    if alone or not any(item.loss.summary for item in core.losses()):
        return [{} for _ in batches]
    state = randomness.rng_state()
    own: list[dict[str, torch.Tensor] | None] = []
    try:
        with accelerator.autocast(), gathered(core):  # as accelerate wraps forward()
            for batch in batches:
                runs = not is_blank(batch) or is_sharded(
                    core
                )  # where ranks wait for each other's shards, all run alike
                found = _summaries(core, batch, accelerator) if runs else {}
                own.append({} if is_blank(batch) else found)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    randomness.set_rng_state(state)
    failed = len(own) if len(own) < len(batches) else None
    everyone = gather_object(own + [None] * (len(batches) - len(own)))
    if None in everyone:  # on every rank alike
        raise NoRoomForSummaryError(failed)
    first = accelerator.process_index * len(batches)
    places: list[dict[str, StepSummary]] = []
    for at in range(first, first + len(batches)):
        summaries = {}
        for name in everyone[at]:
            parts = [found[name] for found in everyone if name in found]
            start = sum(len(found[name]) for found in everyone[:at] if name in found)
            summaries[name] = StepSummary(torch.cat(parts).to(accelerator.device), start)
        places.append(summaries)
    return places


def _summaries(core: Any, batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    with serving(core, batch):
        found = core.loss_summaries(on_device(batch, accelerator.device))
    return {name: value.cpu() for name, value in found.items()}


def is_blank(batch: Mapping[str, Any]) -> bool:
    """Whether a micro-batch is run only so that ranks stay together, and counts for nothing."""
    return isinstance(batch, Batch) and batch.blank
