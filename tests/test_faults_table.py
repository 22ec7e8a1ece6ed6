"""docs/faults.md: each fault of its table has tests, and they exist; its exit codes are those of the package."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

from hfcustom import exits

TEXT = (ROOT / "docs" / "faults.md").read_text()
ROWS = {
    int(cells[0]): cells
    for cells in (line.strip("| ").split(" | ") for line in TEXT.splitlines())
    if cells[0].isdigit() and len(cells) == 4
}


@pytest.mark.parametrize("number", [*range(1, 23), *range(39, 51)])
def test_every_fault_has_tests_that_exist(number: int) -> None:
    names = re.findall(r"`(\S+?\.py)::(\w+)`", ROWS[number][3])
    assert names
    for file, name in names:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"


def test_the_exit_codes_are_those_of_the_package() -> None:
    codes = {
        int(line.split("|")[1])
        for line in TEXT.partition("## How")[0].splitlines()
        if re.match(r"\| \d \| [a-z]", line)
    }
    defined = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert codes - {1} == defined
    assert all(re.search(rf"^    {code} ", exits.__doc__ or "", re.MULTILINE) for code in defined)


def test_each_exit_code_means_one_thing() -> None:
    codes = [value for name, value in vars(exits).items() if name.startswith("EXIT_")]
    assert len(codes) == len(set(codes))
    of_a_run = re.compile(r"^EXIT_[A-Z_, ]* = [^\n]*\b[35689]\b", re.MULTILINE)
    files = [path for path in (ROOT / "hfcustom").rglob("*.py") if path.name != "exits.py"]
    elsewhere = [path.name for path in files if of_a_run.search(path.read_text())]
    assert not elsewhere, f"codes of a run belong into exits.py: {elsewhere}"
