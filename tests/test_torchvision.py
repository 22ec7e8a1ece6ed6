"""With torchvision installed the families behave the same: their tests again, in a process that has it.

torchvision lies in a folder beside the environment (see the Makefile), because the rest of the suite shows that nothing
needs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.utils import is_torchvision_available

from hfcustom.families import family_names, load_family, missing_packages

FOLDER = Path(sys.prefix) / "torchvision"
FILES = [
    "cache",
    "cached_videos",
    "processors",
    "collate",
    "control",
    "connectors",
    "connector_values",
    "families",
    "inspector",
    "adapt",
    "added_tower",
    "loading",
    "noise",
    "parts",
    "patches",
    "pipeline",
    "questions",
    "evaluate",
    "export",
    "packing",
    "experts",
    "ragged",
    "resize",
    "two_encoders",
    "serving",
    "video_rows",
    "videos",
]
WITHOUT_IMAGES = (
    "adapt",
    "added_tower",
    "experts",
    "export",
    "inspector",
    "loading",
    "noise",
    "parts",
    "serving",
    "two_encoders",
)
NEED_IT = [name for name in family_names() if missing_packages(name)]
SAME = "(processor or video or labels) and not connector"  # what another image path could change


def run_tests(chosen: str, names: Sequence[str], options: Sequence[str] = ()) -> tuple[int, str]:
    """Run the tests of the families, and files of their own, where torchvision is; return the exit code and the output."""
    if is_torchvision_available():
        pytest.skip("torchvision is importable here, so the whole suite runs with it; the path without it is untested")
    if not FOLDER.is_dir():
        pytest.skip(f"no torchvision in {FOLDER}: `make test` puts it there")
    environment = {**os.environ, "HFCUSTOM_TORCHVISION": str(FOLDER), "PYTHONPATH": str(ROOT)}
    files = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *options, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout


def test_families_that_work_without_torchvision_work_with_it() -> None:
    names = [name for name in FILES if name not in WITHOUT_IMAGES]
    code, output = run_tests(f"({SAME}) and not ({' or '.join(NEED_IT) or 'none'})", names)
    assert code == 0 and " passed" in output, output


@pytest.fixture(scope="module")
def with_torchvision(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """Run every test of the families that need it, in one process; return its output and the lines of what failed."""
    own = ["labels", "doctor", *(name for name in NEED_IT if (ROOT / f"tests/test_{name}.py").is_file())]
    options = ["--record-families"] if request.config.getoption("--record-families") else []
    code, output = run_tests(" or ".join(NEED_IT), [*FILES, *own], options)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    assert (code == 0) == (not failed), output
    assert all(any(name in line for name in NEED_IT) for line in failed), output
    return output, failed


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_passes_every_test_with_it(
    name: str, with_torchvision: tuple[str, list[str]]
) -> None:
    output, failed = with_torchvision
    assert not [line for line in failed if name in line], output
    assert re.search(rf"^{name} .* [1-9]\d*/", output, re.MULTILINE), f"no check of {name} ran:\n{output}"


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_says_so(name: str) -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is importable here")
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_family(name).tiny_processor()
