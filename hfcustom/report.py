"""One HTML page about a run: loss curves by term, answers beside pictures, the part table. No script, no network.

Every string of a data set or a model is escaped; pictures are embedded, so that the page can be mailed as one file.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.curves import STYLE as CHART_STYLE
from hfcustom.curves import Points, chart, points_of
from hfcustom.evaluate import Answer
from hfcustom.files import write_text, written_whole
from hfcustom.parts import PartRow

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0; display: block; max-width: 100%; overflow-x: auto } td, th { padding: .25rem .8rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #888 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px } .card img { image-rendering: pixelated; height: 96px; margin-right: 6px }
.right { color: #11702b } .wrong { color: #b3261e } .quiet { color: #666 } code { background: #f4f4f4; padding: 0 .2em }
"""


class Report:
    """Sections of a page, added in reading order and written at once."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.sections: list[str] = []

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.sections.append(f"<p>{html.escape(text)}</p>")

    def heading(self, text: str) -> None:
        """Add a heading."""
        self.sections.append(f"<h2>{html.escape(text)}</h2>")

    def html(self, fragment: str) -> None:
        """Add markup as it is; whoever wrote it has escaped what comes from data."""
        self.sections.append(fragment)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add a table; numbers are aligned right."""
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        self.sections.append(f"<table><tr>{head}</tr>{body}</table>")

    def parts(self, rows: Sequence[PartRow]) -> None:
        """Add a part table."""
        adapted = any(row.adapter for row in rows)
        columns = (
            "part",
            "modules",
            "parameters",
            "trained",
            "frozen",
            "bytes",
            "dtype",
            *(["LoRA"] if adapted else []),
        )
        lines = [
            (
                row.part,
                row.modules,
                row.parameters,
                row.trainable,
                row.parameters - row.trainable,
                row.bytes,
                row.dtypes,
                *([row.adapter] if adapted else []),
            )
            for row in rows
        ]
        self.table(columns, lines)

    def curves(self, histories: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]) -> None:
        """Add a chart a name, with a line for each history that holds it."""
        self.charts(
            {name: {label: points_of(history, name) for label, history in histories.items()} for name in names}
        )

    def charts(self, lines: Mapping[str, Mapping[str, Points]]) -> None:
        """Add a chart a title, {title: {label: [(step, value), ...]}}; one without a finite point is left out."""
        charts = [chart(title, points) for title, points in lines.items()]
        self.html(f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No line is logged yet.</p>")

    def answers(self, answers: Sequence[Answer]) -> None:
        """Add a card a row: its pictures, question, answer and truth."""
        self.sections.append('<div class="cards">' + "".join(_card(answer) for answer in answers) + "</div>")

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        body = "\n".join(self.sections)
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}{CHART_STYLE}</style></head>'
            f"<body><h1>{html.escape(self.title)}</h1>\n{body}\n</body></html>\n"
        )
        write_text(path, page)


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f'<td class="number">{shown}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _card(answer: Answer) -> str:
    pictures = "".join(f'<img alt="input image" src="{picture_source(image)}">' for image in answer.example.images)
    verdict = "right" if answer.answer == answer.truth else "wrong"
    return (
        f'<div class="card">{pictures}<div class="quiet">{html.escape(answer.question)}</div>'
        f'<div class="{verdict}">{html.escape(answer.answer) or "(nothing)"}</div>'
        f'<div class="quiet">truth: {html.escape(answer.truth)}</div></div>'
    )


def picture_source(image: Image.Image) -> str:
    """Return a picture as the src of an <img>."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_result(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], answers: Mapping[str, Sequence[Answer]]
) -> None:
    """Write one PNG: the loss curves, and for each task five one-image rows with what the model answered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.1 * len(answers)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2), squeeze=False)[0]
    axes = left.subplots()
    for label, history in histories.items():
        axes.plot(*zip(*points_of(history, "loss"), strict=True), label=label)
    axes.set(title="loss", xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    grid = right.subplots(len(answers), 5, squeeze=False)
    for line, (task, rows) in zip(grid, answers.items(), strict=True):
        shown = [row for row in rows if len(row.example.images) == 1][: len(line)]
        for axes in line:
            axes.axis("off")
        for axes, row in zip(line, shown, strict=False):
            axes.imshow(row.example.images[0], interpolation="nearest")
            color = "#11702b" if row.answer == row.truth else "#b3261e"
            answer = row.answer or "(nothing)"
            axes.set_title(f"{task}:\n{answer}", color=color, fontsize=10, parse_math=False)  # a $ is a $
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
