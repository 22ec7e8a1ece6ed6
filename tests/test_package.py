"""The package as a whole: its names, what importing it costs, and the house rules that a program can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BENCHMARKS, RECIPES, ROOT

import hfcustom

PACKAGE = ROOT / "hfcustom"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: Path) -> list[str]:
    """Return the Python files of some folders, relative to the repository."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py"))


def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", hfcustom.__all__)
def test_every_public_name_exists_and_is_listed(name: str) -> None:
    assert getattr(hfcustom, name) is not None
    assert name in dir(hfcustom)


@pytest.mark.parametrize(("name", "near"), [("registre", "register"), ("fitt", "fit"), ("Colator", "Collator")])
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(
        AttributeError, match=rf"Unknown name of hfcustom: '{name}'. Did you mean '{near}'\? Allowed: "
    ):
        getattr(hfcustom, name)


def test_optional_attributes_can_be_asked_for() -> None:
    assert not hasattr(hfcustom, "__wrapped__")
    assert getattr(hfcustom, "nothing_like_it", None) is None


def test_the_names_for_type_checkers_are_those_that_load() -> None:
    imports = [node for node in ast.walk(tree_of("hfcustom/__init__.py")) if isinstance(node, ast.ImportFrom)]
    declared = {alias.name for node in imports if node.module.startswith("hfcustom.") for alias in node.names}
    assert declared - {"unknown"} == set(hfcustom.__all__) - {"__version__"}


def test_the_version_is_that_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "hfcustom"
    assert project["version"] == hfcustom.__version__


@pytest.mark.parametrize(
    "module",
    [
        "hfcustom",
        "hfcustom.data.hosts",
        "hfcustom.encoders",
        "hfcustom.families",
        "hfcustom.naming",
        "hfcustom.options",
        "hfcustom.train_config",
    ],
)
def test_importing_loads_neither_torch_nor_transformers(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'peft', 'PIL', 'numpy', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# ---- house rules ----------------------------------------------------------------------------------------------------


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yield public functions, classes and methods; those inside a function or a private class are not public."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{prefix}{node.name}.")


def is_module_forward(name: str) -> bool:
    return name.endswith(".forward")


@pytest.mark.parametrize("file", sources(PACKAGE, BENCHMARKS))
def test_every_public_function_class_and_method_says_what_it_does(file: str) -> None:
    found = public_definitions(tree_of(file).body)
    silent = [name for name, node in found if not ast.get_docstring(node) and not is_module_forward(name)]
    assert not silent


@pytest.mark.parametrize("file", sources(PACKAGE, RECIPES, BENCHMARKS))
def test_every_file_says_what_it_is_and_stays_short(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("file", sources(PACKAGE, RECIPES, BENCHMARKS))
def test_no_function_is_long(file: str) -> None:
    functions = [node for node in ast.walk(tree_of(file)) if isinstance(node, Function)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}  # type: ignore[operator]
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("file", sources(PACKAGE, RECIPES, BENCHMARKS, ROOT / "tests"))
def test_source_is_ascii(file: str) -> None:
    for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), start=1):
        assert line.isascii(), f"line {number}: {line}"


def test_the_rules_see_the_files_they_are_for() -> None:
    assert {"hfcustom/train.py", "hfcustom/data/collate.py", "recipes/quickstart.py"} <= set(sources(PACKAGE, RECIPES))
