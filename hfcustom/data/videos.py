"""Videos of a batch, as processors take them; the frames were chosen when the row was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfcustom.data.messages import Example, RowError
from hfcustom.data.video_frames import Frames
from hfcustom.processors import OptionalVideo, RaggedVideos, VideosAsImages

CURE = "set video_as_images=True, so that its frames are images"


def video_options(processor: Any, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Return what a processor is given for the videos of rows; RowError where it, or its chat template, knows none."""
    if not any(example.videos for example in examples):
        return {}
    takes = isinstance(processor, OptionalVideo) or "video_processor" in type(processor).get_attributes()
    for example, text in zip(examples, texts, strict=True):
        if example.videos and not takes:
            raise RowError(
                f"{example.name}: a video, but {type(processor).__name__} takes none; {CURE}, or choose a family with videos."
            )
        if text.count(processor.video_token) < len(example.videos):
            raise RowError(
                f"{example.name}: {len(example.videos)} videos, but the chat template writes {processor.video_token!r} "
                f"{text.count(processor.video_token)} times for its {{'type': 'video'}} blocks; {CURE}, or use a template that "
                "knows videos."
            )
    videos = [frames for example in examples for frames in example.videos]
    options: dict[str, Any] = {"do_sample_frames": False}
    if not isinstance(processor, RaggedVideos):
        _check_lengths(processor, examples[0].name, videos)
        options["return_tensors"] = "pt"  # SmolVLM's asks them for their shape before the batch is made of tensors
    given = {
        "videos": list(map(_clip, videos)),
        "video_metadata": list(map(_metadata, videos)),
        "videos_kwargs": options,
    }
    if isinstance(processor, VideosAsImages):  # which puts pixels of both together
        given["images_kwargs"] = {"return_tensors": "pt"}
    return given


def _check_lengths(processor: Any, name: str, videos: Sequence[Frames]) -> None:
    counts = sorted({len(frames) for frames in videos})
    if len(counts) > 1:
        raise ValueError(
            f"{name} and the rows beside it have videos of {counts[0]} and of {counts[-1]} frames, but "
            f"{type(processor).__name__} takes one number in a micro-batch. Set max_frames to the fewest that a video has, "
            "micro_batch_size=1, or video_as_images=True."
        )


def _clip(frames: Frames) -> np.ndarray:
    """Return frames as an array of the size of the first, (F, H, W, C)."""
    size = frames[0].size
    return np.stack([np.asarray(frame if frame.size == size else frame.resize(size)) for frame in frames])


def _metadata(frames: Frames) -> dict[str, Any]:
    return {
        "fps": frames.fps,
        "total_num_frames": frames.total,
        "duration": frames.total / frames.fps,
        "frames_indices": frames.indices,
    }
