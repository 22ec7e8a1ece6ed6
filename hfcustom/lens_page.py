"""The page of `hfcustom lens`: tokens coloured by role, labels underlined, each tile's picture where its tokens stand."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hfcustom.data.view import Token, View
from hfcustom.lens import batch_table, describe_kind, show_text, total_tables
from hfcustom.report import Report, picture_source

THUMBNAIL, PICTURE = 56, 420  # pixels of the longer side

STYLE = """
<style>
.tokens { line-height: 2.1; font: 13px/2.1 ui-monospace, monospace; overflow-wrap: anywhere }
.t { padding: 2px 1px; border-radius: 3px; white-space: pre-wrap } .system { background: #f1e6fa } .user { background: #e3f0fb }
.assistant { background: #e4f5e4 } .label { border-bottom: 3px solid #11702b; font-weight: 600 } .control { opacity: .65 }
.chip { display: inline-flex; align-items: center; gap: 4px; background: #fdf3d8; border-radius: 5px; padding: 2px 6px; margin: 2px; vertical-align: middle; line-height: 1.2 }
.chip img { height: 40px; image-rendering: pixelated } .bad { outline: 2px solid #b3261e } .pad { color: #999 }
.tiles img { height: 96px; margin: 2px; border: 1px solid #ccc; image-rendering: pixelated } .picture img { max-width: 420px; border: 1px solid #ccc }
.legend .t { margin-right: 10px }
</style>
"""


def write_page(path: Path, views: Sequence[View]) -> None:
    """Write one page about the rows; every string of theirs is escaped, pictures are embedded."""
    page = Report("What the model sees")
    page.html(STYLE + _legend())
    for view in views:
        page.heading(view.name)
        for problem in view.problems:
            page.html(f'<p class="wrong">{html.escape(problem)}</p>')
        page.html(_pictures(view))
        page.html(f'<p class="tokens">{"".join(_run(view, run) for run in view.runs())}</p>')
        for title, columns, rows in total_tables([view]):
            page.text(title)
            page.table(columns, [[f"{cell:.1%}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    if len(views) > 1:
        title, columns, rows = batch_table(views)
        page.heading(title)
        page.table(columns, [[f"{cell:.1%}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    page.write(path)


def _legend() -> str:
    roles = "".join(f'<span class="t {role}">{role}</span>' for role in ("system", "user", "assistant"))
    return (
        f'<p class="legend">{roles}<span class="t label">has a label</span><span class="chip">image tokens of one tile</span>'
        ' <span class="quiet">Point at a token for its id, kind, weight and position.</span></p>'
    )


def _pictures(view: View) -> str:
    pieces = []
    for number, (picture, tiles) in enumerate(zip(view.pictures, view.tiles, strict=True), start=1):
        size = f"{picture.width} x {picture.height}"
        crops = "".join(_picture(tile, 2 * THUMBNAIL, f"tile of image {number}") for tile in tiles)
        caption = f"image {number}, {size} pixels" + (f", as {len(tiles)} tiles" if len(tiles) > 1 else "")
        pieces.append(
            f'<div class="picture">{_picture(picture, PICTURE, caption)}<div class="quiet">{caption}</div></div>'
        )
        pieces.append(f'<div class="tiles">{crops}</div>' if tiles else "")
    return "".join(pieces)


def _picture(picture: Image.Image, longest: int, name: str) -> str:
    small = picture.copy()
    small.thumbnail((longest, longest))
    return f'<img alt="{html.escape(name)}" src="{picture_source(small)}">'


def _run(view: View, run: Sequence[Token]) -> str:
    first = run[0]
    bad = " bad" if first.label is not None and first.kind in ("image", "mark", "padding", "video") else ""
    about = html.escape(
        f"{first.at}: id {first.id}, {first.role or 'unknown role'}, {describe_kind(view, first)}, "
        f"position {','.join(map(str, first.position))}"
        + ("" if first.label is None else f", weight {first.weight:g}"),
        quote=True,
    )
    if first.kind == "padding":
        return f'<span class="t pad{bad}" title="{about}">[{len(run)} x padding]</span>'
    if first.kind == "image":
        return f'<span class="chip{bad}" title="{about}">{_tile(view, first)}{html.escape(describe_kind(view, first))} x {len(run)}</span>'
    label = " label" if first.label is not None else ""
    text = html.escape(show_text(first.text)).replace("\\n", "\\n\n")
    return f'<span class="t {first.role}{label} {first.kind}{bad}" title="{about}">{text}</span>'


def _tile(view: View, token: Token) -> str:
    if token.image is None:
        return ""
    tiles = view.tiles[token.image]
    shown = tiles[token.tile] if tiles and token.tile is not None else view.pictures[token.image]
    return _picture(shown, THUMBNAIL, describe_kind(view, token))
