"""Where the views that the vision tower gets lie in a picture: found by sending a picture whose colours are its coordinates.

Red says how far to the right a pixel is, green how far down, blue is full; black and white pictures of the same size tell
how the processor scales values. A view's edges are read from its own pixels, and what is not blue in it is padding.
Letters: C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfcustom.inspector.record import Size, Step, record, size_of, split_fused

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
PIXELS = ("pixel_values", "pixel_values_images")
FULL = 0.98  # blue of the picture itself; padding has less
WHOLE = 0.98  # a view that reaches across this share of the picture in both directions shows it whole


@dataclass(frozen=True)
class View:
    """One picture that the tower gets: where it lies in the source, how large it is, and which of its pixels show anything."""

    box: Box  # in the source
    size: Size
    filled: Box  # in the view; the rest is padding

    def is_whole(self, size: Size) -> bool:
        """Whether it shows all of a picture of this size."""
        left, top, right, bottom = self.box
        return (right - left) >= WHOLE * size[0] and (bottom - top) >= WHOLE * size[1]


@dataclass
class Look:
    """What a processor makes of one picture of a size: tensors, steps, views."""

    size: Size
    features: dict[str, Any]
    steps: list[Step]
    views: list[View]

    def tiles(self) -> list[View]:
        """Return the views that show a part of what others show whole; of several views none of which is whole, all."""
        parts = [view for view in self.views if not view.is_whole(self.size)]
        return parts if len(self.views) > 1 else []

    def crops(self) -> int:
        """Return how many pictures the tower is run on; a canvas may be cut once more while it becomes patches."""
        values = next((self.features[name] for name in PIXELS if name in self.features), None)
        cut = isinstance(values, torch.Tensor) and values.ndim == 3 and values.shape[0] > len(self.views)
        return len(values) if cut else len(self.views)  # type: ignore[arg-type]

    def overviews(self) -> int:
        """Return how many views stand beside the tiles."""
        return len(self.views) - len(self.tiles())

    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of tiles; (0, 0) where there are none."""
        tiles = self.tiles()
        rows, columns = ({round(tile.box[at]) for tile in tiles} for at in (1, 0))
        return _clusters(rows), _clusters(columns)

    def seen(self) -> float:
        """Return the share of the picture that any view shows."""
        grid = np.zeros((100, 100), dtype=bool)
        for view in self.views:
            left, top, right, bottom = (
                value / side * 100 for value, side in zip(view.box, self.size * 2, strict=True)
            )
            grid[round(top) : round(bottom), round(left) : round(right)] = True
        return float(grid.mean())


class Looker:
    """Sends pictures through a processor; `text` is what it is given beside one, None for an encoder."""

    def __init__(self, processor: Any, with_text: bool = True) -> None:
        self.processor = processor
        self.with_text = with_text
        self._scale: tuple[np.ndarray, np.ndarray] | None = None  # (C,) each: what black and white become

    def other(self, processor: Any) -> Looker:
        """Return one for a processor with other settings of tiles, which scales values as this one's does."""
        looker = Looker(processor, self.with_text)
        looker._scale = self._scale
        return looker

    def process(self, picture: Image.Image, **settings: Any) -> dict[str, Any]:
        """Return what the processor makes of one picture and its placeholder."""
        if not self.with_text:
            return dict(self.processor(images=[picture], return_tensors="pt", **settings))
        text = [self.processor.image_token]
        return dict(self.processor(text=text, images=[[picture]], return_tensors="pt", **settings))

    def look(self, size: Size, **settings: Any) -> Look:
        """Return the views of a picture of a size (width, height), under these settings of a call."""
        features, steps = record(lambda: self.process(coordinates(size), **settings))
        if self._scale is None:
            self._scale = self._calibrate()
        crops = tensor_crops(features)
        if not crops or not all(self._is_picture(crop) for crop in crops):
            crops = recorded_crops(steps)
        return Look(size, features, steps, [view for crop in crops if (view := self._locate(crop, size))])

    def _calibrate(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of black and of white, (C,) each."""
        found = []
        for colour in ((0, 0, 0), (255, 255, 255)):
            features, steps = record(lambda colour=colour: self.process(Image.new("RGB", (512, 512), colour)))  # type: ignore[misc]
            crop = (tensor_crops(features) or recorded_crops(steps))[0]
            found.append(crop[:, crop.shape[1] // 2, crop.shape[2] // 2])
        return found[0], found[1]

    def _colours(self, crop: np.ndarray) -> np.ndarray:
        """Return a crop's colours from 0 to 1, (C, H, W)."""
        assert self._scale is not None
        black, white = (value[:, None, None] for value in self._scale)
        return np.asarray((crop - black) / (white - black))

    def _is_picture(self, crop: np.ndarray) -> bool:
        """Whether a crop shows coordinates that grow to the right, as a picture's do and a row of patches does not."""
        red, _, blue = self._colours(crop)
        shown = np.where(blue > FULL, red, np.nan)[crop.shape[1] // 2]  # one line
        shown = shown[~np.isnan(shown)]
        return bool((np.diff(shown) > -0.02).all())

    def _locate(self, crop: np.ndarray, size: Size) -> View | None:
        red, green, blue = self._colours(crop)  # (H, W) each
        filled = blue > FULL
        if not filled.any():
            return None
        rows, columns = (np.flatnonzero(filled.mean(axis) > filled.mean(axis).max() / 2) for axis in (1, 0))
        inside = np.ix_(rows, columns)
        left, right = _ends(red[inside].mean(0), size[0])
        top, bottom = _ends(green[inside].mean(1), size[1])
        filled_box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return View((left, top, right, bottom), size_of(crop), tuple(float(value) for value in filled_box))  # type: ignore[arg-type]


def coordinates(size: Size) -> Image.Image:
    """Return a picture that says of each pixel where it is."""
    width, height = size
    red = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 255)], -1).round().astype(np.uint8))


def tensor_crops(features: dict[str, Any]) -> list[np.ndarray]:
    """Return the pictures of the tensor that the tower gets, (C, H, W) each; none where it holds patches."""
    values = next((features[name] for name in PIXELS if name in features), None)
    if not isinstance(values, torch.Tensor) or values.ndim < 4 or values.shape[-3] != 3:
        return []
    return list(values.float().flatten(0, -4).numpy())  # (P, C, H, W)


def recorded_crops(steps: Sequence[Step]) -> list[np.ndarray]:
    """Return the last pictures before they became patches, (C, H, W) each."""
    last: dict[str, list[Any]] = {"rescale": [], "normalize": []}
    for step in (single for whole in steps for single in split_fused(whole)):
        if step.name in last:
            last[step.name].extend(step.images)
    return [np.asarray(image, dtype=np.float32) for image in last["normalize"] or last["rescale"]]


def _ends(values: np.ndarray, length: int) -> tuple[float, float]:
    """Return where a line of coordinates, 0 to 1, begins and ends in pixels, half a pixel beyond its first and last centre."""
    inner = values[1:-1] if len(values) > 4 else values
    places = np.arange(len(values))[1:-1] if len(values) > 4 else np.arange(len(values))
    slope, start = np.polyfit(places, inner, 1) if len(inner) > 1 else (0.0, float(inner[0]))
    first, last = start - slope / 2, start + slope * (len(values) - 0.5)
    return tuple(round(float(min(max(value * length, 0.0), length)), 1) for value in (first, last))  # type: ignore[return-value]


def _clusters(values: set[int]) -> int:
    """Return how many different places there are, neighbours within some pixels being one."""
    ordered = sorted(values)
    return sum(at == 0 or value - ordered[at - 1] > 4 for at, value in enumerate(ordered))
