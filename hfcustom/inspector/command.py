"""What `hfcustom inspect` does: look at one target, at two side by side, or at all; print, write a page, a drawing, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from hfcustom.data.images import load_image
from hfcustom.files import written_whole
from hfcustom.inspector.examine import DEFAULT_SIZE, Inspection, check_size, inspect_target
from hfcustom.inspector.picture import draw_inspection
from hfcustom.inspector.record import Size
from hfcustom.inspector.sample import sample_picture
from hfcustom.inspector.words import Section, by, compare, sections

EXIT_USAGE = 2


def show_inspection(options: argparse.Namespace) -> int:
    """Inspect as the command line asks; return 0, or 2 for what cannot be inspected, which is said."""
    from hfcustom.inspector.markdown import family_book

    try:
        _check(options)
        picture = _picture(options.image, options.size)
        if options.all:
            return _show_all(options, picture.size, family_book)
        found = [inspect_target(target, picture.size) for target in options.targets]
        _write(found, picture, options)
    except (FileNotFoundError, ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        print(f"hfcustom inspect: {error}", file=sys.stderr)
        return EXIT_USAGE
    _print(found, options)
    return 0


# ---- what is asked --------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other or would have no effect."""
    if options.all and (options.targets or options.plot or options.html):
        raise ValueError(
            "--all looks at every family and prints; name no target beside it, and neither --plot nor --html."
        )
    if options.all and not (options.markdown or options.json):
        raise ValueError("--all prints --markdown or --json; add one of them.")
    if not options.all and not 1 <= len(options.targets) <= 2:
        raise ValueError(f"{len(options.targets)} targets; name one, or two to compare, or give --all.")
    if options.image and options.size:
        raise ValueError("--size has no effect beside --image, which has a size; leave one of them out.")
    if options.json and options.markdown:
        raise ValueError("--json and --markdown are two ways to print; leave one of them out.")
    if options.plot and Path(options.plot).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--plot {options.plot!r} must end in .png, .jpg or .webp.")


def parse_size(text: str) -> Size:
    """Return width and height of "800x1300"; ValueError for anything else."""
    width, _, height = text.lower().replace(" ", "").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {text!r} is no size; write width x height in pixels, such as 800x1300.")
    return int(width), int(height)


def _picture(image: str | None, size: str | None) -> Image.Image:
    """Return the picture that is looked at: the user's, upright and in colour, or a drawn one."""
    if image is None:
        wanted = parse_size(size) if size else DEFAULT_SIZE
        check_size(wanted)
        return sample_picture(wanted)
    if not Path(image).is_file():
        raise FileNotFoundError(
            f"There is no file {image}; give the path of a picture, or leave --image out for a drawn one."
        )
    path = Path(image).resolve()
    return load_image(str(path), Path(path.anchor))


# ---- what is written and printed ------------------------------------------------------------------------------------


def _write(found: Sequence[Inspection], picture: Image.Image, options: argparse.Namespace) -> None:
    drawings = [draw_inspection(one, picture) for one in found] if options.plot or options.html else []
    if options.plot:
        _save(_beside(drawings), Path(options.plot))
        print(f"The drawing is {options.plot}.", file=sys.stderr)
    if options.html:
        from hfcustom.inspector.page import write_page

        write_page(Path(options.html), found, drawings)
        print(f"The page is {options.html}.", file=sys.stderr)


def _beside(drawings: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(one.width for one in drawings), max(one.height for one in drawings)), "white")
    left = 0
    for one in drawings:
        sheet.paste(one, (left, 0))
        left += one.width
    return sheet


def _save(drawing: Image.Image, path: Path) -> None:
    with written_whole(path) as partial:
        drawing.save(partial)


def _print(found: Sequence[Inspection], options: argparse.Namespace) -> None:
    if options.json:
        listed = [one.to_dict() for one in found]
        print(json.dumps(listed[0] if len(listed) == 1 else listed, indent=2))
        return
    if options.markdown:
        from hfcustom.inspector.markdown import comparison, section_of

        print(section_of(found[0]) if len(found) == 1 else comparison(*found))
        return
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 140)  # a file has no width of its own
    if len(found) == 2:
        _print_two(out, *found)
    else:
        _print_one(out, found[0])


def _print_one(out: Console, found: Inspection) -> None:
    out.print(Text(found.name, style="bold"), Text(found.summary))
    out.print(Text(found.source, style="dim"))
    for section in sections(found):
        out.print(Text(f"\n{section.title}", style="bold cyan"), Text(section.lead))
        if section.title == "Other sizes" and section.rows:
            out.print(Text("  " + in_a_line(section)))
        elif section.rows:
            out.print(_table(section))


def in_a_line(section: Section) -> str:
    """Return a table of sizes as one line, since a screen is short."""
    counts = {row[0].replace(" ", ""): row[1] for row in section.rows}
    return ",  ".join(f"{size} {tokens}" for size, tokens in counts.items())


def _table(section: Section) -> Table:
    table = Table(box=None, show_header=False, pad_edge=True)
    for at, _ in enumerate(section.columns):
        table.add_column(overflow="fold", style="green" if at in section.code else "", no_wrap=at == 0)
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print_two(out: Console, first: Inspection, second: Inspection) -> None:
    out.print(Text(f"an image of {by(first.size)} pixels; what differs is bold", style="dim"))
    table = Table(box=None, pad_edge=False, header_style="bold cyan")
    for name in ("", first.name, second.name):
        table.add_column(name, overflow="fold", ratio=None if not name else 1)
    for name, mine, theirs in compare(first, second):
        style = "" if mine == theirs else "bold"
        table.add_row(name, Text(mine, style=style), Text(theirs, style=style))
    out.print(table)


# ---- all ------------------------------------------------------------------------------------------------------------


def inspect_all(size: Size, quiet: bool = True) -> tuple[list[Inspection], dict[str, str]]:
    """Return what is known of every family and encoder, and why nothing is of the others."""
    from hfcustom.encoders import encoder_names
    from hfcustom.families import family_names

    found, missing = [], {}
    names = [*family_names(), *encoder_names()]
    for name in track(names, "inspecting", console=Console(stderr=True), disable=quiet, transient=True):
        try:
            found.append(inspect_target(name, size))
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def _show_all(options: argparse.Namespace, size: Size, book: Any) -> int:
    found, missing = inspect_all(size, quiet=not sys.stderr.isatty())
    if options.json:
        print(json.dumps({"families": [one.to_dict() for one in found], "missing": missing}, indent=2))
    else:
        print(book(found, missing))
    return 0
