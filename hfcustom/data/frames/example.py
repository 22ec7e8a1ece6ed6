"""A clip drawn on the spot, whose cuts are known: what the methods are compared on where there is no video.

Nine scenes of 4 to 60 frames, numbered 1 to 8 in the picture, and a black one: the camera stands, pans, tilts or shakes,
light changes, something moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hfcustom.data.frames.clip import MemoryClip

WIDTH, HEIGHT = 160, 90
STAGE = (200, 112)  # pixels of a scene, of which the camera sees WIDTH x HEIGHT
FPS = 24.0

# length, what is drawn, background, colours, what the camera does
SCENES: tuple[tuple[int, str, str, tuple[str, ...], str], ...] = (
    (60, "skyline", "#8ecae6", ("#023047", "#219ebc", "#126782"), "pan"),
    (6, "rings", "#fff3b0", ("#9e2a2b", "#e09f3e"), "stand"),
    (40, "hills", "#ffd6ba", ("#386641", "#6a994e", "#a7c957"), "light"),
    (30, "squares", "#2b2d42", ("#edf2f4", "#ef233c", "#8d99ae"), "shake"),
    (5, "black", "#000000", (), "stand"),
    (8, "stripes", "#f1faee", ("#1d3557", "#e63946"), "stand"),
    (50, "dots", "#3c096c", ("#ff9e00", "#e0aaff", "#ff6d00"), "tilt"),
    (36, "spikes", "#caf0f8", ("#03045e", "#0077b6"), "mover"),
    (4, "squares", "#d8f3dc", ("#1b4332", "#d00000", "#52b788"), "stand"),
)


def example_clip(clip_fps: float | None = None) -> tuple[MemoryClip, list[int]]:
    """Return the clip, 239 frames of 160 x 90 pixels, and the first frame of each scene."""
    frames: list[np.ndarray] = []
    starts, number = [], 0
    for seed, (length, kind, back, colours, camera) in enumerate(SCENES):
        number += kind != "black"
        stage = _stage(kind, back, colours, str(number), seed)
        starts.append(len(frames))
        frames += [_shot(stage, camera, at / length) for at in range(length)]
    return MemoryClip(np.stack(frames), clip_fps or FPS, "the example"), starts


def _stage(kind: str, back: str, colours: tuple[str, ...], number: str, seed: int) -> Image.Image:
    stage = Image.new("RGB", STAGE, back)
    if kind != "black":
        draw = ImageDraw.Draw(stage)
        DRAWN[kind](draw, colours, np.random.default_rng(seed))
        draw.ellipse((75, 31, 125, 81), fill=back, outline=colours[0], width=3)
        draw.text((100, 56), number, fill=colours[0], font=ImageFont.load_default(36), anchor="mm")
    return stage


def _shot(stage: Image.Image, camera: str, done: float) -> np.ndarray:
    """Return what is on the screen when the share `done` of a scene is over, (H, W, 3)."""
    free_x, free_y = STAGE[0] - WIDTH, STAGE[1] - HEIGHT
    x, y = {
        "pan": (free_x * done, free_y / 2),
        "tilt": (free_x / 2, free_y * done),
        "shake": (free_x / 2 + 9 * math.sin(40 * done), free_y / 2 + 7 * math.sin(53 * done)),
    }.get(camera, (free_x / 2, free_y / 2))
    picture = stage.crop((round(x), round(y), round(x) + WIDTH, round(y) + HEIGHT))
    if camera == "mover":
        at = -20 + done * (WIDTH + 10)
        ImageDraw.Draw(picture).ellipse((at, 4, at + 26, 30), fill="#fb8500")
    pixels = np.asarray(picture)
    return (pixels * (0.35 + 0.65 * done)).astype(np.uint8) if camera == "light" else pixels


def _skyline(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for at, left in enumerate(range(0, STAGE[0], 18)):
        top = int(rng.integers(20, 80))
        draw.rectangle((left, top, left + 14, STAGE[1]), fill=colours[at % len(colours)])


def _rings(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for at, radius in enumerate(range(118, 26, -14)):
        draw.ellipse((100 - radius, 56 - radius, 100 + radius, 56 + radius), fill=colours[at % 2])


def _hills(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for at, colour in enumerate(colours):
        waves = 2 + 2 * rng.random()
        line = [(x, 44 + 22 * at + 13 * math.sin(waves * x / 40 + 2 * at)) for x in range(0, STAGE[0] + 1, 4)]
        draw.polygon([(0, STAGE[1]), *line, (STAGE[0], STAGE[1])], fill=colour)


def _squares(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for _ in range(26):
        x, y, side = rng.integers(0, STAGE[0]), rng.integers(0, STAGE[1]), rng.integers(10, 34)
        draw.rectangle((int(x), int(y), int(x + side), int(y + side)), fill=str(rng.choice(colours)))


def _spikes(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for at, left in enumerate(range(-10, STAGE[0], 25)):
        top = int(rng.integers(8, 60))
        draw.polygon([(left, STAGE[1]), (left + 17, top), (left + 34, STAGE[1])], fill=colours[at % 2])


def _stripes(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for at, left in enumerate(range(-112, STAGE[0], 30)):
        draw.line((left, STAGE[1], left + 112, 0), fill=colours[at % 2], width=10)


def _dots(draw: Any, colours: tuple[str, ...], rng: np.random.Generator) -> None:
    for _ in range(40):
        x, y, radius = rng.integers(0, STAGE[0]), rng.integers(0, STAGE[1]), rng.integers(4, 15)
        box = (int(x - radius), int(y - radius), int(x + radius), int(y + radius))
        draw.ellipse(box, fill=str(rng.choice(colours)))


DRAWN: dict[str, Callable[[Any, tuple[str, ...], np.random.Generator], None]] = {
    "dots": _dots,
    "hills": _hills,
    "rings": _rings,
    "skyline": _skyline,
    "spikes": _spikes,
    "squares": _squares,
    "stripes": _stripes,
}
