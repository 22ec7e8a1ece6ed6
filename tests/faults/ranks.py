"""Two processes of one run, of which one fails: how long the other takes to say so, and what it says.

python tests/faults/ranks.py [TIMES]        # each fault so often, as `make faults` does
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_run
from kills import ended, start, wait
from tiny_run import Run
from training import short_config, uneven_rows

from hfcustom import train
from hfcustom.distributed import ranks
from hfcustom.exits import exit_codes

RANK_SECONDS = 3.0
BOUND = 60.0


def fail(*_: Any) -> None:
    raise ZeroDivisionError("a bug of one rank")


def leave_out_a_step(*_: Any) -> None:
    """Let this rank's training believe that a step is done."""
    real, left = train.train_step, [1]

    def train_step(*args: Any) -> Any:
        if left.pop() if left else 0:
            return None
        return real(*args)

    train.train_step = train_step


FAULTS: dict[str, Callable[[], Any]] = {
    "raises": fail,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "leaves": lambda: os._exit(0),
    "leaves out a step": leave_out_a_step,
}


@dataclass
class Outcome:
    """What became of the rank that did not fail."""

    code: int
    seconds: float
    printed: str
    saved: bool  # whether there was a checkpoint; the first step is evaluated before it is saved


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_part(rank: int, port: int) -> None:
    """Let this process be one of two."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}


def run_rank(rank: int, port: int, folder: Path, at: Callable[[int], None]) -> None:
    """Train as one of two processes; `at(step)` is called after each step."""
    take_part(rank, port)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        at(step)
        return {}

    ranks.ANSWER_SECONDS = 2.0
    options = {"eval_steps": 1, "save_steps": 1, "max_steps": 5, "micro_batch_size": 2, "rank_seconds": RANK_SECONDS}
    with exit_codes():
        config = short_config(folder, **options)
        train.fit(tiny_run.build(Run()), tiny_run.FAMILY.processor, uneven_rows(), config, evaluate=evaluate)


def outcome(fault: str, folder: Path, failing: int = 1, step: int = 2) -> Outcome:
    """Let one of two ranks fail after a step."""
    port, pids, began = free_port(), [], [0.0]
    mark = folder / "failing"

    def at(rank: int) -> Callable[[int], None]:
        def reached(now: int) -> None:
            if rank == failing and now == step:
                mark.touch()
                FAULTS[fault]()

        return reached

    for rank in range(2):
        work = lambda rank=rank: run_rank(rank, port, folder / "run", at(rank))  # noqa: E731
        pids.append(start(work, folder / f"rank-{rank}.log"))
    survivor = pids[1 - failing]
    while not mark.exists() and not all(map(ended, pids)):
        time.sleep(0.02)
    began = time.monotonic()
    while not ended(survivor) and time.monotonic() - began < BOUND:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    for pid in pids:
        if not ended(pid):
            os.kill(pid, signal.SIGKILL)
    codes = [wait(pid) for pid in pids]
    saved = any((folder / "run" / "checkpoints").glob("step-*/manifest.json"))
    return Outcome(codes[1 - failing], seconds, (folder / f"rank-{1 - failing}.log").read_text(), saved)


def is_right(found: Outcome) -> bool:
    """Whether the other rank ended in time with its code, said that it was for a rank, and from where to go on."""
    said = found.printed.rpartition("rank ")[0]
    where = "; continue with --resume" if found.saved else "There is no checkpoint yet in "
    return found.code == 8 and found.seconds < BOUND and bool(said) and where in found.printed


def main(times: int) -> int:
    dice, began, wrong, count, longest = random.Random(0), time.monotonic(), [], 0, 0.0
    for fault in FAULTS:
        for _ in range(times):
            failing, step = dice.choice([0, 1]), dice.choice([1, 2, 3])
            with tempfile.TemporaryDirectory() as folder:
                found = outcome(fault, Path(folder), failing, step)
            count, longest = count + 1, max(longest, found.seconds)
            if not is_right(found):
                wrong.append(f"rank {failing} {fault} after step {step}: {found.code} {found.printed[-500:]}")
    print("".join(f"  {text}\n" for text in wrong), end="")
    print(
        f"{count - len(wrong)} of {count} faults of a rank ended the other with exit code 8 and the cause "
        f"(the longest after {longest:.0f} s; {time.monotonic() - began:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
