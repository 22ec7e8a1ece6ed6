"""The upgrade sentinel: what a checkpoint relies on in transformers, and what of it has changed since it was saved.

model -> relies_on(model) in hfcustom.json     relies_on, model class -> Drift, ...

Recorded are the stock methods that the class overrides or calls, and the forward that hfcustom runs, each with its signature and
a hash of its source; the modules of the stock graph, layer numbers folded; the classes of its parts; the keys of its config. What
the class, as it is now, still needs and this version has no more is an error; everything else is said once, and loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hfcustom.changes import inherited_function, mentioned, own_classes, own_functions
from hfcustom.naming import printable
from hfcustom.parts import class_of_model, find_parts, is_adapter, is_trained_copy, unwrap
from hfcustom.record import versions

logger = logging.get_logger("hfcustom")

SCREEN = 18  # lines that are shown at loading
ANY_CLASS = frozenset(vars(nn.Module)) | frozenset(vars(PreTrainedModel))  # what is called of every model alike
PARTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class Drift:
    """Something that a checkpoint relies on and that is another now; `lost` where the class cannot do without it."""

    what: str
    lost: bool = False


# ---- what there is --------------------------------------------------------------------------------------------------


def relies_on(model: Any) -> dict[str, Any]:
    """Return what a model's checkpoint relies on, in plain JSON values."""
    core = unwrap(model)
    model_class = class_of_model(core)
    return {
        **class_facts(model_class),
        "modules": folded_modules(core.stock_tensor_names()),
        "parts": part_classes(core),
    }


def class_facts(model_class: Any) -> dict[str, Any]:
    """Return what can be said of a class without a model of it."""
    stock = model_class.stock_class()
    found = versions()
    return {
        "class": model_class.__name__,
        "stock_class": stock.__name__,
        "transformers": found.get("transformers", ""),
        "hfcustom": found["hfcustom"],
        "methods": {name: method_facts(model_class, name) for name in relied_methods(model_class)},
        "config": config_keys(stock),
    }


def config_keys(stock: Any) -> list[str]:
    """Return the fields of a stock config, less what transformers notes of itself."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = inspect.signature(stock.config_class.__init__).parameters.values()
    keys = {item.name for item in dataclasses.fields(stock.config_class)} | {
        item.name for item in taken if item.kind in kinds
    }
    return sorted(key for key in keys if not key.startswith("_") and key not in ("self", "transformers_version"))


def relied_methods(model_class: Any) -> list[str]:
    """Return the names of inherited methods that a class overrides or calls, and of forward, which hfcustom runs."""
    overridden = {name for name in own_functions(model_class) if not name.startswith("__")}
    wanted = {"forward"} | overridden | (mentioned(model_class) - ANY_CLASS)
    return sorted(name for name in wanted if method_facts(model_class, name) is not None)


def method_facts(model_class: Any, name: str) -> dict[str, str] | None:
    """Return an inherited method's signature, without annotations, and a hash of its source; None where there is none.

    That is the stock class's, or a hook of hfcustom's.
    """
    own = own_classes(model_class)
    rest = [cls for cls in model_class.__mro__ if cls not in own]
    found = inherited_function([*model_class.stock_class().__mro__, *rest], name)
    if found is None:
        return None
    owner, function = found
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return {"of": owner.__name__, "signature": signature_of(function), "source": hash_of(source)}


def signature_of(function: Any) -> str:
    """Return a signature as people write it, less the annotations and what an object's repr would add."""
    signature = inspect.signature(function)
    shown = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    text = str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def hash_of(source: str) -> str:
    """Return a hash of a function's source that docstrings, comments and blank lines do not change; "" where there is none."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    try:
        body = ast.parse(source).body
    except SyntaxError:
        body = []
    for node in body[:1]:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = []
    kept = [line.rstrip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16] if kept else ""


def folded_modules(tensor_names: Iterable[str]) -> list[str]:
    """Return the paths of modules that hold tensors, numbers folded: model.language_model.layers.*.mlp.up_proj."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.rpartition(".")[0]) for name in tensor_names})


def part_classes(core: Any) -> dict[str, dict[str, str]]:
    """Return for vision, connector and language where it is, its class and that class's forward, of stock classes only."""
    found: dict[str, dict[str, str]] = {}
    stock_parts = vars(core).get("_stock_parts")  # an encoder does not keep its own
    paths, modules = (stock_parts or find_parts(core)).paths, dict(core.named_modules())
    for part in PARTS:
        for path in paths[part][:1]:
            module = _plain(modules.get(path))
            if type(module).__module__.startswith("transformers."):
                forward = signature_of(type(module).forward)
                found[part] = {"path": path, "class": type(module).__name__, "forward": forward}
    return found


def _plain(module: Any) -> Any:
    """Return the module that peft has wrapped."""
    if module is not None and is_trained_copy(module):
        return module.original_module
    return module.base_layer if module is not None and is_adapter(module) else module


# ---- what has changed -----------------------------------------------------------------------------------------------


def check_class(model_class: Any, record: Mapping[str, Any], source: Any) -> list[Drift]:
    """Return what of a class's methods and config has changed since a checkpoint was saved; ValueError for what is lost."""
    return _refuse_lost(model_class, record, _class_drifts(model_class, _comparable(model_class, record)), source)


def check_model(model: Any, record: Mapping[str, Any], source: Any) -> list[Drift]:
    """Return what of the stock graph has changed since a checkpoint was saved; ValueError for what is lost."""
    core = unwrap(model)
    return _refuse_lost(type(core), record, _graph_drifts(core, _comparable(type(core), record)), source)


def all_drifts(core: Any, record: Mapping[str, Any]) -> list[Drift]:
    """Return everything that has changed."""
    then = _comparable(type(core), record)
    return [*_class_drifts(type(core), then), *_graph_drifts(core, then)]


def _comparable(model_class: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was recorded of the same stock class; nothing of a relative's."""
    then: dict[str, Any] = record.get("relies_on") or {}
    return then if then and then.get("stock_class") == model_class.stock_class().__name__ else {}


def _refuse_lost(model_class: Any, record: Mapping[str, Any], drifts: list[Drift], source: Any) -> list[Drift]:
    if any(drift.lost for drift in drifts):
        raise ValueError(message(model_class, record["relies_on"], drifts, source))
    return drifts


def _class_drifts(model_class: Any, then: Mapping[str, Any]) -> list[Drift]:
    if not then:
        return []
    return [*_methods(model_class, _mapping(then.get("methods"))), *_config(model_class, then.get("config"))]


def _graph_drifts(core: Any, then: Mapping[str, Any]) -> list[Drift]:
    return [*_modules(core, then.get("modules")), *_parts(core, _mapping(then.get("parts")))] if then else []


def warn(model: Any, record: Mapping[str, Any], source: Any, drifts: list[Drift]) -> None:
    """Say on one screen what has changed; nothing when nothing has."""
    if drifts:
        logger.warning(message(type(unwrap(model)), record["relies_on"], drifts, source))


def message(model_class: Any, then: Mapping[str, Any], drifts: list[Drift], source: Any, most: int = SCREEN) -> str:
    """Return what has changed, what is lost first, and what to do about it."""
    name, before = model_class.__name__, printable(str(then.get("transformers")), 40)
    here, there = versions(), {key: printable(str(then.get(key)), 40) for key in ("transformers", "hfcustom")}
    since = " and ".join(f"{key} {version}" for key, version in there.items())
    if here["transformers"] != there["transformers"] or here["hfcustom"] != there["hfcustom"]:
        since += f"; here are {here['transformers']} and {here['hfcustom']}"
    own = f" --custom {model_class.__module__.rpartition('.')[2]}.py:{name}" if own_classes(model_class) else ""
    lines = [f"{source} was saved under {since}. What {name} relies on has changed:"]
    ordered = sorted(drifts, key=lambda drift: not drift.lost)
    lines += [f"  {'LOST  ' if drift.lost else ''}{printable(drift.what, 600)}" for drift in ordered[:most]]
    if len(ordered) > most:
        lines.append(f"  and {len(ordered) - most} more: `hfcustom doctor {source}{own} --check upgrade` lists them")
    if any(drift.lost for drift in drifts):
        lines.append(f"Change {name} to what there is now, or install transformers=={before}.")
    else:
        lines.append(
            f"It is loaded all the same; `hfcustom doctor {source}{own}` says whether it still does what it should."
        )
    return "\n".join(lines)


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping of mappings as it is, nothing for what a damaged record has in its place."""
    return value if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()) else {}


def _names(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _methods(model_class: Any, then: Mapping[str, Any]) -> list[Drift]:
    own, called = own_functions(model_class), mentioned(model_class)
    drifts: list[Drift] = []
    for name, before in then.items():
        now = method_facts(model_class, name)
        use = f"{own[name][0].__name__} overrides" if name in own else "its code calls" if name in called else ""
        title = f"{printable(str(before.get('of')), 80)}.{name}()"
        if now is None:  # of no matter once the class has done without it
            effect = "overrides, so that its own is never called" if name in own else "calls"
            if use:
                drifts.append(Drift(f"{title} is gone, which {model_class.__name__} {effect}", lost=True))
            continue
        if now["signature"] != before.get("signature"):
            forms = f"\n      then {before.get('signature')}\n      now  {now['signature']}"
            drifts.append(Drift(f"{title} takes other arguments{f'; {use} it' if use else ''}:{forms}"))
        elif now["source"] and before.get("source") and now["source"] != before["source"]:
            drifts.append(Drift(f"{title} has other code{f'; {use} it: look at it' if use else ''}"))
    return drifts


def _config(model_class: Any, then: Any) -> list[Drift]:
    now, called = config_keys(model_class.stock_class()), mentioned(model_class)
    gone = [key for key in _names(then) if key not in now]
    kind = model_class.stock_class().config_class.__name__
    return [
        Drift(
            f"{kind}.{key} is gone{f', which the code of {model_class.__name__} reads' * (key in called)}",
            key in called,
        )
        for key in gone
    ]


def _modules(core: Any, then: Any) -> list[Drift]:
    now, before = folded_modules(core.stock_tensor_names()), _names(then)
    gone = sorted(set(before) - set(now))
    if not gone:
        return []
    words = {word for path in now for word in path.split(".")}
    words |= {word for name, _ in core.named_modules() for word in name.split(".")}
    lost = {word for path in gone for word in path.split(".")} & (mentioned(type(core)) - words)
    drifts = [
        Drift(f"the module {word} is gone, which the code of {type(core).__name__} names", True)
        for word in sorted(lost)
    ]
    added = set(now) - set(before)
    for path in _tops(gone, now):
        inside = [name for name in gone if name == path or name.startswith(path + ".")]
        new = _renamed(path, inside, added, set(before))
        drifts.append(Drift(f"the module {path} is {f'called {new} now' if new else 'gone'}"))
    return drifts


def _tops(gone: Iterable[str], now: Iterable[str]) -> list[str]:
    """Return the shortest paths below which nothing is left."""
    left = {path[: match.start()] for path in now for match in re.finditer(r"\.|$", path)}
    tops: dict[str, None] = {}
    for path in gone:
        pieces = path.split(".")
        prefixes = (".".join(pieces[: depth + 1]) for depth in range(len(pieces)))
        tops[next(prefix for prefix in prefixes if prefix not in left or prefix == path)] = None
    return list(tops)


def _renamed(path: str, inside: list[str], added: set[str], before: set[str]) -> str:
    """Return the path under which everything that was below another is found now, nothing where there is none."""
    ends = [name[len(path) :] for name in inside]
    new = sorted({name[: len(name) - len(ends[0])] for name in added if name.endswith(ends[0])})
    return next((top for top in new if top not in before and all(top + end in added for end in ends)), "")


def _parts(core: Any, then: Mapping[str, Any]) -> list[Drift]:
    now = part_classes(core)
    drifts: list[Drift] = []
    for part, before in then.items():
        if part not in now:
            continue  # replaced by a class of the user's
        if (kind := now[part]["class"]) != before.get("class"):
            drifts.append(Drift(f"the part {part} is a {kind}, it was a {before.get('class')}"))
        elif (form := now[part]["forward"]) != before.get("forward"):
            forms = f"\n      then {before.get('forward')}\n      now  {form}"
            drifts.append(Drift(f"{kind}.forward() takes other arguments:{forms}"))
    return drifts
