"""`hfcustom runs`: runs beside each other: steps, seconds, newest and best numbers, options that differ."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcustom.runs.files import FAULTS, read_lines, read_object, step_of

SPEEDS = ("tokens_per_s", "images_per_s", "useful_tokens", "mfu")  # of which the mean is told
NOT_COMPARED = ("output_dir", "trackers")


def run_runs(options: Namespace) -> int:
    """Run the command; the exit code is 2 where there is no run to be compared."""
    found: list[Path] = []
    for folder in map(Path, options.folders):
        runs = find_runs(folder)
        if not runs:
            problem = "holds no run" if folder.is_dir() else "is no folder"
            print(
                f"hfcustom runs: {folder} {problem}: name the output_dir of a training, in which metrics.jsonl is, or a folder "
                "that holds such folders.",
                file=sys.stderr,
            )
            return 2
        found += [path for path in runs if path not in found]
    described = {str(path): describe_run(path) for path in found}
    if options.html:
        write_comparison(Path(options.html), described)
    if options.json:
        print(
            json.dumps({"runs": _strict(described), "differ": differing_options(described)}, indent=1, allow_nan=False)
        )
        return 0
    from hfcustom.console import out, show_table

    for title, columns, rows in tables(described):
        out.print(f"\n{title}" if title else "")
        show_table(columns, rows)
    if options.html:
        out.print(f"\nThe page is {options.html}.")
    return 0


def find_runs(folder: Path) -> list[Path]:
    """Return a folder that is a run, and runs below it, such as the stages of a recipe, in order of their names."""
    return sorted(path.parent for path in folder.rglob("metrics.jsonl"))


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what is told of a run: each number's newest, lowest and highest value with its step."""
    facts, history = read_object(folder / "run.json"), read_lines(folder / "metrics.jsonl")
    numbers: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for entry in history for name in entry if name != "step"):
        points = [
            (step_of(entry), float(entry[name])) for entry in history if isinstance(entry.get(name), int | float)
        ]
        finite = [point for point in points if math.isfinite(point[1])]
        if finite:
            low, high = min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])
            numbers[name] = {
                "last": points[-1][1],
                "lowest": {"value": low[1], "step": low[0]},
                "highest": {"value": high[1], "step": high[0]},
                "mean": sum(value for _, value in finite) / len(finite),
            }
    return {
        "model": facts.get("model"),
        "step": max(map(step_of, history), default=0),
        "steps": facts.get("steps"),
        "seconds": facts.get("seconds"),
        "losses": facts.get("losses") or [],
        "faults": len(read_lines(folder / FAULTS)),
        "left_out": len(read_lines(folder / "bad_rows.jsonl")),
        "options": facts.get("options") or {},
        "scores": _scores(history),
        "numbers": numbers,
    }


def _scores(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the numbers that `evaluate` has returned: those of lines without a loss of training."""
    return list(dict.fromkeys(name for entry in history if "loss" not in entry for name in entry if name != "step"))


def differing_options(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {option: {run: value}} of the options that are not the same in all runs; None where a run does not know one."""
    options = {name: run["options"] for name, run in runs.items() if run["options"]}
    names = [name for name in dict.fromkeys(key for values in options.values() for key in values)]
    found = {name: {run: values.get(name) for run, values in options.items()} for name in names}
    return {
        name: values
        for name, values in found.items()
        if name not in NOT_COMPARED and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1
    }


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(runs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Return (title, columns, rows): the runs, and the options that differ."""
    short = _short_names(list(runs))
    losses = list(dict.fromkeys(["loss", *(name for run in runs.values() for name in run["losses"])]))
    losses = [name for name in losses if any(name in run["numbers"] for run in runs.values())]
    scores = list(dict.fromkeys(name for run in runs.values() for name in run["scores"]))
    speeds = [name for name in SPEEDS if any(name in run["numbers"] for run in runs.values())]
    left_out = any(run["left_out"] for run in runs.values())
    columns = ["run", "step", "seconds", "faults", *(["rows left out"] if left_out else [])]
    columns += [f"{name}, last (lowest)" for name in losses]
    columns += [f"{name}, last (highest)" for name in scores]
    columns += [f"{name}, mean" for name in speeds]
    peaks = any("peak_gib" in run["numbers"] for run in runs.values())
    columns += ["peak_gib"] if peaks else []
    rows = []
    for name, run in runs.items():
        seconds = "" if run["seconds"] is None else f"{run['seconds']:,.0f}"
        row: list[Any] = [short[name], f"{run['step']}/{run['steps'] or '?'}", seconds, str(run["faults"])]
        row += [str(run["left_out"])] * left_out
        row += [_last_and(run["numbers"].get(loss), "lowest") for loss in losses]
        row += [_last_and(run["numbers"].get(score), "highest") for score in scores]
        row += [_number(run["numbers"][speed]["mean"]) if speed in run["numbers"] else "" for speed in speeds]
        row += [
            _number(run["numbers"]["peak_gib"]["highest"]["value"]) if "peak_gib" in run["numbers"] else ""
        ] * peaks
        rows.append(row)
    found = [("", columns, rows)]
    if differ := differing_options(runs):
        lines = [[name, *(_option(values, run) for run in runs)] for name, values in differ.items()]
        found.append(("Options that differ", ["option", *short.values()], lines))
    return found


def _short_names(runs: Sequence[str]) -> dict[str, str]:
    """Return each run's path below the folder that they share; of one run its own name."""
    shared = Path(os.path.commonpath([Path(run).absolute().parent for run in runs]))
    return {run: Path(run).absolute().relative_to(shared).as_posix() for run in runs}


def _last_and(number: Mapping[str, Any] | None, which: str) -> str:
    if number is None:
        return ""
    return f"{_number(number['last'])} ({_number(number[which]['value'])} at {number[which]['step']})"


def _option(values: Mapping[str, Any], run: str) -> str:
    return repr(values[run]) if run in values else "(no run.json)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _strict(value: Any) -> Any:
    """Return a value as strict JSON knows it: a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_comparison(path: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the tables as a page, with one chart a number in which every run has a line."""
    from hfcustom.report import Report

    page = Report("Runs")
    for title, columns, rows in tables(runs):
        if title:
            page.heading(title)
        page.table(columns, rows)
    page.heading("Curves")
    names = dict.fromkeys(name for run in runs.values() for name in run["numbers"])
    short = _short_names(list(runs))
    lines = {short[name]: read_lines(Path(name) / "metrics.jsonl") for name in runs}
    page.curves(lines, list(names))
    page.write(path)
