"""The processes of a run: how long one waits for another, and what is said when one has died or does not answer.

A rank that dies, stops or leaves a step out lets the others wait in a collective. They wait `rank_seconds`, then say which
ranks are gone and end with exit code 8, upon which the launcher ends the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.distributed_c10d import _set_pg_timeout  # the public way is to begin anew

from hfcustom.exits import RankError, RunError, WorkerError
from hfcustom.losses import NonFiniteError
from hfcustom.training.checkpoint_folders import last_good
from hfcustom.training.spikes import SpikeError

ANSWER_SECONDS = 5.0  # in which another rank that is alive finds out as well
SIGNS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset",
    "Timed out waiting",
    "NCCL",
    "ProcessGroup",
    "TCPStore",
)


def process_state() -> PartialState:
    """Return Accelerate's process state; the first bare PartialState() overlooks ACCELERATE_USE_CPU, for good."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if dist.is_initialized():
        atexit.unregister(disconnect)
        atexit.register(disconnect)
    return state


def disconnect() -> None:
    """Leave the other processes at the end of the program,, while the interpreter that their threads may ask for is there.

    Not after an error: NCCL would wait for an answer of processes that are gone.
    """
    if dist.is_initialized() and not UNDER_WAY and "last_value" not in vars(sys):
        gc.collect()  # models in circles, which hold on to the group
        dist.destroy_process_group()


UNDER_WAY: list[str] = []  # the run that has begun last, until it ends without an error


def check_processes(accelerator: Accelerator) -> None:
    """Raise RuntimeError where fewer processes take part than were launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but Accelerate counts {accelerator.num_processes}, so each would train "
            "alone. On CPUs launch with `accelerate launch --cpu` or set ACCELERATE_USE_CPU=true, and before fit() ask "
            "hfcustom.train.process_state() instead of PartialState()."
        )


def wait_at_most(seconds: float) -> None:
    """Bound how long this process waits for others in a collective."""
    if dist.is_initialized():
        _set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def explained(output_dir: str) -> Iterator[None]:
    """Say with what ends a run from where it can go on, and which ranks are gone if it is for them."""
    folder = Path(output_dir) / "checkpoints"
    UNDER_WAY[:] = [output_dir]
    try:
        yield
        UNDER_WAY.clear()
    except (NonFiniteError, SpikeError, WorkerError) as error:
        raise type(error)(f"{error} {last_good(folder)}") from error
    except RunError:
        raise
    except RuntimeError as error:
        if not dist.is_initialized() or not any(sign in str(error) for sign in SIGNS):
            raise
        first = str(error).splitlines()[0].encode("ascii", "ignore").decode()[:200]
        gone = silent_ranks()
        who = (
            f"rank {', '.join(map(str, gone))} died or does not answer" if gone else "the ranks no longer run in step"
        )
        where = f"rank {dist.get_rank()}, in {_own_function(error)}"
        raise RankError(f"{where}: {who} ({first}). {last_good(folder)}") from error


def _own_function(error: BaseException) -> str:
    """Return the innermost function of ours that an error came through: what was waited for."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.name for frame in reversed(frames) if "hfcustom" in Path(frame.filename).parts), "fit")


def silent_ranks() -> list[int]:
    """Return the ranks that do not find out as well that something is wrong; every rank that does has to ask."""
    own, silent = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the store was in the process that died
            store = dist.distributed_c10d._get_default_store()
            store.set(f"hfcustom/alive-{own}", "yes")
            end = time.monotonic() + ANSWER_SECONDS
            while silent and time.monotonic() < end:
                silent.difference_update([rank for rank in silent if store.check([f"hfcustom/alive-{rank}"])])
                time.sleep(0.1)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a store in a stopped process never answers
    asking.start()
    asking.join(2 * ANSWER_SECONDS)
    return sorted(silent) if answered.is_set() else [0]
