"""SIGKILL a run at random moments, inside saves or anywhere, several times in a row; resume; compare with the unbroken run.

    python tests/faults/kills.py [KILLS]        # as `make faults` does: so many inside saves, and so many anywhere

A run is a forked child of this process, so that the libraries are imported once; it has loading processes of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_run
from tiny_run import Run, end_of

RUN = Run(workers=2, source="torch", lora=True)
LOG = "child.log"


def start(work: Callable[[], Any], log: Path) -> int:
    """Run a function in a child with its output in a file; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has its own
        work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Return the exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@dataclass
class Tally:
    """What came of the kills."""

    kills: int = 0
    inside: int = 0  # of them in the middle of a save, by what it left behind
    exact: int = 0
    differing: list[str] = field(default_factory=list)
    leftovers: int = 0  # temporary folders after the last resume

    def add(self, other: Tally) -> None:
        """Take in what came of other kills."""
        for name in ("kills", "inside", "exact", "differing", "leftovers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def line(self, name: str) -> str:
        return (
            f"{name}: {self.exact} of {self.kills} SIGKILLs resumed by themselves and ended bit-equal "
            f"({self.inside} left a half-written or half-deleted checkpoint; {self.leftovers} leftovers)"
        )


class Killer:
    """Kills runs below a folder and compares what their resumed ends are."""

    def __init__(self, folder: Path, seed: int = 0, run: Run = RUN) -> None:
        self.folder, self.run, self.random = folder, run, random.Random(seed)
        self.measure()
        self.expected = end_of(folder / "unbroken")
        self.save_seconds = 0.06

    def measure(self) -> None:
        """Time an unbroken run anew: on a machine that others use, its life is longer now than it was."""
        shutil.rmtree(self.folder / "unbroken", ignore_errors=True)
        began = time.monotonic()
        assert wait(start(lambda: tiny_run.train(self.run, self.folder / "unbroken"), self.folder / LOG)) == 0, (
            self.log()
        )
        self.seconds = time.monotonic() - began

    def log(self) -> str:
        return (self.folder / LOG).read_text()[-3000:]

    def trial(self, kills: int, tally: Tally, inside_saves: bool) -> None:
        """Kill one run `kills` times in a row, resume it, and note how it ended."""
        place = self.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        done = 0
        while done < kills:
            pid = start(lambda: tiny_run.train(self.run, place, resume=True), self.folder / LOG)
            self._wait_inside_a_save(pid, place) if inside_saves else time.sleep(self.random.uniform(0, self.seconds))
            if ended(pid):
                assert wait(pid) == 0, self.log()
                if inside_saves:  # it was quicker than the dice
                    shutil.rmtree(place)
                else:
                    done, tally.kills = done + 1, tally.kills + 1  # killing what has ended changes nothing
                continue
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            torn = bool(list((place / "checkpoints").glob(".step-*")))
            tally.inside += torn
            if torn or not inside_saves:
                done, tally.kills = done + 1, tally.kills + 1
        code = wait(start(lambda: tiny_run.train(self.run, place, resume=True), self.folder / LOG))
        found = end_of(place) if code == 0 else {"exit code": code, "log": self.log()}
        tally.leftovers += len([path for path in place.rglob(".*") if path.name != ".run.json"])
        if found == self.expected:
            tally.exact += kills
        else:
            differ = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
            tally.differing.append(f"{differ}: {found if code else ''}")

    def _wait_inside_a_save(self, pid: int, place: Path) -> None:
        """Wait for one of the next saves to begin, and a part of the time that it takes."""
        for _ in range(self.random.randint(1, 4)):
            before = self._saves(place)
            while not (self._saves(place) - before) and not ended(pid):
                time.sleep(0.0005)
        time.sleep(self.random.uniform(0, self.save_seconds))

    def _saves(self, place: Path) -> set[str]:
        try:
            return {name for name in os.listdir(place / "checkpoints") if name.endswith(".partial")}
        except FileNotFoundError:
            return set()


def kill(killer: Killer, kills: int, inside_saves: bool) -> Tally:
    """Kill runs `kills` times: each in the middle of a save, or at any moment and up to five times in a row."""
    tally, rows = Tally(), [1] if inside_saves else [1, 1, 2, 5]
    while tally.kills < kills:
        killer.trial(min(kills - tally.kills, killer.random.choice(rows)), tally, inside_saves)
    return tally


def main(kills: int) -> int:
    began = time.monotonic()
    totals = {True: Tally(), False: Tally()}
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAULTS_DIR")) as folder:
        killer = Killer(Path(folder), seed=int(os.environ.get("SEED", "0")))
        print(
            f"{killer.run.name}, {tiny_run.STEPS} steps, a checkpoint each: {killer.seconds:.1f} s unbroken",
            flush=True,
        )
        while totals[True].kills < kills:
            killer.measure()
            for inside_saves, total in totals.items():
                total.add(kill(killer, min(10, kills - total.kills), inside_saves))
                print(total.line(WHERE[inside_saves]), flush=True)
    for total in totals.values():
        print("".join(f"  differs: {text}\n" for text in total.differing), end="")
    exact, count = (sum(getattr(total, name) for total in totals.values()) for name in ("exact", "kills"))
    print(f"{exact} of {count} SIGKILLs: resumed and bit-equal ({time.monotonic() - began:.0f} s)")
    return 0 if exact == count else 1


WHERE = {True: "inside saves", False: "anywhere"}

if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
