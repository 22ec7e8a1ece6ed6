"""Columns: numbers that rows carry beside their messages, as tensors of the batch, for losses that look at them.

A column of numbers or of equal-length lists becomes (B, ...). One named "teacher_..." has an entry for each label token of
its row (those that the collator gives a label, in order) and becomes (B, T, ...), 0 where there is no label. Of a pair,
`chosen_<name>` and `rejected_<name>` are read where the row has them, else `<name>` for both answers.
Letters: B rows (a pair is two), T text tokens, M label tokens, K entries of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfcustom.data.messages import Example, RowError
from hfcustom.data.row_forms import SIDES
from hfcustom.losses import IGNORE
from hfcustom.naming import unknown

TOKEN_WEIGHTS = "token_weights"  # the one column that is made from the messages instead of read
PER_TOKEN = "teacher_"  # how the names of columns of label tokens begin
ARRAYS = (bool, int, float, list, tuple, np.generic, np.ndarray, torch.Tensor)
DTYPES = {"b": torch.bool, "i": torch.int64, "u": torch.int64, "f": torch.float32}  # by numpy's kind


def check_columns(columns: Sequence[str], processor: Any) -> tuple[str, ...]:
    """Return the names of columns as a tuple; ValueError for one that is a tensor of the batch anyway."""
    if isinstance(columns, str):
        raise ValueError(f"columns is the string {columns!r}; it must be a list of names: [{columns!r}].")
    taken = {"labels", "preference", *processor.model_input_names}
    for name in columns:
        if name in taken:
            raise ValueError(
                f"Column {name!r} has the name of a tensor that the collator makes itself ({', '.join(sorted(taken))}); "
                "rename the column in the rows, or leave it out of columns."
            )
    return tuple(columns)


def column_report(example: Example, asked: Sequence[str]) -> str:
    """Say what becomes of a row's columns when losses ask for some."""
    sides = [f"{side}_" for side in SIDES]
    names = {key: key.partition("_")[2] if key.startswith(tuple(sides)) else key for key in example.columns}
    kept = [key for key, name in names.items() if key in asked or name in asked]
    ignored = [key for key in names if key not in kept]
    missing = [name for name in asked if name != TOKEN_WEIGHTS and name not in {*names, *names.values()}]
    groups = {
        "used": example.used,
        "kept for losses": kept,
        "ignored": ignored,
        "missing, which a loss needs": missing,
    }
    told = [f"{what}: {', '.join(found)}" for what, found in groups.items() if found]
    return f"columns {'; '.join(told)}"


def column_tensor(
    name: str, examples: Sequence[Example], labels: torch.Tensor, per_token: bool = False
) -> torch.Tensor:
    """Return a column of the rows as a tensor of the batch: labels (B, T) -> (B, ...), or (B, T, ...) if per token.

    Raises RowError naming the row for a column that is missing, ragged, not of numbers or of the wrong length.
    """
    places, arrays = [], []
    for example in examples:
        for key in _keys(name, example):
            places.append(f"{example.name}, column {key!r}")
            arrays.append(_array(example.columns[key], places[-1]))
    skipped = 1 if per_token or name.startswith(PER_TOKEN) else 0
    if skipped:
        _check_lengths(places, arrays, labels)
    for place, array in zip(places, arrays, strict=True):
        if array.shape[skipped:] != arrays[0].shape[skipped:]:
            each = " for a token" if skipped else ""
            raise RowError(
                f"{place}: shape {array.shape[skipped:]}{each}, but {places[0]} has {arrays[0].shape[skipped:]}{each}; all "
                "rows of a batch need the same shape."
            )
    values = np.concatenate(arrays) if skipped else np.stack(arrays)  # (sum of M, ...) or (B, ...)
    tensor = torch.from_numpy(values).to(DTYPES[values.dtype.kind])
    return _scatter(tensor, labels) if skipped else tensor


def _keys(name: str, example: Example) -> list[str]:
    """Return the row's keys for a column: one, or two for a pair."""
    keys = [name]
    if example.rejected is not None:
        own = [f"{side}_{name}" for side in SIDES]
        keys = own if any(key in example.columns for key in own) else [name, name]
    for key in keys:
        if key not in example.columns:
            cure = "These are the row's; add the column to the rows, or leave it out of the collator's columns."
            raise RowError(f"{example.name}: {unknown('column', key, example.columns, cure)}")
    return keys


def _array(value: Any, place: str) -> np.ndarray:
    """Return numbers, or equal-length lists of numbers, as an array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # numpy knows no bfloat16
    try:
        array = np.asarray(value) if isinstance(value, ARRAYS) else None
    except ValueError:  # numpy's word for lists of different lengths
        lengths = " and ".join(str(shape) for shape in sorted(_shapes(value))[:3])
        raise RowError(
            f"{place}: ragged, with items of shape {lengths}; every list must have the same length, so pad it."
        ) from None
    if array is None or array.dtype.kind not in DTYPES or array.dtype == np.uint64:  # uint64: beyond int64
        found = ", ".join(sorted(_kinds(value))) or type(value).__name__
        raise RowError(f"{place}: holds {found}; it must be a number, or lists of numbers of equal length.")
    return array


def _shapes(value: Any) -> set[tuple[int, ...]]:
    """Return the shapes of the items of the outermost list whose items differ."""
    if not isinstance(value, list | tuple):
        return {tuple(np.shape(value))}
    inner = [_shapes(item) for item in value]
    if any(len(shapes) > 1 for shapes in inner):
        return next(shapes for shapes in inner if len(shapes) > 1)
    shapes = set().union(*inner)
    return shapes if len(shapes) > 1 else {(len(value), *shape) for shape in shapes or {()}}


def _kinds(value: Any) -> set[str]:
    """Return the types of what is no number that a tensor can hold."""
    if isinstance(value, list | tuple):
        return set().union(*(_kinds(item) for item in value))
    if isinstance(value, np.ndarray):
        return {str(value.dtype)}
    if isinstance(value, int):
        return set() if -(2**63) <= value < 2**63 else {"an int beyond 64 bits"}
    return set() if isinstance(value, float) else {type(value).__name__}


def _check_lengths(places: Sequence[str], arrays: Sequence[np.ndarray], labels: torch.Tensor) -> None:
    counts = (labels != IGNORE).sum(1).tolist()
    for place, array, count in zip(places, arrays, counts, strict=True):
        if array.ndim == 0 or len(array) != count:
            found = f"{len(array)} entries" if array.ndim else "one number"
            raise RowError(
                f"{place}: {found}, but the row has {count} label tokens; it needs an entry for each token that carries a "
                "label, so make it with the same processor, chat template and weights."
            )


def _scatter(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Put the entries of label tokens at their positions: (sum of M, ...) -> (B, T, ...)."""
    scattered = values.new_zeros(*labels.shape, *values.shape[1:])  # (B, T, ...)
    scattered[labels != IGNORE] = values
    return scattered
