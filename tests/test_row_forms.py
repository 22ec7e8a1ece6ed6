"""Row -> messages in every form that FORMS lists, told by the row's own keys; two forms, or none, are an error."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import picture
from conversations import IMAGE, turn

from hfcustom.data.columns import column_report
from hfcustom.data.messages import RowError, read_row
from hfcustom.data.row_forms import FORMS

PICTURE = picture(3)
ASK, CAT = turn("user", IMAGE, "What is it?"), turn("assistant", "A cat.")
SYSTEM, AGAIN, YES = turn("system", "Be brief."), turn("user", "Sure?"), turn("assistant", "Yes.")


def human(value: str) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


SHARED: dict[str, tuple[dict[str, Any], list[Any]]] = {  # form, and a word more: (row, messages)
    "captions": ({"image": PICTURE, "caption": "A cat."}, [turn("user", IMAGE), CAT]),
    "captions, text": ({"images": [PICTURE], "text": "A cat."}, [turn("user", IMAGE), CAT]),
    "completions": ({"images": [PICTURE], "prompt": "What is it?", "completion": "A cat."}, [ASK, CAT]),
    "completions, tag": (
        {"image": PICTURE, "prompt": "What is it?\n<image>", "completion": [CAT]},
        [turn("user", "What is it?", IMAGE), CAT],
    ),
    "completions, turns": (
        {"image": PICTURE, "prompt": [ASK, CAT, AGAIN], "completion": "Yes."},
        [ASK, {**CAT, "weight": 0.0}, AGAIN, YES],
    ),
    "conversations": (
        {
            "image": PICTURE,
            "conversations": [human("<image>\nWhat is it?"), gpt("A cat."), human("Sure?"), gpt("Yes.")],
        },
        [ASK, CAT, AGAIN, YES],
    ),
    "conversations, system": (
        {"images": [PICTURE], "system": "Be brief.", "conversations": [human("<image>What is it?"), gpt("A cat.")]},
        [SYSTEM, ASK, CAT],
    ),
    "conversations, roles": (
        {"image": PICTURE, "conversations": [SYSTEM, {"role": "user", "content": "<image>\nWhat is it?"}, CAT]},
        [SYSTEM, ASK, CAT],
    ),
    "conversations, weight": (
        {"image": [PICTURE], "conversations": [human("<image>\nWhat is it?"), {**gpt("A cat."), "weight": 0.5}]},
        [ASK, {**CAT, "weight": 0.5}],
    ),
    "messages": ({"images": [PICTURE], "messages": [ASK, CAT]}, [ASK, CAT]),
    "messages, one image": ({"image": PICTURE, "messages": [ASK, CAT]}, [ASK, CAT]),
    "messages, from and value": (
        {"image": PICTURE, "messages": [human("<image>\nWhat is it?"), gpt("A cat.")]},
        [ASK, CAT],
    ),
    "pairs": ({"image": PICTURE, "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}, [ASK, CAT]),
}


@pytest.mark.parametrize("name", SHARED)
def test_every_form_becomes_messages_and_leaves_the_other_columns(name: str) -> None:
    row, messages = SHARED[name]
    example = read_row({**row, "id": 7, "url": None}, "row")
    assert example.messages == messages
    assert [image.tobytes() for image in example.images] == [PICTURE.tobytes()]
    assert example.columns == {"id": 7}
    assert set(example.used) == set(row)


def test_every_form_is_shown_here() -> None:
    assert {name.partition(",")[0] for name in SHARED} == set(FORMS)


def test_tags_become_blocks_in_their_place_and_take_their_line_break_along() -> None:
    value = "One: <image>\ntwo:\n<image> <video>three\n\nfour"
    row = {"conversations": [human(value), gpt("Yes.")], "images": [PICTURE] * 2, "videos": [[PICTURE, PICTURE]]}
    kinds = [block.get("text", block["type"]) for block in read_row(row, "row").messages[0]["content"]]
    assert kinds == ["One: ", "image", "two:", "image", " ", "video", "three\n\nfour"]


def test_an_image_column_that_holds_no_image_is_a_column() -> None:
    row = {"messages": [turn("user", "What?"), YES], "image": 12, "text": "rendered", "caption": None}
    assert read_row(row, "row").columns == {"image": 12, "text": "rendered"}


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "two forms": (
        {"messages": [ASK, CAT], "conversations": [human("a"), gpt("b")]},
        ("both 'messages' and 'conversations'", "an ordinary row or as a LLaVA or ShareGPT row", "drop the column"),
    ),
    "two others": (
        {"conversations": [human("a"), gpt("b")], "chosen": "a", "rejected": "b"},
        ("both 'conversations' and 'chosen'", "a preference row"),
    ),
    "a mistyped key": ({"mesages": [ASK, CAT]}, ("columns: mesages", "Did you mean 'messages' by 'mesages'?")),
    "text without an image": (
        {"text": "hello"},
        ("no list of messages (columns: text)", "{'image': ..., 'text': ...}"),
    ),
    "image and images": (
        {"messages": [ASK, CAT], "image": PICTURE, "images": [PICTURE]},
        ("both 'image' and 'images'", "drop the column"),
    ),
    "caption and text": ({"image": PICTURE, "caption": "a", "text": "b"}, ("both 'text' and 'caption'",)),
    "a blank caption": ({"image": PICTURE, "caption": "  "}, ("its caption is empty ('  ')", "drop the row")),
    "more tags than images": (
        {"image": PICTURE, "conversations": [human("<image><image>"), gpt("b")]},
        ("turn 0: more {'type': 'image'} blocks than the row's 1 images",),
    ),
    "an image without a tag": (
        {"image": PICTURE, "conversations": [human("What?"), gpt("b")]},
        ("1 images, but only 0 {'type': 'image'} blocks use them",),
    ),
    "an unknown speaker": (
        {"conversations": [human("a"), {"from": "function", "value": "b"}]},
        ("turn 1: Unknown role 'function'", "Allowed: assistant, system, user"),
    ),
    "no turns": ({"conversations": []}, ("conversations is an empty list",)),
    "a string of turns": ({"conversations": "a"}, ("conversations is str",)),
    "an answer first": ({"conversations": [gpt("a"), human("b")]}, ("turn 0: a conversation starts with a user",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_of_no_form_or_of_two_is_named_with_a_cure(name: str) -> None:
    row, pieces = WRONG[name]
    with pytest.raises(RowError) as error:
        read_row(row, "rows.json row 8")
    for piece in ("rows.json row 8", *pieces):
        assert piece in str(error.value)


def test_what_becomes_of_the_columns_is_said() -> None:
    row = {"image": PICTURE, "caption": "A cat.", "chosen_score": 1.0, "id": 7, "margin": 2}
    report = column_report(read_row(row, "row"), ["margin", "score", "token_weights", "gain"])
    assert report == (
        "columns used: image, caption; kept for losses: chosen_score, margin; ignored: id; missing, which a loss needs: gain"
    )
