"""The code of a bundle: its files by name, the entry file among them, and what has to be installed for it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hfcustom
from hfcustom.bundle.cargo import Cargo
from hfcustom.bundle.modules import OWN, Modules
from hfcustom.bundle.reach import reach
from hfcustom.bundle.rewrite import WITH_TRANSFORMERS, flat_names, write_modules

LEAST = {  # as in pyproject.toml, and in transformers for chat templates
    "jinja2": "3.1",
    "num2words": "0.5.14",
    "numpy": "1.26",
    "pillow": "11.0",
    "torch": "2.10",
    "transformers": "5.20",
}
ENTRY = '''\
"""{model}: what transformers loads from this folder; written by `hfcustom bundle` {version}.

    model = {auto}.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

It needs what requirements.txt lists; hfcustom need not be installed.
"""

import sys
from typing import TYPE_CHECKING

{imports}

{config} = {model}.config_class
for _class in ({classes}):
    for _name, _value in vars(sys.modules[_class.__module__]).items():
        globals().setdefault(_name, _value)  # what its annotations name
    _class.__module__ = __name__  # save_pretrained then copies this file, and with it all that are named here:

if TYPE_CHECKING:
{files}
'''


class Code:
    """What the code of a cargo becomes."""

    def __init__(self, cargo: Cargo) -> None:
        self.cargo = cargo
        roots = cargo.roots()
        tops = {name.partition(".")[0] for name in (*cargo.modules, *(module for module, _ in roots))}
        self.found = reach(Modules(cargo.folders, tops), roots)
        self.entry = f"modeling_{cargo.config['model_type']}"
        names = flat_names(self.found, {self.entry})
        self.files = write_modules(self.found, names, hfcustom.__version__)
        self.files[f"{self.entry}.py"] = self._entry(names)

    def auto_map(self) -> dict[str, str]:
        """Return which name in the entry file each Auto class is to load."""
        model_class = self.cargo.model_class
        names = {auto.__name__: model_class.__name__ for auto in model_class.auto_classes}
        names |= {"AutoConfig": model_class.config_class.__name__, "AutoModel": model_class.__name__}
        names |= {auto: type(part).__name__ for auto, part in self.cargo.processor_parts.items()}
        return {auto: f"{self.entry}.{name}" for auto, name in sorted(names.items())}

    def user_modules(self) -> list[str]:
        """Return the user's modules that are in the bundle."""
        return [name for name in self.found.files() if name.partition(".")[0] != OWN]

    def left_out(self) -> list[str]:
        """Return the modules that were named with --code, and of which nothing is needed."""
        return [name for name in self.cargo.modules if name not in self.found.files()]

    def _entry(self, names: dict[str, str]) -> str:
        model, parts = self.cargo.model_class, [type(part) for part in self.cargo.processor_parts.values()]
        lines = [f"from .{names[found.__module__]} import {found.__name__}" for found in (model, *parts)]
        acting = [names[name] for name in self.user_modules() if self.found.is_active(name)]
        if acting:
            lines.append(f"from . import {', '.join(acting)}  # what they register")
        classes = [model.__name__, f"{model.__name__}.config_class", *(part.__name__ for part in parts)]
        return ENTRY.format(
            model=model.__name__,
            version=hfcustom.__version__,
            auto=model.auto_classes[0].__name__,
            imports="\n".join(dict.fromkeys(lines)),
            config=model.config_class.__name__,
            classes=", ".join(classes),
            files="\n".join(
                f"    from .{name.removesuffix('.py')} import __name__ as _" for name in sorted(self.files)
            ),
        )

    # ---- once the files are written ---------------------------------------------------------------------------------

    def check_files(self, folder: Path) -> None:
        """Raise ValueError where transformers, which looks for lines and not for statements, would want a file that is not there."""
        for name in self.files:
            for wanted in get_relative_imports(folder / name):
                if f"{wanted}.py" not in self.files:
                    raise ValueError(
                        f"{name}: a line in a docstring or a string reads as `from .{wanted} import ...`, so that transformers would "
                        f"look for {wanted}.py, which is not in the bundle. Reword that line."
                    )

    def requirements(self, folder: Path) -> dict[str, str]:
        """Return what loading needs, as pip names it, each with a version: what transformers will ask for, and image libraries."""
        tops = {top for name in self.files for top in get_imports(folder / name)} - set(sys.stdlib_module_names)
        tops = tops - WITH_TRANSFORMERS | {"torch", "transformers", "PIL", *_family_needs(self.cargo.model_class)}
        if getattr(self.cargo.processor, "chat_template", None):
            tops.add("jinja2")
        homes = importlib.metadata.packages_distributions()
        found = {}
        for top in tops:
            package = homes.get(top, [top])[0]
            version = LEAST.get(package.lower()) or _version(package)
            found[package.lower()] = f">={version}" if version else ""
        return dict(sorted(found.items()))

    def optional(self) -> dict[str, str]:
        """Return the packages that only some uses of the code need, each with the first place."""
        needs = {need.package: need.where for need in reversed(self.found.needs) if need.optional}
        return {name: where for name, where in sorted(needs.items()) if name not in sys.stdlib_module_names}


def _family_needs(model_class: type) -> tuple[str, ...]:
    """Return what the processors of a class's family need: REQUIRES of its file."""
    modules = [sys.modules[base.__module__] for base in model_class.__mro__]
    return tuple(package for module in modules for package in vars(module).get("REQUIRES", ()))


def _version(package: str) -> str:
    """Return the installed version without what says for which device it was built; nothing for a package that is not there."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
