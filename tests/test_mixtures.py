"""Mixtures: shares as the weights say, in any step and over all; every row of a source once before any repeats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import Family, chat_row
from source_files import number_of, numbered, write_jsonl
from training import train

from hfcustom.data.feed import Feed
from hfcustom.data.mixtures import BLOCK, Mixture, block_counts, drawn
from hfcustom.data.sources import Examples, RowsWithColumns, load_rows
from hfcustom.train_config import TrainConfig

SIZES = {"a": 7, "b": 40, "c": 3}
WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1}


def mixture(weights: dict[str, float] = WEIGHTS) -> Mixture:
    rows = {name: [numbered(100 * at + row) for row in range(size)] for at, (name, size) in enumerate(SIZES.items())}
    return Mixture({name: Examples(rows[name], f"{name} row") for name in weights}, weights)


def stream(rows: Mixture, steps: int, batch_size: int = 8, seed: int = 0) -> list[int]:
    return [at for step in range(steps) for at in rows.step_rows(step, batch_size, seed)]


def test_rows_of_a_source_come_once_before_any_repeats() -> None:
    rows = mixture()
    seen = [number_of(rows[at]) for at in stream(rows, 40)]
    for at, size in enumerate(SIZES.values()):
        own = [number for number in seen if number // 100 == at]
        for first in range(0, len(own) - size + 1, size):
            assert sorted(own[first : first + size]) == [100 * at + row for row in range(size)]


def test_every_step_has_nearly_its_share_of_each_source() -> None:
    rows = mixture()
    names = [rows[at].source for at in stream(rows, 100)]
    assert {name: round(count / 200) for name, count in Counter(names).items()} == WEIGHTS
    for step in range(100):
        counts = Counter(names[8 * step : 8 * step + 8])
        assert abs(counts["a"] - 4) <= 2 and abs(counts["b"] - 2) <= 2
    assert len({tuple(names[8 * step : 8 * step + 8]) for step in range(100)}) > 50  # no fixed pattern


def test_added_columns_leave_the_weights_alone() -> None:
    rows = RowsWithColumns(mixture(), {"score": [0.5] * 50})
    feed = Feed(rows, TrainConfig(), Accelerator())
    assert feed.mixture is rows.rows and feed.source_names == list(SIZES) and rows[3].columns == {"score": 0.5}


def test_a_step_is_a_function_of_the_seed_and_the_step() -> None:
    first, second = mixture(), mixture()
    whole = stream(first, 30)
    assert second.step_rows(20, 8, 0) == whole[160:168] and second.step_rows(3, 8, 0) == whole[24:32]
    assert stream(mixture(), 15, batch_size=16) == whole
    assert stream(mixture(), 30, seed=1) != whole


@pytest.mark.parametrize("weights", [[1.0], [2, 1, 1], [0.7, 0.3], [1 / 3, 1 / 3, 1 / 3], [1, 9999], [1e9, 3e9, 1e6]])
def test_blocks_have_the_shares_to_a_row(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) == BLOCK and min(counts) >= 1
    assert all(abs(count - BLOCK * weight / sum(weights)) <= 1 for count, weight in zip(counts, weights, strict=True))
    at = range(BLOCK - 50, BLOCK + 50)  # over the border of two blocks each source counts on
    for source in range(len(weights)):
        numbers = [number for found, number in (drawn(weights, row, (0,)) for row in at) if found == source]
        assert (
            numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            if numbers
            else weights[source] < 0.02 * sum(weights)
        )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "The mixture is empty"),
        ({"a": 0}, "The weight of a is 0; it must be a positive number. Leave the source out for 0"),
        ({"a": -1.0}, "The weight of a is -1.0"),
        ({"a": float("nan")}, "The weight of a is nan"),
        ({"a": True}, "The weight of a is True"),
        ({"a": "1"}, "The weight of a is '1'"),
        ({"a": 1, "b": "1"}, "The weight of b is '1'"),
        ({"a": 1e-6, "b": 1}, "The weight of a is 1e-06, less than one row in 10000"),
    ],
)
def test_weights_that_are_none_are_told(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(weights)


def test_a_run_logs_what_share_of_the_tokens_each_source_had(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = chat_row(0), chat_row(0)
    long["messages"][-1]["content"] = "0 " * 200
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", row | {"id": 1, "images": []})
        for name, row in (("long", long), ("short", short))
    ]
    mixed = load_rows({paths[0]: 1.0, paths[1]: 3.0})
    options = {"batch_size": 8, "max_steps": 2, "save_steps": 1}
    shares = []
    for micro in (8, 2):
        result = train(internvl.model(), internvl, tmp_path / str(micro), mixed, micro_batch_size=micro, **options)
        shares.append([[line[f"tokens/{name}.jsonl"] for name in ("long", "short")] for line in result.history])
    assert shares[0] == shares[1]
    for step in shares[0]:
        assert sum(step) == pytest.approx(1) and step[0] > 0.5  # a quarter of the rows
    assert "short.jsonl: columns used: messages, images; ignored: id" in capsys.readouterr().out
    again = load_rows({paths[0]: 1.0, paths[1]: 2.0})
    with pytest.raises(ValueError, match="was trained on other data: files, rows or weights have changed"):
        train(internvl.model(), internvl, tmp_path / "8", again, resume=True, **{**options, "max_steps": 3})


def test_sources_are_called_by_the_last_part_of_their_path_unless_two_end_alike(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / folder / name, numbered(0))
        for folder, name in (("a", "x.jsonl"), ("b", "x.jsonl"), ("b", "y.jsonl"))
    ]
    for streaming in (False, True):
        rows = load_rows(dict.fromkeys(paths, 1.0), streaming=streaming)
        assert list(rows.weights) == [paths[0], paths[1], "y.jsonl"]
