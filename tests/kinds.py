"""For files whose tests are about training rather than families: `family` is one of each kind there, not all.

from kinds import family_of_each_kind  # noqa: F401
"""

from __future__ import annotations

import pytest
from conftest import KINDS, Family


@pytest.fixture(params=KINDS, name="family")
def family_of_each_kind(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """Take the place of conftest's `family` in the file that imports it."""
    return families[request.param]
