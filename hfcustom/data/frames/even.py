"""uniform, fps: frames at even distances; what they show is not looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfcustom.data.frames.clip import Clip, MissingInputError


def middles(start: int, stop: int, count: int) -> list[int]:
    """Return the middle of each of `count` equal spans of start..stop; count is at most stop - start."""
    return [start + (2 * span + 1) * (stop - start) // (2 * count) for span in range(count)]


def uniform(clip: Clip, k: int, query: str | None = None) -> list[int]:
    """Return the middle frame of each of k equal spans; k = 1 is the middle of the clip."""
    return middles(0, len(clip), k)


def at_rate(clip: Clip, k: int, query: str | None = None, fps: float = 1.0) -> list[int]:
    """Return `fps` frames for each second, but at most k, then spread over the whole clip; one of a shorter clip.

    A second counts as the clip's own times say, so that frames that are shown longer do not lose. Raises
    MissingInputError where these are unknown.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps} must be above 0: frames for each second of the clip.")
    times: Any = clip.times
    if times is None:
        raise MissingInputError(f"The method fps needs times, which {clip.name} does not state; pass clip_fps.")
    seconds = float(times[-1]) * len(clip) / max(1, len(clip) - 1)  # the last frame lasts as long as the others
    count = min(k, max(1, round(seconds * fps)))
    if count == len(clip):
        return list(range(count))
    wanted = (np.arange(count) + 0.5) * seconds / count  # (count,)
    shown = np.searchsorted(times, wanted + 1e-9, side="right") - 1  # the frame that is on the screen then
    return sorted(set(np.clip(shown, 0, len(clip) - 1).tolist()))
