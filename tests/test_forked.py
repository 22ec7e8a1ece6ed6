"""Forked children behave as fresh interpreters do, except that nothing has to be imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest

SCRIPT = """
import os, sys
import beside
print(sys.argv[1:], os.getcwd(), os.environ["MINE"], __name__, "torch" in sys.modules or __import__("torch").__name__)
print("hfcustom" in sys.modules, beside.__name__, file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_a_script_finds_what_an_interpreter_gives_it(script: Path, tmp_path: Path) -> None:
    done = forked.run([sys.executable, script, "a", "b"], cwd=tmp_path, env={**os.environ, "MINE": "x"})
    assert done.stdout == f"['a', 'b'] {tmp_path} x __main__ True\n"
    assert (done.returncode, done.stderr) == (7, "False beside\n")


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import sys; print(sys.argv, sys.path[0])", "a"],
        ["-P", "-c", "import beside"],
        ["-m", "beside_main", "a"],
        ["-c", "raise SystemExit('a reason')"],
        ["-c", "import atexit; atexit.register(print, 'at the end'); 1 / 0"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
    ],
)
def test_it_is_what_subprocess_run_returns(words: list[str], script: Path, tmp_path: Path) -> None:
    (tmp_path / "beside_main.py").write_text("import beside, sys\nprint(__name__, sys.argv)\n")
    command = [sys.executable, *words]
    expected = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = forked.run(command, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_each_child_starts_anew_and_a_late_one_is_ended(tmp_path: Path) -> None:
    forked.run([sys.executable, "-c", "import torch; torch.marked = 1"])
    assert forked.run([sys.executable, "-c", "import torch; print(hasattr(torch, 'marked'))"]).stdout == "False\n"
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    assert forked.run([sys.executable, "-c", "print(1)"]).stdout == "1\n"


def test_what_it_cannot_take_anew_is_an_error() -> None:
    with pytest.raises(AssertionError, match="HF_HOME is read at import"):
        forked.run([sys.executable, "-c", ""], env={**os.environ, "HF_HOME": "elsewhere"})


def test_ranks_know_each_other_and_one_that_fails_ends_the_rest(tmp_path: Path) -> None:
    """Of two processes the second fails while the first waits for it."""
    code = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(rank)
print(int(rank), os.environ["LOCAL_RANK"], flush=True)
if dist.get_rank():
    sys.exit(7)
import time; time.sleep(60)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = forked.run_ranks([sys.executable, "-c", code], 2, port, dict(os.environ))
    assert (done.returncode, done.stdout) == (7, "3 0\n3 1\n"), done.stderr
