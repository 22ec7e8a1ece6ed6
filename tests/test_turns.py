"""Turns: loss weights, where they may stand and what they may be."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from conversations import IMAGE, text, turn

from hfcustom.data.messages import RowError, read_row
from hfcustom.data.turns import without_weights

QUESTION = turn("user", "How many?")


def answer(*blocks: Any, **extra: Any) -> dict[str, Any]:
    return {**turn("assistant", *blocks), **extra}


def weighted(words: str, weight: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, "weight": weight}


# ---- weights that count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, 1, 0.5, 3, 1e-3, np.float32(0.5), np.int64(2)])
def test_a_weight_of_a_message_and_of_a_block_is_kept_as_a_float(weight: Any) -> None:
    row = {"messages": [QUESTION, answer("a", weighted("b", weight), weight=weight)]}
    message = read_row(row, "row").messages[1]
    assert message == answer("a", weighted("b", float(weight)), weight=float(weight))
    assert type(message["weight"]) is type(message["content"][1]["weight"]) is float


def test_a_weight_that_arrow_filled_with_none_is_as_if_missing() -> None:
    row = {"messages": [{**QUESTION, "weight": None}, answer(weighted("a", None), weight=None)]}
    assert read_row(row, "row").messages == [QUESTION, answer("a")]


def test_the_callers_row_keeps_its_weights() -> None:
    row = {"messages": [QUESTION, answer(weighted("a", 2), weight=1)]}
    before = copy.deepcopy(row)
    read_row(row, "row")
    assert row == before


def test_a_template_sees_no_weights() -> None:
    messages = [QUESTION, answer("a", weighted("b", 2.0), weight=0.5)]
    assert without_weights(messages) == [QUESTION, answer("a", "b")]


# ---- weights that do not --------------------------------------------------------------------------------------------

WRONG = {
    "negative": (-1, "weight is -1;"),
    "nan": (float("nan"), "weight is nan;"),
    "infinite": (float("inf"), "weight is inf;"),
    "beyond float32": (1e39, r"weight is 1e\+39;"),
    "beyond any float": (10**400, "weight is 1000"),
    "bool": (True, "weight is True;"),
    "numpy's bool": (np.bool_(True), "weight is .*True.*;"),
    "string": ("2", "weight is '2';"),
    "list": ([1.0], r"weight is \[1.0\];"),
}
ALLOWED = "it must be a finite number of at least 0 .* Write such a number, or leave it out"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_weight_is_named_with_row_message_value_and_cure(name: str) -> None:
    weight, message = WRONG[name]
    with pytest.raises(RowError, match=f"^row 4, message 1: {message}.*{ALLOWED}"):
        read_row({"messages": [QUESTION, answer("a", weight=weight)]}, "row 4")
    with pytest.raises(RowError, match=f"^row 4, message 1, block 1: {message}.*{ALLOWED}"):
        read_row({"messages": [QUESTION, answer("a", weighted("b", weight))]}, "row 4")


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_weight_where_nothing_is_trained_on_has_no_effect_and_is_an_error(role: str) -> None:
    message = (
        f"weight 1 on a turn of the {role} has no effect, since only the assistant's are trained on; leave it out"
    )
    with pytest.raises(RowError, match=f"row 4, message 0: {message}"):
        read_row({"messages": [{**turn(role, "a"), "weight": 1}, answer("b")]}, "row 4")
    with pytest.raises(RowError, match=f"row 4, message 0, block 1: {message}"):
        read_row({"messages": [turn(role, "a", weighted("b", 1)), answer("b")]}, "row 4")


def test_a_weight_of_an_image_is_an_error() -> None:
    row = {"messages": [QUESTION, answer(text("a"), {**IMAGE, "weight": 2})]}
    with pytest.raises(
        RowError, match="row 4, message 1, block 1: an image is never trained on, so its weight has no"
    ):
        read_row(row, "row 4")
