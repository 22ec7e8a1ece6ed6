"""Columns: numbers of the rows as tensors of the batch, and an error with row, column and cure for every other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, chat_row
from conversations import conversation, turn
from kinds import family_of_each_kind  # noqa: F401

from hfcustom.data.collate import Collator
from hfcustom.data.messages import RowError
from hfcustom.losses import IGNORE

ASK = turn("user", "What is it?")


def pair(seed: int = 0, **columns: Any) -> dict[str, Any]:
    return {"prompt": [ASK], "chosen": f"A cat, number {seed}.", "rejected": "No.", **columns}


def collate(family: Family, *values: Any, name: str = "score") -> torch.Tensor:
    """Return the tensor of a column whose rows hold these values."""
    rows = [{**chat_row(0, seed), name: value} for seed, value in enumerate(values)]
    return Collator(family.processor, columns=[name])(rows)[name]


# ---- what numbers become --------------------------------------------------------------------------------------------

VALUES = {  # values of two rows, the tensor
    "floats": ([0.5, -1.5], torch.tensor([0.5, -1.5])),
    "ints": ([3, 2**40], torch.tensor([3, 2**40])),
    "bools": ([True, False], torch.tensor([True, False])),
    "an int and a float": ([1, 0.5], torch.tensor([1.0, 0.5])),
    "a bool and an int": ([True, 2], torch.tensor([1, 2])),
    "lists": ([[1.0, 2.0], (3.0, 4.0)], torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
    "nested lists": ([[[1], [2]], [[3], [4]]], torch.tensor([[[1], [2]], [[3], [4]]])),
    "empty lists": ([[], []], torch.zeros(2, 0)),
    "numpy": ([np.arange(3, dtype=np.uint8), np.arange(3, dtype=np.int32)], torch.arange(3).expand(2, 3)),
    "half precision": ([np.float16(0.5), torch.tensor(2.0, dtype=torch.bfloat16)], torch.tensor([0.5, 2.0])),
    "tensors": ([torch.ones(2, requires_grad=True), [torch.tensor(0.0), 2.0]], torch.tensor([[1.0, 1.0], [0.0, 2.0]])),
}


@pytest.mark.parametrize("name", VALUES)
def test_numbers_become_a_tensor_with_a_row_each(internvl: Family, name: str) -> None:
    values, expected = VALUES[name]
    found = collate(internvl, *values)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_columns_nobody_asked_for_stay_out_of_the_batch(family: Family) -> None:
    plain, extra = chat_row(1), {**chat_row(1), "score": 3, "source": "web", "label": 7}
    assert Collator(family.processor)([extra]).keys() == Collator(family.processor)([plain]).keys()


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_a_column_of_a_pair_is_of_each_answer_or_of_both(family: Family) -> None:
    own = [{"chosen_reference": [1.0, 2.0], "rejected_reference": [3.0, 4.0], "reference": [9.0, 9.0]}]
    own.append({"chosen_reference": [5.0, 6.0], "rejected_reference": [7.0, 8.0]})
    rows = [pair(seed, margin=seed, **columns) for seed, columns in enumerate(own)]
    batch = Collator(family.processor, columns=("reference", "margin"))(rows)
    assert batch["reference"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert batch["margin"].tolist() == [0, 0, 1, 1]


def test_a_column_of_one_answer_only_is_named(internvl: Family) -> None:
    row = pair(chosen_reference=1.0, reference=2.0)
    with pytest.raises(RowError, match=r"row 0: Unknown column 'rejected_reference'. Did you mean 'chosen_reference'"):
        Collator(internvl.processor, columns=["reference"])([row])


# ---- columns of label tokens ----------------------------------------------------------------------------------------


def label_count(family: Family, row: dict[str, Any]) -> list[int]:
    return (Collator(family.processor)([row])["labels"] != IGNORE).sum(1).tolist()


@pytest.mark.parametrize("width", [None, 3])
def test_a_teachers_column_lies_at_the_label_tokens(family: Family, width: int | None) -> None:
    rows: list[dict[str, Any]] = [chat_row(2, turns=2), chat_row(0, seed=1), chat_row(1, seed=2)]
    entries = []
    for row in rows:
        shape = (*label_count(family, row), *([] if width is None else [width]))
        entries.append(np.random.default_rng(len(entries)).integers(1, 99, shape))
        row |= {"teacher_ids": entries[-1].tolist(), "teacher_log_probs": (-entries[-1] / 7).tolist()}
    batch = Collator(family.processor, columns=["teacher_ids", "teacher_log_probs"])(rows)
    ids, log_probs, supervised = batch["teacher_ids"], batch["teacher_log_probs"], batch["labels"] != IGNORE
    assert ids.shape == log_probs.shape == (*batch["labels"].shape, *([] if width is None else [width]))
    assert (ids.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    for row, expected in enumerate(entries):
        assert torch.equal(ids[row][supervised[row]], torch.from_numpy(expected))
        torch.testing.assert_close(log_probs[row][supervised[row]], torch.from_numpy(-expected / 7).float())
    assert not ids[~supervised].any() and not log_probs[~supervised].any()


def test_a_teachers_column_of_a_pair(family: Family) -> None:
    chosen, rejected = label_count(family, pair())
    assert chosen > rejected
    row = pair(chosen_teacher_ids=list(range(1, chosen + 1)), rejected_teacher_ids=[7] * rejected)
    batch = Collator(family.processor, columns=["teacher_ids"])([row])
    ids, supervised = batch["teacher_ids"], batch["labels"] != IGNORE
    assert ids[0][supervised[0]].tolist() == list(range(1, chosen + 1))
    assert ids[1][supervised[1]].tolist() == [7] * rejected
    assert not ids[~supervised].any()


def test_a_token_of_weight_zero_needs_no_teacher(internvl: Family) -> None:
    first = {**turn("assistant", "No."), "weight": 0}
    row = conversation(ASK, first, ASK, turn("assistant", "Yes."))
    (count,) = label_count(internvl, conversation(ASK, turn("assistant", "Yes.")))
    batch = Collator(internvl.processor, columns=["teacher_ids"])([{**row, "teacher_ids": [5] * count}])
    assert (batch["teacher_ids"] != 0).sum() == count


@pytest.mark.parametrize(("change", "found"), [(-1, "{} entries"), (2, "{} entries"), (None, "one number")])
def test_a_teachers_column_of_the_wrong_length_prints_both_counts(
    family: Family, change: int | None, found: str
) -> None:
    row = chat_row(1)
    (count,) = label_count(family, row)
    value = 0.5 if change is None else [0.5] * (count + change)
    found = found.format(count + (change or 0))
    message = (
        rf"row 1, column 'teacher_x': {found}, but the row has {count} label tokens; .*same processor, chat template"
    )
    with pytest.raises(RowError, match=message):
        collate_rows = [{**chat_row(1), "teacher_x": [0.5] * count}, {**row, "teacher_x": value}]
        Collator(family.processor, columns=["teacher_x"])(collate_rows)


# ---- what a wrong column is told ------------------------------------------------------------------------------------

NUMBERS = "it must be a number, or lists of numbers of equal length"
WRONG = {  # value of the second row, where the first has [1.0, 2.0]; the message
    "ragged": (
        [[1], [2, 3]],
        "ragged, with items of shape (1,) and (2,); every list must have the same length, so pad",
    ),
    "deep": ([[[1], [2]], [[3], [4, 5]]], "ragged, with items of shape (1,) and (2,)"),
    "a number beside a list": ([1, [2]], "ragged, with items of shape () and (1,)"),
    "another shape": (
        [1.0, 2.0, 3.0],
        "shape (3,), but row 0, column 'score' has (2,); all rows of a batch need the same",
    ),
    "a number": (3.0, "shape (), but row 0, column 'score' has (2,)"),
    "a string": ("high", f"holds str; {NUMBERS}"),
    "strings": (["a", 1], f"holds str; {NUMBERS}"),
    "none inside": ([1.0, None], f"holds NoneType; {NUMBERS}"),
    "a mapping": ({"a": 1}, f"holds dict; {NUMBERS}"),
    "mappings": ([{"a": 1}], f"holds dict; {NUMBERS}"),
    "bytes": (b"12", f"holds bytes; {NUMBERS}"),
    "a complex number": ([1j, 2], f"holds complex; {NUMBERS}"),
    "a large integer": ([2**70, 1], f"holds an int beyond 64 bits; {NUMBERS}"),
    "strings of numpy": (np.array(["a", "b"]), f"holds <U1; {NUMBERS}"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_row_column_and_cure(internvl: Family, name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(RowError, match=re.escape(f"row 1, column 'score': {message}")):
        collate(internvl, [1.0, 2.0], value)


def test_rows_of_a_teachers_column_need_the_same_number_of_entries_a_token(internvl: Family) -> None:
    rows = [chat_row(0), chat_row(0)]
    (count,) = label_count(internvl, rows[0])
    rows = [{**row, "teacher_ids": np.ones((count, width))} for width, row in enumerate(rows, start=2)]
    message = (
        r"row 1, column 'teacher_ids': shape \(3,\) for a token, but row 0, column 'teacher_ids' has \(2,\) for a"
    )
    with pytest.raises(RowError, match=message):
        Collator(internvl.processor, columns=["teacher_ids"])(rows)


@pytest.mark.parametrize("missing", [{}, {"reward": None}])
def test_a_missing_column_is_named_with_the_rows_own_and_the_nearest(
    internvl: Family, missing: dict[str, Any]
) -> None:
    rows = [{**chat_row(0), "reward": 1.0}, {**chat_row(0), "rewards": 1.0, "source": "web", **missing}]
    message = (
        r"row 1: Unknown column 'reward'. Did you mean 'rewards'\? Allowed: rewards, source. These are the row's; add the "
        r"column to the rows, or leave it out"
    )
    with pytest.raises(RowError, match=message):
        Collator(internvl.processor, columns=["reward"])(rows)
    with pytest.raises(RowError, match=r"row 0: Unknown column 'x'. Allowed: nothing"):
        Collator(internvl.processor, columns=["x"])([chat_row(0)])


@pytest.mark.parametrize("name", ["labels", "preference", "input_ids", "attention_mask", "pixel_values"])
def test_a_column_cannot_replace_a_tensor_of_the_batch(family: Family, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Column '{name}' has the name of a tensor .*input_ids.* rename the column"):
        Collator(family.processor, columns=[name])


def test_columns_is_a_list_of_names(internvl: Family) -> None:
    with pytest.raises(ValueError, match=r"columns is the string 'score'; it must be a list of names: \['score'\]"):
        Collator(internvl.processor, columns="score")
