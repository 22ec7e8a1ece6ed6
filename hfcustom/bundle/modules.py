"""Which modules are a bundle's own business: hfcustom's and the user's, found as files; all others come from packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from hfcustom.bundle.source import Source

OWN = "hfcustom"
PACKAGE = Path(__file__).resolve().parent.parent


class Modules:
    """Finds files by module names.

    `folders` are those that the user's modules are imported from; `tops` are packages that go into the bundle even if they are
    installed, as that of the model's class.
    """

    def __init__(self, folders: Iterable[Path] = (), tops: Iterable[str] = ()) -> None:
        self.folders, self.tops = list(folders), set(tops)
        self._found: dict[str, Source | None] = {}

    def find(self, name: str) -> Source | None:
        """Return a module that goes into a bundle; None for one of a package, of Python, or that is not there."""
        if name not in self._found:
            path = self._path(name)
            is_own = name.partition(".")[0] == OWN
            self._found[name] = (
                None if path is None else Source.read(name, path if path.is_file() else None, is_own=is_own)
            )
        return self._found[name]

    def _path(self, name: str) -> Path | None:
        top = name.partition(".")[0]
        if top == OWN:
            return _below(PACKAGE.parent, name)
        if not top or top in sys.stdlib_module_names:
            return None
        for folder in self.folders:
            if _is_site(folder) and top not in self.tops:
                continue
            if (path := _below(folder, name)) is not None and (path.is_file() or not _is_installed(top)):
                return path
        found = _folder_of(top)
        return None if found is None or (_is_site(found) and top not in self.tops) else _below(found, name)


def _below(folder: Path, name: str) -> Path | None:
    """Return a module's file, or the folder of a package without a file of its own."""
    base = folder.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_name(base.name + ".py")):
        if path.is_file():
            return path
    return base if base.is_dir() and any(base.rglob("*.py")) else None


def _spec_of(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was put into sys.modules by hand
        return None


def _is_installed(top: str) -> bool:
    spec = _spec_of(top)
    return spec is not None and spec.origin is not None


def _folder_of(top: str) -> Path | None:
    """Return where a module lies that is on the path."""
    spec = _spec_of(top)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    path = Path(spec.origin).resolve()
    return path.parent.parent if path.stem == "__init__" else path.parent


def _is_site(folder: Path) -> bool:
    """Whether a folder is one of installed packages, or Python's own."""
    installed = {Path(place).resolve() for key, place in sysconfig.get_paths().items() if key.endswith("lib")}
    return bool({"site-packages", "dist-packages"} & set(folder.parts)) or folder.resolve() in installed


def place_of(file: Path) -> tuple[Path, str]:
    """Return the folder that a file's module is imported from, and the module's name in it.

    Folders with an __init__.py are packages; so is one without, if the file's relative imports say so.
    """
    levels = _relative_levels(file)
    folder, names = file.parent, [] if file.stem == "__init__" else [file.stem]
    while (folder / "__init__.py").is_file() or len(names) <= levels - (file.stem == "__init__"):
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _relative_levels(file: Path) -> int:
    """Return how many folders up the relative imports of a file reach at most; 0 where there are none."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        raise ValueError(f"{file}:{error.lineno}: this is no Python ({error.msg}).") from error
    return max((node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), default=0)


def import_code(files: Iterable[Path]) -> tuple[list[ModuleType], list[Path]]:
    """Import the user's files as they import each other; return the modules and the folders that they are found in.

    Raises FileNotFoundError, ValueError for what is no .py file, and ImportError for a name that is taken by another file.
    """
    files = [_checked(file) for file in files]
    places = [place_of(file) for file in files]
    folders = list(dict.fromkeys(folder for folder, _ in places))
    for folder in reversed(folders):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    modules = []
    for file, (_, name) in zip(files, places, strict=True):
        module = importlib.import_module(name)
        found = getattr(module, "__file__", None)
        if found is None or Path(found).resolve() != file:
            taken = found or "a module built into Python"
            raise ImportError(
                f"{file} cannot be imported as {name!r}: that name is taken by {taken}. Rename the file."
            )
        modules.append(module)
    return modules, folders


def _checked(file: Path) -> Path:
    file = file.resolve()
    if file.suffix == ".ipynb":
        raise ValueError(
            f"{file} is a notebook. Write its class into a .py file (%%writefile my_file.py) and name that."
        )
    if ".py:" in file.name:
        raise ValueError(f"{file.name}: name the file alone; the checkpoint says which of its classes it is.")
    if file.suffix != ".py":
        raise ValueError(f"{file} is no Python file; --code takes .py files.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    if not file.stem.isidentifier():
        raise ValueError(f"{file}: {file.stem!r} cannot be imported by name; use letters, digits and underscores.")
    return file
