"""An inspection in words: sections of lines and tables, which the terminal, the page and the markdown file all show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfcustom.inspector.architecture import Part
from hfcustom.inspector.examine import Inspection, Tokens
from hfcustom.inspector.record import Size, Stage
from hfcustom.inspector.switch import Switch, Way


@dataclass
class Section:
    """A heading, what it comes to, and lines of a table under it; `code` says which columns are code."""

    title: str
    lead: str = ""
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    code: tuple[int, ...] = ()


def sections(found: Inspection) -> list[Section]:
    """Return everything that is known, in reading order."""
    parts = [_model(found), _image(found), _stages(found)]
    if found.tokens is not None:
        parts.append(_sizes(found.tokens))
    if found.switch is not None:
        parts.append(_switch(found.switch))
    return [*parts, _layout(found)]


def short(count: int) -> str:
    """Return a number of parameters: 938M, 78.4B."""
    if count < 10_000:
        return f"{count:,}"
    size, unit = (count / 1e9, "B") if count >= 999_500_000 else (count / 1e6, "M")
    return f"{size:.{max(0, 3 - len(str(int(size))))}f}{unit}"


def by(size: Sequence[int] | Size) -> str:
    """Return a size as width x height."""
    return f"{size[0]} x {size[1]}"


def plural(count: int, noun: str) -> str:
    """Return "1 row", "3 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---- the model ------------------------------------------------------------------------------------------------------


def _model(found: Inspection) -> Section:
    built = found.architecture
    total = sum(part.parameters for part in built.parts)
    numbers = {
        "vision": built.vision,
        "language": built.language,
        "vision_model": built.vision,
        "text_model": built.language,
    }
    rows = []
    for part in built.parts:
        more = ", ".join(f"{key} {_number(value)}" for key, value in numbers.get(part.name, {}).items())
        rows.append((part.name, _parameters(part), part.what, more))
    lead = f"{built.model_class}, {short(total)} parameters"
    if built.image_size:
        lead += f"; the tower is made for images of {by(built.image_size)}"
    others = [f"{one.id.rpartition('/')[2]} {short(one.parameters)}" for one in built.checkpoints[1:]]
    if others:
        rows.append(("also", "", ", ".join(others), ""))
    return Section("Model", lead, ("part", "parameters", "what", "numbers"), rows)


def _parameters(part: Part) -> str:
    return short(part.parameters) if part.parameters else "tied"


def _number(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"


# ---- the image ------------------------------------------------------------------------------------------------------


def _image(found: Inspection) -> Section:
    rows = [("views", _views(found))]
    if found.seen < 0.985:
        rows.append(("lost", f"{1 - found.seen:.0%} of the image is cut off: no view shows it"))
    if found.encoder is not None:
        encoder = found.encoder
        lead = f"{by(found.size)} pixels -> one vector of {encoder['vector']} numbers"
        rows.append(("tower", f"{encoder['tokens_in_tower']} tokens, which stay inside the tower"))
        return Section("Image", lead, ("", ""), rows)
    tokens = found.tokens
    assert tokens is not None
    lead = f"{by(found.size)} pixels -> {plural(tokens.count, 'image token')}"
    lead += f" and {plural(tokens.around, 'other token')} around them" if tokens.around else ""
    rows += [("formula", _formula(tokens)), ("a token", _token(found, tokens)), ("text", tokens.text)]
    if tokens.tile_rule:
        rows.insert(1, ("rows and columns", tokens.tile_rule))
    return Section("Image", lead, ("", ""), rows)


def _views(found: Inspection) -> str:
    sizes = Counter(by(view.size) for view in found.views)
    shown = ", ".join(f"{count} of {size}" if count > 1 else size for size, count in sizes.items())
    rows, columns = found.grid
    if rows * columns == len(found.views) - found.overviews > 0:
        whole = f" + {found.overviews} of the whole image" if found.overviews else ""
        return f"{plural(rows, 'row')} x {plural(columns, 'column')} of tiles{whole}: {shown} pixels"
    cut = f", cut into {found.crops} crops on the way to the tower" if found.crops > len(found.views) else ""
    return f"{plural(len(found.views), 'view')}: {shown} pixels{cut}"


def _formula(tokens: Tokens) -> str:
    if tokens.formula is None:
        return f"none found that is right for all of {tokens.checked} sizes; see the table of sizes"
    return f"{tokens.formula} (right for all of {tokens.checked} sizes tried)"


def _token(found: Inspection, tokens: Tokens) -> str:
    if tokens.mark:
        return f"only marks the place of an image: {tokens.mark}"
    if tokens.queries:
        return "has no place in the image: it is a query that reads every patch of a view"
    if tokens.grids is None:
        return "lies in no grid that is known here"
    grids = Counter(f"{rows} x {columns}" for rows, columns in tokens.grids)
    shown = ", ".join(f"{grid} ({count} views)" if count > 1 else grid for grid, count in grids.items())
    width, height = found.views[0].size
    rows, columns = tokens.grids[0]
    return f"stands for about {width / columns:.0f} x {height / rows:.0f} pixels of a view; rows x columns of tokens: {shown}"


def _sizes(tokens: Tokens) -> Section:
    rows = []
    for line in tokens.sizes:
        tiles = f"{line['tiles'][0]} x {line['tiles'][1]}" if min(line["tiles"]) else "-"
        seen = ", ".join(by(size) for size in line["seen_by_tower"])
        rows.append((by(line["size"]), f"{line['tokens']:,}", str(line["views"]), tiles, seen))
    if len({row[1:] for row in rows}) == 1:
        return Section("Other sizes", f"{rows[0][1]} tokens for each of {', '.join(row[0] for row in rows)} pixels")
    return Section("Other sizes", "", ("image", "tokens", "views", "rows x columns", "a view in pixels"), rows)


# ---- preprocessing --------------------------------------------------------------------------------------------------


def _stages(found: Inspection) -> Section:
    rows = []
    known: set[Size] = {found.size}
    for stage in found.stages:
        unexplained = [size for size in dict.fromkeys(stage.before) if size not in known]
        if unexplained:
            rows.append(
                (
                    "(inside the processor)",
                    f"-> {_sizes_of(unexplained)}",
                    "padded or cut without a function of its own",
                )
            )
        known |= {*stage.before, *stage.after}
        rows.append((stage.name, _change(stage), _values(stage)))
    rows.append(("result", found.pixels, _sized_by(found)))
    lead = f"{found.processor}, recorded while it ran"
    return Section("Preprocessing", lead, ("step", "image", "values"), rows)


def _sized_by(found: Inspection) -> str:
    """Return the settings that say how large images become, which most steps are given worked out."""
    sizes = {
        name: value for name, value in found.settings.items() if "size" in name and isinstance(value, dict) and value
    }
    return "; ".join(f"{name}: {_value(value)}" for name, value in sizes.items() if name != "patch_size")


def _change(stage: Stage) -> str:
    if stage.before == stage.after:
        return f"{_sizes_of(stage.before)}"
    return f"{_sizes_of(stage.before)} -> {_sizes_of(stage.after)}"


def _sizes_of(sizes: Sequence[Size]) -> str:
    counts = Counter(by(size) for size in sizes)
    return ", ".join(f"{count} of {size}" if count > 1 else size for size, count in counts.items())


def _values(stage: Stage) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in stage.values.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(f"{item:g}" for item in value)
    if isinstance(value, float) and 0 < value < 1 and abs(1 / round(1 / value) - value) < 1e-6:
        return f"1/{round(1 / value)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- tiles off, a batch ---------------------------------------------------------------------------------------------


def _switch(switch: Switch) -> Section:
    rows = [("works", way.code, _result(way)) for way in (switch.off or switch.on)]
    rows += [
        ("refused" if way.refused else "no effect", way.code, way.refused or _result(way)) for way in switch.wrong
    ]
    title = "Tiles on" if switch.on else "Tiles off"
    tried = f" (tried with {by(switch.size)}, and each change on the family's small model)" if rows else ""
    return Section(title, switch.sentence() + tried, ("", "setting", "gives") if rows else (), rows, code=(1,))


def _result(way: Way) -> str:
    return f"{plural(way.tokens, 'token')}, {plural(way.views, 'view')}"


def _layout(found: Inspection) -> Section:
    rows = []
    for tensor in found.layout.tensors:
        axes = ", ".join(tensor.axes)
        gaps = f"{axes}; gaps are {tensor.filled}" if tensor.filled else axes
        rows.append((tensor.name, str(tensor.shape), tensor.dtype, gaps))
    images = "; ".join(f"row {at}: {', '.join(by(size) for size in row)}" for at, row in enumerate(found.layout.rows))
    kind = "a text and an image each" if found.tokens is None else "images between words"
    lead = f"{kind}, {images}. Padding: {found.layout.padding}"
    return Section("A batch", lead, ("tensor", "shape", "type", "axes"), rows, code=(0,))


# ---- two side by side -----------------------------------------------------------------------------------------------


def facts(found: Inspection) -> dict[str, str]:
    """Return what is compared of two targets, a line each."""
    built = found.architecture
    total = sum(part.parameters for part in built.parts)
    lines = {"class": built.stock_class, "parameters": short(total)}
    lines |= {part.name: f"{_parameters(part)}, {part.what}" for part in built.parts}
    lines |= {row[0] or "image": row[1] for row in _image(found).rows}
    if found.tokens is not None:
        lines["image tokens"] = f"{found.tokens.count:,}"
    if found.encoder is not None:
        lines["vector"] = f"{found.encoder['vector']} numbers"
    steps = [stage for stage in found.stages if stage.name not in ("convert_to_rgb",)]
    lines["steps"] = " -> ".join(dict.fromkeys(stage.name for stage in steps))
    for name in ("resample", "mean", "std", "scale"):
        values = {_value(stage.values[name]) for stage in found.stages if name in stage.values}
        lines[name] = ", ".join(sorted(values)) or "-"
    if found.switch is not None:
        lines["tiles off"] = found.switch.sentence()
        lines["switch"] = "; ".join(way.code for way in (found.switch.off or found.switch.on)[:2]) or "-"
    lines["what the tower gets"] = found.pixels
    lines["tensors of a batch"] = "; ".join(
        f"{t.name} ({', '.join(map(str, t.shape))})"
        for t in found.layout.tensors
        if t.name.startswith(("pixel", "image", "cross"))
    )
    lines["padding"] = found.layout.padding
    return lines


def compare(first: Inspection, second: Inspection) -> list[tuple[str, str, str]]:
    """Return (what, first, second) for every fact that either has."""
    mine, theirs = facts(first), facts(second)
    return [(name, mine.get(name, "-"), theirs.get(name, "-")) for name in dict.fromkeys([*mine, *theirs])]
