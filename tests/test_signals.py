"""A signal saves and stops, resuming loses nothing, a second signal interrupts at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, Family
from signal_run import WAITING, run
from torch import nn
from training import curve, train, weights

from hfcustom.exits import EXIT_PREEMPTED
from hfcustom.train import TrainResult
from hfcustom.training.signals import STOP_SIGNALS, StopRequest

Process = subprocess.Popen[str]


# name: data-loading processes, how the run is signalled; a terminal signals all of its processes
INTERRUPTED: dict[str, tuple[int, Callable[[Process], None]]] = {
    "SIGTERM": (0, lambda process: process.send_signal(signal.SIGTERM)),
    "SIGINT": (2, lambda process: os.killpg(process.pid, signal.SIGINT)),
}
TWICE = "twice"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Process, Path]]]:
    """Start every run at once; each waits after its second step."""
    started = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, (workers, _) in {**INTERRUPTED, TWICE: (0, None)}.items():
        folder = tmp_path_factory.mktemp("signal")
        command = [sys.executable, str(ROOT / "tests" / "signal_run.py"), str(folder), str(workers)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        process = subprocess.Popen(
            command, env=environment, text=True, stderr=subprocess.STDOUT, start_new_session=True, **pipes
        )
        started[name] = (process, folder)
    yield started
    for process, _ in started.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, nn.Module]:
    return run(tmp_path_factory.mktemp("unbroken"))


def wait_for_steps(process: Process, folder: Path) -> str:
    """Return what a process prints until it waits; by then its log has two lines."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.strip() == WAITING:
            steps = [json.loads(entry)["step"] for entry in (folder / "metrics.jsonl").read_text().splitlines()]
            assert steps == [1, 1, 2]  # each step's evaluation has a line too, step 2's is running
            return "".join(printed)
    raise AssertionError("the run ended before it waited:\n" + "".join(printed))


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_signal_saves_stops_and_resumes_to_the_same_end(
    processes: dict[str, tuple[Process, Path]], unbroken: tuple[TrainResult, nn.Module], name: str
) -> None:
    process, folder = processes[name]
    wait_for_steps(process, folder)
    workers, send = INTERRUPTED[name]
    send(process)
    output, _ = process.communicate("\n", timeout=120)
    assert process.returncode == EXIT_PREEMPTED == 7, output
    assert "Stopped after step 2, which is saved; continue with --resume." in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    result, model = run(folder, resume=True, num_workers=workers)
    assert (result.step, result.interrupted) == (5, False)
    assert curve(result) == curve(unbroken[0]) and len(curve(result)) == 5
    assert all(torch.equal(weights(unbroken[1])[key], value) for key, value in weights(model).items())


def test_a_second_signal_interrupts_at_once(processes: dict[str, tuple[Process, Path]]) -> None:
    process, folder = processes[TWICE]
    wait_for_steps(process, folder)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate("\n", timeout=120)  # a signal just before read() is only handled once that returns
    assert "KeyboardInterrupt: second SIG" in output
    assert process.returncode == -signal.SIGINT
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_signal_stops_after_the_step_and_handlers_come_back(
    internvl: Family, tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    def evaluate(model: Any, step: int) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return {}

    result = train(internvl.model(), internvl, tmp_path, evaluate=evaluate, eval_steps=2)
    assert (result.step, result.interrupted) == (2, True)
    assert result.model_dir == tmp_path / "checkpoints" / "step-000002" / "model"
    assert not (tmp_path / "model").exists()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_a_data_loading_process_is_left_to_the_trainer(
    internvl: Family, tmp_path: Path, number: signal.Signals
) -> None:
    def evaluate(model: Any, step: int) -> dict[str, float]:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid or 0, number)
        return {}

    options: dict[str, Any] = {"max_steps": 20, "batch_size": 1, "num_workers": 2, "eval_steps": 10}
    result = train(internvl.model(), internvl, tmp_path, evaluate=evaluate, **options)
    assert (result.step, result.interrupted) == (20, False)


def test_a_request_after_the_last_step_is_no_interruption(internvl: Family, tmp_path: Path) -> None:
    def evaluate(model: Any, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    result = train(internvl.model(), internvl, tmp_path, evaluate=evaluate, eval_steps=3)
    assert (result.step, result.interrupted) == (3, False)
    result.exit_if_interrupted()
    assert result.model_dir == tmp_path / "model"


def test_without_a_signal_nothing_is_asked() -> None:
    with StopRequest() as stop:
        assert stop.name is None and not stop.agreed(Accelerator())
        signal.raise_signal(signal.SIGUSR1)
        assert stop.name == "SIGUSR1" and stop.agreed(Accelerator())
        with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
