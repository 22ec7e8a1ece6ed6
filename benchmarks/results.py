"""Results as a table on the terminal and as a picture: bars of time and memory, and memory against what makes it grow."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from about import ABOUT
from rounds import Settings, counts_processor_time
from tasks import step_rows

PACKAGES = ("torch", "transformers", "trl", "peft", "hfcustom")
BASELINES = ("trainer", "stock", "trl", "trl_good")  # the first one that was measured is 1x
COLORS = {
    "ours": "#c2410c",
    "ours_packed": "#7c2d12",
    "ours_cached": "#431407",
    "stock": "#94a3b8",
    "trainer": "#64748b",
    "trl": "#93c5fd",
    "trl_good": "#2563eb",
}


def describe_machine(settings: Settings, command: str) -> dict[str, Any]:
    """Return where and how this was measured."""
    task = settings.task
    rows = step_rows(task, "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": command,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "device": settings.device,
        "dtype": settings.dtype,
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "task": {
            "name": task.name,
            "about": task.about,
            "vocabulary": task.vocabulary,
            "rows": len(rows),
            "tokens": sum(row.length for row in rows),
            "padded": len(rows) * max(row.length for row in rows),
            "images": sum(row.images for row in rows),
            "supervised": sum(row.supervised for row in rows),
        },
        "rounds": settings.rounds,
        "seconds": "cpu" if counts_processor_time(settings) else "wall",
    }


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version(package: str) -> str | None:
    """Return an installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def failures(results: dict[str, Any]) -> list[str]:
    """Return what must not be: variants that disagree with the first one, or that failed for no reason given here."""
    found = []
    for group in results["groups"]:
        for row in group["variants"]:
            if row["agrees"] is False:
                found.append(f"{group['group']}: {row['variant']} disagrees (worst: {row['worst_gradient']})")
            if row["status"].startswith("failed"):
                found.append(f"{group['group']}: {row['variant']} {row['status']}; see workers.log")
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """A table before it is printed or written, and the lines that go with it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str]

    def as_rich(self) -> Table:
        """Return it for the terminal."""
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for at, name in enumerate(self.columns):
            table.add_column(name, justify="right" if at else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        """Return it for a README."""
        lines = [f"**{self.title}**", "", *(_line(row) for row in (self.columns, ("---",) * len(self.columns)))]
        return "\n".join([*lines, *(_line(row) for row in self.rows), "", *self.notes])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(results: dict[str, Any], out: Console) -> None:
    """Print the machine, a table a group, growth, and what went wrong."""
    out.print("\n".join(heading(results)))
    for sheet in sheets(results):
        out.print()
        out.print(sheet.as_rich())
        for note in sheet.notes:
            out.print(note)
    for failure in failures(results):
        out.print(f"PROBLEM {failure}")


def markdown(results: dict[str, Any]) -> str:
    """Return the same for a README."""
    return "\n\n".join([" ".join(heading(results)[:3]), *(sheet.as_markdown() for sheet in sheets(results))]) + "\n"


def heading(results: dict[str, Any]) -> list[str]:
    """Return the command, the machine, the task, and what each variant is."""
    machine = results["machine"]
    task = machine["task"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items() if number)
    names = dict.fromkeys(row["variant"] for group in results["groups"] for row in group["variants"])
    return [
        f"`{machine['command']}`, {machine['date']};",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}, threads: {machine['threads']}, "
        f"{machine['dtype']}; {packages};",
        f"task {task['name']}, {task['about']}: {task['rows']} rows, {task['tokens']:,} tokens ({task['padded']:,} padded), "
        f"{task['images']} images, {task['supervised']} supervised, vocabulary {task['vocabulary']:,}.",
        *(f"  {name}: {ABOUT[name]}" for name in names),
    ]


def sheets(results: dict[str, Any]) -> list[Sheet]:
    """Return a table a group, and one of growth."""
    found = [group_sheet(group, results["machine"]["seconds"]) for group in results["groups"]]
    return found + ([growth_sheet(results["scaling"])] if results["scaling"] else [])


def group_sheet(group: dict[str, Any], seconds: str) -> Sheet:
    """Return one group's table; ratios are to the first of BASELINES that was measured."""
    measured = [row for row in group["variants"] if row["memory_gb"] is not None]
    base = next((row for name in BASELINES for row in measured if row["variant"] == name), None)
    columns = ("variant", f"{seconds} s", "faster", "GB", "smaller", "of limit", "loss", "gradients", "agrees")
    rows = []
    for row in measured:
        faster, smaller = ("", "") if base is None else ratios(row, base, seconds)
        numbers = (
            f"{row[seconds + '_s']:.2f}",
            faster,
            f"{row['memory_gb']:.2f}",
            smaller,
            f"{row['share_of_limit']:.0%}",
        )
        agrees = {True: "yes", False: "NO", None: "not judged"}[row["agrees"]]
        rows.append((row["variant"], *numbers, f"{row['loss']:.5f}", f"{row['gradient_distance']:.0e}", agrees))
    notes = [f"{row['variant']}: {row['status']}" for row in group["variants"] if row["memory_gb"] is None]
    limits = ", ".join(f"{name} {rate:.0f}" for name, rate in group["limit_gflops"].items())
    notes.append(f"needed: {group['needed_gflop']:.3g} GFLOP; matmul limit in the same run, GFLOP/s: {limits}")
    return Sheet(group["group"] + (f" (1x is {base['variant']})" if base else ""), columns, rows, notes)


def ratios(row: dict[str, Any], base: dict[str, Any], seconds: str) -> tuple[str, str]:
    """Return how many times faster and smaller a row is."""
    memory = max(row["memory_gb"], 1e-3)
    return f"{base[seconds + '_s'] / row[seconds + '_s']:.1f}x", f"{base['memory_gb'] / memory:.1f}x"


def growth_sheet(scaling: dict[str, Any]) -> Sheet:
    """Return memory against vocabulary and length."""
    names = tuple(dict.fromkeys(row["variant"] for row in scaling["vocabulary"]))
    rows = []
    for axis in ("vocabulary", "length"):
        for size in dict.fromkeys(row["size"] for row in scaling[axis]):
            cells = [row for row in scaling[axis] if row["size"] == size]
            texts = [row["status"] if row["memory_gb"] is None else f"{row['memory_gb']:.3f}" for row in cells]
            rows.append((f"{axis} {size:,}", *texts))
    title = f"Memory of a LoRA step, GB (length {scaling['at_length']:,}, vocabulary {scaling['at_vocabulary']:,})"
    return Sheet(title, ("", *names), rows, [])


# ---- the picture ----------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a row of two bar charts a group, and two charts of growth below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups, scaling = results["groups"], results["scaling"]
    heights = [0.5 + 0.3 * len(group["variants"]) for group in groups] + ([3.0] if scaling else [])
    figure, axes = pyplot.subplots(
        len(heights), 2, figsize=(11, 1.2 + sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    seconds = results["machine"]["seconds"]
    for group, (left, right) in zip(groups, axes, strict=False):
        _bars(left, group["variants"], seconds + "_s", f"{group['group']}: {seconds} seconds a step")
        _bars(right, group["variants"], "memory_gb", "peak memory growth, GB")
    if scaling:
        for axis, chart in zip(("vocabulary", "length"), axes[-1], strict=True):
            _lines(chart, axis, scaling)
    machine = results["machine"]
    figure.suptitle(
        f"One training step, task {machine['task']['name']} ({machine['task']['about']}), {machine['dtype']}, "
        f"{machine['device']}, {machine['threads']} threads",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(chart: Any, rows: Sequence[dict[str, Any]], field: str, title: str) -> None:
    values = [row[field] or 0.0 for row in rows]
    bars = chart.barh([row["variant"] for row in rows], values, color=[COLORS[row["variant"]] for row in rows])
    labels = [f"{row[field]:.2f}" if row[field] is not None else row["status"][:40] for row in rows]
    chart.bar_label(bars, labels, padding=3, fontsize=8)
    chart.invert_yaxis()
    chart.margins(x=0.15)
    chart.set_title(title, fontsize=9, loc="left")
    chart.tick_params(labelsize=8)
    chart.spines[["top", "right"]].set_visible(False)


def _lines(chart: Any, axis: str, scaling: dict[str, Any]) -> None:
    points = [row for row in scaling[axis] if row["memory_gb"] is not None]
    for name in dict.fromkeys(row["variant"] for row in points):
        mine = [row for row in points if row["variant"] == name]
        sizes, memory = [row["size"] for row in mine], [row["memory_gb"] for row in mine]
        chart.plot(sizes, memory, marker="o", label=name, color=COLORS[name])
    fixed = f"length {scaling['at_length']}" if axis == "vocabulary" else f"vocabulary {scaling['at_vocabulary']:,}"
    chart.set_title(f"peak memory growth, GB, against {axis} ({fixed})", fontsize=9, loc="left")
    chart.set_ylim(bottom=0)
    chart.legend(fontsize=8, frameon=False)
    chart.tick_params(labelsize=8)
    chart.spines[["top", "right"]].set_visible(False)
