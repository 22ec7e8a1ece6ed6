"""Tasks for the processes of a scan, in a module that loads at once."""

from __future__ import annotations

import os
from collections.abc import Callable


def multiply(item: int) -> int:
    """Return ten times an item; some kill the process."""
    if item % 5 == 3:
        os._exit(9)
    return 10 * item


def make() -> Callable[[int], int]:
    return multiply


def cannot() -> Callable[[int], int]:
    raise ValueError("no such model")
