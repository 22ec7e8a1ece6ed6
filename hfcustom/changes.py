"""What a class changes of its parent: own methods, new modules, losses, the connector, with the source of what is the user's.

model class -> Change, ...     model -> NewModule, LossFact, ...

The parent is the nearest class of hfcustom or of transformers; a method is compared with the parent's of that name. The change
card (hfcustom/card.py), the doctor and the upgrade sentinel read the same answers.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

from torch import nn

from hfcustom.connectors import CONNECTORS
from hfcustom.losses import LOSSES, parse_losses
from hfcustom.losses.pairs import PAIR_LOSSES
from hfcustom.parts import PartMap, count_parameters, find_parts, unwrap

How = Literal["fills", "extends", "replaces", "adds"]
NO_SOURCE = "# its source is in no file that can be read"
FOREIGN = ("hfcustom.", "transformers.", "torch.", "peft.", "builtins")  # what a user does not write


@dataclass(frozen=True)
class Change:
    """A method of a user's class; `text` is a unified diff where it replaces one of the parent, else its own source."""

    name: str
    owner: str  # the class that defines it
    seam: str
    how: How
    parent: str  # Class.method, "" for a new one
    text: str


@dataclass(frozen=True)
class NewModule:
    """A module, or a bare Parameter, that the stock parent has not."""

    path: str
    kind: str
    tensors: dict[str, tuple[int, ...]]
    parameters: int


@dataclass(frozen=True)
class LossFact:
    """A configured loss; `source` is that of a user's function."""

    name: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def own_classes(model_class: Any) -> list[type]:
    """Return the classes that a user wrote, the most derived first: neither hfcustom's nor the stock class's ancestors."""
    stock = model_class.stock_class()
    return [cls for cls in model_class.__mro__ if not issubclass(stock, cls) and is_users(cls)]


def is_users(thing: Any) -> bool:
    """Whether a class or a function is defined outside of the libraries."""
    return not f"{thing.__module__}.".startswith(FOREIGN)


def own_functions(model_class: Any) -> dict[str, tuple[type, FunctionType]]:
    """Return the methods that a user's classes define, each with the class; copies that only show another signature are none."""
    order = model_class.__mro__
    found: dict[str, tuple[type, FunctionType]] = {}
    for cls in own_classes(model_class):
        for name, value in vars(cls).items():
            function = plain_function(value)
            if function is not None:
                inherited = inherited_function(order[order.index(cls) + 1 :], name)
                if inherited is None or inherited[1].__code__ is not function.__code__:
                    found.setdefault(name, (cls, function))
    return found


def plain_function(value: Any) -> FunctionType | None:
    """Return the function of a method, a class or static method, or a property; None for anything else."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def inherited_function(classes: Any, name: str) -> tuple[type, FunctionType] | None:
    """Return the first of some classes that defines a function of this name, and the function."""
    for cls in classes:
        function = plain_function(vars(cls).get(name))
        if function is not None:
            return cls, function
    return None


def changes_of(model_class: Any) -> list[Change]:
    """Return what a user's classes override and add, in the order in which they stand there."""
    return [_change(model_class, name, *found) for name, found in own_functions(model_class).items()]


def _change(model_class: Any, name: str, owner: type, function: FunctionType) -> Change:
    order, source = model_class.__mro__, source_of(function)
    inherited = inherited_function(order[order.index(owner) + 1 :], name)
    how: How = "adds"
    text, parent = source or NO_SOURCE, ""
    if inherited is not None and inherited[0] is not object:
        parent = f"{inherited[0].__name__}.{name}"
        before = source_of(inherited[1])
        if name.startswith("transform_") and not is_users(inherited[0]):
            how = "fills"
        elif re.search(rf"\bsuper\([^)]*\)\.{re.escape(name)}\b", source):
            how = "extends"
        else:
            how = "replaces"
            text = _diff(before, source, parent, f"{owner.__name__}.{name}") if before and source else text
    return Change(name, owner.__name__, seam_of(name), how, parent, text)


def seam_of(name: str) -> str:
    """Return the seam that a method belongs to, in words."""
    if name.startswith("_at_"):
        return "border of a part"
    return SEAMS.get(name, "")


def source_of(thing: Any) -> str:
    """Return the source of a function or a class, dedented; nothing where there is no file of it."""
    try:
        return textwrap.dedent(inspect.getsource(thing)).rstrip() + "\n"
    except (OSError, TypeError, SyntaxError):  # a prompt, or a file that has changed under the program
        return ""


def _diff(before: str, after: str, parent: str, own: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), parent, own, lineterm="")
    return "\n".join(lines) + "\n"


def class_settings(model_class: Any) -> dict[str, Any]:
    """Return the class attributes that a user set to plain values, such as default_loss."""
    found: dict[str, Any] = {}
    for cls in own_classes(model_class):
        for name, value in vars(cls).items():
            if not name.startswith("_") and is_plain(value):
                found.setdefault(name, value)
    return found


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, strings, lists and mappings alone."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, str | int | float | bool | None)


def mentioned(model_class: Any) -> frozenset[str]:
    """Return the attribute names that a user's methods read or call: self.model.projector -> {"model", "projector"}."""
    names: set[str] = set()
    for _, function in own_functions(model_class).values():
        source = source_of(function)
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a lambda in the middle of a call
            continue
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return frozenset(names)


def new_modules(model: Any, part_map: PartMap | None = None) -> list[NewModule]:
    """Return what a model has beside its stock graph, the configured connector included; `part_map` where it is known."""
    core = unwrap(model)
    modules, parameters = dict(core.named_modules()), dict(core.named_parameters())
    return [_new_module(path, modules.get(path), parameters) for path in (part_map or find_parts(core)).paths["new"]]


def _new_module(path: str, module: nn.Module | None, parameters: Mapping[str, nn.Parameter]) -> NewModule:
    if module is None:  # a bare Parameter, or a buffer
        own = {path.rpartition(".")[2]: parameters[path]} if path in parameters else {}
        kind = "Parameter" if own else "buffer"
    else:
        module = module._modules.get("original_module") or module  # which peft has wrapped
        own, kind = dict(module.named_parameters()), type(module).__name__
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    return NewModule(path, kind, shapes, sum(count_parameters(tensor) for tensor in own.values()))


def losses_of(config: Any) -> list[LossFact]:
    """Return the losses of a config; one whose file is not imported has no source."""
    spec = config.loss
    if spec is None or spec == "stock" or (isinstance(spec, str) and spec in PAIR_LOSSES):
        function = PAIR_LOSSES[spec].function if spec in PAIR_LOSSES else None
        return [LossFact(spec, 1.0, {}, _users_source(function))] if spec else []
    facts = []
    for name, value in ({spec: 1.0} if isinstance(spec, str) else spec).items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if name in LOSSES:
            parse_losses({name: value})  # a wrong option is an error here, too
        facts.append(LossFact(name, weight, options, _users_source(LOSSES[name].function if name in LOSSES else None)))
    return facts


def connector_source(spec: Any) -> str:
    """Return the source of a connector that a user wrote, nothing for one that comes along."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    return _users_source(CONNECTORS.get(name or ""))


def _users_source(thing: Callable[..., Any] | type | None) -> str:
    return source_of(thing) or NO_SOURCE if thing is not None and is_users(thing) else ""


SEAMS = {
    "__init__": "construction",
    "_init_weights": "construction",
    "compute_logits": "head",
    "forward": "the whole forward",
    "make_connector": "connector",
    "transform_embeddings": "merged embeddings",
    "transform_hidden_states": "hidden states",
    "transform_image_embeddings": "image embeddings",
    "transform_text_embeddings": "text embeddings",
    "transform_text_features": "text features",
    "transform_vision_features": "vision features",
}
