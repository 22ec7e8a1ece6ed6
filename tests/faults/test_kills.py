"""Runs killed inside saves, anywhere, and several times in a row end bit-equal; `make faults` does it two hundred times."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import RUN, Killer, Tally, kill
from tiny_run import Run, end_of, train


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(tmp_path_factory.mktemp("kills"), seed=1)


def test_runs_killed_inside_saves_end_bit_equal(killer: Killer) -> None:
    tally = kill(killer, 3, inside_saves=True)
    assert (tally.exact, tally.inside, tally.differing, tally.leftovers) == (3, 3, [], 0)


def test_a_run_killed_several_times_in_a_row_ends_bit_equal(killer: Killer) -> None:
    tally = Tally()
    killer.trial(4, tally, inside_saves=False)
    assert (tally.exact, tally.differing, tally.leftovers) == (4, [], 0)


def test_what_is_compared_tells_a_run_that_lost_its_randomness(killer: Killer, tmp_path: Path) -> None:
    """One row read with other numbers, or one dropout mask, makes another end."""
    assert RUN.source and RUN.lora and RUN.workers == 2
    train(Run(workers=0, source="numpy"), tmp_path)
    other = end_of(tmp_path)
    assert [name for name in other if other[name] == killer.expected[name]] == ["rng-0.safetensors", "step"]
