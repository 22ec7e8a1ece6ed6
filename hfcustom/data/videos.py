"""Videos of a batch, as processors take them; the frames were chosen when the row was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfcustom.data.messages import Example, RowError


def video_options(processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what a processor is given for the videos of rows; RowError for one that takes none."""
    shown = [example for example in examples if example.videos]
    if not shown:
        return {}
    if "video_processor" not in type(processor).get_attributes() and not hasattr(processor, "video_processor"):
        raise RowError(
            f"{shown[0].name}: a video, but {type(processor).__name__} takes none; set video_as_images=True, so that its "
            "frames are images, or choose a family with videos."
        )
    videos = [[_clip(frames) for frames in example.videos] for example in examples]
    metadata = [[_metadata(frames) for frames in example.videos] for example in examples]
    return {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}


def _clip(frames: Sequence[Any]) -> np.ndarray:
    """Return frames of one size as an array, (F, H, W, C)."""
    size = frames[0].size
    return np.stack([np.asarray(frame if frame.size == size else frame.resize(size)) for frame in frames])


def _metadata(frames: Sequence[Any]) -> dict[str, Any]:
    count = len(frames)
    return {"fps": 1.0, "total_num_frames": count, "duration": float(count), "frames_indices": list(range(count))}
