"""Writing what is kept as flat modules: only import statements change, and what is not kept is cut out; comments stay.

transformers copies a model's code into one folder, so `from hfcustom.losses.contract import term` becomes
`from .hfcustom_losses_contract import term`, and `from . import layers` becomes `from . import mypackage_layers as layers`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from hfcustom.bundle.modules import OWN
from hfcustom.bundle.reach import HOME, Reach, is_at_home, is_left_at_home
from hfcustom.bundle.source import Bound, Source, Unit, is_left_out

WITH_TRANSFORMERS = {  # what transformers itself needs, or any model of images
    *(
        "PIL",
        "filelock",
        "huggingface_hub",
        "numpy",
        "packaging",
        "regex",
        "safetensors",
        "tokenizers",
        "torch",
        "tqdm",
    ),
    *("transformers", "yaml"),
}
WIDTH = 119
NOTICE = """\
# {module} of hfcustom {version}, Apache License 2.0 (LICENSE.hfcustom in this folder); changed by `hfcustom bundle`: imports are
# relative, and what this model does not use is left out.
"""
CHILDREN = '''

def __getattr__(name):
    """Return a module that stood below this one, which was a package."""
    import importlib

    below = {below!r}
    if name not in below:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    return importlib.import_module("." + below[name], __package__)
'''
FACADE = '''\
"""The names of hfcustom that this model's code uses."""

import importlib

__version__ = "{version}"
_HOME = {home}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"{{name!r}} of hfcustom is not in this bundle, since the model's code did not use it.")
    module, attribute = _HOME[name]
    value = importlib.import_module("." + module, __package__)
    return getattr(value, attribute) if attribute else value
'''


@dataclass(frozen=True)
class Edit:
    """Put a text in the place of a part of a file, from character `start` to `end`."""

    start: int
    end: int
    text: str


def flat_names(found: Reach, taken: set[str]) -> dict[str, str]:
    """Return a file name without .py for each module, different from each other and from those that are taken."""
    names: dict[str, str] = {}
    used = {name.lower() for name in taken}
    for module in sorted({*found.units, *found.objects, *found.files()}):
        base = "hfcustom_names" if module == OWN else module.replace(".", "_")
        name, at = base, 2
        while name.lower() in used:
            name, at = f"{base}_{at}", at + 1
        used.add(name.lower())
        names[module] = name
    return names


def write_modules(found: Reach, names: dict[str, str], version: str) -> dict[str, str]:
    """Return the text of each file of a bundle, by its name."""
    return {f"{names[module]}.py": Writer(found, names, version).text_of(module) for module in found.files()}


class Writer:
    """Rewrites the files of one bundle."""

    def __init__(self, found: Reach, names: dict[str, str], version: str) -> None:
        self.found, self.names, self.version = found, names, version

    def text_of(self, module: str) -> str:
        """Return the rewritten file of a module."""
        if module == OWN:
            return self._facade()
        source = self.found.modules.find(module)
        assert source is not None
        text = (
            self._rewritten(source)
            if source.path is not None
            else f'"""The package {module}, a folder without a file."""\n'
        )
        children = sorted(self.found.children.get(module, ()))
        if children and "__getattr__" not in source.by_name:
            text += CHILDREN.format(below={child: self.names[f"{module}.{child}"] for child in children})
        if source.is_own:
            text = NOTICE.format(module=module, version=self.version) + text
        return text

    def _facade(self) -> str:
        home: dict[str, tuple[str, str]] = {}
        for name in sorted(self.found.names & HOME.keys()):
            home[name] = (self.names[HOME[name]], name)
        for child in sorted(self.found.children.get(OWN, ())):
            home[child] = (self.names[f"{OWN}.{child}"], "")
        shown = (
            "{\n" + "".join(f'    "{name}": ("{home[name][0]}", "{home[name][1]}"),\n' for name in sorted(home)) + "}"
        )
        return NOTICE.format(module=OWN, version=self.version) + FACADE.format(version=self.version, home=shown)

    # ---- a file -----------------------------------------------------------------------------------------------------

    def _rewritten(self, source: Source) -> str:
        offsets = _line_offsets(source.text)
        edits = [edit for unit in source.units for edit in self._edits(source, unit, offsets)]
        text = source.text
        for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
            before, after = text[: edit.start], text[edit.end :]
            if not edit.text:  # two blank lines are enough where a statement was
                before, ends = before.rstrip("\n"), len(before) - len(before.rstrip("\n"))
                after, more = after.lstrip("\n"), len(after) - len(after.lstrip("\n"))
                before += "\n" * min(ends + more, 3)
            text = before + edit.text + after
        return text.strip("\n") + "\n"

    def _edits(self, source: Source, unit: Unit, offsets: list[int]) -> Iterator[Edit]:
        """Yield the changes to a top-level statement."""
        if isinstance(unit.node, ast.Expr) and unit.node is source.units[0].node or _is_future(unit.node):
            return  # the docstring
        if unit.is_import:
            statement = unit.imports[0]
            new = self._import(source, unit, statement)
            yield self._replaced(source, unit.node, new, offsets) if new else self._removed(source, unit, offsets)
        elif unit not in self.found.units[source.name]:
            yield self._removed(source, unit, offsets)
        else:
            for statement in unit.imports:
                new = self._import(source, unit, statement)
                yield self._replaced(source, statement, new, offsets)
            yield from self._without_typing(source, unit, offsets)

    def _without_typing(self, source: Source, unit: Unit, offsets: list[int]) -> Iterator[Edit]:
        """Yield what empties `if TYPE_CHECKING:` inside a statement that is kept."""
        for child in ast.walk(unit.node):
            if isinstance(child, ast.If) and child is not unit.node and is_left_out(child):
                start, end = _span(source, child.body[0], offsets)[0], _span(source, child.body[-1], offsets)[1]
                yield Edit(start, end, "pass")

    def _acting(self, source: Source, bound: Bound) -> str:
        """Return the module that is imported for what it does, where nothing uses the name; "" if it does nothing."""
        child = f"{bound.module}.{bound.attribute}"
        module = child if self._is_local(child) else bound.module
        acts = self.found.runs(source, bound) and self.found.is_active(module)
        return module if acts and module in self.found.files() else ""

    def _is_local(self, module: str) -> bool:
        return self.found.modules.find(module) is not None

    def _is_optional(self, bounds: list[Bound]) -> bool:
        """Whether hfcustom imports a package that not every model needs."""
        tops = {bound.module.partition(".")[0] for bound in bounds}
        return any(map(is_at_home, bounds)) or not tops & ({OWN} | WITH_TRANSFORMERS | set(sys.stdlib_module_names))

    # ---- an import statement ----------------------------------------------------------------------------------------

    def _import(self, source: Source, unit: Unit, statement: ast.Import | ast.ImportFrom) -> str:
        """Return what binds the names that are used, a statement a line; nothing where none is, and nothing is done either."""
        lines: dict[str, list[str]] = {}  # beginning of the statement -> names
        bounds = list(source.bound_by(statement))
        for bound in bounds:
            for start, name in self._parts(source, unit, bound):
                lines.setdefault(start, [])
                if name not in lines[start]:
                    lines[start].append(name)
        if "from . import" in lines:  # what is imported for what it does may be imported for a name as well
            lines["from . import"] = [name for name in lines["from . import"] if f"from .{name} import" not in lines]
        new = [f"{start} {', '.join(found)}" for start, found in lines.items() if found]
        if new and source.is_own and not isinstance(unit.node, ast.Try) and self._is_optional(bounds):
            indented = "".join(f"\n    {line}" for line in new)
            return f"try:  # so that transformers does not ask for it before anything needs it{indented}\nexcept ImportError:\n    raise"
        return "\n".join(new)

    def _parts(self, source: Source, unit: Unit, bound: Bound) -> Iterator[tuple[str, str]]:
        """Yield the beginning of the statement that binds a name, and how it names it; or what its import does."""
        module, attribute, name = bound.module, bound.attribute, bound.name
        if unit.is_import and bound not in self.found.wanted[source.name]:
            if acting := self._acting(source, bound):
                yield "from . import", self.names[acting]
        elif not self._is_local(module) or is_left_at_home(source, bound, unit):
            as_name = (
                "" if name in (attribute, module.partition(".")[0] if attribute is None else None) else f" as {name}"
            )
            yield ("import", module + as_name) if attribute is None else (f"from {module} import", attribute + as_name)
        elif attribute is None and name == module.partition(".")[0]:  # import a.b.c binds a
            if module != name and module in self.found.files():
                yield "from . import", self.names[module]
            yield "from . import", _named(self.names[name], name)
        elif attribute is None:
            yield "from . import", _named(self.names[module], name)
        elif attribute == "*" and module == OWN:
            for used in sorted(source.used & HOME.keys() - source.by_name.keys()):
                yield f"from .{self.names[HOME[used]]} import", used
        elif module == OWN and attribute in HOME:
            yield f"from .{self.names[HOME[attribute]]} import", _named(attribute, name)
        elif self._is_local(f"{module}.{attribute}") and not self._defines(module, attribute):
            yield "from . import", _named(self.names[f"{module}.{attribute}"], name)
        else:
            yield f"from .{self.names[module]} import", attribute if attribute == "*" else _named(attribute, name)

    def _defines(self, module: str, name: str) -> bool:
        source = self.found.modules.find(module)
        return source is not None and source.owns(name)

    # ---- places -----------------------------------------------------------------------------------------------------

    def _replaced(self, source: Source, node: ast.stmt, new: str, offsets: list[int]) -> Edit:
        start, end = _span(source, node, offsets)
        before = source.text[offsets[node.lineno - 1] : start]
        if not before.strip():
            new = "\n".join(_wrapped(line, len(before)) for line in new.split("\n")).replace("\n", "\n" + before)
        else:  # after a semicolon or a colon
            new = new.replace("\n", "; ")
        return Edit(start, end, new)

    def _removed(self, source: Source, unit: Unit, offsets: list[int]) -> Edit:
        """Cut a statement out, with the comment right above it; `pass` where it shares its line."""
        start, end = _span(source, unit.node, offsets)
        first = unit.node.lineno
        if isinstance(unit.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and unit.node.decorator_list:
            first = min(decorator.lineno for decorator in unit.node.decorator_list)
            start = offsets[first - 1]
        line_end = offsets[unit.node.end_lineno or first]
        after = source.text[end:line_end].strip()
        if source.text[offsets[first - 1] : start].strip() or (after and not after.startswith("#")):
            return Edit(start, end, "pass")
        while (
            first > 1
            and source.lines[first - 2].startswith("#")
            and not source.lines[first - 2].startswith(("#!", "# ---"))
        ):
            first -= 1
        return Edit(offsets[first - 1], line_end, "")


def _wrapped(line: str, indent: int) -> str:
    """Return a long import with a name a line."""
    start, found, names = line.partition(" import ")
    if not found or "," not in names or indent + len(line) <= WIDTH:
        return line
    return f"{start} import (\n" + "".join(f"    {name},\n" for name in names.split(", ")) + ")"


def _named(attribute: str, name: str) -> str:
    return attribute if attribute == name else f"{attribute} as {name}"


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _line_offsets(text: str) -> list[int]:
    """Return where each line of a text begins, and where the last one ends."""
    offsets = [0]
    for line in text.split("\n"):
        offsets.append(offsets[-1] + len(line) + 1)
    return offsets


def _span(source: Source, node: ast.stmt, offsets: list[int]) -> tuple[int, int]:
    """Return the characters of a statement; ast counts the columns in bytes."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    places = []
    for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)):
        prefix = source.lines[line - 1].encode()[:column].decode()
        places.append(offsets[line - 1] + len(prefix))
    return places[0], places[1]
