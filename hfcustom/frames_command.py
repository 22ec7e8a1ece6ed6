"""What `hfcustom frames` does: open a clip, choose frames by one method or by all, print, and draw a contact sheet."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfcustom.data import frames as selection
from hfcustom.data.frames import FRAME_SELECTORS, QUERY_METHODS
from hfcustom.data.frames.clip import BLANK, KEPT, Clip, MissingInputError
from hfcustom.data.frames.example import example_clip
from hfcustom.frames_sheet import Row, contact_sheet

SHEETS = (".jpeg", ".jpg", ".png", ".webp")


@dataclass
class Choice:
    """What a method chose, how long it took, or what it lacks."""

    method: str
    indices: list[int] = field(default_factory=list)
    seconds: float = 0.0
    missing: str = ""

    def covers(self, scenes: Sequence[tuple[int, int]]) -> int:
        """Return in how many scenes (first frame, first frame of the next) a frame was chosen."""
        return sum(any(start <= index < stop for index in self.indices) for start, stop in scenes)


@dataclass
class Found:
    """A clip, the first frame of each scene and the scenes that show something, where known, and the methods' choices."""

    clip: Clip
    cuts: list[int]
    scenes: list[tuple[int, int]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def done(self) -> list[Choice]:
        """Return the choices of the methods that had what they need."""
        return [choice for choice in self.choices if not choice.missing]


def run_frames(options: Namespace) -> int:
    """Do what the command line asks for; return 0, or 2 for a mistake, which is printed."""
    try:
        _check(options)
        found = _open(options)
        found.clip.progress = sys.stderr.isatty() and not options.json
        found.choices = _choose(found.clip, options)
        if not found.done():
            raise ValueError(found.choices[0].missing)
        found.scenes = _visible_scenes(found.clip, found.cuts)
        written = _write(found, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"hfcustom frames: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_as_json(found, options.k), indent=2))
    else:
        _print(found, options.compare, written)
    return 0


def _check(options: Namespace) -> None:
    """Raise ValueError for options that contradict each other or would have no effect."""
    if (options.clip is None) != options.example:
        raise ValueError(
            "Name one clip: a video, a folder of pictures, an animated picture, a .npy array; or --example."
        )
    if options.k < 1:
        raise ValueError(f"-k {options.k} must be at least 1.")
    if options.output and Path(options.output).suffix.lower() not in SHEETS:
        raise ValueError(f"--output {options.output!r} must end in {', '.join(SHEETS)}.")
    if options.compare and (options.method or options.frames_dir):
        both = "--method" if options.method else "--frames-dir"
        raise ValueError(f"--compare runs every method and {both} is about one; leave one of them out.")
    method = options.method or "uniform"
    if not options.compare and options.query is not None and method in FRAME_SELECTORS.keys() - QUERY_METHODS:
        raise ValueError(f"--query has no effect on {method}; methods that look at it: {', '.join(QUERY_METHODS)}.")


def _open(options: Namespace) -> Found:
    if options.example:
        clip, cuts = example_clip(options.clip_fps)
        found = Found(clip, cuts)
    else:
        found = Found(selection.open_clip(options.clip, options.clip_fps), [])
    if options.cuts:
        found.cuts = sorted({0, *options.cuts})
        found.clip.check_places(found.cuts)
    return found


def _choose(clip: Clip, options: Namespace) -> list[Choice]:
    names = list(FRAME_SELECTORS) if options.compare else [options.method or "uniform"]
    known = {name: selection.option_names(selection.find_selector(name)[1]) for name in names}
    flags = {name: getattr(options, name) for name in ("fps", "model", "max_candidates", "batch_size")}
    given = {name: value for name, value in flags.items() if value is not None}
    for option in given:
        if not any(option in names for names in known.values()):
            raise ValueError(f"--{option.replace('_', '-')} has no effect on {names[0]}; leave it out.")
    if "model" in given:
        from hfcustom.data.frames.embeddings import load

        given["model"] = load(given["model"])
    if options.compare and len(clip) <= KEPT:
        clip.small()  # so that no method alone pays for reading
    return [
        _run(clip, name, options, {option: value for option, value in given.items() if option in known[name]})
        for name in names
    ]


def _run(clip: Clip, name: str, options: Namespace, fitting: dict[str, Any]) -> Choice:
    began = time.perf_counter()
    try:
        indices = selection.select_frames(clip, name, options.k, options.query, **fitting)
    except MissingInputError as error:
        return Choice(name, missing=str(error))
    return Choice(name, indices, time.perf_counter() - began)


def _visible_scenes(clip: Clip, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last + 1 of each scene that is not blank throughout."""
    if not cuts:
        return []
    blank = np.array([frame.std() < BLANK for frame in clip.small_frames()])
    bounds = zip(cuts, [*cuts[1:], len(clip)], strict=True)
    return [(start, stop) for start, stop in bounds if not blank[start:stop].all()]


def _write(found: Found, options: Namespace) -> list[str]:
    """Write the sheet and the frames that are asked for; return lines that say what was written."""
    if not options.output and not options.frames_dir:
        return []
    indices = sorted({index for choice in found.done() for index in choice.indices})
    pictures = dict(zip(indices, found.clip.pictures(indices), strict=True))
    written = []
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = _draw(found, pictures)
        sheet = sheet.quantize(256) if path.suffix.lower() == ".png" else sheet  # a third of the bytes
        sheet.save(path, optimize=True)
        written.append(f"contact sheet: {path}")
    if options.frames_dir:
        folder = Path(options.frames_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in pictures.items():
            picture.save(folder / f"frame_{index:06d}.png")
        written.append(f"{len(pictures)} frames: {folder}")
    return written


def _draw(found: Found, pictures: dict[int, Image.Image]) -> Image.Image:
    rows = []
    for choice in found.done():
        covered = f"{choice.covers(found.scenes)} of {len(found.scenes)} scenes"
        facts = [f"{len(choice.indices)} frames, {choice.seconds:.3f} s", *([covered] if found.scenes else [])]
        rows.append(Row(choice.method, facts, choice.indices))
    shades = "; scenes in two shades" if found.cuts else ""
    title = f"{found.clip.name}: {len(found.clip)} frames, those chosen marked on the line{shades}"
    return contact_sheet(title, rows, pictures, len(found.clip), found.clip.times, found.cuts)


def _as_json(found: Found, k: int) -> dict[str, Any]:
    times, methods = found.clip.times, []
    for choice in found.choices:
        if choice.missing:
            methods.append({"method": choice.method, "missing": choice.missing})
            continue
        chosen: dict[str, Any] = {"method": choice.method, "indices": choice.indices, "seconds": choice.seconds}
        chosen["times"] = None if times is None else times[choice.indices].round(6).tolist()
        chosen["scenes_covered"] = choice.covers(found.scenes) if found.scenes else None
        methods.append(chosen)
    scenes = len(found.scenes) or None
    return {"clip": found.clip.name, "frames": len(found.clip), "k": k, "scenes": scenes, "methods": methods}


def _print(found: Found, compare: bool, written: Sequence[str]) -> None:
    if not compare:
        print(" ".join(map(str, found.choices[0].indices)))
    else:
        print(f"{found.clip.name}: {len(found.clip)} frames")
        _print_table(found)
    for line in written:
        print(line)


def _print_table(found: Found) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("method", "seconds", *(["scenes"] if found.scenes else []), "frames"):
        table.add_column(column, overflow="fold")
    for choice in found.choices:
        numbers = [f"{choice.seconds:.3f}", f"{choice.covers(found.scenes)} of {len(found.scenes)}"]
        shown = numbers if not choice.missing else ["-", "-"]
        places = " ".join(map(str, choice.indices)) or choice.missing
        table.add_row(choice.method, *shown[: 2 if found.scenes else 1], Text(places))
    Console(highlight=False).print(table)
