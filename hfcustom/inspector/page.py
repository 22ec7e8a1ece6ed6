"""The page of `hfcustom inspect`: the drawing, and everything that is known under it; two targets side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hfcustom.inspector.examine import Inspection
from hfcustom.inspector.words import Section, by, compare, sections
from hfcustom.report import Report, picture_source

STYLE = """
<style>
body { max-width: 1240px } .drawing img { max-width: 100%; border: 1px solid #e3e3e3; border-radius: 6px }
.big { display: flex; flex-wrap: wrap; gap: 14px; margin: 1rem 0 } .big div { background: #f4f6f9; border-radius: 8px; padding: .6rem 1.1rem }
.big b { display: block; font-size: 1.5rem; font-weight: 600 } .big span { color: #666 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px } td { overflow-wrap: anywhere } td.differs { background: #fff6dc }
table.known td:first-child { white-space: nowrap; color: #555 } table.two { table-layout: fixed; width: 100% }
table.two th:first-child { width: 11rem } .works { color: #11702b } .none { color: #b3261e }
</style>
"""


def write_page(path: Path, found: Sequence[Inspection], drawings: Sequence[Image.Image]) -> None:
    """Write the page about one target, or two; `drawings` in the same order."""
    names = " and ".join(one.name for one in found)
    page = Report(f"What {names} {'makes' if len(found) == 1 else 'make'} of an image")
    page.html(STYLE)
    if len(found) == 2:
        _two(page, found, drawings)
    else:
        page.text(f"{found[0].summary} ({found[0].source})")
        page.html(_numbers(found[0]))
        page.html(_drawing(found[0], drawings[0]))
        for section in sections(found[0]):
            _section(page, section)
    page.write(path)


def _numbers(found: Inspection) -> str:
    """Return the few numbers that people look for."""
    facts = {f"{by(found.size)} px": "the image"}
    if found.tokens is not None:
        facts[f"{found.tokens.count:,}"] = "image tokens"
    if found.encoder is not None:
        facts[f"{found.encoder['vector']}"] = "numbers in its vector"
    facts[f"{found.crops}"] = "picture for the tower" if found.crops == 1 else "pictures for the tower"
    if found.grid[0] * found.grid[1]:
        facts[f"{found.grid[0]} x {found.grid[1]}"] = "rows x columns of tiles"
    if found.seen < 0.985:
        facts[f"{1 - found.seen:.0%}"] = "of the image is never seen"
    cards = "".join(
        f"<div><b>{html.escape(number)}</b><span>{html.escape(what)}</span></div>" for number, what in facts.items()
    )
    return f'<div class="big">{cards}</div>'


def _drawing(found: Inspection, drawing: Image.Image) -> str:
    name = html.escape(f"{found.name}: the image with its tiles and tokens, and what the tower gets")
    return f'<div class="drawing"><img alt="{name}" src="{picture_source(drawing)}"></div>'


def _section(page: Report, section: Section) -> None:
    page.heading(section.title)
    if section.lead:
        page.text(section.lead)
    if not section.rows:
        return
    head = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns) if any(section.columns) else ""
    body = "".join(
        "<tr>" + "".join(_cell(section, at, cell) for at, cell in enumerate(row)) + "</tr>" for row in section.rows
    )
    page.html(f'<table class="known">{f"<tr>{head}</tr>" if head else ""}{body}</table>')


def _cell(section: Section, at: int, cell: str) -> str:
    shown = html.escape(cell)
    if cell and (at in section.code or (section.title == "Image" and cell.startswith("<"))):
        shown = f"<code>{shown}</code>"
    kind = {"works": "works", "no effect": "none", "refused": "none"}.get(cell, "")
    return f'<td class="{kind}">{shown}</td>' if kind else f"<td>{shown}</td>"


def _two(page: Report, found: Sequence[Inspection], drawings: Sequence[Image.Image]) -> None:
    pair = "".join(_drawing(one, drawing) for one, drawing in zip(found, drawings, strict=True))
    page.html(f'<div class="pair">{pair}</div>')
    page.heading("Side by side")
    rows = []
    for name, mine, theirs in compare(*found):
        kind = ' class="differs"' if mine != theirs else ""
        cells = "".join(f"<td{kind}>{html.escape(value)}</td>" for value in (mine, theirs))
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", found[0].name, found[1].name))
    page.html(f'<table class="known two"><tr>{head}</tr>{"".join(rows)}</table>')
