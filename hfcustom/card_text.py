"""The text of a change card: facts (hfcustom/card.py) -> Markdown, in which every string of data or of a model is only text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcustom.changes import Change, LossFact, NewModule
from hfcustom.naming import printable
from hfcustom.record import SECRET, public

HERE = 'folder = "."  # where this file is, or the name on the hub'
SCOPE = ("part", "rank", "alpha", "matrices")
WORDS = {
    "fills": "the hook is empty in the parent",
    "extends": "calls the parent's",
    "replaces": "instead of the parent's",
    "adds": "new",
}


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, an empty one for what a damaged record has in its place."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, an empty one for what a damaged record has in its place."""
    return value if isinstance(value, dict) else {}


def plain(value: Any) -> str:
    """Return a value as one line of plain text; a data set's name may hold anything."""
    return printable(str(public(value)), 200).replace("\n", " ").replace("\r", " ").strip()


class Code(str):
    """A name that a table shows as code."""


def cell(value: Any) -> str:
    """Return a value as Markdown that shows it and does nothing else."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = plain(value)
    if isinstance(value, Code) and "<" not in text:
        return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""
    return re.sub(
        r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))",
        r"\\\1",
        text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    )


def code(text: str, kind: str = "python") -> str:
    """Return a block of code, fenced by more backticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    text = "\n".join(printable(line.expandtabs(4), 2000) for line in scrub(text).splitlines())
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def scrub(text: str) -> str:
    """Return source without what looks like a token or a place in somebody's home."""
    home = str(Path.home())
    text = SECRET.sub("hf_...", text).replace("<!--", "<! --")
    return text.replace(home, "~") if len(home) > 1 else text


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def render(facts: Mapping[str, Any]) -> str:
    """Return a card's text."""
    sections = [_opening(facts), *_changed(facts), *_losses(facts), *_parts(facts)]
    runs = [run for run in facts["training"] if isinstance(run, dict)]
    for number, run in enumerate(runs, start=1):
        sections += _run(run, f"Training run {number}" if len(runs) > 1 else "Training")
    if not runs:
        sections += ["## Training", "No run of `hfcustom.fit` is recorded for these weights."]
    sections += [*_loading(facts), "## Versions", table(("package", "saved with"), facts["versions"].items())]
    return "\n\n".join(sections)


def _opening(facts: Mapping[str, Any]) -> str:
    origin = as_dict(facts["origin"])
    lines = [f"# {facts['class']}", ""]
    what = "A LoRA adapter. " if facts["adapter"] else ""
    verb = "is hfcustom's" if facts["parent"] == facts["class"] else "customises, with hfcustom,"
    lines.append(f"{what}`{facts['class']}` {verb} `{facts['stock_class']}`.")
    if origin:
        at = f", commit {cell(Code(origin['commit']))}" if origin.get("commit") else ""
        where = "on the hub" if origin.get("hub") else "a local folder"
        lines.append(f"Its weights began as {cell(origin.get('name'))} ({where}{at}).")
    elif facts["sizes_of"]:
        lines.append(f"This is of the class alone, with the sizes of {cell(facts['sizes_of'])}.")
    else:
        lines.append("Its weights began at random.")
    lines.append("What stands between the marks of hfcustom is written anew at each save; everything else here stays.")
    return "\n".join(lines)


def _changed(facts: Mapping[str, Any]) -> list[str]:
    found = ["## What is changed"]
    own: list[Change] = facts["changes"]
    if not own and not facts["new_modules"] and facts["connector"] is None and not facts["settings"]:
        return [*found, f"Nothing is overridden: it computes what `{facts['stock_class']}` computes."]
    if own:
        rows = [(Code(item.name), item.seam or "none", item.how, Code(item.parent), Code(item.owner)) for item in own]
        found.append(table(("method", "seam", "how", "of the parent", "in class"), rows))
    for item in own:
        how = WORDS[item.how] + (f", `{item.parent}`" if item.parent and item.how != "fills" else "")
        found += [
            f"### `{item.name}`",
            f"{item.owner}, {how}:",
            code(item.text, "diff" if item.text.startswith("---") else "python"),
        ]
    if facts["settings"]:
        found += [
            "### Settings of the class",
            table(("name", "value"), [(Code(name), _shown(value)) for name, value in facts["settings"].items()]),
        ]
    if facts["new_modules"]:
        found += [
            "### New modules",
            table(("module", "class", "tensors", "parameters"), map(_module_row, facts["new_modules"])),
        ]
    if facts["connector"] is not None:
        found += ["### Connector", cell(Code(facts["connector"]))]
        found += [code(facts["connector_source"])] if facts["connector_source"] else []
    return found


def _module_row(module: NewModule, most: int = 4) -> tuple[str, str, str, int]:
    shown = [f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in list(module.tensors.items())[:most]]
    rest = len(module.tensors) - len(shown)
    return (
        Code(module.path),
        Code(module.kind),
        ", ".join(shown) + (f" and {rest} more" if rest else ""),
        module.parameters,
    )


def _losses(facts: Mapping[str, Any]) -> list[str]:
    losses: list[LossFact] = facts["losses"]
    rows = [
        (Code(item.name), item.weight, ", ".join(f"{key}={value}" for key, value in item.options.items()))
        for item in losses
    ]
    found = ["## Loss", table(("loss", "weight", "options"), rows)] if rows else []
    for item in losses:
        if item.source:
            found += [f"### {cell(Code(item.name))}", code(item.source)]
    return found


def _parts(facts: Mapping[str, Any]) -> list[str]:
    return [
        "## Parts",
        table(
            ("part", "modules", "parameters", "dtype"),
            [(part, Code(paths), *rest) for part, paths, *rest in facts["parts"]],
        ),
    ]


def _trained(part: Mapping[str, Any]) -> tuple[Any, ...]:
    full, lora, total = (part.get(key, 0) for key in ("full", "lora", "parameters"))
    found = ["LoRA"] * bool(lora) + ["in full" if full == total else "in part"] * bool(full)
    how = " and ".join(found) or ("frozen" if total else "tied to another part")
    return part.get("part"), how, full, lora, total


def _run(run: Mapping[str, Any], title: str) -> list[str]:
    rows = [_trained(item) for item in map(as_dict, as_list(run.get("parts")))]
    found = [f"## {title}", "### What was trained", table(("part", "trained", "in full", "in LoRA", "of"), rows)]
    found += _adapter(run) + _data(as_dict(run.get("data")))
    facts = {
        "steps": run.get("steps"),
        "rows a step": run.get("rows_per_step"),
        "processes": run.get("processes"),
        "precision": run.get("precision"),
        "loss": run.get("loss"),
        **as_dict(run.get("settings")),
    }
    found += ["### Settings", "Options that are not listed were at their defaults."]
    found += [table(("option", "value"), [(Code(key), _shown(value)) for key, value in facts.items()])]
    found += _averaged(as_dict(run.get("averaged"))) + _skipped(as_dict(run.get("skipped")))
    then = ", ".join(f"{name} {value}" for name, value in as_dict(run.get("versions")).items())
    return [*found, f"Trained with {cell(then)}.", *_results(run)]


def _averaged(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    over = f"over {cell(facts.get('steps'))} steps, with a decay of {cell(facts.get('decay'))}"
    return [f"These are the trained weights' running average {over}, not the weights of the last step."]


def _skipped(steps: Mapping[str, Any]) -> list[str]:
    rows = [(step, ", ".join(map(plain, as_list(names)))) for step, names in steps.items()]
    title = "Steps that were skipped after a spike of the loss:"
    return [title, table(("step", "rows"), rows)] if rows else []


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float | None) else Code(plain(value))


def _adapter(run: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if lora := as_dict(run.get("lora")):
        full = ", ".join(map(str, as_list(lora.get("trained_in_full"))))
        rows = [tuple(item.get(key) for key in SCOPE) for item in map(as_dict, as_list(lora.get("scopes")))]
        also = f"; in full beside it: {cell(Code(full))}" if full else ""
        found += [f"{cell(lora.get('kind'))} with dropout {cell(lora.get('dropout'))}{also}:", table(SCOPE, rows)]
    if held := as_dict(run.get("quantization")):
        title = f"Weights were held in {cell(held.get('bits'))} bits by {cell(held.get('method'))} while training:"
        found += [title, table(("part and class of matrices", "matrices"), as_dict(held.get("matrices")).items())]
    return found


def _data(data: Mapping[str, Any]) -> list[str]:
    rows = [(item.get("name"), item.get("weight")) for item in map(as_dict, as_list(data.get("sources")))]
    facts = {"rows": data.get("rows"), "split": data.get("split"), "fingerprint": data.get("fingerprint")}
    told = ", ".join(f"{name} {cell(value)}" for name, value in facts.items() if value is not None)
    return ["### Data", table(("source", "weight"), rows), *([f"Altogether: {told}."] if told else [])]


def _results(run: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[Any, ...]] = [
        (Code(name), value, item.get("data"), item.get("split"), item.get("rows"))
        for item in map(as_dict, as_list(run.get("results")))
        for name, value in as_dict(item.get("values")).items()
    ]
    last = as_dict(run.get("evaluation"))
    rows += [
        (Code(name), value, f"while training, step {last.get('step')}", None, None)
        for name, value in as_dict(last.get("values")).items()
    ]
    return ["### Results", table(("metric", "value", "on", "split", "rows"), rows)] if rows else []


def _loading(facts: Mapping[str, Any]) -> list[str]:
    auto = "AutoModel" if facts["encoder"] else "AutoModelForImageTextToText"
    name, module = facts["class"], facts["module"]
    trust = ", trust_remote_code=True" if facts["remote_code"] else ""
    head = f"from transformers import {'AutoProcessor' if facts['adapter'] else f'{auto}, AutoProcessor'}\n"
    if not facts["remote_code"]:
        own = (
            f"import {module}  # defines and registers {name}\n"
            if module
            else f"# run the code that defines {name} first\n"
        )
        head = f"{head}\n{own}"
    if facts["adapter"]:
        origin = as_dict(facts["origin"])
        comment = "" if origin.get("hub") else "  # the folder of the model that it was trained on"
        head = f"import hfcustom\n{head}"
        load = f"base = {plain(origin.get('name', ''))!r}{comment}\nmodel = hfcustom.load_adapter(folder, base)\n"
    else:
        load = f"model = {auto}.from_pretrained(folder{trust})\n"
    text = f"{head}\n{HERE}\n{load}processor = AutoProcessor.from_pretrained(folder{trust})\n"
    return ["## Load it", code(text)]
