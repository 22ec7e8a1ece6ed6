"""One video -> at most `max_frames` of its frames, as upright RGB images.

A video is a list of frames (each what the image loader takes), an animated GIF, WebP, PNG or TIFF, or an MP4, MOV, Matroska,
WebM or AVI file (optional package av). Files are read below the data set's folder only, as images are; the container is
told by its first bytes, so that no demuxer that opens other files or addresses (playlists) is ever started.
Letters: F frames.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from hfcustom.data.images import MAX_PIXELS, load_image, resolve_path, to_rgb

ANIMATED = ("GIF", "PNG", "TIFF", "WEBP")
HEAD = 12  # bytes that tell a container


@dataclass(frozen=True)
class VideoOptions:
    """How many frames of a video are seen, and whether as a video or as images."""

    max_frames: int = 8
    as_images: bool = False

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"max_frames={self.max_frames} must be positive.")


VIDEO_DEFAULTS = VideoOptions()


def load_video(source: Any, root: Path | None = None, options: VideoOptions = VIDEO_DEFAULTS) -> list[Image.Image]:
    """Return the chosen frames of a video: a list of frames, bytes, {"bytes": ..., "path": ...} or a path below `root`.

    Raises ValueError for a source of another kind, an empty or undecodable video and a path outside `root`,
    FileNotFoundError for a missing file, ImportError where the package that decodes such a file is missing.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("A video without frames; drop its block.")
        return [load_image(source[at], root) for at in choose_frames(len(source), options.max_frames)]
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "video bytes", options)
    if isinstance(source, str | Path):
        path = resolve_path(str(source), root)
        with path.open("rb") as file:
            return _decode(file, str(path), options)
    raise ValueError(
        f"A video is a list of frames, bytes or a path, not {type(source).__name__} ({source!r:.80}); give its frames as "
        "images or paths."
    )


def choose_frames(num_frames: int, max_frames: int) -> list[int]:
    """Return the indices of at most `max_frames` frames: the middles of as many stretches of equal length."""
    count = min(num_frames, max_frames)
    return [(2 * at + 1) * num_frames // (2 * count) for at in range(count)]


def _decode(file: Any, name: str, options: VideoOptions) -> list[Image.Image]:
    head = file.read(HEAD)
    file.seek(0)
    container = _container(head)
    if container is not None:
        return _decode_container(file, name, container, options.max_frames)
    try:
        return _decode_animation(file, name, options.max_frames)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} is no readable video: neither MP4, MOV, Matroska, WebM or AVI, nor an animated "
            f"{'/'.join(ANIMATED)} ({error})."
        ) from error


def _container(head: bytes) -> str | None:
    """Return the container that the first bytes tell, by the name of its demuxer."""
    if head[4:8] == b"ftyp":
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else None


def _decode_animation(file: Any, name: str, max_frames: int) -> list[Image.Image]:
    with Image.open(file, formats=ANIMATED) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded.")
        total = getattr(image, "n_frames", 1)  # formats without animation lack it
        chosen = choose_frames(total, max_frames)
        return _pick(ImageSequence.Iterator(image), chosen, to_rgb)


def _pick(frames: Iterator[Any], chosen: Sequence[int], convert: Any) -> list[Image.Image]:
    """Return the chosen frames, converted; formats store a frame as its difference from the last, so all are passed."""
    wanted, found = set(chosen), []
    for at, frame in enumerate(frames):
        if at in wanted:
            found.append(convert(frame))
        if at >= chosen[-1]:
            break
    return found


def _decode_container(file: Any, name: str, container: str, max_frames: int) -> list[Image.Image]:
    """Decode with PyAV, https://pyav.org; a first pass counts the frames, since headers may not say or be wrong."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{name} is a video file: pip install av decodes it. Or give the frames as a list of images, or a GIF."
        ) from error
    try:
        with av.open(file, format=container) as video:
            total = sum(1 for _ in video.decode(video=0))
        if not total:
            raise ValueError(f"{name} holds no frame.")
        file.seek(0)
        with av.open(file, format=container) as video:
            return _pick(
                video.decode(video=0), choose_frames(total, max_frames), lambda frame: to_rgb(frame.to_image())
            )
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{name} is no readable video: {error}") from error
