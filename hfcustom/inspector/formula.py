"""The number of an image's tokens as a formula of its size, found among kinds of formulas and kept only if it is right.

Each kind is tried with every parameter that could be meant; what does not give the counts that the processor wrote, for every
size that was tried, is not shown. Where tiles come from is found in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfcustom.inspector.record import Size
from hfcustom.inspector.views import Look

SIZES: tuple[Size, ...] = (
    (800, 1300),
    (1300, 800),
    (224, 224),
    (640, 480),
    (480, 640),
    (2000, 2000),
    (1920, 1080),
    (1600, 400),
    (300, 1000),
    (90, 60),
)


@dataclass(frozen=True)
class Count:
    """What a picture of one size took."""

    size: Size
    tokens: int
    look: Look
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Formula:
    """A formula in words and numbers, and what it gives for a picture."""

    text: str
    predict: Callable[[Count], int]
    grids: Callable[
        [Count], list[tuple[int, int]] | None
    ]  # rows and columns of the tokens of each view; None where unknown

    def fits(self, counts: Sequence[Count]) -> bool:
        """Whether it is right for every size."""
        return all(self.predict(count) == count.tokens for count in counts)


def find_formula(counts: Sequence[Count]) -> Formula | None:
    """Return the simplest formula that is right for every size, None where none is."""
    for kind in (_constant, _by_view, _by_pixels, _with_newlines):
        for formula in kind(counts):
            if formula.fits(counts):
                return formula
    return None


def _constant(counts: Sequence[Count]) -> Iterator[Formula]:
    tokens = counts[0].tokens
    views = len(counts[0].look.views)
    if all(len(count.look.views) == views for count in counts) and tokens % views == 0 and views > 1:
        text = f"{tokens} = {views} views x {tokens // views}, whatever the size"
    else:
        text = f"{tokens}, whatever the size"
    yield Formula(
        text, lambda _: tokens, lambda count: _even_grids(count, tokens // views if tokens % views == 0 else 0)
    )


def _by_view(counts: Sequence[Count]) -> Iterator[Formula]:
    """Each view has the same number of tokens."""
    first = counts[0]
    overviews = {count.look.overviews() for count in counts if count.look.tiles()}
    if first.tokens % len(first.look.views) or len(overviews) != 1:
        return
    each = first.tokens // len(first.look.views)
    single = any(not count.look.tiles() for count in counts)
    extra = f" + {max(overviews)}" if overviews != {0} else ""
    alone = f"; {each} where one tile is enough" if single and extra else ""
    text = f"{each} x (rows x columns{extra}){alone}" if extra else f"{each} x rows x columns"
    yield Formula(text, lambda count: each * len(count.look.views), lambda count: _even_grids(count, each))


def _by_pixels(counts: Sequence[Count]) -> Iterator[Formula]:
    """A token for each square of so many pixels of each view."""
    several = any(len(count.look.views) > 1 for count in counts)
    lengths = [length for count in counts for view in count.look.views for length in view.size]
    for side in sorted(
        range(4, 129), key=lambda side: any(length % side for length in lengths)
    ):  # what divides all first
        for rounded, words in ((math.floor, ""), (math.ceil, ", rounded up")):

            def grids(
                count: Count, side: int = side, rounded: Callable[[float], int] = rounded
            ) -> list[tuple[int, int]]:
                sizes = (view.size for view in count.look.views)
                return [(rounded(height / side), rounded(width / side)) for width, height in sizes]

            def predict(count: Count, grids: Callable[[Count], list[tuple[int, int]]] = grids) -> int:
                return sum(rows * columns for rows, columns in grids(count))

            text = f"(height / {side}) x (width / {side}){words}, of the resized image"
            if several:
                text = f"(height / {side}) x (width / {side}){words}, of each view, added up"
            yield Formula(text, predict, grids)


def _with_newlines(counts: Sequence[Count]) -> Iterator[Formula]:
    """An overview, and the part of a canvas of tiles that is no padding, with a newline behind each of its rows."""
    for base in range(4, 40):
        for most in (0, *range(2, 37)):

            def predict(count: Count, base: int = base, most: int = most) -> int:
                rows, columns = unpadded(count.size, count.look.grid(), base, most)
                return base * base + rows * (columns + 1)

            text = f"{base * base} + rows x (columns + 1): an overview, and the rows of the tiles' tokens that are no padding"
            if most:
                text += f", scaled down to {most} x {base * base} where there are more"
            yield Formula(text, predict, lambda count, base=base, most=most: _canvas_grids(count, base, most))  # type: ignore[misc]


def unpadded(size: Size, grid: tuple[int, int], base: int, most: int) -> tuple[int, int]:
    """Return rows and columns of tokens of a canvas of tiles, `base` by `base` tokens each, that a picture covers.

    `most` is how many tiles' worth of tokens are kept, 0 for all.
    """
    width, height = size
    rows, columns = (max(1, count) * base for count in grid)
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        rows -= 2 * ((rows - covered) // 2)
    else:
        covered = int(round(width * (rows / height), 7))
        columns -= 2 * ((columns - covered) // 2)
    ratio = math.sqrt(rows * columns / (most * base * base)) if most else 0.0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _canvas_grids(count: Count, base: int, most: int) -> list[tuple[int, int]] | None:
    """Return the grids of the views; None where tokens of the tiles are scaled down over the borders of the tiles."""
    full = unpadded(count.size, count.look.grid(), base, 0)
    if full != unpadded(count.size, count.look.grid(), base, most):
        return None
    return [(base, base)] * len(count.look.views)


def _even_grids(count: Count, each: int) -> list[tuple[int, int]] | None:
    """Return a grid for each view, of `each` tokens with sides as a square view's; None where that is no grid."""
    grids = []
    for width, height in (view.size for view in count.look.views):
        rows = math.isqrt(each * height // max(width, 1))
        if rows == 0 or each % rows or rows * width != each // rows * height:
            return None
        grids.append((rows, each // rows))
    return grids


# ---- where the tiles come from --------------------------------------------------------------------------------------

Shape = tuple[int, int]  # rows, columns


def find_tile_rule(counts: Sequence[Count], settings: Mapping[str, Any]) -> str | None:
    """Return how many rows and columns of tiles an image gets, in words; None where no rule is right for every size.

    Limits are not guessed: they are numbers, and lists of sizes, that the processor's settings hold.
    """
    grids = {count.size: count.look.grid() if count.look.tiles() else (1, 1) for count in counts}
    if set(grids.values()) == {(1, 1)}:
        return None
    if len(set(grids.values())) == 1:
        rows, columns = next(iter(grids.values()))
        return f"always {rows} x {columns}"
    tile = next(view.size for count in counts for view in count.look.tiles())
    return _longest_side(grids) or _of_pinpoints(grids, tile, settings) or _of_so_many(grids, tile, settings)


def _longest_side(grids: Mapping[Size, Shape]) -> str | None:
    longest = max(max(grid) for grid in grids.values())
    for size, grid in grids.items():
        expected = tuple(math.ceil(longest * side / max(size) - 1e-9) for side in (size[1], size[0]))
        if grid != expected:
            return None
    return f"the longer side is {longest} tiles, the other as many as it needs"


def _of_pinpoints(grids: Mapping[Size, Shape], tile: Size, settings: Mapping[str, Any]) -> str | None:
    """Of a list of canvases, (height, width) in pixels, the one on which most of the image's pixels are kept."""
    for name, value in settings.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(item, list | tuple) and len(item) == 2 for item in value)
        ):
            shapes = [(height // tile[1], width // tile[0]) for height, width in value]
            if all(_keeps_most(size, tile, shapes) == grid for size, grid in grids.items()):
                return f"of the {len(value)} canvases in {name}, the one that keeps most of the image's pixels and wastes fewest"
    return None


def _keeps_most(size: Size, tile: Size, shapes: Sequence[Shape]) -> Shape:
    def kept(shape: Shape) -> tuple[int, int]:
        width, height = shape[1] * tile[0], shape[0] * tile[1]
        scale = min(width / size[0], height / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return pixels, pixels - width * height  # the second is what is wasted, negative

    return max(shapes, key=kept)


def _of_so_many(grids: Mapping[Size, Shape], tile: Size, settings: Mapping[str, Any]) -> str | None:
    rules = {
        "the grid of at most {} tiles whose shape is nearest to the image's": _is_nearest,
        "the smallest grid of at most {} tiles that holds the image unshrunk, else that which shrinks it least": _is_roomy,
    }
    limits = sorted({value for value in settings.values() if type(value) is int and 1 < value <= 64})
    for text, rule in rules.items():
        for most in limits:
            shapes = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
            if all(grid in shapes and rule(size, grid, tile, shapes) for size, grid in grids.items()):
                return text.format(most)
    return None


def _is_nearest(size: Size, grid: Shape, tile: Size, shapes: Sequence[Shape]) -> bool:
    def distance(shape: Shape) -> float:
        return abs(size[0] / size[1] - shape[1] * tile[0] / (shape[0] * tile[1]))

    return distance(grid) <= min(map(distance, shapes)) + 1e-12


def _is_roomy(size: Size, grid: Shape, tile: Size, shapes: Sequence[Shape]) -> bool:
    scales = {(r, c): min(c * tile[0] / size[0], r * tile[1] / size[1]) for r, c in shapes}
    larger = [scale for scale in scales.values() if scale >= 1]
    wanted = min(larger) if larger else max(scales.values())
    smallest = min(r * c for (r, c), scale in scales.items() if scale == wanted)
    return scales[grid] == wanted and grid[0] * grid[1] == smallest
