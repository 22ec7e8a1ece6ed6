"""Curves as inline SVG: {label: [(step, value), ...]} -> markup, with no script and nothing loaded from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hfcustom.runs.files import step_of

Points = Sequence[tuple[float, float]]

COLOURS = ("#1f5fa8", "#c2571a", "#2b7a3d", "#8a3d9c", "#b3261e", "#6b6b6b", "#0d8a8a", "#a08000")
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px } .chart { margin: 0 }
.chart svg { width: 100%; font: 10px system-ui, sans-serif; fill: #555 } figcaption { font-weight: 600 }
.legend { font-size: 12px; color: #444 } .legend span { margin-right: 10px; white-space: nowrap }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 4px }
"""
WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 20
MOST = 300  # points of a line: beyond, of each stretch the lowest and the highest are drawn


def chart(title: str, lines: Mapping[str, Points]) -> str:
    """Return one chart, with a legend that gives each line's newest value; nothing where no line has a finite point."""
    finite = {label: [point for point in points if all(map(math.isfinite, point))] for label, points in lines.items()}
    drawn = {label: points for label, points in finite.items() if points}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    log = min(values) > 0 and max(values) / min(values) > 1000
    low, high = _scale(min(values), max(values), log)
    first, last = min(steps), max(steps)

    def place(point: tuple[float, float]) -> str:
        across = (point[0] - first) / ((last - first) or 1)
        up = (_height(point[1], log) - low) / (high - low)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    shapes = [_grid(low, high, log), _axis(first, last)]
    for at, points in enumerate(drawn.values()):
        shapes.append(_line([place(point) for point in thin(points)], COLOURS[at % len(COLOURS)]))
    note = " (log scale)" if log else ""
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(shapes)}</svg>'
        f'<div class="legend">{_legend(drawn)}</div></figure>'
    )


def points_of(history: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of each line of a log that has a number by this name."""
    return [(step_of(entry), entry[name]) for entry in history if isinstance(entry.get(name), int | float)]


def thin(points: Points) -> Points:
    """Return few enough points to draw, with every spike still there."""
    if len(points) <= MOST:
        return points
    stretch = math.ceil(2 * len(points) / MOST)
    kept: list[tuple[float, float]] = [points[0]]
    for start in range(0, len(points), stretch):
        piece = points[start : start + stretch]
        kept += sorted({min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])})
    return [*kept, points[-1]]


def _height(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _scale(low: float, high: float, log: bool) -> tuple[float, float]:
    low, high = _height(low, log), _height(high, log)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _grid(low: float, high: float, log: bool) -> str:
    shapes = []
    for share in (0.05, 0.5, 0.95):
        at = low + share * (high - low)
        y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        shapes.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
            f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{shorten(10**at if log else at)}</text>'
        )
    return "".join(shapes)


def _axis(first: float, last: float) -> str:
    ends = [(LEFT, "start", first), (WIDTH - RIGHT, "end", last)] if last > first else [(LEFT, "start", first)]
    return "".join(
        f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">step {step:g}</text>' for x, anchor, step in ends
    )


def _line(places: Sequence[str], colour: str) -> str:
    if len(places) == 1:
        x, y = places[0].split(",")
        return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
    return f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _legend(lines: Mapping[str, Points]) -> str:
    return " ".join(
        f'<span><i style="background:{COLOURS[at % len(COLOURS)]}"></i>{html.escape(label)} {shorten(points[-1][1])}</span>'
        for at, (label, points) in enumerate(lines.items())
    )


def shorten(value: float) -> str:
    """Return a number as people read it."""
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.2e}" if value and not 1e-2 <= abs(value) < 1e7 else f"{value:.4g}"
