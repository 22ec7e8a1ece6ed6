"""A picture for those who bring none: hills, a house and small things, so that tiles and tokens can be told apart by eye."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from hfcustom.inspector.record import Size


def sample_picture(size: Size) -> Image.Image:
    """Return the picture in a size."""
    width, height = size
    unit = min(width, height) / 100
    sky = np.linspace((92, 148, 214), (252, 226, 190), height)[:, None, :]
    picture = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    rng = np.random.default_rng(3)
    draw.ellipse(_around(0.74 * width, 0.2 * height, 9 * unit), fill="#fff3c4")
    for level, colour in ((0.55, "#7f9db9"), (0.64, "#5b8a72"), (0.76, "#3f6f4e")):
        _hill(draw, size, level, colour, rng)
    _house(draw, 0.32 * width, 0.78 * height, 11 * unit)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0.8, 1.0) * height
        draw.ellipse(
            _around(x, y, rng.uniform(0.5, 1.4) * unit), fill=str(rng.choice(["#f4d35e", "#ee6352", "#f7f7ff"]))
        )
    for _ in range(7):
        x, y, wing = rng.uniform(0, width), rng.uniform(0.06, 0.4) * height, rng.uniform(1.5, 3) * unit
        draw.line(
            [(x - wing, y - wing / 2), (x, y), (x + wing, y - wing / 2)], fill="#2b3a55", width=max(1, int(unit / 2))
        )
    return picture


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _hill(draw: ImageDraw.ImageDraw, size: Size, level: float, colour: str, rng: np.random.Generator) -> None:
    width, height = size
    xs = np.linspace(0, width, 80)
    waves = sum(np.sin(xs / width * rng.uniform(3, 9) + rng.uniform(0, 6)) for _ in range(3))
    ys = (level + 0.03 * np.asarray(waves)) * height
    draw.polygon([(0, height), *zip(xs.tolist(), ys.tolist(), strict=True), (width, height)], fill=colour)


def _house(draw: ImageDraw.ImageDraw, x: float, y: float, half: float) -> None:
    draw.rectangle((x - half, y - half, x + half, y + half), fill="#f2e3d5")
    draw.polygon([(x - 1.3 * half, y - half), (x, y - 2 * half), (x + 1.3 * half, y - half)], fill="#a63d40")
    draw.rectangle((x - 0.25 * half, y, x + 0.25 * half, y + half), fill="#6b4226")
    for side in (-0.6, 0.6):
        draw.rectangle(
            (x + (side - 0.2) * half, y - 0.6 * half, x + (side + 0.2) * half, y - 0.2 * half),
            fill="#87b6d9",
            outline="#6b4226",
        )
