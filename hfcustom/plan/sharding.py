"""One GPU's share of a training step: what N GPUs have in common is cut, what they exchange comes on top.

Measured, gpus, scheme -> Share. Weights, gradients and optimiser state are exact: FSDP cuts each tensor along its first
dimension, ZeRO (https://arxiv.org/abs/1910.02054) cuts the sum. What is gathered for a moment is an estimate: two of the
largest units, one that computes and one that is fetched, and the whole gradients of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfcustom.distributed.zero import BUCKET
from hfcustom.plan.measure import Measured, share

ALLOWANCE = 0.75 * 2**30  # of a GPU: CUDA's own context, cuBLAS; not measured here
FRAGMENTED = 0.03  # of what is allocated, which the allocator cannot use; not measured here


@dataclass(frozen=True)
class Share:
    """Bytes of one GPU."""

    weights: int
    gradients: int
    optimizer: int
    average: int  # of ema_decay
    exchange: int  # DDP's buckets, or what is gathered for a moment
    activations: int
    peak: int

    @property
    def needed(self) -> int:
        """The peak, and what a GPU takes besides."""
        return int(self.peak * (1 + FRAGMENTED) + ALLOWANCE)


def share_of(measured: Measured, gpus: int, scheme: str) -> Share:
    """Return what one of several GPUs holds under DDP ("none"), "fsdp", "zero2" or "zero3", which fit() launches as fsdp."""
    weights = measured.total("weights") + measured.total("adapters")
    gradients, optimizer = measured.total("gradients"), measured.total("optimizer")
    if scheme == "none":
        buckets = (
            gradients if gpus > 1 else 0
        )  # DistributedDataParallel copies gradients, unless they are views of them
        held = measured.at_peak.get("weights", 0) + measured.at_peak.get("optimizer", 0)
        held += measured.at_peak.get("gradients", 0) + measured.at_peak.get("average", 0)
        average = measured.total("average")
        return Share(weights, gradients, optimizer, average, buckets, measured.peak - held, measured.peak + buckets)
    unit = measured.largest_unit
    buffers = weights - sum(parameter.weights for parameter in measured.parameters)

    def cut(what: str) -> int:
        if scheme != "fsdp":
            return math.ceil(sum(vars(parameter)[what] for parameter in measured.parameters) / gpus)
        return sum(share(vars(parameter)[what], parameter.rows, gpus) for parameter in measured.parameters)

    other = measured.activations + measured.at_peak.get("batch", 0)
    if scheme == "zero2":  # as hfcustom/distributed/zero.py runs it: gradients are whole until the end of a step
        updated = math.ceil(sum(p.weights for p in measured.parameters if p.gradients) / gpus)  # DeepSpeed's own copy
        state, exchange = cut("optimizer") + updated, cut("gradients") + min(4 * BUCKET, gradients)
        average = measured.total("average")
        peak = weights + gradients + state + average + exchange + other
        return Share(weights, gradients, state, average, exchange, other, peak)
    exchange = unit.gradients + 2 * unit.weights
    held_weights = cut("weights") + buffers
    average = cut("gradients") if measured.total("average") else 0  # as large, in float32 both
    peak = held_weights + cut("gradients") + cut("optimizer") + average + exchange + other
    return Share(held_weights, cut("gradients"), cut("optimizer"), average, exchange, other, peak)


def check_sharding(measured: Measured, scheme: str) -> None:
    """Raise ValueError for weights that cannot be cut: those that bitsandbytes has packed."""
    packed = [part for part in measured.parts if "int8" in part.dtypes]  # uint8 of 4 bits, int8
    if packed and scheme in ("fsdp", "zero3"):
        raise ValueError(
            f"shard={scheme} cannot cut weights that bitsandbytes has packed ({', '.join(part.part for part in packed)}); choose "
            "zero2 or none, or leave load_in out."
        )
