"""hfcustom preflight: what training would refuse of a data set, what a person may want to know of it, and how long it is.

Rows -> hfcustom/data/scan.py -> findings over all rows (duplicates, leaks, kinds) -> bad_rows.jsonl, a summary, a plot.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hfcustom.data.checks import check_kind
from hfcustom.data.findings import SHOWN, Finding
from hfcustom.data.scan import EVAL, TRAIN, Place, RowFacts, RowReader, ScanOptions, ScanState, run_chunks
from hfcustom.data.sources import Examples
from hfcustom.data.turns import RowError
from hfcustom.naming import printable

EXIT_FOUND, EXIT_USAGE, EXIT_TOO_MANY, EXIT_INTERRUPTED = 1, 2, 4, 7
ROWS_A_PROCESS = 256  # fewer are read sooner than a process starts
BINS = 30


def run_preflight(options: argparse.Namespace) -> int:
    """Check rows as `hfcustom preflight` was asked to; return its exit code."""
    try:
        return _preflight(options)
    except KeyboardInterrupt:
        print("Stopped before rows were checked. Give the same command again.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (OSError, ImportError, ValueError) as error:
        print(f"hfcustom preflight: {error}", file=sys.stderr)
        return EXIT_USAGE


def _preflight(options: argparse.Namespace) -> int:
    _check(options)
    scanned = _scan_options(options)
    sets = scanned.load_sets()
    state = _open_state(options, scanned, sets)
    done = False
    try:
        with _terminating():
            scan(scanned, sets, state, _workers(options.workers, sets), show=not options.json)
            add_findings_over_all(state)
        summary = summarise(state, options.batch_size)
        _write_findings(state, Path(options.output), {TRAIN: options.data, EVAL: options.eval_data})
        done = True
    except KeyboardInterrupt:
        total = sum(map(len, sets.values()))
        print(f"Stopped; {state.count()} of {total} rows are checked. Go on with --resume.", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        state.close(delete=done)
    bad = summary["rows"]["bad"]
    too_many = bad > options.max_bad_share * summary["rows"][TRAIN] or bad == summary["rows"][TRAIN]
    code = EXIT_TOO_MANY if bad and too_many else EXIT_FOUND if bad or summary["rows"]["bad_eval"] else 0
    summary |= {"output": options.output, "exit_code": code}
    if options.plot:
        plot(summary, Path(options.plot))
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        _print(summary)
    return code


# ---- options --------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    rules = [
        (options.max_length is None or options.max_length > 0, f"--max-length {options.max_length} must be positive"),
        (options.min_pixels >= 0, f"--min-pixels {options.min_pixels} must not be negative"),
        (options.batch_size > 0, f"--batch-size {options.batch_size} must be positive"),
        (0 <= options.max_bad_share <= 1, f"--max-bad-share {options.max_bad_share} must be in [0, 1]"),
        (options.workers is None or options.workers >= 0, f"--workers {options.workers} must not be negative"),
        (options.eval_data is not None or options.eval_split is None, "--eval-split has no effect without --eval"),
        (
            not (options.captions and options.family),
            "--captions has no published settings; name a checkpoint with --model",
        ),
        (not options.captions or options.train_on == "assistant", "--train-on has no effect with --captions"),
        (not options.captions or not options.allowed_tokens, "--allowed-tokens has no effect with --captions"),
        (not (options.resume and options.overwrite), "--resume and --overwrite exclude each other"),
    ]
    if not (options.model or options.family):
        rules += [
            (
                options.max_length is None,
                "--max-length has no effect without --model or --family, which say what a token is",
            ),
            (not options.allowed_tokens, "--allowed-tokens has no effect without --model or --family"),
        ]
    if problems := [message for holds, message in rules if not holds]:
        raise ValueError("; ".join(problems))
    if options.plot:
        _import_matplotlib()


def _scan_options(options: argparse.Namespace) -> ScanOptions:
    names = (
        "data",
        "split",
        "eval_data",
        "eval_split",
        "model",
        "family",
        "max_length",
        "min_pixels",
        "train_on",
        "captions",
        "max_frames",
        "frame_method",
        "video_as_images",
        "image_root",
        "image_downloads",
    )
    given = {name: vars(options)[name] for name in names}
    given |= {name: tuple(vars(options)[name]) for name in ("allowed_tokens", "image_hosts")}
    return ScanOptions(**given)


def _workers(asked: int | None, sets: dict[str, Examples]) -> int:
    if asked is not None:
        return asked
    paying = sum(map(len, sets.values())) // ROWS_A_PROCESS
    return min(os.cpu_count() or 1, paying)


def _open_state(options: argparse.Namespace, scanned: ScanOptions, sets: dict[str, Examples]) -> ScanState:
    """Return the file of the scan, of an interrupted one with --resume; ValueError where it is another's."""
    path = Path(f"{options.output}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and options.overwrite:
        path.unlink()
    if path.exists() and not options.resume:
        raise ValueError(
            f"{path} holds a scan that was interrupted; go on with --resume, or forget it with --overwrite."
        )
    state = ScanState(path)
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(scanned).items()}
    for part, rows in sets.items():
        facts |= {f"{part}_rows": len(rows), f"{part}_content": rows.fingerprint()}
    if different := state.describe(facts):
        state.close(delete=False)
        raise ValueError(f"{path} is of another scan: {'; '.join(different)}. Start afresh with --overwrite.")
    return state


# ---- the scan -------------------------------------------------------------------------------------------------------


def scan(
    options: ScanOptions, sets: dict[str, Examples], state: ScanState, workers: int, *, show: bool = False
) -> None:
    """Read every row that is not known yet, and write down what it is."""
    sizes = {part: len(rows) for part, rows in sets.items()}
    chunks = run_chunks(partial(RowReader, options), state.missing(sizes), workers, partial(_killed, sets))
    with _progress(show) as bar, _quiet_readers():
        task = bar.add_task("rows", total=sum(sizes.values()), completed=state.count())
        for facts in chunks:
            state.add(facts)
            bar.advance(task, len(facts))


def _killed(sets: dict[str, Examples], place: Place) -> RowFacts:
    name = sets[place[0]].name_of(place[1])
    reason = f"{name}: the process that read it was killed, for its memory perhaps; look at the row's images."
    return RowFacts(place, name, findings=[Finding(name, reason, "killed")])


def _progress(show: bool) -> Progress:
    out = Console(stderr=True)
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=out, disable=not (show and out.is_terminal))


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """What readers warn of are findings here."""
    logger = logging.getLogger("hfcustom")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM, as schedulers send it, end a scan as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- findings over all rows -----------------------------------------------------------------------------------------

OVER_ALL = ("duplicate_image", "duplicate_row", "kind", "leaked_image", "leaked_row")


def add_findings_over_all(state: ScanState) -> None:
    """Add what only all rows together show: rows of another kind, the same row or image twice, held-out ones in training."""
    with state.db:
        marks = ", ".join("?" * len(OVER_ALL))
        state.db.execute(f"DELETE FROM findings WHERE code IN ({marks})", OVER_ALL)  # of a scan stopped at this point
        for findings in (_other_kinds(state), _same_rows(state), _same_images(state)):
            state.add_findings(findings)


def _other_kinds(state: ScanState) -> Iterator[tuple[Place, Finding]]:
    rows = "SELECT at, name, kind FROM rows WHERE part = ? AND kind IS NOT NULL"
    first = state.db.execute(f"{rows} ORDER BY at LIMIT 1", (TRAIN,)).fetchone()
    for at, name, kind in state.db.execute(f"{rows} AND kind != ?", (TRAIN, first[2])) if first else ():
        try:
            check_kind(name, kind, first[2])
        except RowError as error:
            yield (TRAIN, at), Finding.of(error, name)


def _same_rows(state: ScanState) -> Iterator[tuple[Place, Finding]]:
    """Name each training row that is held out too, or the same as an earlier one."""
    firsts = ", ".join(f"first_value({column}) OVER same" for column in ("part", "at", "name"))
    same = f"""SELECT part, at, name, {firsts} FROM rows WHERE digest != ''
        WINDOW same AS (PARTITION BY digest ORDER BY part, at)"""  # held-out rows first
    for part, at, name, first_part, first_at, first in state.db.execute(same):
        if part == EVAL or (part, at) == (first_part, first_at):
            continue
        if first_part == EVAL:
            words = f"{name} is held out too, as {first}; drop one of them."
            yield (TRAIN, at), Finding(name, words, "leaked_row", "warning")
        else:
            yield (TRAIN, at), Finding(name, f"{name} is the same as {first}.", "duplicate_row", "warning")


def _same_images(state: ScanState) -> Iterator[tuple[Place, Finding]]:
    several = """SELECT digest, count(DISTINCT CASE part WHEN 'train' THEN at END) AS train,
        count(DISTINCT CASE part WHEN 'eval' THEN at END) AS held_out FROM images GROUP BY digest
        HAVING train > 0 AND train + held_out > 1"""
    places = f"""SELECT images.at, min(number), name FROM images JOIN rows ON rows.part = images.part AND rows.at = images.at
        WHERE images.digest = ? AND images.part = ? GROUP BY images.at ORDER BY images.at LIMIT {SHOWN + 1}"""
    for digest, train, held_out in state.db.execute(several):
        (at, number, name), *others = state.db.execute(places, (digest, TRAIN)).fetchall()
        if held_out:
            shown = [row for _, _, row in state.db.execute(places, (digest, EVAL))]
            code, words = "leaked_image", f"is held out too, in {_few(shown, held_out)}"
        else:
            code, words = "duplicate_image", f"is also in {_few([row for _, _, row in others], train - 1)}"
        words = f"{name}, image {number}: the same picture {words}."
        yield (TRAIN, at), Finding(name, words, code, "warning", f"image {number}")


def _few(names: Sequence[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    more = f" and {total - SHOWN} more" if total > SHOWN else ""
    return f"{'; '.join(names[:SHOWN])}{more}"


# ---- results --------------------------------------------------------------------------------------------------------


def _write_findings(state: ScanState, path: Path, files: dict[str, str | None]) -> None:
    """Write bad_rows.jsonl, one line a finding, at once."""
    new = path.with_name(f"{path.name}.new")
    lines = state.db.execute("SELECT * FROM findings ORDER BY part DESC, at, severity, rowid")
    with new.open("w", encoding="utf-8") as file:
        for part, at, *finding in lines:
            file.write(Finding(*finding).to_json(set=part, file=files[part], index=at) + "\n")
    new.replace(path)


def summarise(state: ScanState, batch_size: int) -> dict[str, Any]:
    """Return all that is printed, as plain JSON values."""
    counted = dict(state.db.execute("SELECT part, count(*) FROM rows GROUP BY part"))
    bad = dict(
        state.db.execute("SELECT part, count(DISTINCT at) FROM findings WHERE severity = 'error' GROUP BY part")
    )
    tokens = state.db.execute("SELECT count(*) FROM rows WHERE tokens IS NOT NULL").fetchone()[0] > 0
    size = "tokens" if tokens else "characters"
    names = {size: size, "images": "images"} | ({"tiles": "tiles", "labels": "labels"} if tokens else {})
    numbers = {name: _numbers(state, column) for name, column in names.items()}
    pixels = state.db.execute("SELECT width * height / 1e6 FROM images WHERE part = ?", (TRAIN,))
    numbers["megapixels of an image"] = np.fromiter((value for (value,) in pixels), dtype=np.float64)
    return {
        "rows": {
            TRAIN: counted.get(TRAIN, 0),
            EVAL: counted.get(EVAL, 0),
            "bad": bad.get(TRAIN, 0),
            "bad_eval": bad.get(EVAL, 0),
        },
        "reasons": _reasons(state),
        "numbers": {name: describe(values) for name, values in numbers.items() if len(values)},
        "costliest_batch": _costliest(state, size, batch_size),
    }


def _numbers(state: ScanState, column: str) -> np.ndarray:
    usable = f"SELECT {column} FROM rows WHERE part = ? AND kind IS NOT NULL AND {column} IS NOT NULL"
    return np.fromiter((value for (value,) in state.db.execute(usable, (TRAIN,))), dtype=np.float64)


def describe(values: np.ndarray) -> dict[str, Any]:
    """Return the spread of numbers and their histogram."""
    counts, edges = np.histogram(values, bins=BINS)
    spread = dict(zip(("median", "p95", "max"), np.quantile(values, (0.5, 0.95, 1.0)).tolist(), strict=True))
    return {"total": float(values.sum()), **spread, "counts": counts.tolist(), "edges": edges.tolist()}


def _reasons(state: ScanState) -> list[dict[str, Any]]:
    """Return each reason with how many rows it is about, the first of them, and its words for the first."""
    grouped = "SELECT severity, code, count(DISTINCT part || at) FROM findings GROUP BY severity, code"
    reasons = []
    for severity, code, count in state.db.execute(f"{grouped} ORDER BY severity, 3 DESC, code").fetchall():
        first = state.db.execute(
            "SELECT row, reason FROM findings WHERE severity = ? AND code = ? ORDER BY part DESC, at LIMIT ?",
            (severity, code, SHOWN),
        ).fetchall()
        names = list(dict.fromkeys(name for name, _ in first))
        reasons.append({"severity": severity, "code": code, "rows": count, "first": names, "example": first[0][1]})
    return reasons


def _costliest(state: ScanState, size: str, batch_size: int) -> dict[str, Any]:
    """Return the batch of the longest usable rows: what memory has to hold when they meet."""
    query = f"""SELECT name, {size}, images, tiles FROM rows WHERE part = 'train' AND {size} IS NOT NULL AND at NOT IN (
        SELECT at FROM findings WHERE part = 'train' AND severity = 'error') ORDER BY 2 DESC, at LIMIT ?"""
    rows = state.db.execute(query, (batch_size,)).fetchall()
    longest = rows[0][1] if rows else 0
    return {
        "rows": [name for name, *_ in rows],
        size: [length for _, length, *_ in rows],
        f"padded_{size}": longest * len(rows),
        "images": sum(images for *_, images, _ in rows),
        "tiles": sum(tiles or 0 for *_, tiles in rows) if size == "tokens" else None,
    }


def _print(summary: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = 160  # a file has no width of its own
    rows = summary["rows"]
    held_out = f", {rows['bad_eval']} of {rows[EVAL]} held-out ones" if rows[EVAL] else ""
    out.print(f"{rows['bad']} of {rows[TRAIN]} rows cannot be used{held_out}.")
    if summary["reasons"]:
        cells = [
            (reason["severity"], reason["code"], reason["rows"], "; ".join(reason["first"]), reason["example"])
            for reason in summary["reasons"]
        ]
        out.print(_table(("", "reason", "rows", "first", "the first says"), cells))
    spread = [
        (
            name,
            *(
                f"{found[key]:,.4g}" if found[key] < 1e4 else f"{found[key]:,.0f}"
                for key in ("total", "median", "p95", "max")
            ),
        )
        for name, found in summary["numbers"].items()
    ]
    out.print(_table(("", "total", "median", "95 %", "most"), spread))
    out.print(_costliest_line(summary["costliest_batch"]))
    out.print(f"Every finding is in {summary['output']}.")


def _costliest_line(batch: dict[str, Any]) -> str:
    if not batch["rows"]:
        return "There is no batch of usable rows."
    size = "tokens" if "tokens" in batch else "characters"
    tiles = f" as {batch['tiles']} tiles" if batch["tiles"] is not None else ""
    return (
        f"costliest batch of {len(batch['rows'])}: {batch[f'padded_{size}']:,} {size} with padding, {batch['images']} images"
        f"{tiles}; {printable(_few(batch['rows']))}"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(
            name, overflow="fold", justify="left" if name in ("", "reason", "first", "the first says") else "right"
        )
    for row in rows:
        table.add_row(*(printable(str(value)) for value in row))
    return table


# ---- the plot -------------------------------------------------------------------------------------------------------


def _import_matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or leave it out.") from error
    return Figure


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw the histograms of lengths, tiles and image sizes."""
    numbers = {name: found for name, found in summary["numbers"].items() if name != "labels"}
    figure = _import_matplotlib()(figsize=(4 * len(numbers), 3), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.items(), strict=True):
        axes.stairs(found["counts"], found["edges"], fill=True)
        axes.set_yscale("symlog", linthresh=1)  # one row of a million is what fills the memory
        axes.set_ylim(bottom=0)
        axes.set_xlabel(name)
        axes.set_ylabel("images" if name.startswith("megapixels") else "rows")
        axes.axvline(found["p95"], color="0.3", linestyle=":", label=f"95 %: {found['p95']:,.4g}")
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
