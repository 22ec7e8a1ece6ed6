"""A contact sheet: a block a method, its frames with place and time under each, and where they lie in the clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8  # frames side by side
THUMB = (112, 84)  # pixels that a frame is made to fit
LABEL, GAP, CAPTION, BAR = 138, 6, 16, 12  # width of the names, space, height of a caption and of the line of the clip
INK, GREY, PICK = "#1b1b1b", "#767676", "#c1121f"
SHADES = ("#dfe3e8", "#b4bcc6")  # scenes, in turn


@dataclass(frozen=True)
class Row:
    """What one method chose: its name, lines of facts, and the places of its frames."""

    name: str
    facts: Sequence[str]
    indices: Sequence[int]


def contact_sheet(
    title: str,
    rows: Sequence[Row],
    pictures: Mapping[int, Image.Image],
    num_frames: int,
    times: np.ndarray | None = None,
    cuts: Sequence[int] = (),
) -> Image.Image:
    """Return the picture; `pictures` holds every frame that a row names, `cuts` the first frame of each scene."""
    thumbs = {index: _thumb(picture) for index, picture in pictures.items()}
    height = max(40, *(thumb.height for thumb in thumbs.values()))  # room for the names beside it
    columns = min(COLUMNS, max(len(row.indices) for row in rows))
    line = height + CAPTION + GAP
    heights = [-(-len(row.indices) // columns) * line + BAR + 2 * GAP for row in rows]
    width = LABEL + max(columns * (THUMB[0] + GAP), 3 * THUMB[0])
    sheet = Image.new("RGB", (width, 30 + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 7), _fit(draw, title, width - 2 * GAP, 14), fill=INK, font=ImageFont.load_default(14))
    top = 30
    for row, block in zip(rows, heights, strict=True):
        _names(draw, row, top)
        for at, index in enumerate(row.indices):
            left = LABEL + at % columns * (THUMB[0] + GAP)
            _frame(sheet, thumbs[index], (left, top + at // columns * line), height, _caption(index, times))
        _clip_line(draw, (LABEL, top + block - BAR - 2 * GAP, width - GAP), row.indices, num_frames, cuts)
        top += block
    return sheet


def _thumb(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    scale = min(THUMB[0] / small.width, THUMB[1] / small.height)
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    return small.resize(size, Image.Resampling.LANCZOS)


def _caption(index: int, times: np.ndarray | None) -> str:
    if times is None:
        return f"{index}"
    minutes, seconds = divmod(float(times[index]), 60)
    return f"{index}   {minutes:.0f}:{seconds:05.2f}" if minutes else f"{index}   {seconds:.2f} s"


def _names(draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    draw.text((GAP, top), _fit(draw, row.name, LABEL - 2 * GAP, 14), fill=INK, font=ImageFont.load_default(14))
    for at, fact in enumerate(row.facts):
        draw.text((GAP, top + 20 + 16 * at), fact, fill=GREY, font=ImageFont.load_default(12))


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """Return a text, cut where it would not fit."""
    font = ImageFont.load_default(size)
    short = text
    while draw.textlength(short, font=font) > width:
        short = short.removesuffix("...")[:-1] + "..."
    return short


def _frame(sheet: Image.Image, thumb: Image.Image, corner: tuple[int, int], height: int, caption: str) -> None:
    left, top = corner
    sheet.paste(thumb, (left + (THUMB[0] - thumb.width) // 2, top + (height - thumb.height) // 2))
    middle = (left + THUMB[0] // 2, top + height + 2)
    ImageDraw.Draw(sheet).text(middle, caption, fill=INK, font=ImageFont.load_default(11), anchor="ma")


def _clip_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    indices: Sequence[int],
    num_frames: int,
    cuts: Sequence[int],
) -> None:
    """Draw the clip from its first frame to its last, scenes in two shades, with a mark at each frame that is chosen."""
    left, top, right = place
    scale = (right - left) / num_frames
    starts = list(cuts) or [0]
    for at, (start, stop) in enumerate(zip(starts, [*starts[1:], num_frames], strict=True)):
        draw.rectangle((left + start * scale, top, left + stop * scale, top + BAR), fill=SHADES[at % 2])
    for index in indices:
        x = left + (index + 0.5) * scale
        draw.rectangle((x - 1.5, top - 2, x + 1.5, top + BAR + 2), fill=PICK)
