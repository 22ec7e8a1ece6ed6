"""Checks of labels, and of what a config gives a loss as options; a wrong one is told the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hfcustom.losses.contract import IGNORE


def check_labels(labels: torch.Tensor, vocabulary_size: int) -> None:
    """Raise ValueError for labels (B, T) that the head has no logit for; on a GPU they would end the process."""
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocabulary_size))]
    if len(wrong):
        raise ValueError(
            f"labels hold {int(wrong[0])}, and {len(wrong)} such in all; the head has logits for 0 to {vocabulary_size - 1}. "
            f"Set what is not to be learnt to {IGNORE}, the marks of images among it, as hfcustom.Collator does."
        )


def check_number(loss: str, option: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError for what is no finite number from low to high."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high:
        return
    bounds = [f"{word} {bound:g}" for word, bound in (("from", low), ("to", high)) if math.isfinite(bound)]
    refuse(loss, option, value, " ".join(["a finite number", *bounds]))


def check_temperature(loss: str, temperature: Any) -> None:
    """Raise ValueError for a temperature that logits cannot be divided by."""
    check_number(loss, "temperature", temperature)
    if temperature <= 0:
        refuse(loss, "temperature", temperature, "above 0; 1 leaves the distributions as they are")


def check_whole(loss: str, option: str, value: Any, low: int, high: int) -> None:
    """Raise ValueError for what is no whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        refuse(loss, option, value, f"a whole number from {low} to {high}")


def check_ids(loss: str, option: str, value: Any, vocabulary_size: int, cure: str) -> None:
    """Raise ValueError for what is no list of two or more different ids of tokens."""
    fits = (
        isinstance(value, Sequence)
        and all(isinstance(item, int) and 0 <= item < vocabulary_size for item in value)
        and len(set(value)) == len(value) >= 2
    )
    if not fits:
        refuse(loss, option, value, f"two or more different ids from 0 to {vocabulary_size - 1}, {cure}")


def refuse(loss: str, option: str, value: Any, allowed: str) -> None:
    """Raise the ValueError of a wrong option."""
    raise ValueError(f"The {option} of loss {loss!r} is {value!r}; it must be {allowed}.")
