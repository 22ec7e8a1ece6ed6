"""What `hfcustom families` prints: a table of all, one family in full, or a model that is no family."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from hfcustom.catalog import PICTURE, FamilyFacts, encoder_facts, family_facts
from hfcustom.encoders import encoder_names
from hfcustom.external import EXTERNAL, External, find_external
from hfcustom.families import family_names
from hfcustom.naming import unknown

COLUMNS = {"vision": "vision", "connector": "conn.", "language": "lang.", "head": "head", "other": "other"}


def show_families(names: Sequence[str], as_json: bool = False) -> int:
    """Print families and models outside, all when none is named; return 0, or 2 for an unknown name."""
    known = [*family_names(), *encoder_names()]
    wanted = {name: find_external(name) if name not in known else None for name in names}
    for name, external in wanted.items():
        if name not in known and external is None:
            print(f"hfcustom families: {unknown('family', name, [*known, *EXTERNAL])}", file=sys.stderr)
            return 2
    chosen = [name for name in names if name in known] if names else known
    outside = [key for key in wanted.values() if key is not None] if names else list(EXTERNAL)
    quiet = as_json or not sys.stderr.isatty()
    facts = [
        encoder_facts(name) if name in encoder_names() else family_facts(name)
        for name in track(
            chosen, "counting parameters and tokens", console=Console(stderr=True), disable=quiet, transient=True
        )
    ]
    if as_json:
        print(
            json.dumps(
                {"families": [f.to_dict() for f in facts], "outside": {k: asdict(EXTERNAL[k]) for k in outside}},
                indent=2,
            )
        )
        return 0
    out = Console()
    if names:
        for family in facts:
            _show_one(out, family)
    else:
        _show_table(out, facts)
    if not names:
        out.print(
            Text("\nknown, not native to transformers (hfcustom families NAME says what can be done)", style="bold")
        )
    for key in outside:
        _show_external(out, key, EXTERNAL[key], short=not names)
    return 0


def _show_table(out: Console, facts: Sequence[FamilyFacts]) -> None:
    """Print a line a checkpoint under a line a family, 79 characters wide."""
    out.print(Text(_line("parameters of", ("all", *COLUMNS.values())), style="bold"))
    for family in facts:
        head = f"{family.name}: {_tokens(family)} tokens, {_seams(family)} seams, {len(family.verified)} checks"
        out.print(Text(head, style="bold"))
        for checkpoint in family.checkpoints:
            counts = (checkpoint.parameters, *(checkpoint.parts.get(column) for column in COLUMNS))
            out.print(Text(_line("  " + checkpoint.id.rpartition("/")[2], map(_short, counts))))
    out.print(
        f"\ntokens: what an image of {PICTURE[0]} x {PICTURE[1]} px takes in the text, with the published settings"
    )
    out.print("checks: tests that passed when the suite last recorded them; hfcustom families NAME lists them")
    for family in facts:
        if family.missing_packages:
            missing = " ".join(family.missing_packages)
            out.print(f"{family.name} needs more packages: pip install {missing}")


def _line(name: str, counts: Iterable[str]) -> str:
    return f"{name:<37.37}" + "".join(f"{count:>7}" for count in counts)


def _short(count: int | None) -> str:
    """Return a count in three digits: 938M, 78.4B; a small one as it is."""
    if not count:
        return "-"
    if count < 10_000:
        return f"{count:,}"
    size, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{size:.{max(0, 2 - len(str(int(size))) + 1)}f}{unit}" if size < 1000 else f"{size:,.0f}{unit}"


def _show_one(out: Console, family: FamilyFacts) -> None:
    out.print(Text(f"{family.name}: {family.summary}", style="bold"))
    out.print(Text(_line("parameters of", ("all", *COLUMNS.values()))))
    for checkpoint in family.checkpoints:
        counts = (checkpoint.parameters, *(checkpoint.parts.get(column) for column in COLUMNS))
        out.print(Text(_line("  " + checkpoint.id, map(_short, counts))))
    rows = {
        "class": family.custom_class,
        "stock class": family.stock_class,
        f"tokens of {PICTURE[0]} x {PICTURE[1]} px": _tokens(family),
        **{f"seam {seam}": answer for seam, answer in family.seams.items()},
    }
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(overflow="fold")  # a class's path is there to be copied whole
    for name, value in rows.items():
        facts.add_row(name, Text(value))
    out.print(facts)
    out.print(Text(f"{len(family.verified)} checks passed{':' if family.verified else ', none is recorded'}"))
    for check in family.verified:
        out.print(Text(f"  {check}"))


def _show_external(out: Console, key: str, model: External, short: bool) -> None:
    if short:
        out.print(Text(f"  {key:<28}{model.checkpoint}"))
        return
    out.print(Text(f"{key}: known, not native to transformers", style="bold"))
    rows: dict[str, Any] = {
        "where": model.checkpoint,
        "what": model.what,
        "wrap()": model.wrap,
        "nearest family": model.native,
        "connectors of its idea": ", ".join(model.connectors),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    out.print(table)


def _tokens(family: FamilyFacts) -> str:
    if family.image_tokens == 0:
        return "no"
    return "?" if family.image_tokens is None else f"{family.image_tokens:,}"


def _seams(family: FamilyFacts) -> str:
    have = sum(answer == "yes" for answer in family.seams.values())
    return f"{have} of {len(family.seams)}"
