"""The image loader: what it opens, what it refuses and how it says so, and that pixels come out right."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_corpus import encode, png
from conftest import picture
from PIL import Image

from hfcustom.data.images import FORMATS, MAX_BYTES, MAX_PIXELS, ImageError, load_image, notes_of

ORIENTATION = 0x0112
LOSSLESS = [name for name in FORMATS if name not in ("GIF", "JPEG")]


def pixels(source: Any, root: Path | None = None) -> list[Any]:
    """Return a loaded image as nested lists, having checked its form."""
    image = load_image(source, root)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


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


@pytest.mark.parametrize("url", ["http://127.0.0.1/a", "https://example.org/a", "ftp://host/a", "file:///a"])
@pytest.mark.parametrize("rooted", [True, False])
def test_a_url_is_refused_without_a_fetch(root: Path, url: str, rooted: bool, monkeypatch: Any) -> None:
    def no_socket(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", no_socket)
    for source in (url, {"bytes": None, "path": url}):
        cures = "(Name its host in image_hosts|Give the path)"
        with pytest.raises(ValueError, match=rf"Image '{url}' is a URL; none is fetched. {cures}"):
            load_image(source, root if rooted else None)


@pytest.mark.parametrize(
    ("source", "kind"),
    [(None, "NoneType"), (3, "int"), ([1, 2], "list"), ({}, "NoneType"), ({"bytes": b""}, "NoneType")],
)
def test_a_source_of_another_kind_names_the_kinds_allowed(source: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"An image is a PIL image, bytes or a path, not {kind}"):
        load_image(source)


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"not an image", png(5, 5)[:20]])
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
    data = png(width, height)
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


# ---- colour profiles ------------------------------------------------------------------------------------------------


def profile(space: bytes, name: str = "linear light") -> bytes:
    """Return an ICC profile of sRGB's primaries whose values are linear in light: of RGB or gray."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        primaries = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
        for letter, values in zip((b"r", b"g", b"b"), primaries, strict=True):
            tags |= {letter + b"XYZ": xyz(*values), letter + b"TRC": curve}
    tags = {tag: data + bytes(-len(data) % 4) for tag, data in tags.items()}
    start, table = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags))
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start, len(data))
        start += len(data)
    head = struct.pack(">I4sI4s4s4s", start, b"\0\0\0\0", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + b"".join(tags.values())


def encoded(values: np.ndarray) -> np.ndarray:
    """Return sRGB's values of light, 0..255 of both."""
    light = values / 255
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_colours_are_those_of_the_colour_profile(mode: str) -> None:
    image = picture(size=(16, 12)).convert(mode)
    expected = encoded(np.asarray(image.convert("RGB")).astype(float))
    space = b"GRAY" if mode == "L" else b"RGB "
    loaded = load_image(encode(image, icc_profile=profile(space)))
    assert np.abs(np.asarray(loaded) - expected).max() <= 2
    assert notes_of(loaded) == () and "icc_profile" not in loaded.info


def test_srgb_changes_nothing_and_a_profile_that_cannot_be_used_is_noted() -> None:
    image = picture(size=(16, 12))
    standard = load_image(encode(image, icc_profile=profile(b"RGB ", "sRGB of some kind")))
    assert np.array_equal(np.asarray(standard), np.asarray(image)) and notes_of(standard) == ()
    for wrong in (b"no profile", profile(b"GRAY"), profile(b"RGB ")[:200]):
        loaded = load_image(encode(image, icc_profile=wrong))
        assert np.array_equal(np.asarray(loaded), np.asarray(image))
        assert [note.code for note in notes_of(loaded)] == ["damaged_profile"]


# ---- frames, shapes, codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count"), [("GIF", "more than one frame"), ("PNG", "3 frames"), ("TIFF", "more than")]
)
def test_the_first_frame_is_taken_and_the_others_are_noted(kind: str, count: str) -> None:
    frames = [picture(at).quantize(16).convert("RGB") for at in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    loaded = load_image(data)
    assert np.array_equal(np.asarray(loaded), np.asarray(frames[0]))
    (note,) = notes_of(loaded)
    assert note.code == "animated" and count in note.text
    assert notes_of(load_image(encode(frames[0], kind))) == ()


def test_the_previews_in_a_photo_are_no_frames() -> None:
    data = encode(picture(), "MPO", save_all=True, append_images=[picture(1)])
    assert notes_of(load_image(data)) == ()


def test_exif_of_a_jpeg_turns_it_and_broken_exif_is_noted() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide = Image.new("RGB", (32, 16), "red")
    wide.paste("blue", (0, 0, 16, 16))
    loaded = np.asarray(load_image(encode(wide, "JPEG", exif=exif))).astype(int)
    assert loaded.shape == (32, 16, 3) and loaded[4, 8, 2] > 200 and loaded[28, 8, 0] > 200
    broken = load_image(encode(wide, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert broken.size == (32, 16)


@pytest.mark.parametrize(("size", "good"), [((200, 1), True), ((201, 1), False), ((5, 1001), False), ((0, 4), False)])
def test_a_side_may_be_two_hundred_times_the_other(size: tuple[int, int], good: bool) -> None:
    image = Image.new("RGB", size)
    if good:
        assert load_image(image).size == size
    else:
        with pytest.raises(ImageError, match=rf"the image has {size[0]}x{size[1]} pixels"):
            load_image(image)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(root: Path) -> None:
    with (root / "sparse.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match=rf"has {MAX_BYTES + 1} bytes; at most {MAX_BYTES} are read") as caught:
        load_image("sparse.png", root)
    assert caught.value.code == "enormous"


# ---- what would hang, or fill the memory: in a process of its own ---------------------------------------------------

BOMBS = """
import resource, sys
from pathlib import Path
from hfcustom.data.images import load_image, open_regular

folder = Path(sys.argv[1])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    try:
        load_image(name, folder)
    except (ValueError, OSError) as error:
        print(type(error).__name__, flush=True)
try:
    open_regular(folder / "pipe.png")  # as if it had been put there after the path was checked
except ValueError as error:
    print(error, flush=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def test_bombs_cost_no_memory_and_pipes_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    pixels = zlib.compressobj(1)
    data = b"".join(pixels.compress(bytes(2501)) for _ in range(20_000)) + pixels.flush()
    text = (b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))
    bomb = (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(300_000_000)))
    for name, content in {
        "large": png(20_000, 20_000, data=data),
        "text": png(9, 9, *[text] * 200),
        "one_text": png(9, 9, bomb),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    names = ["large.png", "text.png", "one_text.png", "pipe.png", "zero.png", "/dev/zero", "."]
    command = [sys.executable, "-c", BOMBS, str(tmp_path), *names]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    *errors, said, megabytes = child.stdout.splitlines()
    assert len(errors) == len(names), child.stdout + child.stderr
    assert said.endswith("pipe.png is no regular file, so it is not read.")
    assert int(megabytes) < 50
