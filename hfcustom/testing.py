"""For a user's own tests: each check of `hfcustom doctor` as a test of pytest.

    from hfcustom.testing import check_model
    test_my_model = check_model(MyModel)

pytest then runs test_my_model[parity], test_my_model[overrides], ..., and reports what failed with its cure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hfcustom.doctor.command import line_of
from hfcustom.doctor.examine import Target, examine
from hfcustom.doctor.finding import CHECKS
from hfcustom.naming import unknown


def check_model(target: Target, checks: Sequence[str] = (), *, leave_out: Sequence[str] = ()) -> Callable[..., Any]:
    """Return a test of a class, a family, a checkpoint or `my_file.py:MyModel`, with a case for each check.

    `checks` names those to run instead of all, `leave_out` those not to run. ValueError for an unknown one.
    """
    for name in (*checks, *leave_out):
        if name not in CHECKS:
            raise ValueError(unknown("check", name, CHECKS))
    chosen = [name for name in checks or CHECKS if name not in leave_out]

    @pytest.mark.parametrize("check", chosen)
    def test(check: str) -> None:
        (finding,) = examine(target, [check])
        if finding.status == "skipped":
            pytest.skip(finding.measured)
        if finding.status == "failed":
            pytest.fail(line_of(finding), pytrace=False)

    return test
