"""Checks of rows among others: beside each other in a batch, packed into one, and tokens behind others.

Letters: B rows, T text tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from hfcustom.data.collate import Collator
from hfcustom.data.packing import pack_rows
from hfcustom.doctor.finding import Failed, Skipped, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference
from hfcustom.packed import why_not_packed

IMAGES = (2, 0, 1)


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """Return the logits of a batch, (B, T, V)."""
    with torch.no_grad():
        logits: torch.Tensor = model(**batch, return_logits=True).logits
    return logits


def _alone(patient: Patient) -> list[Any]:
    collate = Collator(patient.processor)
    return [collate([patient.row(count, seed)]) for seed, count in enumerate(IMAGES)]


def _judge(change: float, what: str, cure: str = "") -> str:
    measured = f"{what} {change:.1e} of the logits"
    if not change <= ROUNDING:  # NaN is not
        raise Failed(measured, cure)
    return measured


@check(
    expected="a row has the same logits alone and in a batch",
    why="A row that sees its neighbours, or its padding, is trained and evaluated differently for each batch size.",
    cure="Do not average over the batch or over padding: treat each row and position by itself.",
)
def batch_invariance(patient: Patient) -> str:
    """Compare rows in a batch with the same rows alone."""
    model = patient.model()
    together = logits_of(model, patient.batch(list(IMAGES)))
    changes = []
    for at, single in enumerate(_alone(patient)):
        expected = logits_of(model, single)[0]  # (T, V)
        changes.append(difference(together[at, : len(expected)], expected))
    return _judge(max(changes), "alone and in a batch:", patient.corrections())


@check(
    expected="rows packed into one have the logits of separate ones",
    why="A packed row that sees the one before it learns from a stranger's conversation.",
    cure="Pass position_ids on, and treat each position by itself in the seams; or train without --packing.",
)
def packing(patient: Patient) -> str:
    """Compare rows packed into one with the same rows alone."""
    model = patient.model()
    if reason := why_not_packed(model):
        raise Skipped(f"this family is not packed: {reason}")
    singles = _alone(patient)
    expected = torch.cat([logits_of(model, single)[0] for single in singles])  # (T, V)
    found = logits_of(model, pack_rows(singles, type(model).merge_images))[0]
    return _judge(difference(found, expected), "packed and alone:")


@check(
    expected="another token changes no logit before it, in training and out of it",
    why="A model that sees the answer reaches a low loss and has learnt nothing.",
    cure="Mix no positions in the seams, or only with those before; look at roll, flip, mean and attention without a mask.",
)
def causal_leak(patient: Patient) -> str:
    """Change the word before the end of a row."""
    model, batch = patient.model(), patient.batch([1])
    changed = dict(batch)
    at = batch["input_ids"].shape[1] - 3
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][0, at] += 1
    changes = []
    for training in (False, True):
        model.train(training)
        changes.append(difference(logits_of(model, changed)[0, :at], logits_of(model, batch)[0, :at]))
    return _judge(max(changes), "by a later token:")
