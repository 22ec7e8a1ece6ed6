"""The quick start's rows: real scans, none of them in both parts, and answers that are what the pictures show."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hfcustom.data.digits import (
    CAPTION,
    CELL,
    HELD_OUT,
    SIDE,
    TASKS,
    WORDS,
    _scans,
    digit_captions,
    digit_rows,
    draw_grid,
)
from hfcustom.data.messages import read_row

ALL = load_digits()
WIDTH = 14  # pixels of a drawn scan


def parts() -> dict[str, Counter[tuple[bytes, int]]]:
    """Return each part's scans with their digits, counted."""
    found = {}
    for split in ("train", "held_out"):
        scans, labels = _scans(split)
        found[split] = Counter((scan.tobytes(), int(label)) for scan, label in zip(scans, labels, strict=True))
    return found


def answer_of(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"][0]["text"]


def read_cell(cell: np.ndarray, drawn: np.ndarray, labels: np.ndarray) -> int:
    """Return the digit of the one scan that a cell shows, wherever in the cell it lies."""
    for down in range(CELL - WIDTH + 1):
        for right in range(CELL - WIDTH + 1):
            piece = cell[down : down + WIDTH, right : right + WIDTH]
            match = np.flatnonzero((drawn == piece).all((1, 2)))
            if len(match):
                return int(labels[match[0]])
    raise AssertionError("the cell shows none of the scans")


def read_picture(image: Image.Image, drawn: np.ndarray, labels: np.ndarray) -> str:
    pixels = np.asarray(image)
    corners = [(CELL * row, CELL * column) for row in range(SIDE) for column in range(SIDE)]
    cells = [pixels[top : top + CELL, left : left + CELL] for top, left in corners]
    return "".join(str(read_cell(cell, drawn, labels)) for cell in cells)


def enlarged(scans: np.ndarray) -> np.ndarray:
    """Return scans as a row shows them: 0..16 as 0..255, 14 x 14 pixels."""
    images = [Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in scans]
    return np.stack([np.asarray(image.resize((WIDTH, WIDTH), Image.Resampling.BICUBIC)) for image in images])


def test_no_scan_is_in_both_parts_and_none_is_lost() -> None:
    found = parts()
    assert not found["train"].keys() & found["held_out"].keys()
    whole = Counter((scan.tobytes(), int(label)) for scan, label in zip(ALL.images, ALL.target, strict=True))
    assert found["train"] + found["held_out"] == whole
    assert found["held_out"].total() == HELD_OUT
    assert {label for _, label in found["held_out"]} == set(range(10))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_answer_is_what_the_pictures_show_and_only_scans_of_the_part_are_shown(split: str) -> None:
    scans, labels = _scans(split)
    drawn = enlarged(scans)
    for row in digit_rows(12, split, seed=3):
        truths = answer_of(row).split()
        if row["images"]:
            assert [read_picture(image, drawn, labels) for image in row["images"]] == truths


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_caption_is_the_digit_that_its_picture_shows(split: str) -> None:
    scans, labels = _scans(split)
    drawn, rows = enlarged(scans), digit_captions(12, split, seed=3)
    for row in rows:
        assert row["image"].size == (CELL, CELL)
        assert row["text"] == CAPTION.format(WORDS[read_cell(np.asarray(row["image"]), drawn, labels)])
    assert len(set(rows["text"])) > 3 and read_row(rows[0], "row 0").images[0].size == (CELL, CELL)


def test_the_answer_has_four_digits_an_image() -> None:
    for row in digit_rows(60, seed=5):
        if row["images"]:
            assert [len(word) for word in answer_of(row).split()] == [4] * len(row["images"])
            assert all(image.size == (CELL * SIDE, CELL * SIDE) for image in row["images"])


def test_a_drawing_moves_its_scans_about() -> None:
    rng = np.random.default_rng(0)
    scans = np.full((1, 8, 8), 16.0)
    corners = set()
    for _ in range(30):
        pixels = np.asarray(draw_grid(rng, scans, np.array([7]))[0])
        corners.add(tuple(int(edge.min()) for edge in np.nonzero(pixels[:CELL, :CELL])))
    assert corners == {(down, right) for down in range(3) for right in range(3)}


def test_every_kind_of_row_occurs_about_as_often_as_promised() -> None:
    kinds = Counter(len(row["images"]) for row in digit_rows(400).remove_columns("messages"))
    assert set(kinds) == {0, 1, 2, 3}
    assert 240 <= kinds[1] <= 320 and 20 <= kinds[0] <= 65 and 50 <= kinds[2] + kinds[3] <= 110


def test_rows_of_text_hold_their_digits_in_the_question() -> None:
    rows = [row for row in digit_rows(60, task="backwards") if not row["images"]]
    assert rows
    for row in rows:
        given = row["messages"][0]["content"][0]["text"]
        assert given == f"{answer_of(row)[::-1]}. "


def test_held_out_rows_of_text_are_not_those_of_the_training_part() -> None:
    drawn = {
        split: {answer_of(row) for row in digit_rows(60, split, seed=1) if not row["images"]}
        for split in ("train", "held_out")
    }
    assert drawn["train"] and drawn["held_out"] - drawn["train"]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    first, again, other = digit_rows(8, seed=1), digit_rows(8, seed=1), digit_rows(8, seed=2)
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != other.to_dict()


def test_tasks_show_the_same_pictures_and_ask_for_other_answers() -> None:
    read, backwards = digit_rows(30, task="read"), digit_rows(30, task="backwards")
    assert read.remove_columns("messages").to_dict() == backwards.remove_columns("messages").to_dict()
    for forth, back in zip(read, backwards, strict=True):
        assert [word[::-1] for word in answer_of(forth).split()] == answer_of(back).split()
        questions = [row["messages"][0]["content"][-1]["text"] for row in (forth, back)]
        assert questions == [TASKS["read"][0], TASKS["backwards"][0]]


def test_the_rows_are_a_dataset_that_the_toolkit_reads() -> None:
    rows = digit_rows(20)
    assert isinstance(rows, datasets.Dataset) and len(rows) == 20
    assert rows.column_names == ["messages", "images"]
    assert rows.features["images"] == datasets.List(datasets.Image())
    block = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    assert rows.features["messages"] == datasets.List(
        {"role": datasets.Value("string"), "content": datasets.List(block)}
    )
    for at, row in enumerate(rows):
        example = read_row(row, f"row {at}")
        assert len(example.images) == len(row["images"])
        assert [message["role"] for message in example.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "reed"}, r"Unknown task 'reed'. Did you mean 'read'\? Allowed: backwards, read"),
        ({"split": "test"}, r"Unknown split 'test'.* Allowed: held_out, train"),
        ({"split": "heldout"}, r"Unknown split 'heldout'. Did you mean 'held_out'"),
    ],
)
def test_an_unknown_task_or_split_names_those_there_are(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digit_rows(1, **options)
