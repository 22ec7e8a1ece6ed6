"""The folder of a run: one run in it, writable, and what happens to it while a run is under way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from accelerate import Accelerator
from conftest import Family
from disk import no_space
from kills import LOG, start, wait
from tiny_run import Run, end_of
from training import curve, short_config, train

from hfcustom.exits import EXIT_CONFIG, ConfigError, exit_codes
from hfcustom.runs.folder import LOCK, run_folder

RUN = Run(workers=0, lora=True)


def waiting_run(folder: Path) -> int:
    """Start a run that has begun in a folder and goes on until it is killed; return its process id."""

    def stay(model: Any, step: int) -> dict[str, float]:
        time.sleep(600)
        return {}

    def work() -> None:
        from hfcustom.train import fit

        config = short_config(folder, eval_steps=1, batch_size=4)
        fit(tiny_run.build(RUN), tiny_run.FAMILY.processor, tiny_run.uneven_rows(), config, evaluate=stay)

    pid = start(work, folder.with_suffix(".log"))
    while not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.01)
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return pid


def test_a_second_run_is_refused_and_a_dead_ones_folder_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = waiting_run(folder)
    owner = json.loads((folder / LOCK).read_text())
    assert owner["pid"] == pid and owner["host"] and owner["since"]
    try:
        with pytest.raises(ConfigError, match=rf"another run writes there \(process {pid} on .*another --output-dir"):
            tiny_run.train(RUN, folder, max_steps=1)
        before = (folder / "metrics.jsonl").read_text()
        assert wait(start(lambda: refused(folder), tmp_path / LOG)) == 0, (tmp_path / LOG).read_text()
        assert (folder / "metrics.jsonl").read_text() == before
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    assert (folder / LOCK).is_file()
    assert tiny_run.train(RUN, folder, max_steps=1, resume=True).step == 1
    assert not (folder / LOCK).exists()


def refused(folder: Path) -> None:
    try:
        with exit_codes():
            tiny_run.train(RUN, folder, max_steps=1, resume=True)
    except SystemExit as exit_:
        assert exit_.code == EXIT_CONFIG
        return
    raise AssertionError("two runs in one folder")


def test_what_a_lock_file_holds_is_no_reason_to_refuse(tmp_path: Path) -> None:
    for content in ("", "{", '{"pid": 1, "host": "elsewhere", "since": "yesterday"}'):
        (tmp_path / LOCK).write_text(content)
        with run_folder(short_config(tmp_path), Accelerator()):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_loading_process_that_outlives_its_run_holds_no_lock(tmp_path: Path) -> None:
    with run_folder(short_config(tmp_path), Accelerator()):
        orphan = start(lambda: time.sleep(600), tmp_path / "orphan.log")
    try:
        with run_folder(short_config(tmp_path), Accelerator()):
            code = wait(start(lambda: refused(tmp_path), tmp_path / LOG))
            assert code == 0, (tmp_path / LOG).read_text()
    finally:
        os.kill(orphan, signal.SIGKILL)
        wait(orphan)


def a_file(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken"


UNWRITABLE: dict[str, Callable[[Path], Path]] = {
    "a file": a_file,
    "below a file": lambda folder: a_file(folder) / "run",
    "where nothing can be made": lambda folder: Path("/proc/run"),
}


@pytest.mark.parametrize("make", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_folder_that_cannot_be_written_stops_the_run_before_it_trains(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcustom.train.train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(
        ConfigError, match=r"output_dir='.*': nothing can be written there \(.*\).*another --output-dir"
    ):
        tiny_run.train(RUN, make(tmp_path))


def test_a_folder_on_a_read_only_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & os.O_CREAT:
            raise OSError(30, os.strerror(30), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ConfigError, match=r"nothing can be written there \(Read-only file system\)"):
        tiny_run.train(RUN, tmp_path)


def test_a_folder_that_vanishes_is_made_again_with_the_next_checkpoint(internvl: Family, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def evaluate(model: Any, step: int) -> dict[str, float]:
        shutil.rmtree(folder)
        return {}

    result = train(internvl.model(), internvl, folder, evaluate=evaluate, eval_steps=2)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    again = train(internvl.model(), internvl, folder, resume=True)
    assert curve(again) == curve(result)


def test_log_lines_that_a_full_disk_refuses_are_written_later_and_end_no_run(
    internvl: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, refused = tmp_path / "run", []
    metrics, opened = folder / "metrics.jsonl", Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path == metrics and mode == "a" and not refused:
            refused.append(path)
            raise no_space()
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    result = train(internvl.model(), internvl, folder, log_steps=1, evaluate=lambda *_: {"score": 1.0}, eval_steps=1)
    assert refused
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == result.history
    assert len(result.history) == 6
    assert f"{folder / 'metrics.jsonl'}: No space left on device" in caplog.text


def test_a_run_that_has_moved_resumes_where_it_is(tmp_path: Path) -> None:
    tiny_run.train(RUN, tmp_path / "here", max_steps=4)
    shutil.copytree(tmp_path / "here", tmp_path / "unmoved")
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there" / "run")
    for folder in (tmp_path / "unmoved", tmp_path / "there" / "run"):
        tiny_run.train(RUN, folder, max_steps=6, resume=True)
    assert end_of(tmp_path / "unmoved") == end_of(tmp_path / "there" / "run")
    assert not (tmp_path / "here").exists()
