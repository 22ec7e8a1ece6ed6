"""scenes: the middle frame of each scene; a scene begins where the picture changes far more than around it."""

from __future__ import annotations

import itertools

import numpy as np

from hfcustom.data.frames.clip import BLANK, Clip
from hfcustom.data.frames.differences import CHUNK, best_correlation
from hfcustom.data.frames.even import middles

WINDOW = 5  # frames before and after, whose changes are what is usual there
NOISE = 0.01  # mean difference of two frames below which nothing has changed


def scenes(clip: Clip, k: int, query: str | None = None, ratio: float = 3.0, least_change: float = 0.2) -> list[int]:
    """Return the middle of each scene, the longest scenes first; with k above their number long scenes are split evenly.

    A scene in which nothing is to be seen comes last, and a frame like that gives way to its nearest neighbour.
    """
    starts, blank = _scan(clip, ratio, least_change)
    bounds = list(zip(starts, [*starts[1:], len(blank)], strict=True))
    visible = [bool((~blank[start:stop]).any()) for start, stop in bounds]
    counts = share([stop - start for start, stop in bounds], visible, min(k, len(blank)))
    chosen: list[int] = []
    for (start, stop), count in zip(bounds, counts, strict=True):
        chosen += _visible(middles(start, stop, count), start, blank[start:stop])
    return sorted(chosen)


def scene_starts(clip: Clip, ratio: float = 3.0, least_change: float = 0.2) -> list[int]:
    """Return the first frame of each scene, 0 to begin with.

    The change of a frame is 1 - its best normalised cross-correlation with the one before (differences.py): a camera that
    pans or shakes, and light, change little. It is a cut when it is at least `least_change`, `ratio` times the median of the
    frames around it, and the highest of its neighbours. Slow fades are not seen.
    Source of the ratio to what is usual: the adaptive detector of PySceneDetect, https://www.scenedetect.com.
    """
    return _scan(clip, ratio, least_change)[0]


def _scan(clip: Clip, ratio: float, least_change: float) -> tuple[list[int], np.ndarray]:
    """Return where scenes begin, and which frames are blank, (F,)."""
    if not ratio >= 1 or not 0 < least_change <= 1:
        raise ValueError(f"ratio={ratio} must be at least 1 and least_change={least_change} above 0 and at most 1.")
    changes, blank = [], []
    before: np.ndarray | None = None
    frames = iter(clip.small_frames())
    while part := list(itertools.islice(frames, CHUNK)):
        pixels = np.stack(part) / np.float32(255)  # (n, S, S)
        earlier = np.concatenate([pixels[:1] if before is None else before, pixels[:-1]])  # (n, S, S)
        change = 1 - best_correlation(pixels, earlier, pixels.shape[1] // 4)  # (n,)
        changes += np.where(np.abs(pixels - earlier).mean((1, 2)) < NOISE, 0.0, change).tolist()
        blank += (pixels.std((1, 2)) < BLANK / 255).tolist()
        before = pixels[-1:]
    found = [at for at in range(1, len(changes)) if _is_cut(changes, at, ratio, least_change)]
    return [0, *found], np.array(blank)


def _is_cut(changes: list[float], at: int, ratio: float, least_change: float) -> bool:
    around = [*changes[max(1, at - WINDOW) : at], *changes[at + 1 : at + 1 + WINDOW]]
    usual = float(np.median(around)) if around else 0.0
    beside = max(changes[at - 1 : at] + changes[at + 1 : at + 2], default=0.0)
    return changes[at] >= least_change and changes[at] >= ratio * usual and changes[at] >= beside


def share(lengths: list[int], visible: list[bool], k: int) -> list[int]:
    """Deal k frames to scenes: one each, visible and long ones first, then to the longest for its frames."""
    counts = [0] * len(lengths)
    for _ in range(k):
        open_scenes = [at for at, length in enumerate(lengths) if counts[at] < length]
        served = max(
            open_scenes,
            key=lambda at: (visible[at], not counts[at], lengths[at] / max(1, counts[at]), -at),
        )
        counts[served] += 1
    return counts


def _visible(places: list[int], start: int, blank: np.ndarray) -> list[int]:
    """Move blank places to the nearest ones in their scene that are neither blank nor taken, where there are any."""
    taken = {place for place in places if not blank[place - start]}
    for place in places:
        if blank[place - start]:
            free = [start + int(at) for at in np.flatnonzero(~blank) if start + int(at) not in taken]
            everywhere = [at for at in range(start, start + len(blank)) if at not in taken]
            taken.add(min(free or everywhere, key=lambda at: (abs(at - place), at)))
    return sorted(taken)
