"""report.html of a run: a folder that fit() has written -> curves, answers over time, parts, faults, options.

Made of the run's files alone, so that it can be made again at any time, and of a resumed run as of one that never stopped.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.parts import PartRow
from hfcustom.report import Report, picture_source
from hfcustom.runs.files import FAULTS, read_lines, read_object, step_of

MOST_ANSWERS = 12  # of one row: beyond, the first and the newest
MOST_BAD_ROWS = 20

STYLE = """
<style>
.sample { border: 1px solid #ddd; border-radius: 6px; padding: 8px; overflow-wrap: anywhere } .sample img { max-height: 96px; margin-right: 6px }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 12px }
td { overflow-wrap: break-word }
</style>
"""
TITLES = {
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
    "lr": "learning rate",
    "mfu": "MFU: share of the device's matrix products",
    "peak_gib": "peak memory of the GPU, GiB",
    "tokens_per_s": "tokens per second",
    "useful_tokens": "share of positions that are tokens, not padding",
}


def write_run_page(folder: Path) -> None:
    """Write folder/report.html, whole or not at all."""
    facts, history = read_object(folder / "run.json"), read_lines(folder / "metrics.jsonl")
    page = Report(f"Run {folder.resolve().name}")
    page.html(STYLE)
    page.text(_summary(facts, history))
    page.heading("Curves")
    page.charts(group_curves(history))
    if samples := read_lines(folder / "samples.jsonl"):
        page.heading("Held-out rows, and what the model said at each evaluation")
        page.html(
            f'<div class="samples">{"".join(_sample(folder, at, samples) for at in _rows_of(samples[-1]))}</div>'
        )
    if parts := _parts(facts):
        page.heading("Parts")
        page.parts(parts)
    page.heading("Faults met")
    _add_faults(page, folder)
    page.heading("Options that differ from their defaults")
    options = facts.get("options") or {}
    page.table(("option", "value"), [(name, repr(options.get(name))) for name in facts.get("changed") or ()])
    page.write(folder / "report.html")


def _summary(facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    done = max(map(step_of, history), default=0)
    losses = ", ".join(map(str, facts.get("losses") or ())) or "unknown losses"
    seconds = facts.get("seconds")
    spent = f" {seconds:,.0f} seconds so far." if isinstance(seconds, int | float) else ""
    return f"{facts.get('model', 'A model')}, trained on {losses}: step {done} of {facts.get('steps', 'an unknown number')}.{spent}"


def group_curves(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return {title: {label: points}}: a chart a number, but for those of the parts and of the sources, which share one."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            title, label = _place(name)
            groups.setdefault(title, {}).setdefault(label, []).append((step_of(entry), value))
    return groups


def _place(name: str) -> tuple[str, str]:
    for stem in ("grad_norm", "lr"):
        if name == stem or name.startswith(stem + "_"):
            return TITLES[stem], name.removeprefix(stem).removeprefix("_") or "all parts"
    if name.startswith("tokens/"):
        return "share of the tokens", name.removeprefix("tokens/")
    stem, slash, source = name.partition("/")
    if slash:
        return stem, source
    return TITLES.get(name, name), name


# ---- samples --------------------------------------------------------------------------------------------------------


def _rows_of(entry: Mapping[str, Any]) -> range:
    return range(len(entry["rows"]) if isinstance(entry.get("rows"), list) else 0)


def _sample(folder: Path, at: int, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a card: picture, question, truth, and the answer from step to step; equal ones in a row are told once."""
    row = samples[-1]["rows"][at]
    pictures = "".join(_thumbnail(folder, str(name)) for name in row.get("images") or ())
    told: list[tuple[int, int, str]] = []
    for entry in samples:
        others = [other for other in entry.get("rows") or () if other.get("name") == row.get("name")]
        for other in others[:1]:
            step, answer = step_of(entry), str(other.get("answer"))
            if told and told[-1][2] == answer:
                told[-1] = (told[-1][0], step, answer)
            else:
                told.append((step, step, answer))
    truth = str(row.get("truth"))
    if (left_out := len(told) - MOST_ANSWERS) > 0:
        told = [*told[:3], *told[3 + left_out :]]
    lines = "".join(_answer(first, last, answer, truth) for first, last, answer in told)
    more = (
        f'<div class="quiet">{left_out} other answers between them are in samples.jsonl</div>' if left_out > 0 else ""
    )
    return (
        f'<div class="sample">{pictures}<div class="quiet">{html.escape(str(row.get("question")))}</div>'
        f"<div>expected: {html.escape(truth)}</div>{lines}{more}</div>"
    )


def _answer(first: int, last: int, answer: str, truth: str) -> str:
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    verdict = "right" if answer == truth else "wrong"
    return f'<div><span class="quiet">{steps}:</span> <span class="{verdict}">{html.escape(answer) or "(nothing)"}</span></div>'


def _thumbnail(folder: Path, name: str) -> str:
    if Path(name).name != name:  # a name, never a way out of the folder
        return ""
    try:
        with Image.open(folder / "samples" / name) as picture:
            return f'<img alt="input image" src="{picture_source(picture)}">'
    except OSError:
        return ""


# ---- parts and faults -----------------------------------------------------------------------------------------------


def _parts(facts: Mapping[str, Any]) -> list[PartRow]:
    try:
        return [PartRow(**row) for row in facts.get("parts") or ()]
    except TypeError:  # of another version
        return []


def _add_faults(page: Report, folder: Path) -> None:
    told = [
        [str(entry.get("time", "")), str(step_of(entry)), tell_fault(entry)] for entry in read_lines(folder / FAULTS)
    ]
    if told:
        page.table(("when", "after step", "what"), told)
    bad = read_lines(folder / "bad_rows.jsonl")
    if bad:
        page.text(f"Rows left out: {len(bad)}; bad_rows.jsonl lists all.")
        columns = list(dict.fromkeys(name for entry in bad[:MOST_BAD_ROWS] for name in entry))
        page.table(columns, [[str(entry.get(name, "")) for name in columns] for entry in bad[:MOST_BAD_ROWS]])
    if not told and not bad:
        page.text("None.")


def tell_fault(entry: Mapping[str, Any]) -> str:
    """Return a line of faults.jsonl in words: by its kind, where that has a sentence, else what it says of itself."""
    kind = str(entry.get("kind"))
    sentence = SENTENCES.get(kind)
    if sentence is not None:
        return sentence(entry)
    facts = [
        f"{name}: {_plain(value)}" for name, value in entry.items() if name not in ("kind", "step", "time", "text")
    ]
    return " ".join([f"{kind.capitalize()}.", str(entry.get("text", "")), "; ".join(facts)]).strip()


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _resumed(entry: Mapping[str, Any]) -> str:
    reached = entry.get("reached")
    lost = f"; the attempt before it had logged up to step {reached}" if isinstance(reached, int) else ""
    began = f"Resumed after step {step_of(entry)}" if step_of(entry) else "Began again, since nothing was saved"
    return f"{began}{lost}."


def _memory(entry: Mapping[str, Any]) -> str:
    words = {"cut": "was cut in two", "again": "was run once more as it is", "out": "was left out"}
    what = words.get(str(entry.get("then")), "was run again")
    return f"Memory ran out in the step after {step_of(entry)}: a micro-batch of {entry.get('batch')} {what}."


def _rewound(entry: Mapping[str, Any]) -> str:
    skipped = _plain(entry.get("skipped") or [])
    return f"Went back from step {step_of(entry)} to step {entry.get('to')}; skipped since: {skipped}."


SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "damaged": lambda entry: f"{entry.get('checkpoint')} was found damaged and set aside.",
    "halved": lambda entry: (
        f"{entry.get('batch')} did not fit into memory; since step {step_of(entry)} with {entry.get('size')}."
    ),
    "interrupted": lambda entry: f"Stopped by a signal after step {step_of(entry)}, which was saved.",
    "memory": _memory,
    "resumed": _resumed,
    "rewound": _rewound,
    "spike": lambda entry: f"Spike of the loss at {entry.get('text')}",
    "stopped": lambda entry: f"Ended by an error after step {step_of(entry)}: {entry.get('error')}",
}
