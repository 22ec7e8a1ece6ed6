"""Reading a user's methods: their syntax trees, with lines of their files."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from hfcustom.origins import Place, is_users, place_of, tree_of


def method_of(some_class: type, name: str) -> tuple[ast.FunctionDef, Place] | None:
    """Return the tree of a method that the user's classes define last, and its place; None where they do not."""
    for base in some_class.__mro__:
        if name in vars(base) and not is_users(base):
            return None
        found = tree_of(base) if name in vars(base) else None
        for node in found[0].body if found is not None else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                assert found is not None
                return node, Place(found[1].file, node.lineno)
    return None


def owner_of(some_class: type, name: str) -> type | None:
    """Return the class whose method it is, None where it is not the user's."""
    owner = next((base for base in some_class.__mro__ if name in vars(base)), None)
    return owner if owner is not None and is_users(owner) else None


def line_in(place: Place, node: ast.AST) -> Place:
    """Return the place of a node in the same file."""
    return Place(place.file, getattr(node, "lineno", place.line))


def variadic_name(function: Any) -> str | None:
    """Return the name of a function's **kwargs, None where it has none."""
    parameters = inspect.signature(function).parameters.values()
    return next((item.name for item in parameters if item.kind is inspect.Parameter.VAR_KEYWORD), None)


def passes_on(node: ast.FunctionDef, name: str) -> bool:
    """Whether a method hands `**name` to something that it calls."""
    calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
    keywords = (item for call in calls for item in call.keywords if item.arg is None)
    return any(isinstance(found, ast.Name) and found.id == name for item in keywords for found in ast.walk(item.value))


def names_called(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield the last part of what is called, `softmax` for `torch.nn.functional.softmax(...)`, and the call."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            function = inner.func
            yield (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")), inner


def mentions(some_class: type, *names: str) -> bool:
    """Whether the source of a class, or of its bases of the user's, has one of these names."""
    for base in some_class.__mro__:
        found = tree_of(base) if is_users(base) and base is not object else None
        for node in ast.walk(found[0]) if found is not None else ():
            if getattr(node, "id", None) in names or getattr(node, "attr", None) in names:
                return True
    return False


def place_of_class(some_class: type) -> Place | None:
    """Return where a class of the user's begins."""
    return place_of(some_class) if is_users(some_class) else None
