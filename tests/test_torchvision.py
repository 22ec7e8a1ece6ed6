"""With torchvision installed the families behave the same: their tests again, in a process that has it.

torchvision lies in a folder beside the environment (see the Makefile), because the rest of the suite shows that nothing
needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.utils import is_torchvision_available

FOLDER = Path(sys.prefix) / "torchvision"
TESTS = ["tests/test_processors.py", "tests/test_collate.py", "tests/test_connectors.py", "tests/test_families.py"]
CHOSEN = "processor or video or labels or placeholders or bit_equal"


def test_the_families_work_with_torchvision() -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is importable here, so the whole suite runs with it; the path without it is untested")
    if not FOLDER.is_dir():
        pytest.skip(f"no torchvision in {FOLDER}: `make test` puts it there")
    environment = {**os.environ, "HFCUSTOM_TORCHVISION": str(FOLDER), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
