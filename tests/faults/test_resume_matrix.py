"""A sample of the resume matrix in which every pair of values meets; `make faults` runs all of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from matrix import AXES, Cell, all_cells, covering_cells, resumed, run_of, unbroken
from tiny_run import Run, end_of, train


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a run once."""
    known: dict[Run, tuple[Path, dict[str, Any]]] = {}

    def end(run: Run) -> tuple[Path, dict[str, Any]]:
        if run not in known:
            folder = tmp_path_factory.mktemp("unbroken") / "run"
            known[run] = folder, unbroken(run, folder)
        return known[run]

    return end


@pytest.mark.parametrize("cell", covering_cells(), ids=str)
def test_a_cell_is_bit_equal(cell: Cell, ends: Any, tmp_path: Path) -> None:
    run = run_of(cell)
    folder, expected = ends(run)
    assert resumed(run, folder, cell[-1], tmp_path / "resumed") == expected


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_every_cut_is_bit_equal(accumulated: int, tmp_path: Path) -> None:
    """Steps of 6 of 8 rows, so that epochs end within a step."""
    run, options = Run(workers=0), {"batch_size": 6, "micro_batch_size": 6 // accumulated, "max_steps": 6}
    train(run, tmp_path / "unbroken", keep_checkpoints=9, **options)
    expected = end_of(tmp_path / "unbroken")
    for cut in range(6):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "unbroken", folder)
        for step in range(cut + 1, 7):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
        assert train(run, folder, resume=True, save_steps=7, **options).step == 6
        assert end_of(folder) == expected


def test_what_is_compared_tells_runs_apart(ends: Any) -> None:
    """A transform that draws from another generator makes another run, so the transform has an effect on what is compared."""
    found = [ends(Run(workers=0, source=source))[1] for source in (None, "torch", "numpy")]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_number_of_loading_processes_changes_nothing(ends: Any) -> None:
    assert ends(Run(workers=0))[1] == ends(Run(workers=2))[1]


def test_the_sample_covers_every_pair_and_the_matrix_is_large() -> None:
    cells = covering_cells()
    assert len(all_cells()) >= 96 and len(cells) < 30
    for one, values in enumerate(AXES.values()):
        for other, others in enumerate(AXES.values()):
            if one < other:
                assert {(cell[one], cell[other]) for cell in cells} == {(a, b) for a in values for b in others}
