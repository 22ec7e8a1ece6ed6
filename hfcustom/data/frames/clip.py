"""Clip: the frames of a video, read one after another, so that a long one never lies in memory at its full size.

A clip is what a frame selector gets: `len(clip)`, `for picture in clip` (upright RGB Pillow images), `clip.times` (seconds,
or None where nobody knows), and `clip.small(step)`, grey pictures of SIDE x SIDE, which are read once and kept.
Letters: F frames of the clip, N of them that a method looks at, S = SIDE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from hfcustom.data.images import to_rgb

SIDE = 32  # pixels: enough to tell scenes apart, one KiB a frame
BLANK = 2.0  # grey levels of standard deviation below which a frame shows nothing: black, white, faded out
KEPT = 8192  # small frames that are kept without having been asked for: 8 MB

Item = TypeVar("Item")


class MissingInputError(ValueError):
    """A method lacks what it cannot do without: a query, a model, the clip's frame rate."""


@dataclass(frozen=True)
class Small:
    """Every so many-th frame of a clip as a small grey picture."""

    indices: np.ndarray  # (N,) places in the clip
    pixels: np.ndarray  # (N, S, S) uint8

    @cached_property
    def blank(self) -> np.ndarray:
        """Which of the frames show nothing, (N,)."""
        return np.array([picture.std() < BLANK for picture in self.pixels], dtype=bool)


class Clip:
    """The frames of one source; a subclass says how they are read."""

    progress = False  # whether long work shows a bar

    def __init__(self, name: str, num_frames: int, clip_fps: float | None = None) -> None:
        if num_frames < 1:
            raise ValueError(f"{name} has no frames; give at least one.")
        if clip_fps is not None and not 0 < clip_fps < float("inf"):
            raise ValueError(f"clip_fps={clip_fps} of {name} is no frame rate; it must be above 0, for instance 25.")
        self.name = name
        self.num_frames = num_frames
        self.clip_fps = clip_fps  # as the caller says: it wins over times that the source states
        self._small: tuple[int, Small] | None = None

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[Image.Image]:
        return self.read()

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first, as an upright RGB picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its frames are read: define read().")

    def own_times(self) -> np.ndarray | None:
        """Return the seconds that the source itself states, (F,); None where it states none."""
        return None

    @cached_property
    def times(self) -> np.ndarray | None:
        """The second at which each frame is shown, (F,), from 0; None where that is unknown."""
        return np.arange(len(self)) / self.clip_fps if self.clip_fps is not None else self.own_times()

    def shrink(self, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th frame as (S, S) uint8 grey."""
        return (shrink(picture) for picture in self.read(step))

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at these places, in increasing order, at their full size."""
        self.check_places(indices)
        wanted, found = set(indices), []
        for index, picture in enumerate(self.read()):
            if index in wanted:
                found.append(picture)
            if len(found) == len(wanted):
                return found
        raise ValueError(f"{self.name} ends before its frame {max(wanted)}, though it states {len(self)} frames.")

    def check_places(self, indices: Sequence[int]) -> None:
        """Raise ValueError for places that are not in increasing order or not in the clip."""
        if any(later <= earlier for earlier, later in pairwise(indices)) or not all(
            0 <= index < len(self) for index in indices
        ):
            raise ValueError(
                f"Frames {list(indices)!r:.200} of {self.name} must be in increasing order, from 0 to {len(self) - 1}."
            )

    def step_for(self, limit: int, k: int) -> int:
        """Return the step that leaves at most `limit` frames to look at, but never fewer than k."""
        if limit < 1:
            raise ValueError(f"max_candidates={limit} must be at least 1: it is how many frames are looked at.")
        return max(1, min(-(-len(self) // limit), len(self) // k))

    def small(self, step: int = 1) -> Small:
        """Return every `step`-th frame as a small grey picture; the latest answer is kept."""
        if self._small is None or self._small[0] != step:
            pictures = list(self.track(self.shrink(step), f"reading {self.name}", -(-len(self) // step)))
            if not pictures:
                raise ValueError(f"{self.name}: not one frame could be decoded; is the file damaged?")
            self._small = step, Small(step * np.arange(len(pictures)), np.stack(pictures))
        return self._small[1]

    def small_frames(self) -> Iterable[np.ndarray]:
        """Yield every frame as a small grey picture, (S, S); those of a long clip are not kept."""
        if len(self) <= KEPT or (self._small is not None and self._small[0] == 1):
            return self.small().pixels
        return self.track(self.shrink(), f"reading {self.name}", len(self))

    def track(self, items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
        """Yield the items, with a progress bar on stderr where `progress` asks for one."""
        if not self.progress:
            return items
        from rich.console import Console
        from rich.progress import track

        return track(items, what, total=total, console=Console(stderr=True), transient=True)


def shrink(picture: Image.Image) -> np.ndarray:
    """Return an RGB picture as (S, S) uint8 grey, each pixel the average of what it covers."""
    return np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


class MemoryClip(Clip):
    """An array (F, H, W, 3) uint8, perhaps mapped from a file, or a list of pictures, perhaps of several sizes."""

    def __init__(self, frames: Any, clip_fps: float | None = None, name: str = "the clip") -> None:
        super().__init__(name, len(frames), clip_fps)
        self.frames = frames

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first."""
        return (_picture(self.frames[at], at) for at in range(0, len(self.frames), step))

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at these places; no other one is touched."""
        self.check_places(indices)
        return [_picture(self.frames[at], at) for at in indices]


def _picture(frame: Any, index: int) -> Image.Image:
    """Return one frame, a Pillow image or (H, W, 3) uint8, as an RGB picture."""
    if isinstance(frame, Image.Image):
        return to_rgb(frame)
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"Frame {index} is {array.dtype} of shape {array.shape}; a frame is a Pillow image or uint8 of shape (H, W, 3)."
        )
    return Image.fromarray(array)


def memory_clip(frames: Any, clip_fps: float | None = None, name: str = "the clip") -> MemoryClip:
    """Return frames in memory as a clip: (F, H, W, 3) uint8, a tensor, which may be (F, 3, H, W), or a list of pictures.

    Numbers from 0 to 1 are taken times 255. Raises ValueError for another shape or range.
    """
    if isinstance(frames, Sequence) and not isinstance(frames, str | bytes):
        return MemoryClip(frames, clip_fps, name)
    # a tensor may lie on a GPU; torch itself is not imported for those who have none
    array = frames.numpy(force=True) if type(frames).__module__.startswith("torch") else np.asanyarray(frames)
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)  # (F, H, W, 3)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype.kind not in "uf":
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; frames are uint8 of shape (F, H, W, 3), a list of pictures, "
            "a Clip, or the path of a video, a folder of pictures, an animated picture or a .npy array."
        )
    return MemoryClip(array if array.dtype == np.uint8 else _to_uint8(array, name), clip_fps, name)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if array.dtype.kind != "f" or not 0 <= low <= high <= 1:  # also refuses NaN
        raise ValueError(
            f"{name} holds {array.dtype} from {low:g} to {high:g}; give uint8 from 0 to 255 or floats from 0 to 1."
        )
    return np.stack([np.rint(frame * 255).astype(np.uint8) for frame in array])  # (F, H, W, 3)
