"""One image loader: from a PIL image, bytes, or a path below an allowed folder, to upright 8-bit RGB.

Only raster formats are opened (never one for which Pillow would start another program), pixels and shape are checked from
the header, before anything is decoded, and nothing is fetched but by the function that the rows bring
(hfcustom/data/downloads.py). Of several frames the first is taken; what was left out or
ignored goes with the image as notes.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
KEEPER: ContextVar[Any] = ContextVar("keeper", default=None)  # hfcustom/cache/lazy.py, while a run has a cache
MAX_PIXELS = 89_478_485  # Pillow's own warning level, a third of a GiB as RGB
MAX_BYTES = 2**29  # of a file
MAX_ASPECT = 200  # of the sides; Qwen's processors refuse more, so no family gets more
Fetch = Callable[[str], bytes]  # of an address its bytes; ImageError where they may not or cannot be had
ORIENTATION = 0x0112  # the EXIF tag
NOTES = "hfcustom_notes"  # key in Image.info


class ImageError(ValueError):
    """An image that cannot be used; `code` is the reason in one word."""

    def __init__(self, message: str, code: str = "undecodable") -> None:
        super().__init__(message)
        self.code = code


class Note(NamedTuple):
    """What a loaded image lacks of its source: a code, and the words."""

    code: str
    text: str


def load_image(source: Any, root: Path | None = None, fetch: Fetch | None = None) -> Image.Image:
    """Return an upright RGB image from a PIL image, bytes, {"bytes": ..., "path": ...}, a path below `root` or a data: URL.

    Other URLs are for `fetch`, without which they are refused. Raises ImageError, a ValueError, for a source of another kind,
    an image that cannot be decoded, has too many pixels or too extreme a shape, and a path outside `root`; FileNotFoundError
    for a missing file.
    """
    if (keeper := KEEPER.get()) is not None:
        return keeper(source, root, fetch)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        check_size(source, "the image")
        return _convert(source, "the image")
    if isinstance(source, bytes):
        return decode_image(io.BytesIO(source), "image bytes")
    if isinstance(source, str) and is_url(source):
        return decode_image(io.BytesIO(read_url(source, fetch)), f"image {source!r:.200}")
    if isinstance(source, str | Path):
        path = resolve_path(str(source), root)
        with open_regular(path) as file:
            return decode_image(file, str(path))
    raise ImageError(
        f"An image is a PIL image, bytes or a path, not {type(source).__name__} ({source!r:.80}).", "no_image"
    )


def notes_of(image: Image.Image) -> tuple[Note, ...]:
    """Return what the loader left out of an image, such as further frames."""
    notes: tuple[Note, ...] = image.info.get(NOTES, ())
    return notes


# ---- URLs -----------------------------------------------------------------------------------------------------------


def is_url(source: str) -> bool:
    """Whether a string is no path: it names a scheme, or holds the image itself."""
    return "://" in source or source[:5].lower() == "data:"


def read_url(url: str, fetch: Fetch | None) -> bytes:
    """Return the bytes that a data: URL holds, or that `fetch` returns for another one."""
    if url[:5].lower() == "data:":
        return _inline(url)
    if fetch is not None:
        return fetch(url)
    if url.lower().startswith(("http://", "https://")):
        cure = "Name its host in image_hosts (--image-hosts) if you trust it, or download it and give the path."
    else:
        cure = "Give the path of a file."
    raise ImageError(f"Image {url!r:.200} is a URL; none is fetched. {cure}", "url")


def _inline(url: str) -> bytes:
    """Return what a URL of the form data:image/png;base64,... holds."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"Image {url!r:.80} is no 'data:image/png;base64,...'; encode its bytes so.", "url")
    if len(data) > MAX_BYTES:
        raise ImageError(f"Image {url!r:.80} has {len(data)} characters; at most {MAX_BYTES} are read.", "enormous")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ImageError(f"Image {url!r:.80} is no base64: {error}. Encode its bytes anew.", "url") from error


# ---- files ----------------------------------------------------------------------------------------------------------


def resolve_path(source: str, root: Path | None) -> Path:
    """Return the real path of an image file, which must be below `root`; without a root no path is read."""
    if is_url(source):
        raise ImageError(f"{source!r:.200} is a URL; none is fetched. Download it and give the path.", "url")
    if root is None:
        raise ImageError(
            f"Image {source!r:.200} is a path, but these rows have no folder of their own; pass the image.", "outside"
        )
    try:
        root = root.resolve()
        path = (root / source).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL in it
        raise ImageError(
            f"Image {source!r:.200} is no path that can be followed: {error!s:.200}", "missing"
        ) from error
    if not path.is_relative_to(root):
        raise ImageError(
            f"Image {source!r:.200} lies outside {root}, the folder of its data set; move it below, or name the folder of the "
            "images as image_root.",
            "outside",
        )
    if not is_file:
        raise FileNotFoundError(
            f"Image {source!r:.200} is no file below {root}; the folder of the images can be named as image_root."
        )
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a file that is one: no link put there meanwhile, no pipe that would never end; ImageError for a huge one."""
    flags = os.O_RDONLY | (os.O_NOFOLLOW | os.O_NONBLOCK if os.name == "posix" else 0)
    file = os.fdopen(os.open(path, flags), "rb")
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES:
        return file
    file.close()
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path} is no regular file, so it is not read.", "missing")
    raise ImageError(f"{path} has {found.st_size} bytes; at most {MAX_BYTES} are read. Shrink the image.", "enormous")


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """Return the image of an open file; ImageError for what is none of FORMATS, or of a size that is not read."""
    kinds = "/".join(FORMATS)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is no readable {kinds} image: {error}", "enormous") from error
    except Exception as error:  # damaged data makes Pillow raise almost anything
        file.seek(0)
        begins = f"its first bytes are {start!r}" if (start := file.read(16)) else "it is empty"
        detail = begins if isinstance(error, UnidentifiedImageError) else f"{error!s:.200} ({begins})"
        raise ImageError(f"{name} is no readable {kinds} image: {detail}") from error
    with image:
        check_size(image, name)
        return _convert(image, name)


def check_size(image: Image.Image, name: str) -> None:
    """Refuse what is too large to decode, or of a shape that some processor cannot read."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels; at most {MAX_PIXELS} are decoded. Shrink it.", "enormous"
        )
    if not width or not height:
        raise ImageError(f"{name} has {width}x{height} pixels, so there is nothing to see; drop it.", "tiny")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} has {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other, which is what all "
            "families can read. Cut it, or put it on a wider ground.",
            "aspect",
        )


# ---- pixels ---------------------------------------------------------------------------------------------------------


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image into upright RGB with its notes; ImageError where its data is damaged."""
    try:
        image.load()
        notes = _frames_dropped(image)
        rgb = to_rgb(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}", error.code) from error
    except Exception as error:  # damaged data makes Pillow raise almost anything
        raise ImageError(
            f"{name} is no readable {'/'.join(FORMATS)} image, its data is damaged: {error!s:.200}", "damaged"
        ) from error
    rgb.info = {NOTES: (*notes, *notes_of(rgb))} if notes or notes_of(rgb) else {}
    return rgb


def _frames_dropped(image: Image.Image) -> list[Note]:
    """Say when there are further frames; only headers are asked, since counting a million takes seconds."""
    # of a JPEG (MPO), the further pictures are previews and depth
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []
    count = f"{image.n_frames} frames" if image.format in ("PNG", "WEBP") else "more than one frame"  # type: ignore[attr-defined]
    return [Note("animated", f"{count}, of which the first is used and the others are dropped")]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright 8-bit RGB copy: EXIF rotation applied, transparency on white, 16-bit values scaled down.

    Colours are those of the image's colour profile, as sRGB.
    """
    image, notes = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    else:
        profile = image.info.get("icc_profile")
        if image.mode in ("LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode not in ("CMYK", "L", "RGB", "RGBA"):
            image = image.convert("RGB")
        if profile:
            image, more = _apply_profile(image, profile)
            notes += more
        rgb = _on_white(image) if image.mode == "RGBA" else image.convert("RGB")
    rgb.info = {**rgb.info, NOTES: tuple(notes)}
    return rgb


def _upright(image: Image.Image) -> tuple[Image.Image, list[Note]]:
    """Return an image turned as its EXIF says; EXIF that cannot be read turns nothing, as in every viewer."""
    image.load()  # TIFF turns itself
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # damaged data makes Pillow raise almost anything
        return image.copy(), [Note("damaged_exif", f"EXIF that cannot be read ({error!s:.80}), so it is not turned")]
    method = TURNS.get(orientation) if isinstance(orientation, int) else None
    return (image.copy() if method is None else image.transpose(method)), []


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, list[Note]]:
    """Return an image as sRGB; a profile that is damaged or of another kind of image is ignored, as in browsers."""
    transform = _to_srgb(profile, image.mode)
    if transform is None:
        return image, []
    if isinstance(transform, str):
        return image, [Note("damaged_profile", f"a colour profile that cannot be used ({transform}); it is ignored")]
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted, []


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """Return the transform of a profile to sRGB, None for sRGB itself, or why there is none."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        # lcms's shortcut for gray is off by 10 of 255 where it is dark
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target, flags=flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        return f"{error!s:.80}"


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit integers by 1/257, wider ones and floats from their own 0..1 or 0..255 or 0..65535 range."""
    if not np.isfinite(values).all():
        raise ImageError("The image holds values that are not finite numbers; replace them.", "not_finite")
    top = float(values.max(initial=0))
    scale = (
        255.0 if top <= 1.0 and values.dtype.kind == "f" else 1.0 if top <= 255 and values.itemsize > 2 else 1 / 257
    )
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


TURNS = {  # EXIF's orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
