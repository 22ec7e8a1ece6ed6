"""The costliest batch: which rows it is made of, and a trial of it before the first step, so that memory runs out at minute one.

rows -> the micro-batch of the longest of them -> forward and backward without a step. The trial leaves nothing behind:
random state, gradients and buffers are put back, so that a run with it is bit-equal to one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hfcustom import checkpoint
from hfcustom.cache.levels import on_device
from hfcustom.cache.run import serving, use_caches
from hfcustom.console import out
from hfcustom.data.collate import Batch
from hfcustom.data.feed import Feed, usable_rows
from hfcustom.data.findings import Finding
from hfcustom.data.messages import RowError
from hfcustom.data.packing import Packer, Size, size_of
from hfcustom.data.sources import Examples
from hfcustom.data.steps import Attempts
from hfcustom.losses import count_all_tokens
from hfcustom.parts import unwrap
from hfcustom.step_plan import plan_step
from hfcustom.train_config import TrainConfig

ROWS_READ = 256  # evenly spread over the data
MOST_PACKED = 64  # of the longest rows, from which the fullest pack is made
CROP_TOKENS = 256  # what the vision tower's work on an image crop counts for, in tokens of the language model
Cut = tuple[int, int]  # rows of a micro-batch, micro-batches of a step


class NoMemoryError(RuntimeError):
    """The costliest batch does not fit; the message has its numbers and what to change."""


# ---- which rows -----------------------------------------------------------------------------------------------------


def costliest_batch(
    rows: Attempts, collate: Any, micro_batch_size: int, packer: Packer | None = None, most_rows: int = ROWS_READ
) -> Batch:
    """Return the costliest micro-batch of rows, of which at most `most_rows` are read (0: all); RowError if none can be used."""
    count = min(len(rows), most_rows or len(rows))
    costs: list[tuple[int, int]] = []
    reason = ""
    for at in dict.fromkeys(number * len(rows) // count for number in range(count)):
        found = rows[at]
        try:
            if isinstance(found, Finding):
                raise RowError(found.reason)
            costs.append((cost_of(collate([found])), at))
        except RowError as error:  # the run itself says it, counts it and stops where it is told to
            reason = reason or str(error)
    if not costs:
        raise RowError(f"None of the {count} rows that were read can be used; the first says: {reason}")
    ranked = [at for _, at in sorted(costs, key=lambda pair: (-pair[0], pair[1]))]
    if packer is None:
        return collate([rows[at] for at in islice(cycle(ranked), micro_batch_size)])
    chosen = [rows[at] for at in ranked[:MOST_PACKED]]
    batches, _ = packer(collate, chosen, [collate([row]) for row in chosen])
    return max(batches, key=cost_of)


def cost_of(batch: Any) -> int:
    """Return about what a batch costs, in tokens, padding and image crops included."""
    size = size_of(batch) if "attention_mask" in batch else Size(count_all_tokens(batch))
    tokens = batch["labels"].numel() if "labels" in batch else size.tokens
    return tokens + CROP_TOKENS * crops_of(batch)


def crops_of(batch: Any) -> int:
    """Return the image crops of a batch, or its images in families that take them whole."""
    return size_of({"attention_mask": torch.ones(1, 1), **batch}).crops


def describe_batch(batch: Any) -> str:
    """Return a batch's size in words."""
    rows, *_ = batch["input_ids"].shape
    crops = crops_of(batch)
    return f"{rows} x {batch['input_ids'].shape[1]:,} tokens, {crops} image crop{'' if crops == 1 else 's'}"
