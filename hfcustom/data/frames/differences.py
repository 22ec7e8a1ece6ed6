"""pixel_l1, pixel_l2, cross_correlation: frames that differ from each other, compared as small grey pictures.

cross_correlation allows one picture to lie anywhere over the other, up to a quarter of its side away, and counts what they
share: a camera that pans or shakes, and light that changes, are no difference. It is evaluated for all shifts at once by
FFT, the means and deviations of each overlap from tables of sums.
Letters: N frames, S = 32 the side of a small frame, R the largest shift, D = 2 R + 1 shifts a side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hfcustom.data.frames.clip import Clip, Small
from hfcustom.data.frames.farthest import farthest

MAX_CANDIDATES = 8192  # frames looked at: of a longer clip every second, third, ... one
CHUNK = 256  # frames transformed together: 3 MB
FLAT = (1.0 / 255) ** 2  # variance of an overlap that shows nothing


def pixel_l1(clip: Clip, k: int, query: str | None = None, max_candidates: int = MAX_CANDIDATES) -> list[int]:
    """Return k frames far from each other by the mean of absolute differences of their pixels; the middle frame first."""
    return _far_apart(clip, k, max_candidates, lambda frames, one: np.abs(frames - one).mean((1, 2)))


def pixel_l2(clip: Clip, k: int, query: str | None = None, max_candidates: int = MAX_CANDIDATES) -> list[int]:
    """Return k frames far from each other by the root of the mean of squared differences; the middle frame first."""
    return _far_apart(clip, k, max_candidates, lambda frames, one: np.sqrt(np.square(frames - one).mean((1, 2))))


def cross_correlation(
    clip: Clip, k: int, query: str | None = None, max_candidates: int = MAX_CANDIDATES, max_shift: float = 0.25
) -> list[int]:
    """Return k frames far from each other by 1 - their best normalised cross-correlation; the middle frame first.

    `max_shift` is how far one frame may lie from the other, as a share of its side: 0 to 0.5.
    Source: J. P. Lewis, Fast Normalized Cross-Correlation, 1995 (FFT and tables of sums).
    """
    if not 0 <= max_shift <= 0.5:
        raise ValueError(f"max_shift={max_shift} must be from 0 to 0.5: beyond, frames share too little.")

    def distances(frames: np.ndarray, one: np.ndarray) -> np.ndarray:
        return 1 - best_correlation(frames, one, round(max_shift * one.shape[0]))

    return _far_apart(clip, k, max_candidates, distances)


def _far_apart(
    clip: Clip, k: int, max_candidates: int, distances: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[int]:
    """Choose by `distances((n, S, S), (S, S)) -> (n,)` of pixels from 0 to 1."""
    small: Small = clip.small(clip.step_for(max_candidates, k))

    def distance_to(place: int) -> np.ndarray:
        one = small.pixels[place] / np.float32(255)  # (S, S)
        parts = [small.pixels[at : at + CHUNK] / np.float32(255) for at in range(0, len(small.pixels), CHUNK)]
        return np.concatenate([distances(part, one) for part in parts])  # (N,)

    rounds = clip.track(range(min(k, len(small.indices))), "comparing frames", k)
    return sorted(small.indices[farthest(distance_to, small.blank, rounds)].tolist())


def best_correlation(frames: np.ndarray, others: np.ndarray, max_shift: int) -> np.ndarray:
    """Return the highest correlation over all shifts, to 1, of frames with one other or one each: (N, S, S), (S, S) -> (N,).

    A shift at which either shows nothing counts as 0.
    """
    others = others.reshape(-1, *others.shape[-2:])  # (1 or N, S, S)
    others = others - others.mean((1, 2), keepdims=True)
    frames = frames - frames.mean((1, 2), keepdims=True)
    side, at = frames.shape[1], np.arange(-max_shift, max_shift + 1)
    size = (side + max_shift, side + max_shift)  # so that nothing comes in again on the other side
    spectrum = np.fft.rfft2(others, size).conj() * np.fft.rfft2(frames, size)  # (N, side + R, (side + R) / 2 + 1)
    products = np.fft.irfft2(spectrum, size)[:, at[:, None], at]  # (N, D, D), sums over the overlap
    shared = side - np.abs(at)
    area = shared[:, None] * shared  # (D, D)
    mean, variance = _overlaps(frames, max_shift, area)  # (N, D, D)
    its_mean, its_variance = (table[:, ::-1, ::-1] for table in _overlaps(others, max_shift, area))  # (1 or N, D, D)
    flat = (variance < FLAT) | (its_variance < FLAT)
    power = np.sqrt(np.where(flat, 1.0, variance * its_variance))
    found = np.where(flat, 0.0, (products / area - mean * its_mean) / power)
    return np.minimum(found.max((1, 2)), 1.0)


def _overlaps(frames: np.ndarray, max_shift: int, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the part of each frame that a picture shifted by (y, x) covers: (N, S, S) -> (N, D, D)."""
    at, side = np.arange(-max_shift, max_shift + 1), frames.shape[1]
    low, high = np.maximum(at, 0), side + np.minimum(at, 0)  # rows and columns covered

    def mean(values: np.ndarray) -> np.ndarray:
        table = np.pad(values.astype(np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))  # (N, S + 1, S + 1)
        rows = table[:, high] - table[:, low]  # (N, D, S + 1)
        return (rows[:, :, high] - rows[:, :, low]) / area  # (N, D, D)

    first = mean(frames)
    return first, mean(np.square(frames)) - first**2
