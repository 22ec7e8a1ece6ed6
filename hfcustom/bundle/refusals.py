"""What cannot travel in a folder of code: files beside it, and modules whose names are only known when it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfcustom.bundle.source import Source, Unit

if TYPE_CHECKING:
    from hfcustom.bundle.modules import Modules

PLACES = {("__file__",), ("__path__",), ("__spec__",), ("inspect", "getfile"), ("inspect", "getsourcefile")}
IMPORTERS = {("importlib", "import_module"), ("import_module",), ("__import__",), ("importlib", "__import__")}


def check_unit(source: Source, unit: Unit, reason: Sequence[tuple[Source, Unit]], modules: Modules) -> None:
    """Raise ValueError for a statement that would not find in a bundle what it finds here, with its place and the cure."""
    if source.is_own:
        _check_own(source, unit, reason)
        return
    for node in ast.walk(unit.node):
        if _chain(node) in PLACES:
            raise ValueError(
                f"{source.where(node)}: {ast.unparse(node)} is read, which in a bundle is a file in transformers' cache: what "
                "lies beside it here is not there. Put what the code reads into the config (model.config.my_field) or a buffer "
                "(self.register_buffer), which are saved with the weights."
            )
        if isinstance(node, ast.Call):
            _check_call(source, node, modules)


def _check_own(source: Source, unit: Unit, reason: Sequence[tuple[Source, Unit]]) -> None:
    """Say which line of the user's needs a part of hfcustom that looks for modules or files while it runs."""
    found = next((chain for chain in sorted(unit.chains) if chain in IMPORTERS or chain == ("__file__",)), None)
    if found is None:
        return
    user, user_unit = reason[-1]
    name = next(iter(sorted(unit.defines)), "its code")
    does = "looks for a file beside itself" if found == ("__file__",) else "imports modules by names that it computes"
    raise ValueError(
        f"{user.where(user_unit.node)}: this needs {name} of {source.name}, which {does}, so that a bundle cannot know what it needs. "
        "Import what you use by name (from hfcustom.families.internvl import CustomInternVLForConditionalGeneration), and keep "
        "training and tools in functions that the model's code does not call."
    )


def _check_call(source: Source, node: ast.Call, modules: Modules) -> None:
    if _chain(node.func) in IMPORTERS:
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if not isinstance(name, str) or name.startswith(".") or modules.find(name) is not None:
            raise ValueError(
                f"{source.where(node)}: {ast.unparse(node)} imports a module by a name that is computed, or one of your own by a "
                "string; a bundle cannot rename it there. Write an import statement: from my_module import my_function."
            )
    for text in _texts(node):
        if (file := _file_of(text, source)) is not None:
            raise ValueError(
                f"{source.where(node)}: {ast.unparse(node)} names the file {file}, which would not be in the bundle. Put what is "
                "in it into the config (model.config.my_field) or a buffer (self.register_buffer), which are saved with the weights."
            )


def _texts(node: ast.Call) -> Iterator[str]:
    for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def _file_of(text: str, source: Source) -> Path | None:
    """Return the file that a text names, from the folder of the code or from the current one."""
    if not 2 < len(text) < 1000 or "\n" in text or "\0" in text or not ("." in text or "/" in text):
        return None
    assert source.path is not None
    for folder in (source.path.parent, Path.cwd()):
        try:
            if (file := folder / Path(text).expanduser()).is_file():
                return file
        except (OSError, RuntimeError):  # a name that is too long, or ~somebody
            return None
    return None


def _chain(node: ast.AST) -> tuple[str, ...]:
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    return (node.id, *attributes) if isinstance(node, ast.Name) else ()
