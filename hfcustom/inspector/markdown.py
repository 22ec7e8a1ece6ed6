"""Inspections as Markdown: a section of one target, two side by side, and the book of all families, docs/families.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hfcustom.inspector.examine import Inspection
from hfcustom.inspector.words import Section, by, compare, sections

HEAD = """# What each family makes of an image

Written by `hfcustom inspect --all --markdown`, from the published checkpoints' sizes and image settings: nothing here is typed
by hand, and a test compares it with what the command finds (`make docs` writes it anew). Stages were recorded while the
processors ran, formulas are right for every size that is listed, and each switch was tried. `hfcustom inspect NAME --image
photo.jpg --html page.html` draws the tiles and tokens of an image of yours. Tokenizers are small ones, trained on the spot,
so that ids and lengths of text are not those of the checkpoints.
"""


def family_book(found: Sequence[Inspection], missing: Mapping[str, str]) -> str:
    """Return the whole file: a table of all, then a section each."""
    size = by(found[0].size) if found else ""
    pieces = [
        HEAD,
        table(("family", f"tokens of {size} px", "tiles", "formula", "tiles off"), map(overview_row, found)),
    ]
    pieces += [f"## {name}\n\n{reason}" for name, reason in missing.items()]
    pieces += [section_of(one) for one in found]
    return "\n".join(piece.rstrip("\n") + "\n" for piece in pieces).rstrip("\n")


def overview_row(found: Inspection) -> tuple[str, ...]:
    """Return a family's line in the table of all."""
    rows, columns = found.grid
    whole = f" + {found.overviews}" if found.overviews else ""
    tiles = f"{rows} x {columns}{whole}" if rows * columns > 1 else "-"
    link = f"[{found.name}](#{found.name})"
    if found.tokens is None:
        return link, "one vector", tiles, "-", "-"
    off = "-" if found.switch is None or not (found.switch.off or found.switch.on) else found.switch.sentence()
    return link, f"{found.tokens.count:,}", tiles, found.tokens.formula or "none found", off


def section_of(found: Inspection) -> str:
    """Return one target's section."""
    pieces = [f"## {found.name}", f"{found.summary} {found.source[0].upper()}{found.source[1:]}."]
    for section in sections(found):
        pieces += _section(section)
    return "\n\n".join(pieces)


def _section(section: Section) -> Iterable[str]:
    lead = f" {section.lead}." if section.lead else ""
    yield f"**{section.title}.**{escape(lead)}"
    if not section.rows:
        return
    rows = [[_cell(section, at, cell) for at, cell in enumerate(row)] for row in section.rows]
    yield table(section.columns, rows)


def _cell(section: Section, at: int, cell: str) -> str:
    is_text = section.title == "Image" and at == 1 and ("<" in cell or "*" in cell or "[" in cell)
    return f"`{cell.replace('|', chr(92) + '|')}`" if cell and (at in section.code or is_text) else escape(cell)


def comparison(first: Inspection, second: Inspection) -> str:
    """Return two targets side by side."""
    rows = [(name, escape(mine), escape(theirs)) for name, mine, theirs in compare(first, second)]
    return f"An image of {by(first.size)} pixels.\n\n" + table(("", first.name, second.name), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown already."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return a text whose characters mean nothing to Markdown."""
    for char in "\\`*_<[|":
        text = text.replace(char, "\\" + char)
    return text
