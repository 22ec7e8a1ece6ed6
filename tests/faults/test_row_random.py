"""What is random in reading a row follows from the row: the same with any number of loading processes, and after a resume."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_run import FAMILY, SOURCES, Transformed, streamed
from training import short_config, uneven_rows

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.data.feed import Feed, first_example
from hfcustom.randomness import row_random

WORKERS = (0, 1, 2, 4)
STEPS = 6


def inputs(folder: Path, rows: Any, workers: int, first: int = 0, collate: Any = None, **options: Any) -> list[str]:
    """Return a hash of what each step would train on."""
    config = short_config(folder, batch_size=4, max_steps=STEPS, num_workers=workers, **options)
    feed = Feed(rows, config, Accelerator())
    loader = iter(feed.loader(collate or Collator(FAMILY.processor), range(first, STEPS), (2, 2)))
    found = []
    for step in loader:
        digest = hashlib.sha256()
        for batch in step.batches:
            for name in sorted(batch):
                digest.update(name.encode() + np.ascontiguousarray(batch[name].numpy()).tobytes())
        found.append(digest.hexdigest())
    loader.close()
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_transformed_alike_by_any_number_of_loading_processes(source: str, tmp_path: Path) -> None:
    rows = Transformed(uneven_rows(), source)
    expected = inputs(tmp_path, rows, 0)
    assert len(set(expected)) == STEPS, "a row that comes again in the next epoch is transformed anew"
    for workers in WORKERS[1:]:
        assert inputs(tmp_path, rows, workers) == expected
    for first in (1, 3):
        assert inputs(tmp_path, rows, 2, first) == expected[first:]
    assert inputs(tmp_path, rows, 0, seed=1) != expected


@pytest.mark.parametrize("source", SOURCES)
def test_so_is_what_a_processor_of_ones_own_draws(source: str, tmp_path: Path) -> None:
    plain = Collator(FAMILY.processor)

    def collate(rows: Any) -> Any:
        batch = plain(rows)
        batch["pixel_values"] = batch["pixel_values"] * SOURCES[source]()
        return batch

    rows = uneven_rows(images=[1] * 8)
    expected = inputs(tmp_path, rows, 0, collate=collate)
    assert expected != inputs(tmp_path, rows, 0)
    assert all(inputs(tmp_path, rows, workers, collate=collate) == expected for workers in WORKERS[1:])
    assert inputs(tmp_path, rows, 2, 3, collate=collate) == expected[3:]


def test_training_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    inputs(tmp_path, Transformed(uneven_rows(), "torch"), 0)
    inputs(tmp_path, streamed("numpy"), 0)
    assert [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] == before


def test_a_stream_that_a_function_maps_is_the_same_for_one_reader(tmp_path: Path) -> None:
    for source in SOURCES:
        expected = inputs(tmp_path, streamed(source), 0)
        assert inputs(tmp_path, streamed(source), 1) == expected
        assert expected[:2] != expected[2:4] and len(expected) == STEPS


def test_a_map_by_batches_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Feed(streamed("torch"), short_config(tmp_path), Accelerator())
    assert "batched" not in capsys.readouterr().out
    Feed(streamed(None).map(lambda rows: rows, batched=True), short_config(tmp_path), Accelerator())
    assert "rows pass a map(batched=True). What is random in its function is drawn anew" in capsys.readouterr().out


def test_each_key_has_numbers_of_its_own_and_the_same_ones_again() -> None:
    def draw() -> list[float]:
        return [*(draw() for draw in SOURCES.values()), random.gauss(0, 1), float(torch.randn(()))]

    found = {}
    for key in ((0, "row", 1), (0, "row", 2), (1, "row", 1), (0, "collate", 1)):
        for _ in range(2):
            with row_random(*key):
                found.setdefault(key, []).append(draw())
    assert all(first == second for first, second in found.values())
    assert len({tuple(first) for first, _ in found.values()}) == 4


def test_a_rows_seed_is_the_rows_within_fit_and_any_elsewhere() -> None:
    with row_random(0, "row", 1):
        assert hfcustom.row_seed() == hfcustom.row_seed()
    assert hfcustom.row_seed() != hfcustom.row_seed()


def test_the_look_at_the_first_row_draws_nothing_of_training(tmp_path: Path) -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    for source in SOURCES:
        first_example(Transformed(uneven_rows(), source), short_config(tmp_path))
    assert [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] == before
