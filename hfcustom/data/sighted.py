"""Ranks whose rows are text alone, where only what sees images is trained: they take part with a pass that counts for nothing.

A step's micro-batches of one rank -> the same, those without an image first, and at least one with an image wherever any rank has
one. DDP adds up gradients in the backward of the last, which a batch of text does not have there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hfcustom.data.collate import Batch
from hfcustom.distributed.zero import is_engine
from hfcustom.parts import part_table

SEEING = {"vision", "connector", "new"}  # parts that text alone may not reach


class Sighted:
    """Aligns the micro-batches of the ranks of one run; every rank has to ask."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.kept: Batch | None = None  # one with images, this rank's newest, at first another's

    def align(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return this rank's micro-batches in order, with a blank one of images where it has none and another rank does."""
        if not batches:  # on all ranks, then
            return []
        seen = [batch for batch in batches if batch.images]
        text = [_idle(batch) for batch in batches if not batch.images]
        self.kept = seen[-1] if seen else self.kept
        everyone = gather_object([(bool(seen), self.kept is not None)])
        if not any(has for has, _ in everyone):
            return text
        if not all(keeps for _, keeps in everyone):
            giver = next(rank for rank, (has, _) in enumerate(everyone) if has)
            given = gather_object([self.kept] if giver == self.accelerator.process_index else [])
            self.kept = self.kept or given[0]
        assert self.kept is not None
        if all(has for has, _ in everyone):
            return [*text, *seen]
        if not seen:
            return [*text, self.kept.blank_copy()]
        return [(text or seen)[0].blank_copy(), *text, *seen]  # as many as where one was added


def _idle(batch: Batch) -> Batch:
    copied = copy.copy(batch)
    copied.idle = True
    return copied


def sighted(core: Any, model: nn.Module, accelerator: Accelerator) -> Sighted | None:
    """Return what a run needs where ranks hold the whole model each and train only what sees images."""
    whole = isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model)
    trained = {row.part for row in part_table(core) if row.trainable}
    return Sighted(accelerator) if whole and trained <= SEEING else None
