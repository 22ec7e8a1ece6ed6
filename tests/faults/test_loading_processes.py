"""A loading process that dies, hangs or stops ends the run with the row it was at; a slow row is a bad row; nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from conftest import ROOT
from tiny_run import Run
from torch.utils.data import get_worker_info
from training import short_config, uneven_rows

from hfcustom.data.messages import RowError
from hfcustom.exits import EXIT_RANK, WorkerError
from hfcustom.train import fit

SECONDS = 1.0


def sleep() -> None:
    time.sleep(60)


def sleep_where_no_signal_reaches() -> None:
    """As a read of a disk that is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


class Failing(list[Any]):
    """Rows of which row 5 does something to the process that reads it, once it has been read before."""

    what: Callable[[], Any]

    def __getitem__(self, index: Any) -> Any:
        if index == 5 and get_worker_info() is not None:
            self.what()
        return super().__getitem__(index)


def failing(what: Callable[[], Any]) -> Failing:
    rows = Failing(uneven_rows())
    rows.what = what
    return rows


def run(rows: Any, folder: Path, **options: Any) -> Any:
    defaults = {"batch_size": 2, "num_workers": 2, "save_steps": 1, "max_steps": 12, "row_seconds": SECONDS}
    return fit(tiny_run.build(Run()), tiny_run.FAMILY.processor, rows, short_config(folder, **{**defaults, **options}))


DEATHS: dict[str, tuple[Callable[[], Any], str]] = {
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"died while it read row 5 \(.*[Kk]illed"),
    "leaves": (lambda: os._exit(3), r"died while it read row 5 \(.*exited unexpectedly"),
    "is stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), r"has not moved for \d+ s while it read row 5"),
    "hangs": (sleep_where_no_signal_reaches, r"has not moved for \d+ s while it read row 5"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_the_run_ends_with_the_row_and_where_to_go_on(death: str, tmp_path: Path) -> None:
    what, message = DEATHS[death]
    began = time.monotonic()
    with pytest.raises(WorkerError, match=message) as error:
        run(failing(what), tmp_path)
    assert time.monotonic() - began < 60
    assert error.value.exit_code == EXIT_RANK == 8
    assert "checkpoint" in str(error.value) and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_takes_too_long_is_a_bad_row(workers: int, tmp_path: Path) -> None:
    rows = failing(sleep) if workers else Slow(uneven_rows())
    message = "^row 5: reading it took longer than row_seconds=1; leave it out or allow more"
    with pytest.raises(RowError, match=message) as error:
        run(rows, tmp_path / "error", num_workers=workers)
    assert error.value.exit_code == 4
    options = {"on_bad_row": "skip", "max_bad_share": 0.5, "max_steps": 4}
    assert run(rows, tmp_path / "skip", num_workers=workers, **options).step == 4
    assert "took longer than row_seconds" in (tmp_path / "skip" / "bad_rows.jsonl").read_text()


class Slow(list[Any]):
    """Rows of which row 5 is slow to read in any process."""

    def __getitem__(self, index: Any) -> Any:
        if index == 5 and signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            sleep()
        return super().__getitem__(index)


def test_a_loading_process_that_is_killed_between_rows_ends_the_run(tmp_path: Path) -> None:
    def evaluate(model: Any, step: int) -> dict[str, float]:
        time.sleep(0.3)  # until what is loaded ahead is there
        if step == 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
            time.sleep(0.3)
        return {}

    config = short_config(tmp_path, batch_size=2, num_workers=2, max_steps=12, eval_steps=1, save_steps=1)
    with pytest.raises(WorkerError, match=r"died between two rows .*step-000002; continue with --resume"):
        fit(tiny_run.build(Run()), tiny_run.FAMILY.processor, uneven_rows(), config, evaluate=evaluate)


@pytest.mark.parametrize("signals", [False, True], ids=["an error", "Ctrl-C twice"])
def test_an_error_with_loading_processes_ends_the_program(signals: bool, tmp_path: Path) -> None:
    """Loading processes ignore the signals that a scheduler sends to all; an exiting interpreter must not wait for them."""
    script = tmp_path / "own.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT / 'tests' / 'faults')!r}]\n"
        "import tiny_run\n"
        "from training import short_config, uneven_rows\n"
        "from hfcustom.train import fit\n"
        "def evaluate(model, step):\n"
        f"    if {signals}: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]\n"
        "    raise ZeroDivisionError('a bug')\n"
        f"config = short_config({str(tmp_path / 'run')!r}, num_workers=2, eval_steps=1)\n"
        "fit(tiny_run.build(tiny_run.Run()), tiny_run.FAMILY.processor, uneven_rows(), config, evaluate=evaluate)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == (-signal.SIGINT if signals else 1)
    assert ("second SIGINT" if signals else "ZeroDivisionError: a bug") in done.stderr
