"""Names: nearest match for a mistyped one, snake_case for a class, and an object out of the user's own file.

Nothing heavy is imported here: the command line uses it before torch is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hfcustom.exits import ConfigError, MissingError

PARTS = ("vision", "connector", "language", "head", "new", "other")  # of a model; hfcustom/parts.py finds them


def unknown(kind: str, name: object, allowed: Iterable[str], cure: str = "") -> str:
    """Return the message for a name that is not allowed: the value, the nearest, what is allowed, the cure."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'nothing'}.{' ' + cure if cure else ''}"


def printable(text: str, limit: int = 8000) -> str:
    """Return a text for a terminal or a file: what is no letter (ANSI codes, half letters) escaped, the middle cut if long."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def snake_case(name: str) -> str:
    """Return `PairPool` as `pair_pool`, `MyInternVL` as `my_intern_vl`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def load_object(spec: str, kind: str = "object") -> Any:
    """Return `name` from `path/to/file.py:name`, importing the file once as the module `file`.

    This runs the file: it is for code the user names on their own command line, never for a name out of a checkpoint.
    Raises ValueError for a malformed spec and FileNotFoundError, ImportError or AttributeError that names the file.
    """
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{kind} {spec!r} is not of the form path/to/file.py:Name.")
    file = Path(path).resolve()
    if not file.is_file():
        raise MissingError(f"{kind} {spec!r}: there is no file {file}.")
    module = import_file(file)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise AttributeError(f"{file}: " + unknown(kind, name, public))
    return getattr(module, name)


def load_class(spec: str) -> Any:
    """Return the class that `my_file.py:MyModel` means, as load_object() does; TypeError for what is no class."""
    found = load_object(spec, "model")
    if not isinstance(found, type):
        raise TypeError(f"{spec} is no class but of type {type(found).__name__}; name the class of the model.")
    return found


def no_target(target: str, families: Iterable[str]) -> str:
    """Return what is said of what is neither a family, nor a folder, nor a class in a file."""
    if target.endswith(".py"):
        return f"{target!r} is a file; name the class in it as well: {target}:MyModel."
    cure = "Or name a checkpoint's folder, a hub id (owner/name), or your class: my_file.py:MyModel."
    return unknown("family", target, families, cure)


def import_file(file: Path) -> Any:
    """Import a Python file under its own stem, once; a module that already came from this file is returned as it is."""
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        # What is not known by its own name is a leftover of runpy, as __mp_main__ can be.
        known = sys.modules.get(getattr(module, "__name__", "")) is module
        if origin is not None and known and Path(origin).resolve() == file:
            return module
    if file.stem in sys.modules:
        other = getattr(sys.modules[file.stem], "__file__", "a built-in module")
        raise ImportError(
            f"{file} cannot be imported as {file.stem!r}: that name is taken by {other}. Rename the file."
        )
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[file.stem] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def check_shape(what: str, value: Any, expected: Sequence[int], legend: str = "the shape it got") -> None:
    """Raise ValueError when a seam returned something else than a tensor of the expected shape."""
    found = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
    if found != tuple(expected):
        raise ValueError(f"{what} returned {found}; it must return {tuple(expected)}, {legend}.")
