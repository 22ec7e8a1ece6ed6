"""Frame selection: which k frames of a video a model is to see. One file a kind of method, FRAME_SELECTORS below.

A selector is a function `(frames, k, query=None, **options of its own) -> indices`. It gets a Clip (clip.py says what that
offers) and a k of at least 1 and at most the clip's length; it returns sorted places, each once. Frames come from memory or
from a file (`as_clip`), and are the same each time for the same clip: nothing is drawn at random.

- Each method returns min(k, F) places of F frames; only `fps` may return fewer, and k is its bound.
- k = 1 is the middle of the clip for the methods that spread out, of the longest scene for `scenes`, the best for `query`.
- A clip that does not change is sampled evenly. Blank frames (black, white) come last in the methods that look.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

from hfcustom.data.frames.clip import Clip, MissingInputError, memory_clip
from hfcustom.data.frames.differences import cross_correlation, pixel_l1, pixel_l2
from hfcustom.data.frames.embeddings import by_query, embedding
from hfcustom.data.frames.even import at_rate, uniform
from hfcustom.data.frames.files import open_clip
from hfcustom.data.frames.scenes import scene_starts, scenes
from hfcustom.naming import load_object, unknown

Selector = Callable[..., list[int]]

__all__ = [
    "FRAME_SELECTORS",
    "QUERY_METHODS",
    "Clip",
    "MissingInputError",
    "as_clip",
    "open_clip",
    "scene_starts",
    "select_frames",
]


def select_frames(
    frames: Any,
    method: str | Selector,
    k: int,
    query: str | None = None,
    clip_fps: float | None = None,
    **options: Any,
) -> list[int]:
    """Return the places of at most k frames, sorted.

    Args:
        frames: a Clip; (F, H, W, 3) uint8, an array or a tensor; a list of pictures; or a path (see `open_clip`).
        method: a name in FRAME_SELECTORS, `path/to/file.py:function`, or a function.
        query: a text, for the methods that score by one; the others do not look at it.
        clip_fps: frames a second of the clip, where it does not state that itself.
        options: of the method, such as `model` of `embedding` and `fps` of `fps`.
    """
    clip = as_clip(frames, clip_fps)
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k!r} must be a whole number of frames, at least 1.")
    name, selector = find_selector(method)
    known = option_names(selector)
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of frame method {name!r}:", option, known))
    return _checked(name, selector(clip, min(int(k), len(clip)), query, **options), k, len(clip))


def as_clip(frames: Any, clip_fps: float | None = None) -> Clip:
    """Return frames in memory or the path of a file or folder as a clip; a clip as it is."""
    if isinstance(frames, Clip):
        if clip_fps not in (None, frames.clip_fps):
            raise ValueError(f"{frames.name} is a Clip already; pass clip_fps={clip_fps} where it is made.")
        return frames
    return open_clip(frames, clip_fps) if isinstance(frames, str | Path) else memory_clip(frames, clip_fps)


def find_selector(method: str | Selector) -> tuple[str, Selector]:
    """Return the name and the function of a method; ValueError names an unknown one and the nearest."""
    if callable(method):
        return getattr(method, "__name__", type(method).__name__), method
    if method in FRAME_SELECTORS:
        return method, FRAME_SELECTORS[method]
    if ".py:" in str(method):
        return method, load_object(method, "frame method")
    raise ValueError(unknown("frame method", method, FRAME_SELECTORS, "Pass file.py:function for your own."))


def option_names(selector: Selector) -> list[str]:
    """Return the options that a selector takes after (frames, k, query)."""
    return list(inspect.signature(selector).parameters)[3:]


def _checked(name: str, found: Any, k: int, num_frames: int) -> list[int]:
    indices = [int(index) for index in found]
    good = indices == sorted(set(indices)) and 0 < len(indices) <= k
    if not good or indices[0] < 0 or indices[-1] >= num_frames:
        raise ValueError(
            f"The frame method {name!r} returned {indices!r:.200}; it must return 1 to {k} places, sorted, each once, from 0 "
            f"to {num_frames - 1}."
        )
    return indices


FRAME_SELECTORS: dict[str, Selector] = {
    "cross_correlation": cross_correlation,
    "embedding": embedding,
    "fps": at_rate,
    "pixel_l1": pixel_l1,
    "pixel_l2": pixel_l2,
    "query": by_query,
    "scenes": scenes,
    "uniform": uniform,
}
QUERY_METHODS = ("query",)  # those that look at the query
