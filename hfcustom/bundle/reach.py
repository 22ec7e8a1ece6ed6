"""What a class needs: from its name through every name that its code uses, in the user's files and in hfcustom's.

A function that nothing reaches is left out with what it imports, so that a training loop beside a model does not ask whoever
loads the model for accelerate. What a file does when it is imported (registering a loss) is always kept.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import hfcustom
from hfcustom.bundle.modules import OWN, Modules
from hfcustom.bundle.refusals import check_unit
from hfcustom.bundle.source import Bound, Source, Unit

HOME = hfcustom._HOME
AT_HOME = tuple(
    f"{OWN}.{name}." for name in ("card", "data", "hub", "record", "sentinel")
)  # not needed by whoever loads
LOOKS_UP = {("globals",), ("eval",), ("exec",), ("sys", "modules")}


@dataclass
class Need:
    """A package that code imports, and where."""

    package: str  # as it is imported
    where: str
    optional: bool  # the code says what to do without it, or only some uses of it come so far


@dataclass
class Reach:
    """What is kept, of which modules."""

    modules: Modules
    units: dict[str, set[Unit]] = field(default_factory=dict)  # of each module that is visited
    wanted: dict[str, set[Bound]] = field(default_factory=dict)  # of each module's top-level imports
    objects: set[str] = field(default_factory=set)  # modules that are used as such, even when nothing is in them
    names: set[str] = field(default_factory=set)  # of `hfcustom` itself
    children: dict[str, set[str]] = field(default_factory=dict)  # modules that are used as attributes of their package
    needs: list[Need] = field(default_factory=list)
    _because: dict[Unit, tuple[Source, Unit]] = field(default_factory=dict)
    _stack: list[tuple[Source, Unit]] = field(default_factory=list)
    _done: set[tuple[str, str]] = field(default_factory=set)

    def visit(self, module: str) -> None:
        """Keep what a module does when it is imported, and its packages before it."""
        if module in self.units:
            return
        if parent := module.rpartition(".")[0]:
            self.visit(parent)
        source = self.modules.find(module)
        if source is None or module in self.units:
            return
        self.units[module], self.wanted[module] = set(), set()
        if module == OWN:
            return
        for unit in source.units:
            if unit.is_import:
                self._run_import(source, unit)
            elif unit.acts or self._registers_itself(source, unit):
                self._keep(source, unit)

    def need(self, module: str, name: str) -> None:
        """Keep what defines a name of a module, "*" for all its names."""
        if (module, name) in self._done:
            return
        self._done.add((module, name))
        self.visit(module)
        source = self.modules.find(module)
        assert source is not None
        if module == OWN:
            self._need_own(name)
        elif name == "*":
            self.objects.add(module)
            for unit in source.units:
                for defined in unit.defines or [""]:
                    self._keep(source, unit, defined)
        elif source.owns(name):
            for unit in source.by_name[name]:
                self._keep(source, unit, name)
        elif self.modules.find(f"{module}.{name}") is not None:
            self.visit(f"{module}.{name}")
            self.objects.add(f"{module}.{name}")
        else:  # set by a call, as register() does with a config class, or out of an import of all names
            for bound in source.bindings.get("*", []):
                if self.modules.find(bound.module) is not None:
                    self.need(bound.module, name)
            if "__getattr__" in source.by_name:
                self.need(module, "__getattr__")

    def _need_own(self, name: str) -> None:
        if name in HOME:
            self.names.add(name)
            self.need(HOME[name], name)
        elif self.modules.find(f"{OWN}.{name}") is not None:
            self.visit(f"{OWN}.{name}")
            self.objects.add(f"{OWN}.{name}")
        else:
            self.names.add(name)

    def runs(self, source: Source, bound: Bound) -> bool:
        """Whether an import is kept for what the module does, even where nothing that is kept uses the name.

        Of hfcustom's modules only one that nobody in the file uses is imported for that, as those that register losses are.
        """
        return not is_own(bound.module) or bound.name not in source.used

    def _run_import(self, source: Source, unit: Unit) -> None:
        """Follow an import for what the imported modules do; what nobody uses of a package is there for that too."""
        for _, bound in (pair for pair in source.top_imports() if pair[0] is unit):
            if self.modules.find(bound.module) is None:
                if bound.name not in source.used and not source.is_own:
                    self._keep(source, unit, bound.name)
            elif bound.attribute == "*":
                self.wanted[source.name].add(bound)
                self._follow(source, bound, unit, optional=False)
            elif self.runs(source, bound):
                self.visit(bound.module)
                if bound.attribute and self.modules.find(f"{bound.module}.{bound.attribute}") is not None:
                    self.visit(f"{bound.module}.{bound.attribute}")

    def _keep(self, source: Source, unit: Unit, name: str = "") -> None:
        if unit.is_import:
            for _, bound in (pair for pair in source.top_imports() if pair[0] is unit):
                if bound.name == name and bound not in self.wanted[source.name]:
                    self.wanted[source.name].add(bound)
                    self._follow(source, bound, unit, optional=False)
            return
        if unit in self.units[source.name]:
            return
        self.units[source.name].add(unit)
        if self._stack:
            self._because[unit] = self._stack[-1]
        check_unit(source, unit, self._reason(source, unit), self.modules)
        self._stack.append((source, unit))
        for statement in unit.imports:
            optional = isinstance(unit.node, ast.Try) or source.is_own or _is_tried(unit.node, statement)
            for bound in source.bound_by(statement):
                self._follow(source, bound, unit, optional=optional)
        for chain in sorted(unit.chains):
            self._read(source, unit, chain)
        self._stack.pop()

    def _registers_itself(self, source: Source, unit: Unit) -> bool:
        """Whether a class of the user's has a base of theirs that is told of each subclass."""
        if source.is_own or not isinstance(unit.node, ast.ClassDef):
            return False
        for base in unit.node.bases:
            name = ast.unparse(base).split(".")
            homes = [(source, name[-1])] if name[0] in source.by_name and len(name) == 1 else []
            for bound in source.bindings.get(name[0], []):
                home = self.modules.find(self._module_of(bound) or bound.module)
                homes += [(home, bound.attribute if len(name) == 1 and bound.attribute else name[-1])] if home else []
            for home, defined in homes:
                for parent in () if home.is_own else home.by_name.get(defined, ()):
                    if isinstance(parent.node, ast.ClassDef) and parent is not unit:
                        hooks = (child for child in parent.node.body if isinstance(child, ast.FunctionDef))
                        told = any(hook.name == "__init_subclass__" for hook in hooks)
                        if told or self._registers_itself(home, parent):
                            return True
        return False

    def _reason(self, source: Source, unit: Unit) -> list[tuple[Source, Unit]]:
        """Return what leads to a unit: it, what uses that, and so on, up to a file of the user's."""
        chain = [(source, unit)]
        while chain[-1][0].is_own and chain[-1][1] in self._because:
            chain.append(self._because[chain[-1][1]])
        return chain

    def _follow(self, source: Source, bound: Bound, unit: Unit, *, optional: bool) -> None:
        """Keep what an import binds."""
        if is_left_at_home(source, bound, unit):
            return
        if self.modules.find(bound.module) is None:
            if unit.is_import or not source.is_own:  # hfcustom's functions say themselves what they would like to have
                self.needs.append(Need(bound.module.partition(".")[0], source.where(unit.node), optional))
            return
        self.visit(bound.module)
        if bound.attribute == "*" and bound.module == OWN:
            for name in sorted(source.used & HOME.keys() - source.by_name.keys()):
                self.need(OWN, name)
        elif bound.attribute:
            self.need(bound.module, bound.attribute)
        else:
            self.objects.update(
                {bound.module, bound.name} if bound.name == bound.module.partition(".")[0] else {bound.module}
            )

    def _read(self, source: Source, unit: Unit, chain: tuple[str, ...]) -> None:
        """Keep what a name stands for, and of a module those names that are read of it."""
        root, attributes = chain[0], list(chain[1:])
        if chain[:2] in LOOKS_UP and not source.is_own:  # for any name, perhaps
            self.need(source.name, "*")
        if root in source.by_name:
            self.need(source.name, root)
        elif any(bound.attribute == "*" for bound in source.bindings.get("*", [])):
            for bound in source.bindings["*"]:
                if bound.module != OWN and self.modules.find(bound.module) is not None:
                    self.need(bound.module, root)
        for bound in source.bindings.get(root, []):
            module = self._module_of(bound)
            if module is not None and (attributes or root not in unit.locals):
                self._read_module(module, attributes)

    def _module_of(self, bound: Bound) -> str | None:
        """Return the module that a name stands for, None where it stands for something else, or not for one of a bundle."""
        if bound.attribute is None:
            name = bound.module if bound.name != bound.module.partition(".")[0] else bound.name
        else:
            package = self.modules.find(bound.module)
            if package is None or package.owns(bound.attribute) or (bound.module == OWN and bound.attribute in HOME):
                return None
            name = f"{bound.module}.{bound.attribute}"
        return name if self.modules.find(name) is not None else None

    def _read_module(self, module: str, attributes: list[str]) -> None:
        while attributes:
            source = self.modules.find(module)
            assert source is not None
            name, child = attributes[0], f"{module}.{attributes[0]}"
            defined = name in HOME if module == OWN else source.owns(name)
            if defined or self.modules.find(child) is None:
                self.need(module, name)
                return
            self.visit(child)
            self.objects.update((module, child))
            self.children.setdefault(module, set()).add(name)
            module, attributes = child, attributes[1:]
        if module != OWN:
            self.need(module, "*")

    # ---- what comes of it -------------------------------------------------------------------------------------------

    def is_active(self, module: str) -> bool:
        """Whether importing a module does something, by itself or by what it imports; once all is reached."""
        return module in self._active

    @cached_property
    def _active(self) -> set[str]:
        sources = {name: source for name in self.units if (source := self.modules.find(name)) and name != OWN}
        active = {name for name, source in sources.items() if self._acts(source)}
        before = -1
        while len(active) > before:
            before = len(active)
            for name, source in sources.items():
                imported = {
                    m for _, bound in source.top_imports() for m in (bound.module, f"{bound.module}.{bound.attribute}")
                }
                if imported & active:
                    active.add(name)
        return active

    def _acts(self, source: Source) -> bool:
        """Whether a module does something itself, or imports a package that nobody uses, for what that does."""
        wanted = (bound for bound in self.wanted[source.name] if self.modules.find(bound.module) is None)
        kept = any(unit.acts for unit in self.units[source.name])
        return kept or any(bound.name not in source.used for bound in wanted)

    def files(self) -> list[str]:
        """Return the modules that a bundle holds, in alphabetical order."""
        kept = {name for name, units in self.units.items() if units or self.wanted[name] or self.is_active(name)}
        return sorted(kept | self.objects | ({OWN} if self.names else set()))


def is_own(module: str) -> bool:
    """Whether a module is hfcustom's."""
    return module.partition(".")[0] == OWN


def is_left_at_home(source: Source, bound: Bound, unit: Unit) -> bool:
    """Whether a function of hfcustom's imports what reads rows, or writes cards: that is left to an installed hfcustom."""
    return source.is_own and not unit.is_import and is_at_home(bound)


def is_at_home(bound: Bound) -> bool:
    """Whether an import is of what no bundle holds."""
    return any(f"{name}.".startswith(AT_HOME) for name in (bound.module, f"{bound.module}.{bound.attribute}"))


def reach(modules: Modules, roots: Iterable[tuple[str, str]]) -> Reach:
    """Follow some names, (module, name), and what their modules do."""
    found = Reach(modules)
    for module, name in roots:
        found.need(module, name)
    return found


def _is_tried(node: ast.stmt, statement: ast.stmt) -> bool:
    """Whether a statement stands in a `try`, where transformers does not ask for the package."""
    tries = (child for child in ast.walk(node) if isinstance(child, ast.Try))
    return any(statement is inner for child in tries for inner in ast.walk(child))
