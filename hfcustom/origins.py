"""Where a class says what: the file and line of a method, a class attribute, or of `self.name = ...`.

(class, name) -> Place, printed as my_file.py:12; None where there is no source, as in a notebook or a prompt.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

OURS = ("hfcustom.", "transformers.", "torch.", "peft.", "bitsandbytes.")
REGISTRARS = ("register_buffer", "register_parameter", "register_module", "add_module", "setattr", "set_submodule")


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        path = Path(self.file)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{shown}:{self.line}"


def is_users(some_class: type) -> bool:
    """Whether a class is of the user's own code: neither hfcustom's nor a library's that models are made of."""
    return not f"{some_class.__module__}.".startswith(OURS) and some_class is not object


def users_classes(some_class: type) -> list[type]:
    """Return the user's own classes among the bases of one, it first."""
    return [base for base in some_class.__mro__ if is_users(base) and base.__module__ not in ("builtins", "abc")]


def place_of(thing: Any) -> Place | None:
    """Return where a class or function begins, below its decorators."""
    try:
        thing = inspect.unwrap(thing) if isinstance(thing, FunctionType) else thing
        file = inspect.getsourcefile(thing)
        lines, start = inspect.getsourcelines(thing)
    except (OSError, TypeError):
        return None
    begins = (at for at, line in enumerate(lines) if line.lstrip().startswith(("class ", "def ", "async def ")))
    return None if file is None else Place(file, start + next(begins, 0))


def said(place: Place | None, some_class: type) -> str:
    """Return a place in words; the class's module where there is no line."""
    return str(place) if place is not None else f"{some_class.__module__} (no source)"


@cache
def tree_of(some_class: type) -> tuple[ast.ClassDef, Place] | None:
    """Return the syntax tree of a class, its lines as in its file, and where it begins; None where there is no source."""
    place = place_of(some_class)
    if place is None:
        return None
    lines, start = inspect.getsourcelines(some_class)
    try:
        (node,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(node, ast.ClassDef):
        return None
    ast.increment_lineno(node, start - 1)
    return node, place


def attribute_place(some_class: type, name: str) -> Place | None:
    """Return where a class, or a base of the user's, sets a class attribute or defines a method."""
    for base in users_classes(some_class):
        found = tree_of(base)
        for node in found[0].body if found is not None else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if name in names or getattr(node, "name", None) == name:
                assert found is not None
                return Place(found[1].file, node.lineno)
    return None


def assignment_place(some_class: type, path: str) -> Place | None:
    """Return where the user's classes put a module or tensor of this path: `self.a.b = ...` for a.b, or for a.b.c."""
    best: tuple[int, Place] | None = None
    for base in users_classes(some_class):
        found = tree_of(base)
        for target, line in assignments(found[0]) if found is not None else ():
            assert found is not None
            if path == target or path.startswith(target + "."):
                if best is None or len(target) > best[0]:
                    best = len(target), Place(found[1].file, line)
    return None if best is None else best[1]


def assignments(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a class's methods set on themselves, a dotted path and the line."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                for single in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if path := own_path(single):
                        yield path, inner.lineno
        elif isinstance(inner, ast.Call) and (name := _registered(inner)):
            yield name, inner.lineno


def _registered(call: ast.Call) -> str:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in REGISTRARS:
        return ""
    words = [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    owner = own_path(function.value) if isinstance(function, ast.Attribute) else own_path(call.args[0])
    return ".".join(part for part in (owner, *words[:1]) if part) if words else ""


def own_path(node: ast.AST) -> str:
    """Return the dotted path of `self.a.b`, up to a subscript; "" for what is not on self."""
    names: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            names, node = [], node.value
        else:
            return ".".join(names) if isinstance(node, ast.Name) and node.id == "self" else ""


def overrides(some_class: type, harmless: Iterable[str] = ()) -> dict[str, type]:
    """Return the methods of a base that the user's classes override, each with the class that does.

    Left out are names in `harmless`, dunder methods, and inherited functions under another signature, as CustomVLM makes
    of forward.
    """
    order, found = some_class.__mro__, dict[str, type]()
    for at, base in enumerate(order):
        for name, value in vars(base).items() if is_users(base) else ():
            inherited = next((vars(other)[name] for other in order[at + 1 :] if name in vars(other)), None)
            if inherited is None or name in harmless or (name.startswith("__") and name != "__call__"):
                continue
            if isinstance(value, FunctionType | property | classmethod | staticmethod) and not _is_copy(
                value, inherited
            ):
                found.setdefault(name, base)
    return found


def _is_copy(method: Any, inherited: Any) -> bool:
    both = isinstance(method, FunctionType) and isinstance(inherited, FunctionType)
    return both and method.__code__ is inherited.__code__
