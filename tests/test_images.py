"""The image loader: what it opens, what it refuses and how it says so, and that pixels come out right."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from hfcustom.data.images import FORMATS, MAX_PIXELS, load_image

ORIENTATION = 0x0112
LOSSLESS = [name for name in FORMATS if name not in ("GIF", "JPEG")]


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source: Any, root: Path | None = None) -> list[Any]:
    """Return a loaded image as nested lists, having checked its form."""
    image = load_image(source, root)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def png_of_size(width: int, height: int) -> bytes:
    """Return a 1-bit PNG of a few bytes whose header promises any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set's folder with images and links, and an image beside it."""
    folder = tmp_path / "rows"
    (folder / "sub").mkdir(parents=True)
    picture(1).save(folder / "in.png")
    picture(2).save(folder / "sub" / "deep.png")
    picture(3).save(tmp_path / "outside.png")
    (folder / "link_in.png").symlink_to("in.png")
    (folder / "link_out.png").symlink_to(tmp_path / "outside.png")
    (folder / "link_folder").symlink_to(tmp_path)
    (folder / "text.png").write_text("not an image")
    return folder


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_pil_image_bytes_and_a_mapping_give_the_same_pixels(kind: str) -> None:
    expected = np.asarray(picture()).tolist()
    data = encode(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(picture()) == expected
    assert pixels(data) == expected
    assert pixels({"bytes": data, "path": None}) == expected
    assert pixels({"bytes": data, "path": "https://example.org/no_matter.png"}) == expected


@pytest.mark.parametrize("kind", ["GIF", "JPEG"])
def test_lossy_formats_open(kind: str) -> None:
    assert load_image(encode(picture(), kind)).size == picture().size


@pytest.mark.parametrize(
    ("source", "seed"),
    [
        ("in.png", 1),
        (Path("in.png"), 1),
        ({"bytes": None, "path": "in.png"}, 1),
        ("sub/deep.png", 2),
        ("sub/../in.png", 1),
        ("link_in.png", 1),
        ("../rows/in.png", 1),
    ],
    ids=str,
)
def test_a_path_below_the_root_is_read(root: Path, source: Any, seed: int) -> None:
    assert pixels(source, root) == np.asarray(picture(seed)).tolist()


def test_an_absolute_path_below_the_root_is_read(root: Path) -> None:
    assert pixels(str(root / "in.png"), root) == pixels("in.png", root)


@pytest.mark.parametrize(
    "source", ["../outside.png", "sub/../../outside.png", "link_out.png", "link_folder/outside.png"]
)
def test_a_path_outside_the_root_is_refused(root: Path, source: str) -> None:
    with pytest.raises(
        ValueError, match=rf"Image '{source}' lies outside .*rows, the folder of its data set; move it"
    ):
        load_image(source, root)


def test_an_absolute_path_outside_the_root_is_refused(root: Path) -> None:
    for folder in (root, root / "sub"):
        with pytest.raises(ValueError, match="lies outside"):
            load_image(str(root.parent / "outside.png"), folder)


def test_a_folder_whose_name_begins_like_the_roots_is_outside(root: Path) -> None:
    (root.parent / "rows_too").mkdir()
    picture().save(root.parent / "rows_too" / "in.png")
    with pytest.raises(ValueError, match="lies outside"):
        load_image("../rows_too/in.png", root)


def test_a_path_without_a_root_is_refused_even_if_it_exists(root: Path) -> None:
    with pytest.raises(ValueError, match=r"is a path, but these rows have no folder of their own; pass the image"):
        load_image(str(root / "in.png"))


@pytest.mark.parametrize("source", ["missing.png", "sub", ""])
def test_what_is_no_file_names_the_value_and_the_folder(root: Path, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"Image '{source}' is no file below .*rows"):
        load_image(source, root)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a.png", "https://example.org/a.png", "ftp://host/a", "file:///a.png"]
)
@pytest.mark.parametrize("rooted", [True, False])
def test_a_url_is_refused_without_a_fetch(root: Path, url: str, rooted: bool, monkeypatch: Any) -> None:
    def no_socket(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", no_socket)
    for source in (url, {"bytes": None, "path": url}):
        with pytest.raises(ValueError, match=rf"Image '{url}' is a URL; none is fetched. Download it"):
            load_image(source, root if rooted else None)


@pytest.mark.parametrize(
    ("source", "kind"),
    [(None, "NoneType"), (3, "int"), ([1, 2], "list"), ({}, "NoneType"), ({"bytes": b""}, "NoneType")],
)
def test_a_source_of_another_kind_names_the_kinds_allowed(source: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"An image is a PIL image, bytes or a path, not {kind}"):
        load_image(source)


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"not an image", png_of_size(5, 5)[:20]])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"image bytes is no readable BMP/GIF/JPEG/PNG/TIFF/WEBP image"):
        load_image(data)


def test_a_file_that_is_no_image_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"rows/text.png is no readable BMP/.*/WEBP image"):
        load_image("text.png", root)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_image_is_refused(kind: str) -> None:
    data = encode(picture(size=(200, 200)), kind)
    with pytest.raises(ValueError, match="is no readable"):
        load_image(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "TGA", "PDF"])
def test_other_formats_are_refused_though_pillow_could_open_them(kind: str) -> None:
    assert kind not in FORMATS
    with pytest.raises(ValueError, match="is no readable"):
        load_image(encode(picture(), kind))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20_000, 20_000, r"is no readable .* image: Image size \(400000000 pixels\) exceeds limit"),
        (10_000, 9_000, rf"has 10000x9000 pixels; at most {MAX_PIXELS} are decoded"),
    ],
)
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int, message: str) -> None:
    data = png_of_size(width, height)
    assert len(data) < 100
    with pytest.raises(ValueError, match=message):
        load_image(data)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def gray(values: list[int]) -> list[Any]:
    return [[[value] * 3 for value in values]]


def array(values: list[float], dtype: str) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


GRAY = {
    "16-bit": (array([0, 257, 32896, 65535], "uint16"), [0, 1, 128, 255]),
    "16-bit, dark": (array([0, 255], "uint16"), [0, 1]),
    "16-bit, big-endian": (Image.frombytes("I;16B", (2, 1), b"\x00\xff\xff\xff"), [1, 255]),
    "32-bit, 16 used": (array([0, 257, 65535], "int32"), [0, 1, 255]),
    "32-bit, 8 used": (array([0, 1, 255], "int32"), [0, 1, 255]),
    "32-bit, negative": (array([-7, 255], "int32"), [0, 255]),
    "float of 0..1": (array([0, 0.2, 0.5, 1], "float32"), [0, 51, 128, 255]),
    "float of 0..255": (array([0, 1, 254.6], "float32"), [0, 1, 255]),
    "float of 0..65535": (array([0, 257, 65535], "float32"), [0, 1, 255]),
    "8-bit": (array([0, 7, 255], "uint8"), [0, 7, 255]),
    "1-bit": (Image.frombytes("1", (2, 1), b"\x40"), [0, 255]),
}


@pytest.mark.parametrize("name", GRAY)
def test_gray_of_any_depth_is_scaled_to_8_bits(name: str) -> None:
    image, expected = GRAY[name]
    assert pixels(image) == gray(expected)


@pytest.mark.parametrize(("name", "kind"), [("16-bit", "PNG"), ("16-bit, dark", "TIFF"), ("float of 0..1", "TIFF")])
def test_gray_of_any_depth_is_scaled_out_of_a_file_too(name: str, kind: str) -> None:
    image, expected = GRAY[name]
    assert pixels(encode(image, kind)) == gray(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_no_numbers_are_refused_not_painted_black(value: float) -> None:
    with pytest.raises(ValueError, match="values that are not finite numbers; replace them"):
        load_image(array([0.5, value], "float32"))


RED, WHITE = [255, 0, 0], [255, 255, 255]


def two_pixels(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    for at, value in enumerate(values):
        image.putpixel((at, 0), value)
    return image


def palette() -> Image.Image:
    image = two_pixels("P", 0, 1)
    image.putpalette([*RED, 0, 255, 0])
    return image


COLOURS = {
    "RGBA": (two_pixels("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), [RED, WHITE]),
    "RGBA, half": (two_pixels("RGBA", (255, 0, 0, 255), (0, 0, 0, 51)), [RED, [204] * 3]),
    "LA": (two_pixels("LA", (9, 255), (9, 0)), [[9] * 3, WHITE]),
    "palette PNG": (encode(palette(), "PNG", transparency=1), [RED, WHITE]),
    "palette GIF": (encode(palette(), "GIF", transparency=1), [RED, WHITE]),
    "opaque palette": (palette(), [RED, [0, 255, 0]]),
    "one transparent colour": (
        encode(two_pixels("RGB", (255, 0, 0), (9, 9, 9)), transparency=(9, 9, 9)),
        [RED, WHITE],
    ),
    "CMYK": (two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), [RED, WHITE]),
}


@pytest.mark.parametrize("name", COLOURS)
def test_transparency_is_laid_on_white_and_other_colour_spaces_become_rgb(name: str) -> None:
    source, expected = COLOURS[name]
    assert pixels(source) == [expected]


def test_a_cmyk_jpeg_opens() -> None:
    red, green, blue = pixels(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0][0]
    assert red > 250 and green < 5 and blue < 5


UPRIGHT = [[0, 40, 80], [120, 160, 200]]
STORED = {  # what a camera writes for each orientation so that a viewer shows UPRIGHT
    1: UPRIGHT,
    2: [[80, 40, 0], [200, 160, 120]],
    3: [[200, 160, 120], [80, 40, 0]],
    4: [[120, 160, 200], [0, 40, 80]],
    5: [[0, 120], [40, 160], [80, 200]],
    6: [[80, 200], [40, 160], [0, 120]],
    7: [[200, 80], [160, 40], [120, 0]],
    8: [[120, 0], [160, 40], [200, 80]],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.array(STORED[orientation], dtype=np.uint8)).convert("RGB")
    loaded = load_image(encode(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.asarray(loaded)[:, :, 0].tolist() == UPRIGHT
    assert loaded.getexif().get(ORIENTATION, 1) == 1


def test_the_callers_image_is_left_as_it_is() -> None:
    image = two_pixels("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    load_image(image).putpixel((0, 0), (1, 2, 3))
    rgb = picture()
    load_image(rgb).putpixel((0, 0), (1, 2, 3))
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255, 0, 0, 255)
    assert np.array_equal(np.asarray(rgb), np.asarray(picture()))
