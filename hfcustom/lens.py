"""hfcustom lens: what the model sees of a row, as a table in the terminal, a page, or JSON.

row -> hfcustom/data/view.py -> lines of tokens (image tokens of one tile folded), totals, problems. The exit code is 1 when a
label is where none may be.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfcustom.data.collate import Collator
from hfcustom.data.columns import TOKEN_WEIGHTS
from hfcustom.data.downloads import make_downloads
from hfcustom.data.images import is_url
from hfcustom.data.labels import TrainOn
from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.data.sources import load_rows
from hfcustom.data.token_checks import load_processor
from hfcustom.data.view import Token, View, view_row
from hfcustom.families import class_of, family_names, load_family
from hfcustom.mrope import MRopeImages
from hfcustom.naming import load_object
from hfcustom.options import json_if_it_looks_so
from hfcustom.registry import REGISTERED

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "": "white"}
EXIT_LABELS, EXIT_USAGE = 1, 2


def show_lens(options: argparse.Namespace) -> int:
    """Show rows as `hfcustom lens` was asked to; return 0, 1 for labels where none may be, 2 for what cannot be shown."""
    try:
        views = [view for look in _looks(options) for view in look()]
    except (OSError, ImportError, RowError, ValueError) as error:
        print(f"hfcustom lens: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.json:
        print(json.dumps([to_dict(view) for view in views], indent=2))
    else:
        out = Console(highlight=False)
        if not out.is_terminal:
            out.width = 140  # a file has no width of its own; rich would assume 80 and fold every cell
        _print(out, views, options)
    if options.page:
        from hfcustom.lens_page import write_page

        write_page(Path(options.page), views)
        print(f"The page is {options.page}.", file=sys.stderr)
    return EXIT_LABELS if any(view.problems for view in views) else 0


# ---- what to look at ------------------------------------------------------------------------------------------------


def _looks(options: argparse.Namespace) -> list[Callable[[], list[View]]]:
    """Return a call for each row, and each model or family, that is asked for."""
    _check(options)
    processor, place = _reader(options.model, options.family)
    collate = load_object(options.collate, "collator")(processor) if options.collate else None
    own = partial(_collator, train_on=options.train_on, allowed_tokens=options.allowed_tokens)
    looks = [(row, processor, place, collate) for row in options.row]
    if options.compare is not None and options.compare.isdigit():
        looks.append((int(options.compare), processor, place, collate))
    elif options.compare is not None:
        family = options.compare if options.compare in family_names() else None
        other = _reader(None if family else options.compare, family)
        looks += [(row, *other, None) for row in options.row]
    looks = [(row, reader, place, collate or own(reader)) for row, reader, place, collate in looks]
    read = _rows(options)
    return [
        lambda row=row, reader=reader, place=place, collate=collate: view_row(reader, read(row), collate, place)  # type: ignore[misc]
        for row, reader, place, collate in looks
    ]


def _check(options: argparse.Namespace) -> None:
    if options.collate and (options.train_on != "assistant" or options.allowed_tokens):
        raise ValueError(
            "--train-on and --allowed-tokens have no effect with --collate, which chooses the labels itself"
        )


def _collator(processor: Any, train_on: TrainOn, allowed_tokens: Sequence[str]) -> Collator:
    """Return the collator of a training run, which has all the weights of a row in its batch."""
    return Collator(processor, columns=(TOKEN_WEIGHTS,), train_on=train_on, allowed_tokens=allowed_tokens)


def _rows(options: argparse.Namespace) -> Callable[[int], Example]:
    """Return a function that reads a row of the data, or the one that the command line spells out."""
    if options.data is None:
        fetch = make_downloads(options.image_hosts, options.image_downloads)
        paths = [name if is_url(name) else str(Path(name).resolve()) for name in options.image]
        images = [{"type": "image"} for _ in paths]
        user = {"role": "user", "content": [*images, {"type": "text", "text": options.question}]}
        spelled = {"messages": [user, {"role": "assistant", "content": options.answer}], "images": paths}
        return lambda row: read_row(spelled, "the row of the command line", Path("/"), fetch=fetch)
    rows = load_rows(
        json_if_it_looks_so(options.data),
        options.split,
        max_frames=options.max_frames,
        frame_method=options.frame_method,
        video_as_images=options.video_as_images,
        image_root=options.image_root,
        image_hosts=options.image_hosts,
        image_downloads=options.image_downloads,
    )

    def read(row: int) -> Example:
        if not 0 <= row < len(rows):
            raise ValueError(f"{options.data} has {len(rows)} rows, from 0 to {len(rows) - 1}; there is no row {row}.")
        example: Example = rows[row]
        return example

    return read


def _reader(model: str | None, family: str | None) -> tuple[Any, Callable[[Any], torch.Tensor] | None]:
    """Return a processor, and where tokens lie if not in a line; a family's has published image settings and a tiny tokenizer."""
    if family is not None:
        module = load_family(family)
        model_class: Any = REGISTERED[f"custom_{family}"]
        return load_processor(None, family)[0], _places(model_class, module.tiny_config())
    if model is None:
        raise ValueError("Name a model (--model folder-or-hub-id) or a family (--family internvl).")
    model_class = class_of(model)
    config = model_class.config_class.from_pretrained(model)
    return model_class.processor_class.from_pretrained(model), _places(model_class, config)


def _places(model_class: Any, config: Any) -> Callable[[Any], torch.Tensor] | None:
    """Return how a model places tokens in time, height and width, asked of one without weights."""
    if not issubclass(model_class, MRopeImages):
        return None
    with torch.device("meta"):
        skeleton = model_class(config)

    def place(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return skeleton.place_tokens(batch)

    return place


# ---- the terminal ---------------------------------------------------------------------------------------------------


def _print(out: Console, views: Sequence[View], options: argparse.Namespace) -> None:
    for view in views:
        out.print(Text(f"\n{view.name}", style="bold"))
        out.print(_token_table(view, folded=not options.all))
        for table in total_tables([view]):
            out.print(_rich_table(*table))
        for problem in view.problems:
            out.print(Text(f"WRONG: {problem}", style="bold red"))
    if len(views) > 1:
        out.print(_rich_table(*batch_table(views)))
    if options.compare is not None:
        _print_difference(out, views[0], views[-1])


def _token_table(view: View, folded: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("at", "right"), ("id", "right"), ("token", "left"), ("role", "left"), ("kind", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name in ("label", "weight", "position"):
        table.add_column(name, justify="right")
    for run in view.runs() if folded else ([token] for token in view.tokens):
        table.add_row(*_cells(view, run))
    return table


def _cells(view: View, run: Sequence[Token]) -> list[Text]:
    first, last = run[0], run[-1]
    style = "red bold" if first.label is not None and first.kind != "text" and first.role != "assistant" else ""
    style = style or ("dim" if first.kind == "padding" else COLOURS.get(first.role, "white"))
    label = "" if first.label is None else "yes" if len(run) == 1 else f"{len(run)} x"
    position = ",".join(map(str, first.position))
    if len(run) > 1:
        position += f" .. {','.join(map(str, last.position))}"
    values = [
        str(first.at) if len(run) == 1 else f"{first.at}-{last.at}",
        str(first.id),
        show_text(first.text) if len(run) == 1 else f"{first.text} x {len(run)}",
        first.role,
        describe_kind(view, first),
        label,
        f"{first.weight:g}" if first.label is not None else "",
        position,
    ]
    return [
        Text(value, style=f"{style} underline" if label and name == 2 else style) for name, value in enumerate(values)
    ]


def show_text(text: str) -> str:
    """Return a token's text with line ends, blanks and control characters visible, in ASCII where it can be."""
    shown = json.dumps(text, ensure_ascii=not text.isprintable())[1:-1]
    return shown.replace(" ", "_") if shown.strip() == "" else shown


def describe_kind(view: View, token: Token) -> str:
    """Return the kind of a token, and of which image and tile."""
    if token.image is None:
        return token.kind
    tiles = len(view.tiles[token.image])
    tile = "" if token.tile is None or tiles < 2 else f", tile {token.tile + 1} of {tiles}"
    return f"{token.kind} {token.image + 1}{tile}"


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left")
    for row in rows:
        table.add_row(*(f"{value:.1%}" if isinstance(value, float) else str(value) for value in row))
    return table


# ---- totals ---------------------------------------------------------------------------------------------------------

TotalTable = tuple[str, Sequence[str], list[Sequence[Any]]]


def total_tables(views: Sequence[View]) -> list[TotalTable]:
    """Return what tokens there are and who is trained on: (title, columns, rows) each."""
    kinds, labels = Counter[str](), Counter[str]()
    for view in views:
        kinds += view.counts()
        labels += view.label_counts()
    return [
        (f"{sum(kinds.values())} tokens by kind", ("kind", "tokens", "share"), _shares(kinds)),
        (f"{sum(labels.values())} labels by role", ("role", "tokens", "share"), _shares(labels)),
    ]


def _shares(counts: Counter[str]) -> list[Sequence[Any]]:
    return [(name, count, count / sum(counts.values())) for name, count in counts.most_common()]


def batch_table(views: Sequence[View]) -> TotalTable:
    """Return what a batch of these rows would be: length, useful share, images, tiles a row."""
    lengths = [sum(token.kind != "padding" for token in view.tokens) for view in views]
    rows = [
        (
            view.name,
            length,
            length / max(lengths),
            view.counts()["image"],
            len(view.pictures),
            sum(map(len, view.tiles)),
        )
        for view, length in zip(views, lengths, strict=True)
    ]
    padding = 1 - sum(lengths) / (max(lengths) * len(lengths))
    columns = ("row", "tokens", "of the longest", "image tokens", "images", "tiles")
    return f"in one batch, {padding:.1%} would be padding", columns, list(rows)


def _print_difference(out: Console, first: View, second: View) -> None:
    lines, others = ([f"{show_text(token.text)}  {token.kind}" for token in view.tokens] for view in (first, second))
    names = (first.name, second.name) if first.name != second.name else ("first", "second")
    out.print(Text(f"\n{names[0]} (-) against {names[1]} (+)", style="bold"))
    for line in fold_lines(difflib.unified_diff(lines, others, n=1, lineterm="")):
        out.print(Text(line, style={"-": "red", "+": "green"}.get(line[:1], "dim")))
    if lines == others:
        out.print("the same tokens")


def fold_lines(lines: Any) -> list[str]:
    """Return the lines of a difference without its file names, equal neighbours written once with their number."""
    folded: list[tuple[str, int]] = []
    for line in lines:
        if line.startswith(("---", "+++")):
            continue
        if folded and folded[-1][0] == line:
            folded[-1] = (line, folded[-1][1] + 1)
        else:
            folded.append((line, 1))
    return [line if count == 1 else f"{line}  x {count}" for line, count in folded]


def to_dict(view: View) -> dict[str, Any]:
    """Return a view as JSON can hold it, without its pictures."""
    return {
        "row": view.name,
        "tokens": [asdict(token) for token in view.tokens],
        "images": [
            {"size": picture.size, "tiles": len(tiles)}
            for picture, tiles in zip(view.pictures, view.tiles, strict=True)
        ],
        "kinds": dict(view.counts()),
        "labels": dict(view.label_counts()),
        "problems": view.problems,
    }
