"""Clips out of files: a folder of pictures, an animated GIF, WEBP or PNG, a multi-page TIFF, a .npy array.

Pictures pass through the rules of hfcustom/data/images.py; nothing is unpickled. A video is in video.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfcustom.data.frames.clip import Clip, memory_clip
from hfcustom.data.frames.video import SUFFIXES, VideoClip
from hfcustom.data.images import FORMATS, MAX_PIXELS, load_image, to_rgb

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ANIMATED = ("GIF", "PNG", "TIFF", "WEBP")
MAX_ANIMATION_PIXELS = 100 * MAX_PIXELS  # over all frames: 4,300 of 1920 x 1080


def open_clip(path: str | Path, clip_fps: float | None = None) -> Clip:
    """Open a folder of pictures (in natural order: 2 before 10), an animated picture, a .npy array, or a video.

    `clip_fps` is the frame rate where the source states none, and wins where it does. Raises ValueError for what is no
    readable clip, FileNotFoundError for a missing file, ImportError naming the package that decodes videos.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if "://" in str(path) or re.match(r"\w{2,}:/", str(path)):
        raise ValueError(f"Clip {str(path)!r} is a URL; none is fetched. Download it and give the path.")
    if path.is_dir():
        return FolderClip(path, clip_fps)
    if not path.is_file():
        raise FileNotFoundError(f"Clip {str(path)!r} is no file and no folder.")
    if suffix == ".npy":
        return memory_clip(_load_array(path), clip_fps, str(path))
    if suffix in PICTURES:
        return AnimationClip(path, clip_fps)
    if suffix in SUFFIXES:
        return VideoClip(path, clip_fps)
    known = ", ".join((*PICTURES, ".npy", *SUFFIXES))
    raise ValueError(f"Clip {str(path)!r} has no suffix of a clip; give a folder of pictures, or one of {known}.")


def _load_array(path: Path) -> np.ndarray:
    """Map an array into memory, which reads of it what is looked at."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no .npy array of numbers: {error}") from error


def _count(image: Any) -> int:
    """Return how many frames a picture file has."""
    return int(image.n_frames) if image.format in ANIMATED else 1


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a sorting key by which frame_2 comes before frame_10."""
    words = re.split(r"([0-9]+)", path.name)
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word.lower()) for word in words] + [(2, 0, path.name)]


class FolderClip(Clip):
    """The pictures of a folder, one a frame; other files are passed over."""

    def __init__(self, folder: Path, clip_fps: float | None = None) -> None:
        files = (file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.name[0] != ".")
        self.folder, self.files = folder, sorted(files, key=natural)
        if not self.files:
            raise ValueError(f"The folder {folder} holds no picture ({', '.join(PICTURES)}).")
        super().__init__(str(folder), len(self.files), clip_fps)

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first."""
        return (load_image(file.name, self.folder) for file in self.files[::step])

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at these places; no other one is touched."""
        self.check_places(indices)
        return [load_image(self.files[index].name, self.folder) for index in indices]


class AnimationClip(Clip):
    """The frames of one picture file; times are those that the file states, if it states any."""

    def __init__(self, path: Path, clip_fps: float | None = None) -> None:
        self.path = path
        with self._open() as image:
            num_frames = _count(image)
            pixels = num_frames * image.width * image.height
        if pixels > MAX_ANIMATION_PIXELS:
            raise ValueError(
                f"{path} has {num_frames} frames, {pixels} pixels together; at most {MAX_ANIMATION_PIXELS} are decoded. "
                "Make it smaller or cut it."
            )
        super().__init__(str(path), num_frames, clip_fps)

    def _open(self) -> Image.Image:
        try:
            image = Image.open(self.path, formats=FORMATS)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.path} is no readable {'/'.join(FORMATS)} picture: {error}") from error
        self._check_size(image)
        return image

    def _check_size(self, image: Image.Image) -> None:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise ValueError(f"{self.path} has {size} pixels; at most {MAX_PIXELS} are decoded.")

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        """Yield every `step`-th frame, from the first."""
        return (to_rgb(image) for image in self._seek(step))

    def _seek(self, step: int) -> Iterator[Image.Image]:
        """Yield the opened file at each `step`-th frame, decoded."""
        with self._open() as image:
            for index in range(0, len(self), step):
                try:
                    image.seek(index)
                    self._check_size(image)  # pages of a TIFF have sizes of their own
                    image.load()
                except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
                    raise ValueError(f"{self.path}: frame {index} cannot be decoded: {error}") from error
                yield image

    def own_times(self) -> np.ndarray | None:
        """Return the seconds that the file states, (F,), or None."""
        shown = [float(image.info.get("duration", 0)) / 1000 for image in self._seek(1)]
        return np.cumsum([0.0, *shown[:-1]]) if sum(shown) else None
