"""VideoClip: a video file, decoded by PyAV (FFmpeg) as it is asked for, one frame at a time.

Only the demuxers of CONTAINERS are allowed, whatever the file is named, and only the file itself is read: FFmpeg would
otherwise follow a playlist to other files and to the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfcustom.data.frames.clip import SIDE, Clip, shrink
from hfcustom.data.images import MAX_PIXELS

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
CONTAINERS = "asf,avi,flv,matroska,webm,mov,mp4,mpeg,mpegts,ogg"
MAX_VIDEO_PIXELS = 10_000 * MAX_PIXELS  # over all frames: four hours of 1920 x 1080 at 30 frames a second


class VideoClip(Clip):
    """The first video stream of a file; its frames are counted without decoding them."""

    def __init__(self, path: Path, clip_fps: float | None = None) -> None:
        self.path = path
        stamps: list[int | None] = []
        with self._open() as (container, stream):
            size = stream.codec_context.width * stream.codec_context.height
            for packet in container.demux(stream):  # one after another: together they are the whole file
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
            self.time_base = float(stream.time_base)
            self.rate = float(stream.average_rate or 0)
        known = sorted(stamp for stamp in stamps if stamp is not None)
        self.stamps = known if len(known) == len(stamps) else None  # some AVI files have none
        if size > MAX_PIXELS or size * len(stamps) > MAX_VIDEO_PIXELS:
            raise ValueError(
                f"{path} has {len(stamps)} frames of {size} pixels; at most {MAX_PIXELS} a frame and {MAX_VIDEO_PIXELS} "
                "together are decoded. Scale it down or cut it."
            )
        super().__init__(str(path), len(stamps), clip_fps)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Open the file; whatever FFmpeg finds wrong, also later, is a ValueError that names the file."""
        try:
            import av
        except ImportError as error:
            raise ImportError(
                f"{self.path} is a video, which PyAV decodes: pip install av. Without it, give a folder of pictures, "
                "an animated picture or a .npy array."
            ) from error
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        try:
            with av.open(str(self.path.resolve()), options=options) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path} holds no video stream.")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.path} is no video that can be decoded: {error}") from error

    def own_times(self) -> np.ndarray | None:
        """Return the seconds that the file states, (F,), or None."""
        if self.stamps is not None:
            return (np.array(self.stamps) - self.stamps[0]) * self.time_base
        return np.arange(len(self)) / self.rate if self.rate else None

    def _decode(self, step: int) -> Iterator[Any]:
        with self._open() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index >= len(self):
                    return
                if index % step == 0:
                    yield frame

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first."""
        return (_upright(frame.to_image(), frame) for frame in self._decode(step))

    def shrink(self, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th frame as (S, S) uint8 grey, made small before it becomes a picture."""
        for frame in self._decode(step):
            small = frame.reformat(width=SIDE, height=SIDE, format="rgb24", interpolation="AREA")
            yield shrink(_upright(small.to_image(), frame))

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at these places, going to each from the key frame before it where the file has time stamps."""
        self.check_places(indices)
        if self.stamps is None:
            return super().pictures(indices)
        with self._open() as (container, stream):
            return [self._at(container, stream, self.stamps[index], index) for index in indices]

    def _at(self, container: Any, stream: Any, stamp: int, index: int) -> Image.Image:
        container.seek(stamp, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= stamp:
                return _upright(frame.to_image(), frame)
        raise ValueError(f"{self.path} ends before its frame {index}, though it states {len(self)} frames.")


def _upright(picture: Image.Image, frame: Any) -> Image.Image:
    """Turn a picture as the file asks, degrees counter-clockwise: telephones film on their side."""
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
