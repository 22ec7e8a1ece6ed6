"""Watch over reading: which row each loading process is at and since when, so that a dead or stuck one is named with it.

A row that takes longer than `row_seconds` is a bad row, as far as Python can interrupt it; where it cannot (a stuck disk, a stopped
process) the trainer gives the loading process up. The notes lie in shared memory, a few words a loading process.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

from hfcustom.data.turns import RowError
from hfcustom.exits import WorkerError

PID, SINCE, TICKS, FIRST, WORDS = (
    0,
    1,
    2,
    3,
    64,
)  # of a loading process: its pid, since when, signs of life, its row's name


class Watch:
    """What the loading processes of a run are at."""

    def __init__(self, num_workers: int, seconds: float) -> None:
        self.num_workers = num_workers
        self.seconds = seconds
        self.notes = RawArray("d", WORDS * max(num_workers, 1))

    @contextmanager
    def reading(self, name: Callable[[], str]) -> Iterator[None]:
        """Note the row that is read, and interrupt what takes too long; RowError then."""
        info = get_worker_info()
        if info is not None:
            self._note(info.id, name())
        try:
            with _time_limit(self.seconds, name):
                yield
        finally:
            if info is not None:
                self.notes[info.id * WORDS + SINCE] = 0.0

    def _note(self, worker: int, name: str) -> None:
        first = worker * WORDS
        packed = name.encode(errors="replace")[-4 * (WORDS - FIRST) :].ljust(4 * (WORDS - FIRST), b"\0")
        words = [float(int.from_bytes(packed[at : at + 4], "big")) for at in range(0, len(packed), 4)]
        ticks = self.notes[first + TICKS] + 1
        self.notes[first : first + WORDS] = [float(os.getpid()), time.monotonic(), ticks, *words]

    def forget(self) -> None:
        """Forget what loading processes were at that have been ended."""
        self.notes[:] = [0.0] * len(self.notes)

    def tick(self) -> None:
        """Show that the loading process moves, between two rows too."""
        if (info := get_worker_info()) is not None:
            self.notes[info.id * WORDS + TICKS] += 1

    def rows(self, only: Callable[[int, float], bool] = lambda pid, since: True) -> list[str]:
        """Return the rows that loading processes are at, of those of which `only(pid, since)` is true."""
        found = []
        for first in range(0, len(self.notes), WORDS):
            words = self.notes[first : first + WORDS]
            if words[SINCE] and only(int(words[PID]), words[SINCE]):
                packed = b"".join(int(word).to_bytes(4, "big") for word in words[FIRST:])
                found.append(packed.strip(b"\0").decode(errors="replace"))
        return found

    def stuck(self) -> list[str]:
        """Return the rows that have been read for so long that they cannot be interrupted."""
        return self.rows(lambda pid, since: time.monotonic() - since > 1.5 * self.seconds)

    def dead(self) -> list[str]:
        """Return the rows at which loading processes died."""
        alive = {process.pid for process in multiprocessing.active_children()}
        return self.rows(lambda pid, since: pid not in alive)

    @contextmanager
    def naming_deaths(self) -> Iterator[None]:
        """Turn torch's word for a loading process that died, which comes wherever the trainer is, into WorkerError."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise WorkerError(f"A data-loading process died{_at(self.dead())} ({_first(error)}).") from error


def _at(rows: list[str]) -> str:
    return f" while it read {', '.join(dict.fromkeys(rows))}" if rows else " between two rows"


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(". ")


class Watched:
    """The items of a DataLoader but None; WorkerError names the row where a loading process is stuck.

    To be closed: loading processes outlive the signals that a scheduler sends to all, and so an exiting interpreter's too, which
    would wait for them for ever where a traceback keeps the loader.
    """

    def __init__(self, loader: Iterable[Any], watch: Watch) -> None:
        before = set(multiprocessing.active_children())
        self.items, self.watch = iter(loader), watch
        self.processes = set(multiprocessing.active_children()) - before
        self.gave_up = False

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> Any:
        try:
            with self._looking():
                return next(item for item in self.items if item is not None)
        except RowError as error:  # of a loading process, with its traceback before the message
            raise RowError(str(error).rpartition("RowError: ")[2].strip(), error.code) from error

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Look at the loading processes now and then, wherever this one waits: for a batch, or for the memory of one."""
        if not self.processes or not _can_interrupt(self.watch.seconds):
            yield
            return
        began, seen = time.monotonic(), self.watch.notes[:]

        def look(number: int, frame: FrameType | None) -> None:
            nonlocal began, seen
            if self.watch.notes[:] != seen:
                began, seen = time.monotonic(), self.watch.notes[:]
            rows, waited = self.watch.stuck(), time.monotonic() - began
            if rows or waited > 2 * self.watch.seconds:
                self.gave_up = True
                raise WorkerError(
                    f"A data-loading process has not moved for {waited:.0f} s{_at(rows)}. Look at that row and its disk, or "
                    "allow more with --row-seconds."
                )

        with _alarm(look, min(5.0, self.watch.seconds / 2), repeat=True):
            yield

    def close(self) -> None:
        """End the loading processes, those that do not listen too."""
        if self.gave_up:
            self._kill()  # torch would first wait for each
        if self.processes:
            self.items._shutdown_workers()  # type: ignore[attr-defined]  # as its __del__ does, which may be too late
        self._kill()

    def _kill(self) -> None:
        while any(process.is_alive() for process in self.processes):
            with contextlib.suppress(
                RuntimeError
            ):  # with which torch interrupts whatever runs when a loading process dies
                for process in self.processes:
                    process.kill()
                    process.join()


@contextmanager
def _time_limit(seconds: float, name: Callable[[], str]) -> Iterator[None]:
    """Raise RowError in what runs longer; only a main thread can be interrupted."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise RowError(
            f"{name()}: reading it took longer than row_seconds={seconds:g}; leave it out or allow more.", "time"
        )

    if not _can_interrupt(seconds):
        yield
        return
    with _alarm(interrupt, seconds):
        yield


def _can_interrupt(seconds: float) -> bool:
    return threading.current_thread() is threading.main_thread() and not math.isinf(seconds)


@contextmanager
def _alarm(handler: Callable[[int, FrameType | None], None], seconds: float, repeat: bool = False) -> Iterator[None]:
    old = signal.signal(signal.SIGALRM, handler)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, seconds if repeat else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, old)
