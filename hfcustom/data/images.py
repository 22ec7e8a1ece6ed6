"""One image loader: from a PIL image, bytes, or a path below an allowed folder, to upright 8-bit RGB.

Only raster formats are opened (never one for which Pillow would start another program), the pixel count is checked
before decoding, and no URL is fetched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
KEEPER: ContextVar[Any] = ContextVar("keeper", default=None)  # hfcustom/cache/lazy.py, while a run has a cache
MAX_PIXELS = 89_478_485  # Pillow's own warning level, a third of a GiB as RGB


def load_image(source: Any, root: Path | None = None) -> Image.Image:
    """Return an upright RGB image from a PIL image, bytes, {"bytes": ..., "path": ...} or a path below `root`.

    Raises ValueError for a source of another kind, an image that cannot be decoded or is too large, and a path
    outside `root`; FileNotFoundError for a missing file.
    """
    if (keeper := KEEPER.get()) is not None:
        return keeper(source, root)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "image bytes")
    if isinstance(source, str | Path):
        path = resolve_path(str(source), root)
        return _decode(path, str(path))
    raise ValueError(f"An image is a PIL image, bytes or a path, not {type(source).__name__} ({source!r:.80}).")


def resolve_path(source: str, root: Path | None) -> Path:
    """Return the real path of an image file, which must be below `root`; without a root no path is read."""
    if "://" in source:
        raise ValueError(f"Image {source!r} is a URL; none is fetched. Download it and give the path.")
    if root is None:
        raise ValueError(f"Image {source!r} is a path, but these rows have no folder of their own; pass the image.")
    root = root.resolve()
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"Image {source!r} lies outside {root}, the folder of its data set; move it below.")
    if not path.is_file():
        raise FileNotFoundError(f"Image {source!r} is no file below {root}.")
    return path


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded.")
            return to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no readable {'/'.join(FORMATS)} image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright 8-bit RGB copy: EXIF rotation applied, transparency on white, 16-bit values scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit integers by 1/257, wider ones and floats from their own 0..1 or 0..255 or 0..65535 range."""
    if not np.isfinite(values).all():
        raise ValueError("The image holds values that are not finite numbers; replace them.")
    top = float(values.max(initial=0))
    scale = (
        255.0 if top <= 1.0 and values.dtype.kind == "f" else 1.0 if top <= 255 and values.itemsize > 2 else 1 / 257
    )
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
