"""Rows about real handwriting, chats or captions, made from the scans that ship with scikit-learn; no network.

The 1,797 scans (8 x 8 pixels, 13 writers, UCI "Optical Recognition of Handwritten Digits") are cut into a training and a
held-out part before any row is made, so that no scan is in both. A row shows grids of digits and asks to read them; some
rows hold two or three images between text, some hold none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from hfcustom.naming import unknown

HELD_OUT = 360  # scans, drawn once at random; a writer may have scans in both parts, a scan may not
CELL = 16  # pixels of one digit's cell
SIDE = 2  # cells of a grid's side
ORDINALS = ("First ", "then ", "last ")

CAPTION = "a scan of the digit {}"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "read": ("Read the digits.", lambda digits: digits),
    "backwards": ("Read the digits backwards.", lambda digits: digits[::-1]),
}


def digit_rows(num_rows: int, split: str = "train", task: str = "read", seed: int = 0) -> Any:
    """Return a `datasets.Dataset` of {"messages": [...], "images": [...]} rows.

    Seven rows of ten show one grid, two show two or three, one is text only; the same seed draws the same pictures for
    every task. Raises ValueError for an unknown split or task.
    """
    import datasets

    if task not in TASKS:
        raise ValueError(unknown("task", task, TASKS))
    rng = np.random.default_rng([seed, split == "train"])
    scans, labels = _scans(split)
    rows = [_row(rng, scans, labels, task) for _ in range(num_rows)]
    block = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": datasets.List(block)}
    features = datasets.Features({"messages": datasets.List(message), "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(rows, features=features)


def digit_captions(num_rows: int, split: str = "train", seed: int = 0) -> Any:
    """Return a `datasets.Dataset` of {"image", "text"} rows for a contrastive encoder: one scan, and its digit in words.

    Raises ValueError for an unknown split.
    """
    import datasets

    rng = np.random.default_rng([seed, split == "train"])
    scans, labels = _scans(split)
    rows = []
    for _ in range(num_rows):
        image, digit = draw_grid(rng, scans, labels, side=1)
        rows.append({"image": image, "text": CAPTION.format(WORDS[int(digit)])})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    parts = {"train": order[:-HELD_OUT], "held_out": order[-HELD_OUT:]}
    if split not in parts:
        raise ValueError(unknown("split", split, parts))
    return data.images[parts[split]], data.target[parts[split]]  # (scans, 8, 8) of 0..16, (scans,)


def _row(rng: np.random.Generator, scans: np.ndarray, labels: np.ndarray, task: str) -> dict[str, Any]:
    question, answer_of = TASKS[task]
    kind = rng.random()
    num_images = 1 if kind < 0.7 else int(rng.integers(2, 4)) if kind < 0.9 else 0
    content: list[dict[str, Any]] = []
    images, answers = [], []
    for at in range(num_images):
        if num_images > 1:
            content.append({"type": "text", "text": ORDINALS[at]})
        image, digits = draw_grid(rng, scans, labels)
        images.append(image)
        answers.append(answer_of(digits))
        content.append({"type": "image"})
    if not num_images:
        digits = "".join(str(digit) for digit in rng.integers(0, 10, rng.integers(2, 5)))
        content.append({"type": "text", "text": f"{digits}. "})
        answers.append(answer_of(digits))
    content.append({"type": "text", "text": question})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": " ".join(answers)}]},
    ]
    return {"messages": messages, "images": images}


def draw_grid(
    rng: np.random.Generator, scans: np.ndarray, labels: np.ndarray, side: int = SIDE
) -> tuple[Image.Image, str]:
    """Draw scans into the cells of a square grid, each a little moved; return the picture and its digits, row by row."""
    chosen = rng.integers(0, len(scans), side**2)
    canvas = np.zeros((side * CELL, side * CELL), dtype=np.uint8)  # (H, W)
    for cell, scan in enumerate(chosen):
        picture = Image.fromarray((scans[scan] * 255 / 16).astype(np.uint8)).resize((14, 14), Image.Resampling.BICUBIC)
        down, right = rng.integers(0, CELL - 14 + 1, 2)
        top, left = CELL * (cell // side) + down, CELL * (cell % side) + right
        canvas[top : top + 14, left : left + 14] = np.asarray(picture)
    return Image.fromarray(canvas), "".join(str(labels[scan]) for scan in chosen)
