"""A pytest plugin: which checks passed for which family, as a table at the end of a run, and as what `hfcustom families` shows.

`pytest --record-families` writes hfcustom/families/verified.json. A check counts for a family when every case of it passed.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hfcustom.catalog import VERIFIED
from hfcustom.encoders import encoder_names
from hfcustom.families import family_names, missing_packages

OUTCOMES = pytest.StashKey[dict[tuple[str, str, str], set[str]]]()  # (family, file, check) -> outcomes of its cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-families", action="store_true", help=f"write {VERIFIED.name} from what passes")
    parser.addoption("--write-docs", action="store_true", help="write docs/families.md from what is found")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = defaultdict(set)
    config.pluginmanager.register(Recorder(config), "family-checks")


class Recorder:
    """Collects reports, in the process that sees them all."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = case_of(report.nodeid)
        if case is not None and (report.when == "call" or report.outcome != "passed"):
            self.config.stash[OUTCOMES][case].add(report.outcome)


def case_of(nodeid: str) -> tuple[str, str, str] | None:
    """Return the family, file and check of a test, None for one that is not of a family."""
    found = re.fullmatch(r"(?:.*/)?test_(\w+)\.py::test_(\w+)\[(.+)\]", nodeid)
    family = next(
        (name for name in (*family_names(), *encoder_names()) if found and name in found[3].split("-")), None
    )
    return (family, found[1], found[2].replace("_", " ")) if found and family else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    families = sorted({family for family, _, _ in outcomes})
    files = sorted({file for _, file, _ in outcomes})
    if len(families) > 1:
        terminalreporter.section("checks of the families (passed / run)")
        width = max(map(len, families)) + 2
        terminalreporter.write_line(" " * width + " ".join(f"{file:>10.10}" for file in files))
        for family in families:
            cells = []
            for file in files:
                cases = [found for (name, where, _), found in outcomes.items() if (name, where) == (family, file)]
                cells.append(f"{sum(found == {'passed'} for found in cases)}/{len(cases)}" if cases else "-")
            terminalreporter.write_line(f"{family:<{width}}" + " ".join(f"{cell:>10}" for cell in cells))
    if config.getoption("--record-families"):
        record(outcomes)


def record(outcomes: dict[tuple[str, str, str], set[str]]) -> None:
    """Replace what verified.json says of the families that were tried."""
    with FileLock(
        Path(tempfile.gettempdir()) / "hfcustom-verified.lock"
    ):  # processes with torchvision may record at the same time
        _write(outcomes)


def _write(outcomes: dict[tuple[str, str, str], set[str]]) -> None:
    checks = recorded()
    for family in {family for family, _, _ in outcomes}:
        passed = {check for (name, _, check), found in outcomes.items() if name == family and found == {"passed"}}
        if family in family_names() and missing_packages(family):  # its checks run in a process that has them
            passed |= source_checks().intersection(checks.get(family, []))
        checks[family] = sorted(passed)
    text = json.dumps({"versions": versions(), "families": dict(sorted(checks.items()))}, indent=1)
    VERIFIED.write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that the checks passed with."""
    import torch
    import transformers

    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def recorded() -> dict[str, list[str]]:
    """Return what verified.json says, {family: [check, ...]}."""
    checks: dict[str, list[str]] = json.loads(VERIFIED.read_text(encoding="utf-8"))["families"]
    return checks


def source_checks() -> set[str]:
    """Return the names of all tests as checks, from the test files themselves."""
    names: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        names |= {name.replace("_", " ") for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)}
    return names
