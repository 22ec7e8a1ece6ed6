"""One video of a row -> at most `max_frames` of its frames, as upright RGB images.

A video is a list of frames (each what the image loader takes), or the path or bytes of an animated picture or a video file
(hfcustom/data/frames/files.py); which frames are seen is for a method of hfcustom/data/frames/. Files are read below the data
set's folder only, as images are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.data.frames import Clip, open_clip, select_frames
from hfcustom.data.frames import find_selector as find_frame_method
from hfcustom.data.images import Fetch, load_image, resolve_path

HEAD = 12  # bytes that tell a container
MATROSKA = b"\x1a\x45\xdf\xa3"


@dataclass(frozen=True)
class VideoOptions:
    """How many frames of a video are seen, which ones, and whether as a video or as images."""

    max_frames: int = 8
    method: str = "uniform"
    as_images: bool = False

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"max_frames={self.max_frames} must be positive.")
        find_frame_method(self.method)  # an unknown one is an error here, not at the first video


VIDEO_DEFAULTS = VideoOptions()


def load_video(
    source: Any, root: Path | None = None, options: VideoOptions = VIDEO_DEFAULTS, fetch: Fetch | None = None
) -> Frames:
    """Return the chosen frames of a video: a list of frames, bytes, {"bytes": ..., "path": ...} or a path below `root`.

    Frames may be URLs for `fetch`, a video file may not. Raises ValueError for a source of another kind, an empty or undecodable video and a path outside `root`,
    FileNotFoundError for a missing file, ImportError where the package that decodes such a file is missing.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, list | tuple):
        return _choose(ListClip(source, root, fetch), options)
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(suffix=_suffix(source[:HEAD])) as file:
            file.write(source)
            file.flush()
            return _choose(open_clip(file.name), options)
    if isinstance(source, str | Path):
        return _choose(open_clip(resolve_path(str(source), root)), options)
    raise ValueError(
        f"A video is a list of frames, bytes or a path, not {type(source).__name__} ({source!r:.80}); give its frames as "
        "images or paths."
    )


def _choose(clip: Clip, options: VideoOptions) -> Frames:
    indices = select_frames(clip, options.method, options.max_frames)
    length = float(clip.times[-1] - clip.times[0]) if clip.times is not None else 0.0
    frames = Frames(clip.pictures(indices))
    if length > 0:
        frames.fps, frames.indices, frames.total = (len(clip) - 1) / length, indices, len(clip)
    return frames


def _suffix(head: bytes) -> str:
    """Return the suffix of a file that begins so; what is no video is taken for an animated picture."""
    if head[4:8] == b"ftyp":
        return ".mp4"
    if head[:4] == MATROSKA:
        return ".mkv"
    return ".avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else ".gif"


class Frames(list[Image.Image]):
    """The chosen frames of a video, and where they lie in it; those of one without times count as a frame a second."""

    def __init__(self, frames: Iterable[Image.Image]) -> None:
        super().__init__(frames)
        self.fps = 1.0  # of the whole video
        self.indices = list(range(len(self)))
        self.total = len(self)


class ListClip(Clip):
    """Frames that a row lists, each what the image loader takes, of which only those that are looked at are loaded."""

    def __init__(self, sources: Sequence[Any], root: Path | None, fetch: Fetch | None = None) -> None:
        super().__init__("the video", len(sources))
        self.sources, self.root, self.fetch = sources, root, fetch

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first."""
        return (load_image(source, self.root, self.fetch) for source in self.sources[::step])

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at these places; no other one is touched."""
        self.check_places(indices)
        return [load_image(self.sources[index], self.root, self.fetch) for index in indices]
