"""Frames as different from each other as can be, for any measure of difference between two frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

SAME = 1e-4  # differences this close are equal; position then decides, so that rounding does not


def farthest(distance_to: Callable[[int], np.ndarray], blank: np.ndarray, rounds: Iterable[int]) -> list[int]:
    """Return places out of N: the middle one first, then for each further round the one least like all that are chosen.

    `distance_to(place)` returns its differences from all, (N,). Of places equally far the one in the widest gap is taken,
    so that a clip that does not change is sampled evenly. Places in `blank` (N,) come when nothing else is left.
    Source: T. F. Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    places = np.arange(len(blank))
    nearest = np.where(blank, -1.0, np.inf)  # to what is chosen, (N,); chosen places themselves are at -2
    gap = -np.abs(2 * places - len(blank))  # first how near the middle, then how far from what is chosen
    chosen: list[int] = []
    for _ in rounds:
        best = nearest.max()
        equal = np.flatnonzero(nearest >= best - SAME) if np.isfinite(best) else np.flatnonzero(nearest == best)
        place = int(equal[gap[equal].argmax()])
        gap = np.minimum(gap, np.abs(places - place)) if chosen else np.abs(places - place)
        chosen.append(place)
        nearest = np.where(nearest >= 0, np.minimum(nearest, distance_to(place).clip(min=0)), nearest)
        nearest[place] = -2.0
    return chosen
