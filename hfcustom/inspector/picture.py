"""A drawing of an inspection: the image with its tiles and tokens at the left, the views as the tower gets them at the right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from hfcustom.inspector.examine import Inspection
from hfcustom.inspector.views import Box, View
from hfcustom.inspector.words import plural

LEFT = (560, 620)  # pixels that the image is made to fit
RIGHT = (620, 620)  # and all views together
GAP, TOP, CAPTION = 24, 66, 22
INK, GREY, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"
COLOURS = ("#c1121f", "#1d6fb8", "#1a8754", "#b5651d", "#7b2cbf", "#00838f", "#c2185b", "#5d6d1e")
PADDING, STRIPE = "#e4e6ea", "#c6cad1"
Place = tuple[int, int, int, int]


def draw_inspection(found: Inspection, picture: Image.Image) -> Image.Image:
    """Return the drawing; `picture` is the image, in the size that was inspected."""
    left = _fit(picture.size, LEFT)
    panel, height = _views_panel(found, picture)
    large, small = ImageFont.load_default(24), ImageFont.load_default(17)
    name = found.name if len(found.name) <= 40 else "..." + found.name[-37:]
    beside = GAP + math.ceil(ImageDraw.Draw(picture).textlength(name, font=large)) + 14
    title = beside + math.ceil(ImageDraw.Draw(picture).textlength(_headline(found), font=small)) + GAP
    size = (
        max(3 * GAP + left[0] + panel.width, title),
        TOP + max(left[1] + len(_notes(found)) * CAPTION + 8, height) + GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 14), name, fill=INK, font=large)
    draw.text((beside, 20), _headline(found), fill=GREY, font=small)
    sheet.paste(_image_panel(found, picture, left), (GAP, TOP))
    for at, line in enumerate(_notes(found)):
        draw.text((GAP, TOP + left[1] + 8 + at * CAPTION), line, fill=GREY, font=ImageFont.load_default(14))
    sheet.paste(panel, (2 * GAP + left[0], TOP))
    return sheet


def _headline(found: Inspection) -> str:
    size = f"{found.size[0]} x {found.size[1]} pixels"
    if found.tokens is None:
        return f"{size}: one vector of {(found.encoder or {}).get('vector', 0)} numbers"
    rows, columns = found.grid
    tiles = plural(len(found.views), "view")
    if rows * columns > 1:
        tiles = f"{plural(rows, 'row')} x {plural(columns, 'column')} of tiles"
        tiles += f" + {found.overviews}" if found.overviews else ""
    return f"{size}: {tiles}, {plural(found.tokens.count, 'image token')}"


def _notes(found: Inspection) -> list[str]:
    notes = []
    if found.tokens is not None and found.tokens.queries:
        notes.append("no grid: each token is a query that reads every patch of a view")
    elif _grids(found):
        tiles = "thick lines: tiles; thin lines" if len(found.views) > 1 else "lines"
        notes.append(f"{tiles}: what a token stands for")
    if found.seen < 0.985:
        notes.append(f"{1 - found.seen:.0%} of the image, darkened, is cut off and never seen")
    return notes


def _grids(found: Inspection) -> list[tuple[int, int]]:
    grids = None if found.tokens is None else found.tokens.grids
    return [(rows, columns) for rows, columns in grids or []]


def _image_panel(found: Inspection, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image with its tiles; where there are none, with the tokens of the view that shows it."""
    scale = size[0] / picture.width
    panel = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    shade = Image.new("RGBA", size, (20, 20, 25, 165))
    for view in found.views:
        shade.paste((0, 0, 0, 0), _scaled(view.box, scale))
    panel = Image.alpha_composite(panel, shade)
    whole = [view for view in found.views if view.is_whole(found.size)] if len(found.views) > 1 else []
    tiles = [view for view in found.views if view not in whole] or found.views[:1]
    lines = Image.new("RGBA", size, (0, 0, 0, 0))
    for view in tiles:
        at = found.views.index(view)
        _token_lines(ImageDraw.Draw(lines), view, _grids(found)[at : at + 1], scale)
    panel = Image.alpha_composite(panel, lines)
    draw = ImageDraw.Draw(panel)
    for view in tiles if len(found.views) > 1 or found.seen < 0.985 else []:
        draw.rectangle(_scaled(view.box, scale), outline=_colour(found.views.index(view)), width=4)
        if len(found.views) > 1:
            _badge(draw, _scaled(view.box, scale), found.views.index(view))
    return panel.convert("RGB")


def _token_lines(draw: ImageDraw.ImageDraw, view: View, grid: Sequence[tuple[int, int]], scale: float) -> None:
    """Draw the grid of a view's tokens over the image: a view's pixels, padding too, laid over what they show."""
    if not grid:
        return
    (rows, columns), (left, top, right, bottom) = grid[0], view.box
    filled_left, filled_top, filled_right, filled_bottom = view.filled
    across = (right - left) / max(filled_right - filled_left, 1) * scale  # pixels of the drawing for one of the view
    down = (bottom - top) / max(filled_bottom - filled_top, 1) * scale
    box = _scaled(view.box, scale)
    for column in range(1, columns):
        x = left * scale + (view.size[0] * column / columns - filled_left) * across
        if box[0] < x < box[2]:
            draw.line((x, box[1], x, box[3]), fill=(255, 255, 255, 120))
    for row in range(1, rows):
        y = top * scale + (view.size[1] * row / rows - filled_top) * down
        if box[1] < y < box[3]:
            draw.line((box[0], y, box[2], y), fill=(255, 255, 255, 120))


def _views_panel(found: Inspection, picture: Image.Image) -> tuple[Image.Image, int]:
    """Return the views side by side, tiles as they lie in the image, and the height of that."""
    rows, columns = found.grid
    tiled = rows * columns == len(found.views) - found.overviews and rows * columns > 1
    columns = columns if tiled else min(len(found.views), 4)
    whole = [view for view in found.views if view.is_whole(found.size)] if tiled else []
    tiles = [view for view in found.views if view not in whole]
    lines = -(-len(tiles) // columns)
    width, height = max(view.size[0] for view in tiles), max(view.size[1] for view in tiles)
    room = (RIGHT[0] / columns - 8, (RIGHT[1] - CAPTION) / (lines + bool(whole)) - CAPTION - 8)
    scale = min(room[0] / width, room[1] / height, 1.0)
    step = (int(width * scale) + 8, int(height * scale) + CAPTION + 4)
    across = max(columns, len(whole))
    title = f"what the tower gets: {found.pixels}"
    least = math.ceil(ImageDraw.Draw(picture).textlength(title, font=ImageFont.load_default(14)))
    panel = Image.new("RGB", (max(across * step[0], least), CAPTION + (lines + bool(whole)) * step[1] + 10), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), title, fill=INK, font=ImageFont.load_default(14))
    for at, view in enumerate([*tiles, *whole]):
        line, column = divmod(at, columns) if at < len(tiles) else (lines, at - len(tiles))
        corner = (column * step[0], CAPTION + line * step[1] + (6 if line == lines and whole else 0))
        _paste_view(panel, found, picture, found.views.index(view), corner, scale)
    return panel, panel.height


def _paste_view(
    panel: Image.Image, found: Inspection, picture: Image.Image, at: int, corner: tuple[int, int], scale: float
) -> None:
    view = found.views[at]
    size = max(1, round(view.size[0] * scale)), max(1, round(view.size[1] * scale))
    tile = _stripes(size)
    place = _scaled(view.filled, scale)
    inside = max(1, place[2] - place[0]), max(1, place[3] - place[1])
    tile.paste(picture.convert("RGB").resize(inside, Image.Resampling.LANCZOS, box=view.box), place[:2])
    grid = _grids(found)[at : at + 1]
    if grid:
        lines = Image.new("RGBA", size, (0, 0, 0, 0))
        full = View((0, 0, view.size[0], view.size[1]), view.size, (0, 0, view.size[0], view.size[1]))
        _token_lines(ImageDraw.Draw(lines), full, grid, scale)
        tile = Image.alpha_composite(tile.convert("RGBA"), lines).convert("RGB")
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_colour(at), width=2)
    if len(found.views) > 1:
        _badge(draw, (0, 0, *size), at)
    panel.paste(tile, corner)
    said = f"{grid[0][0]} x {grid[0][1]} tokens" if grid else f"{view.size[0]} x {view.size[1]} px"
    ImageDraw.Draw(panel).text(
        (corner[0] + 1, corner[1] + size[1] + 3), said, fill=GREY, font=ImageFont.load_default(12)
    )


def _stripes(size: tuple[int, int]) -> Image.Image:
    """Return what padding looks like."""
    tile = Image.new("RGB", size, PADDING)
    draw = ImageDraw.Draw(tile)
    for x in range(-size[1], size[0], 9):
        draw.line((x, size[1], x + size[1], 0), fill=STRIPE, width=2)
    return tile


def _badge(draw: ImageDraw.ImageDraw, place: Place, at: int) -> None:
    """Write a view's number into its corner."""
    text, font = str(at + 1), ImageFont.load_default(14)
    width = math.ceil(draw.textlength(text, font=font)) + 9
    draw.rectangle((place[0], place[1], place[0] + width, place[1] + 19), fill=_colour(at))
    draw.text((place[0] + width / 2, place[1] + 2), text, fill=PAPER, font=font, anchor="ma")


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def _fit(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    scale = min(room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _scaled(box: Box, scale: float) -> Place:
    left, top, right, bottom = (round(value * scale) for value in box)
    return left, top, right, bottom
