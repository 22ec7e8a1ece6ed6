"""With torchvision installed the families behave the same: their tests again, in a process that has it.

torchvision lies in a folder beside the environment (see the Makefile), because the rest of the suite shows that nothing
needs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT
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
    "work",
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
    "work",
)
NEED_IT = [name for name in family_names() if missing_packages(name)]
OWN = ["labels", "doctor", *(name for name in NEED_IT if (ROOT / f"tests/test_{name}.py").is_file())]
NEITHER = " or ".join(f"test_{name}.py" for name in (*WITHOUT_IMAGES, *OWN))
VIDEOS = "videos.py or video_rows.py or ragged.py"  # elsewhere "video" is in the name of a family
SAME = f"(processor or labels or video and (not video_llava or {VIDEOS})) and not (connector or {NEITHER})"
CHOSEN = " or ".join([*NEED_IT, f"({SAME})"])  # of families that do without: what another image path could change


@pytest.fixture(scope="module")
def with_torchvision(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """Run the tests in one process that has torchvision; return its output and the lines of what failed."""
    if is_torchvision_available():
        pytest.skip("torchvision is importable here, so the whole suite runs with it; the path without it is untested")
    if not FOLDER.is_dir():
        pytest.skip(f"no torchvision in {FOLDER}: `make test` puts it there")
    environment = {**os.environ, "HFCUSTOM_TORCHVISION": str(FOLDER), "PYTHONPATH": str(ROOT)}
    recording = request.config.getoption(
        "--record-families"
    )  # of every test of a family, so of none that does without
    chosen = ["-k", " or ".join(NEED_IT), "--record-families"] if recording else ["-k", CHOSEN]
    files = [f"tests/test_{name}.py" for name in (*FILES, *OWN)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    assert (done.returncode == 0) == (not failed), done.stdout
    return done.stdout, failed


def ran(name: str, output: str) -> bool:
    return re.search(rf"^{name} .* [1-9]\d*/", output, re.MULTILINE) is not None


def test_families_that_work_without_torchvision_work_with_it(
    with_torchvision: tuple[str, list[str]], request: pytest.FixtureRequest
) -> None:
    output, failed = with_torchvision
    assert not [line for line in failed if not any(name in line for name in NEED_IT)], output
    if not request.config.getoption("--record-families"):
        assert not [name for name in FAMILIES if not ran(name, output)], output


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_passes_every_test_with_it(
    name: str, with_torchvision: tuple[str, list[str]]
) -> None:
    output, failed = with_torchvision
    assert not [line for line in failed if name in line], output
    assert ran(name, output), f"no check of {name} ran:\n{output}"


@pytest.mark.parametrize("name", NEED_IT)
def test_a_family_that_needs_torchvision_says_so(name: str) -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is importable here")
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_family(name).tiny_processor()
