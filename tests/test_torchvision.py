"""With torchvision installed the families behave the same: their tests again, in a process that has it.

torchvision lies in a folder beside the environment (see the Makefile), because the rest of the suite shows that nothing
needs it.
"""

from __future__ import annotations

import os
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
    "processors",
    "collate",
    "control",
    "connectors",
    "connector_values",
    "families",
    "adapt",
    "loading",
    "parts",
    "pipeline",
    "questions",
    "evaluate",
    "packing",
    "experts",
    "ragged",
    "resize",
    "video_rows",
    "videos",
]
NEED_IT = [name for name in family_names() if missing_packages(name)]
SAME = "(processor or video or labels) and not connector"  # what another image path could change


def run_tests(chosen: str, own: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    """Run the tests of the families, and files of their own, in a process that has torchvision."""
    if is_torchvision_available():
        pytest.skip("torchvision is importable here, so the whole suite runs with it; the path without it is untested")
    if not FOLDER.is_dir():
        pytest.skip(f"no torchvision in {FOLDER}: `make test` puts it there")
    environment = {**os.environ, "HFCUSTOM_TORCHVISION": str(FOLDER), "PYTHONPATH": str(ROOT)}
    files = [f"tests/test_{name}.py" for name in (*FILES, *own)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *options, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_families_that_work_without_torchvision_work_with_it() -> None:
    run_tests(f"({SAME}) and not ({' or '.join(NEED_IT) or 'none'})")


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_passes_every_test_with_it(name: str, request: pytest.FixtureRequest) -> None:
    own = ["labels", *([name] if (ROOT / f"tests/test_{name}.py").is_file() else [])]
    run_tests(name, own, ["--record-families"] if request.config.getoption("--record-families") else [])


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_says_so(name: str) -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is importable here")
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_family(name).tiny_processor()
