"""A rank that dies, stops, leaves or falls out of step ends the others in time, with the cause and a code of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import is_right, outcome

from hfcustom.distributed.ranks import explained

ALIVE = ("leaves out a step",)  # the rank is there, and says so
QUICK = ("is killed", "is stopped", "leaves out a step")  # tests/faults/ranks.py has all, of either rank


@pytest.mark.parametrize("fault", QUICK)
def test_the_other_rank_ends_with_the_cause_and_where_to_go_on(fault: str, tmp_path: Path) -> None:
    found = outcome(fault, tmp_path)
    assert is_right(found), f"{found.code} after {found.seconds:.0f} s: {found.printed[-2000:]}"
    cause = "the ranks no longer run in step" if fault in ALIVE else "rank 1 died or does not answer"
    assert cause in found.printed and "rank 0, in " in found.printed
    assert "The last good checkpoint is " in found.printed


def test_an_error_of_ones_own_is_left_as_it_is(tmp_path: Path) -> None:
    for error in (RuntimeError("Timed out waiting for a friend"), KeyError("gloo")):
        with pytest.raises(type(error)) as raised, explained(str(tmp_path)):
            raise error
        assert raised.value is error
