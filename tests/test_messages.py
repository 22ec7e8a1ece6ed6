"""Row -> messages: every form a row may take, and an error with row, place, value and cure for every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from hfcustom.data.messages import RowError, read_row, split_answer

TEXT = {"type": "text", "text": "Hello."}
SLOT = {"type": "image"}
ANSWER = {"role": "assistant", "content": "Yes."}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def seeds(images: list[Image.Image]) -> list[int]:
    """Return which pictures these are."""
    known = {picture(seed).tobytes(): seed for seed in range(8)}
    return [known[image.tobytes()] for image in images]


# ---- what a row may be ----------------------------------------------------------------------------------------------


def test_a_string_and_a_list_of_blocks_become_the_same_messages() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}, ANSWER]}
    example = read_row(row, "row 3")
    assert example.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    assert (example.images, example.name) == ([], "row 3")
    blocks = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in row["messages"]]
    assert read_row({"messages": blocks, "images": []}, "row 3") == example


@pytest.mark.parametrize("images", [None, [], ()])
def test_a_row_of_text_needs_no_images(images: Any) -> None:
    row = {"messages": [user(TEXT), ANSWER], "images": images}
    assert read_row(row, "row").images == []


def test_images_are_taken_in_order_across_messages() -> None:
    messages = [user(SLOT, TEXT, SLOT), ANSWER, user(SLOT), {"role": "assistant", "content": [TEXT, SLOT]}]
    example = read_row({"messages": messages, "images": [picture(seed) for seed in (3, 1, 2, 0)]}, "row")
    assert seeds(example.images) == [3, 1, 2, 0]
    assert [[block["type"] for block in message["content"]] for message in example.messages] == [
        ["image", "text", "image"],
        ["text"],
        ["image"],
        ["text", "image"],
    ]


def test_inline_images_keep_their_place_among_the_listed_ones() -> None:
    inline = {"type": "image", "image": picture(5)}
    example = read_row({"messages": [user(SLOT, inline, SLOT), ANSWER], "images": [picture(1), picture(2)]}, "row")
    assert seeds(example.images) == [1, 5, 2]
    assert example.messages[0]["content"] == [SLOT, SLOT, SLOT]  # pictures are kept in one place only


@pytest.mark.parametrize("key", ["image", "path"])
def test_inline_paths_are_read_below_the_rows_folder(key: str, tmp_path: Path) -> None:
    picture(4).save(tmp_path / "a.png")
    row = {"messages": [user({"type": "image", key: "a.png"}, TEXT), ANSWER]}
    assert seeds(read_row(row, "row", tmp_path).images) == [4]
    with pytest.raises(RowError, match=r"row 7, image 0: Image 'a.png' is a path, but .* pass the image"):
        read_row(row, "row 7")


def test_keys_that_arrow_filled_with_none_are_as_if_missing() -> None:
    filled = user({"type": "image", "text": None, "image": None, "path": None}, {**TEXT, "image": None, "path": None})
    row = {"messages": [{**filled, "name": None}, ANSWER], "images": [picture(2)]}
    example = read_row(row, "row")
    assert example == read_row({"messages": [user(SLOT, TEXT), ANSWER], "images": [picture(2)]}, "row")


def test_images_come_back_as_rgb() -> None:
    gray = Image.fromarray(np.full((4, 5), 7, dtype=np.uint8))
    (image,) = read_row({"messages": [user(SLOT, TEXT), ANSWER], "images": [gray]}, "row").images
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_the_callers_row_is_left_as_it_is() -> None:
    row = {"messages": [user(SLOT, {**TEXT, "image": None}), ANSWER], "images": [picture()]}
    read_row(row, "row")
    assert row["messages"] == [user(SLOT, {**TEXT, "image": None}), ANSWER]
    assert len(row["images"]) == 1


# ---- what a wrong row is told: (row, what the message must hold) ----------------------------------------------------

FORM = "a row is {'messages': [...], 'images': [...]}"
WRONG_ROWS = {
    "no messages": ({"text": "a", "label": 1}, ("no list of messages", "columns: text, label", FORM)),
    "empty row": ({}, ("columns: nothing", FORM)),
    "messages of another kind": ({"messages": "hi"}, ("no list of messages", FORM)),
    "no turn at all": ({"messages": []}, ("no list of messages", FORM)),
    "no mapping": ("hi", ("str, no mapping", FORM)),
    "one image, not a list": (
        {"messages": [user(SLOT), ANSWER], "images": picture()},
        ("images is Image", "must be a list, also of one image"),
    ),
    "a path, not a list": ({"messages": [user(SLOT)], "images": "a.png"}, ("images is str", "must be a list")),
    "images left over": (
        {"messages": [user(SLOT), ANSWER], "images": [picture(), picture(), picture()]},
        ("3 images, but only 1 {'type': 'image'} blocks use them", "put a block where each image belongs"),
    ),
    "an image that cannot be read": (
        {"messages": [user(SLOT, SLOT)], "images": [picture(), "https://example.org/a.png"]},
        ("image 1: Image 'https://example.org/a.png' is a URL; none is fetched. Name its host in image_hosts",),
    ),
    "an image of no kind": (
        {"messages": [user(SLOT)], "images": [3]},
        ("image 0: An image is a PIL image, bytes or a path, not int (3)",),
    ),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named_with_its_value_and_a_cure(name: str) -> None:
    row, pieces = WRONG_ROWS[name]
    with pytest.raises(RowError) as error:
        read_row(row, "rows.jsonl, line 8")
    for piece in ("rows.jsonl, line 8", *pieces):
        assert piece in str(error.value)


WRONG_MESSAGES = {
    "unknown role": ({"role": "asistant", "content": "a"}, ("'asistant'", "Did you mean 'assistant'", "system, user")),
    "no role": ({"content": "a"}, ("Unknown role None", "Allowed: assistant, system, user")),
    "a string": ("hi", ("Unknown role 'hi'", "Allowed: assistant, system, user")),
    "no content": ({"role": "user"}, ("content is NoneType", "must be a string or a list of blocks")),
    "content of another kind": ({"role": "user", "content": {"type": "text"}}, ("content is dict", "list of blocks")),
    "unknown block": (user({"type": "imgae"}), ("'imgae'", "Did you mean 'image'", "Allowed: image, text")),
    "a block of no type": (user({"words": "a"}), ("Unknown block type None", "Allowed: image, text")),
    "a number as a block": (user(4), ("Unknown block type 4", "Allowed: image, text")),
    "text without text": (user({"type": "text"}), ("'text' is NoneType", "must be a string")),
    "text of another kind": (user({"type": "text", "text": ["a"]}), ("'text' is list", "must be a string")),
    "a fraction, which has many spellings": ({"role": "user", "content": 42.0}, ("content is 42.0 (float)", "string")),
    "a truth value": (user({"type": "text", "text": True}), ("'text' is True (bool)", "must be a string")),
    "half a letter": (user("caf\ud83d"), ("'\\ud83d' at character 3", "lone surrogate", "repair the text, or drop")),
    "more blocks than images": (
        user(SLOT, SLOT),
        ("more {'type': 'image'} blocks than the row's 1 images", "list every image"),
    ),
}


@pytest.mark.parametrize("name", WRONG_MESSAGES)
def test_a_wrong_message_is_named_with_row_number_value_and_cure(name: str) -> None:
    message, pieces = WRONG_MESSAGES[name]
    with pytest.raises(RowError) as error:
        read_row({"messages": [user(TEXT), ANSWER, message], "images": [picture()]}, "row 11")
    for piece in ("row 11, message 2", *pieces):
        assert piece in str(error.value)


def test_what_can_only_mean_one_text_is_read_as_it() -> None:
    blocks = [
        "What is ",
        {"text": "six times "},
        {"type": "text", "text": 7},
        {"type": "text", "text": "?", "image": None},
    ]
    row = {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": np.int64(42)}]}
    question, answer = read_row(row, "row").messages
    assert [block["text"] for block in question["content"]] == ["What is ", "six times ", "7", "?"]
    assert answer["content"] == [{"type": "text", "text": "42"}]


def test_an_answer_without_words_is_named_unless_it_is_not_trained_on() -> None:
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert read_row({"messages": [user(TEXT), empty, user(TEXT), ANSWER]}, "row").messages[1]["weight"] == 0
    wordless = {"empty": "", "blank": [" ", "\n"], "an image without words": [SLOT]}
    for kind, content in wordless.items():
        row = {"messages": [user(TEXT), ANSWER, user(TEXT), {"role": "assistant", "content": content}], "images": []}
        row["images"] = [picture()] * (content == [SLOT])
        with pytest.raises(RowError, match=f"^row 3, message 3: the assistant's answer is {kind}, .* drop the row"):
            read_row(row, "row 3")
    with pytest.raises(RowError, match="row 3, rejected: message 1: the assistant's answer is blank"):
        read_row({"prompt": "Hi", "chosen": "Yes.", "rejected": " "}, "row 3")


def test_an_unreadable_file_is_told_with_the_row(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    row = {"messages": [user(SLOT), ANSWER], "images": ["bad.png"]}
    with pytest.raises(RowError, match=r"^row 2, image 0: .*bad.png is no readable"):
        read_row(row, "row 2", tmp_path)
    row["images"] = ["gone.png"]
    with pytest.raises(RowError, match=r"^row 2, image 0: Image 'gone.png' is no file below"):
        read_row(row, "row 2", tmp_path)


# ---- splitting off the answer ---------------------------------------------------------------------------------------


def test_the_answer_is_the_text_of_the_last_turn() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}]}
    example = read_row({"messages": [user(SLOT, TEXT), ANSWER, user(TEXT), answer], "images": [picture()]}, "row")
    prompt, truth = split_answer(example)
    assert truth == "One, two."
    assert prompt == example.messages[:3]


def test_a_row_that_ends_with_no_answer_is_told_so() -> None:
    example = read_row({"messages": [user(TEXT), ANSWER, user(TEXT)]}, "row 5")
    with pytest.raises(RowError, match=r"row 5: the last turn is not the assistant's, so there is no answer"):
        split_answer(example)
