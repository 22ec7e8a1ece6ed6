"""One Python file as a bundle sees it: its top-level statements, what each defines, and what each uses.

A file is cut into units, its top-level statements. A unit is kept if something that is kept uses a name that it defines, or
if it does something when the file is imported (registers a loss, fills a table). The rest is left out of a bundle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
PASSIVE = {  # decorators that only change what they decorate; any other may register it somewhere
    *("abstractmethod", "cache", "cached_property", "contextmanager", "dataclass", "final", "lru_cache", "overload"),
    *("singledispatch", "total_ordering", "wraps", "no_grad", "inference_mode", "compile", "can_return_tuple"),
}


@dataclass(frozen=True)
class Bound:
    """A name that an import statement binds: `from module import attribute as name`, or `import module` without attribute."""

    name: str
    module: str  # absolute
    attribute: str | None = None  # "*" for all


@dataclass(eq=False)
class Unit:
    """A top-level statement; `chains` are the names that it reads, with their attributes: ("losses", "contract", "term")."""

    node: ast.stmt
    defines: frozenset[str]
    chains: frozenset[tuple[str, ...]]
    locals: frozenset[str]  # names that functions inside give their own meaning
    imports: list[ast.Import | ast.ImportFrom]  # anywhere inside
    acts: bool  # when the file is imported

    @property
    def is_import(self) -> bool:
        """Whether it is an import statement, of which each name is kept or left out by itself."""
        return isinstance(self.node, ast.Import | ast.ImportFrom)


@dataclass(eq=False)
class Source:
    """A file under its module's name."""

    name: str
    path: Path | None  # None: a package that is only a folder
    is_package: bool = False
    is_own: bool = False  # hfcustom's, where a call on the right of a top-level assignment has no effect elsewhere
    text: str = ""
    units: list[Unit] = field(default_factory=list)

    @classmethod
    def read(cls, name: str, path: Path | None, *, is_own: bool) -> Source:
        """Parse a file; ValueError for one that is no Python."""
        if path is None:
            return cls(name, path, True)
        text = path.read_text(encoding="utf-8-sig")
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"{path}:{error.lineno}: this is no Python ({error.msg}).") from error
        source = cls(name, path, path.stem == "__init__", is_own, text)
        source.units = [source._unit(node) for node in tree.body]
        return source

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the file, with their ends."""
        return [line + "\n" for line in self.text.split("\n")]

    def top_imports(self) -> Iterator[tuple[Unit, Bound]]:
        """Yield the names that are bound by import statements at the top, with those."""
        for unit in self.units:
            if unit.is_import and unit.imports:
                for bound in self.bound_by(unit.imports[0]):
                    yield unit, bound

    @cached_property
    def by_name(self) -> dict[str, list[Unit]]:
        """The units that define each name; a function may be defined in both branches of a condition."""
        found: dict[str, list[Unit]] = {}
        for unit in self.units:
            for name in unit.defines:
                found.setdefault(name, []).append(unit)
        return found

    def owns(self, name: str) -> bool:
        """Whether a name is defined here, and not only a module below this package that it imports."""
        below = Bound(name, self.name, name)
        return any(
            not unit.is_import or below not in self.bound_by(unit.imports[0]) for unit in self.by_name.get(name, ())
        )

    @cached_property
    def used(self) -> frozenset[str]:
        """The names that any unit reads."""
        return frozenset(chain[0] for unit in self.units for chain in unit.chains)

    @cached_property
    def bindings(self) -> Mapping[str, list[Bound]]:
        """What each name may stand for that is bound by an import, at the top or in a function."""
        found: dict[str, list[Bound]] = {}
        for unit in self.units:
            for statement in unit.imports:
                for bound in self.bound_by(statement):
                    found.setdefault(bound.name, []).append(bound)
        return found

    def bound_by(self, statement: ast.Import | ast.ImportFrom) -> Iterator[Bound]:
        """Yield the names that an import statement binds, in its order."""
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield Bound(alias.asname or alias.name.partition(".")[0], alias.name)
            return
        module = self.absolute(statement)
        for alias in statement.names:
            yield Bound(alias.asname or alias.name, module, alias.name)

    def absolute(self, statement: ast.ImportFrom) -> str:
        """Return the module that `from ... import` names; ValueError for a relative one that leaves the package."""
        if not statement.level:
            return statement.module or ""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        if statement.level > len(package):
            raise ValueError(
                f"{self.path}:{statement.lineno}: a relative import that leaves the package; this file is {self.name!r}. "
                "Put an __init__.py into each folder of the package."
            )
        package = package[: len(package) - statement.level + 1]
        return ".".join([*package, *([statement.module] if statement.module else [])])

    def where(self, node: ast.AST) -> str:
        """Return the place of a node for a message."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def _unit(self, node: ast.stmt) -> Unit:
        imports = [*_imports(node)]
        defines = frozenset(_defined(node, [bound.name for found in imports for bound in self.bound_by(found)]))
        return Unit(node, defines, frozenset(_chains(node)), frozenset(_locals(node)), imports, self._acts(node))

    def _acts(self, node: ast.stmt) -> bool:
        """Whether a statement does more on import than define its names; an import that nobody uses is there for what it does."""
        if is_left_out(node) or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
            return False
        if isinstance(node, Definition):
            acts = [d for d in node.decorator_list if _last_name(d) not in PASSIVE]
            return bool(acts) or isinstance(node, ast.ClassDef) and bool(node.keywords)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            calls = node.value is not None and any(isinstance(child, ast.Call) for child in ast.walk(node.value))
            return not all(isinstance(target, ast.Name) for target in targets) or calls and not self.is_own
        return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def is_left_out(node: ast.stmt) -> bool:
    """Whether a statement never runs in a bundle: `if TYPE_CHECKING` and `if __name__ == "__main__"`, without an else."""
    if not isinstance(node, ast.If) or node.orelse:
        return False
    test = ast.unparse(node.test)
    return test in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'", "'__main__' == __name__")


def _last_name(node: ast.expr) -> str:
    """Return `dataclass` for `@dataclasses.dataclass(frozen=True)`."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements in a statement, but for those that never run."""
    if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
        yield node
    elif not (isinstance(node, ast.stmt) and is_left_out(node)):
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)


def _defined(node: ast.stmt, imported: list[str]) -> Iterator[str]:
    """Yield the names that a top-level statement gives the module."""
    if isinstance(node, Definition):
        yield node.name
        return
    yield from imported
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store | ast.Del):
            yield child.id
        elif isinstance(child, Definition):
            yield child.name


def _locals(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, Definition):
        for child in ast.walk(node):
            if isinstance(child, ast.arg):
                yield child.arg
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                yield child.id


def _chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield each name that is read, with the attributes that are read of it."""
    if isinstance(node, ast.Attribute | ast.Name):
        attributes: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            yield (base.id, *attributes)
            return
        yield from _chains(base)
        return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)
