"""Preference rows: every form a pair or a judged answer may take, and an error with row, place and cure for every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import chat_row, picture
from conversations import IMAGE, conversation, text, turn

from hfcustom.data.messages import RowError, read_row, split_answer

ASK = turn("user", IMAGE, "What is it?")
CAT, DOG = turn("assistant", "A cat."), turn("assistant", "A dog.")
FIRST = [turn("user", "Hello."), turn("assistant", "Hi.")]
PICTURE = [picture(3)]


def muted(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "weight": 0.0}


PAIRS = {  # row, chosen conversation, rejected conversation
    "a prompt of messages": ({"prompt": [ASK], "chosen": [CAT], "rejected": [DOG]}, [ASK, CAT], [ASK, DOG]),
    "strings, the images before the prompt": (
        {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
        [ASK, CAT],
        [ASK, DOG],
    ),
    "string and messages": ({"prompt": "What is it?", "chosen": [CAT], "rejected": "A dog."}, [ASK, CAT], [ASK, DOG]),
    "whole conversations": ({"chosen": [ASK, CAT], "rejected": [ASK, DOG]}, [ASK, CAT], [ASK, DOG]),
    "a prompt with an answer in it": (
        {"prompt": [*FIRST, ASK], "chosen": [CAT], "rejected": [DOG]},
        [FIRST[0], muted(FIRST[1]), ASK, CAT],
        [FIRST[0], muted(FIRST[1]), ASK, DOG],
    ),
    "whole conversations that begin alike": (
        {"chosen": [*FIRST, ASK, CAT], "rejected": [*FIRST, ASK, DOG, *FIRST]},
        [FIRST[0], muted(FIRST[1]), ASK, CAT],
        [FIRST[0], muted(FIRST[1]), ASK, DOG, *FIRST],
    ),
    "answers of several turns": (
        {"prompt": [ASK], "chosen": [CAT, *FIRST], "rejected": [CAT, FIRST[0], DOG]},
        [ASK, CAT, *FIRST],
        [ASK, CAT, FIRST[0], DOG],
    ),
    "weights of the answers": (
        {"prompt": [ASK], "chosen": [{**CAT, "weight": 2}], "rejected": [DOG]},
        [ASK, {**CAT, "weight": 2.0}],
        [ASK, DOG],
    ),
    "what arrow filled with none": (
        {"prompt": None, "messages": None, "label": None, "chosen": [ASK, CAT], "rejected": [ASK, DOG]},
        [ASK, CAT],
        [ASK, DOG],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_two_conversations_about_the_same_images(name: str) -> None:
    row, chosen, rejected = PAIRS[name]
    example = read_row({**row, "images": PICTURE, "score": 3}, "row")
    assert (example.messages, example.rejected) == (chosen, rejected)
    assert example.images == PICTURE
    assert (example.preferred, example.columns, example.name) == (None, {"score": 3}, "row")


def test_a_pair_of_strings_without_images() -> None:
    example = read_row({"prompt": "What?", "chosen": "This.", "rejected": "That."}, "row")
    assert example.messages == conversation(turn("user", "What?"), turn("assistant", "This."))["messages"]
    assert example.images == []


@pytest.mark.parametrize("key", ["image", "path"])
def test_inline_images_are_the_same_in_both_conversations(key: str, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "a.png")
    picture(4).save(tmp_path / "b.png")
    ask, other = (turn("user", {"type": "image", key: name}, "What is it?") for name in ("a.png", "b.png"))
    example = read_row({"chosen": [ask, CAT], "rejected": [ask, DOG]}, "row", tmp_path)
    assert example.messages == [ASK, CAT]
    assert [image.tobytes() for image in example.images] == [picture(3).tobytes()]
    message = "row 2, image 0: chosen shows another image than rejected; both answers must be about the same images"
    with pytest.raises(RowError, match=message):
        read_row({"chosen": [ask, CAT], "rejected": [other, DOG]}, "row 2", tmp_path)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "completion": [CAT]},
        {"prompt": "What is it?", "completion": "A cat."},
        {"messages": [ASK, CAT]},
        {"messages": [ASK, CAT], "completion": None},
    ],
    ids=str,
)
def test_an_answer_with_a_label_is_preferred_or_not(row: dict[str, Any], label: bool) -> None:
    example = read_row({**row, "label": label, "images": PICTURE}, "row")
    assert (example.messages, example.images) == ([ASK, CAT], PICTURE)
    assert (example.preferred, example.rejected, example.columns) == (label, None, {})


def test_the_prompt_of_an_answer_with_a_label_is_not_trained_on() -> None:
    row = {"prompt": [*FIRST, ASK], "completion": [CAT], "label": True, "images": PICTURE}
    assert read_row(row, "row").messages == [FIRST[0], muted(FIRST[1]), ASK, CAT]


@pytest.mark.parametrize("label", [1, 0, "yes", None, 0.5])
def test_a_label_that_is_no_bool_leaves_an_ordinary_row(label: Any) -> None:
    example = read_row({**chat_row(1), "label": label, "prompt": "What?"}, "row")
    assert example.preferred is None
    assert example.columns == ({"prompt": "What?"} if label is None else {"prompt": "What?", "label": label})


# ---- what a wrong row is told: (row, what the message must hold) ----------------------------------------------------

PAIR = {"prompt": [ASK], "chosen": [CAT], "rejected": [DOG]}
JUDGED = {"prompt": [ASK], "completion": [CAT], "label": True}
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no rejected": ({"prompt": [ASK], "chosen": [CAT]}, ("'chosen' without 'rejected'", "a pair has both")),
    "no chosen": ({"rejected": [ASK, DOG]}, ("'rejected' without 'chosen'", "a pair has both")),
    "the same twice": ({**PAIR, "rejected": [CAT]}, ("the same, so there is nothing to prefer", "drop the row")),
    "the same but for weights": ({**PAIR, "rejected": [{**CAT, "weight": 2}]}, ("nothing to prefer",)),
    "the same whole conversations": ({"chosen": [ASK, CAT], "rejected": [ASK, CAT]}, ("nothing to prefer",)),
    "strings without a prompt": (
        {"chosen": "A cat.", "rejected": "A dog."},
        ("chosen is a string and there is no 'prompt'", "add the prompt"),
    ),
    "answers without a question": (
        {"chosen": [CAT], "rejected": [DOG]},
        ("chosen message 0: a conversation starts with a user or system turn",),
    ),
    "whole conversations beside a prompt": (
        {"prompt": "What is it?", "chosen": [ASK, CAT], "rejected": [ASK, DOG]},
        ("chosen message 0: role 'user'", "starts with the assistant's answer", "drop the column 'prompt'"),
    ),
    "a prompt that ends with an answer": (
        {**PAIR, "prompt": [ASK, CAT]},
        ("prompt message 1: the prompt ends with an assistant turn", "front of each answer"),
    ),
    "a prompt that starts with an answer": (
        {**PAIR, "prompt": [CAT, ASK]},
        ("prompt message 0: a conversation starts",),
    ),
    "an empty prompt": ({**PAIR, "prompt": []}, ("prompt is an empty list", "a list of messages, or a string")),
    "a prompt of another kind": ({**PAIR, "prompt": 3}, ("prompt is int", "a list of messages, or a string")),
    "a rejected of another kind": ({**PAIR, "rejected": {"a": 1}}, ("rejected is dict", "a list of messages")),
    "an empty completion": ({**JUDGED, "completion": []}, ("completion is an empty list",)),
    "one that only begins like the other": (
        {"chosen": [ASK, CAT], "rejected": [ASK, CAT, *FIRST]},
        ("chosen has no assistant turn after the 2 messages that both", "drop the row"),
    ),
    "one that ends with a question": (
        {"chosen": [ASK, CAT], "rejected": [ASK, turn("user", "Well?")]},
        ("rejected has no assistant turn after the 1 messages",),
    ),
    "images of one only": (
        {"chosen": [ASK, CAT], "rejected": [turn("user", "What is it?"), DOG]},
        ("chosen has 1 {'type': 'image'} blocks and rejected 0", "write the same blocks in both"),
    ),
    "an image in one answer": (
        {**PAIR, "rejected": [turn("assistant", IMAGE, "That.")]},
        ("chosen has 1 {'type': 'image'} blocks and rejected 2",),
    ),
    "images left over": ({**PAIR, "prompt": [FIRST[0]]}, ("1 images, but only 0 {'type': 'image'} blocks use them",)),
    "more blocks than images": (
        {**PAIR, "prompt": [turn("user", IMAGE, IMAGE)]},
        ("prompt message 0: more {'type': 'image'} blocks than the row's 1 images",),
    ),
    "a wrong role": (
        {**PAIR, "rejected": [{"role": "bot", "content": "a"}]},
        ("rejected message 0", "Unknown role 'bot'"),
    ),
    "a weight in the prompt": (
        {**PAIR, "prompt": [FIRST[0], {**FIRST[1], "weight": 1}, ASK]},
        ("prompt message 1: a weight in the prompt of an answer has no effect", "leave it out"),
    ),
    "a weight of a block in what both begin with": (
        {
            "chosen": [FIRST[0], turn("assistant", {**text("Hi."), "weight": 2}), ASK, CAT],
            "rejected": [*FIRST, ASK, DOG],
        },
        ("chosen message 1: a weight in the prompt",),
    ),
    "a wrong weight": ({**PAIR, "chosen": [{**CAT, "weight": -2}]}, ("chosen message 0: weight is -2",)),
    "messages beside a pair": (
        {**PAIR, "messages": [ASK, CAT]},
        ("both 'messages' and 'chosen'", "drop the column that is not meant"),
    ),
    "messages beside a completion": ({**JUDGED, "messages": [ASK, CAT]}, ("both 'messages' and 'completion'",)),
    "a completion whose label is missing": (
        {"prompt": [ASK], "completion": [CAT], "label": None},
        ("label is None", "must be true (preferred) or false", "drop the column 'label'"),
    ),
    "a label that is a number": ({**JUDGED, "label": 1}, ("label is 1", "must be true (preferred) or false")),
    "a completion without a prompt": (
        {"completion": [CAT], "label": True},
        ("'completion' without 'prompt'", "add the prompt"),
    ),
    "a prompt alone": (
        {"prompt": [ASK]},
        ("no list of messages (columns: prompt, images)", "'chosen'", "'completion'"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_preference_row_is_named_with_its_value_and_a_cure(name: str) -> None:
    row, pieces = WRONG[name]
    with pytest.raises(RowError) as error:
        read_row({**row, "images": PICTURE}, "rows.jsonl, line 8")
    assert str(error.value).startswith("rows.jsonl, line 8")
    for piece in pieces:
        assert piece in str(error.value)


# ---- the answer to compare with -------------------------------------------------------------------------------------


def test_the_answer_of_a_pair_is_the_chosen_one() -> None:
    prompt, answer = split_answer(read_row({**PAIR, "prompt": [*FIRST, ASK], "images": PICTURE}, "row"))
    assert (prompt, answer) == ([*FIRST, ASK], "A cat.")


def test_an_answer_that_is_not_preferred_is_no_truth() -> None:
    assert split_answer(read_row({**JUDGED, "images": PICTURE}, "row"))[1] == "A cat."
    with pytest.raises(RowError, match=r"row 5: label is False, so its answer is not the right one .* label is true"):
        split_answer(read_row({**JUDGED, "label": False, "images": PICTURE}, "row 5"))
