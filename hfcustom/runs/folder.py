"""The folder of a run: one run at a time in it, writable, with room for what is to come, before anything is trained.

output_dir/.run.json is locked while a run writes there, and says whose it is; a dead process holds no lock, so that what it left
is taken over. Every rank gets rank 0's answer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from hfcustom.exits import ConfigError
from hfcustom.parts import wrapped_by_peft
from hfcustom.train_config import TrainConfig

LOCK = ".run.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def run_folder(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Hold output_dir for this run; ConfigError where another run does, or nothing can be written."""
    folder, lock = Path(config.output_dir), None
    refusal, made = [""], not folder.exists()
    if accelerator.is_main_process:
        try:
            lock = _take(folder)
        except ConfigError as error:
            refusal = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise ConfigError(refusal[0])
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)  # and with it the lock
            if made:  # a run that was refused leaves no empty folder
                with suppress(OSError):
                    folder.rmdir()


def _take(folder: Path) -> int:
    """Return a locked descriptor; the lock is of this process alone, forked loading processes do not share it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            _lock(lock, folder)
            if os.fstat(lock).st_nlink:  # else its owner has just finished and deleted it
                break
            os.close(lock)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(owner).encode() + b"\n", 0)
    except OSError as error:
        raise ConfigError(
            f"output_dir={str(folder)!r}: nothing can be written there ({error.strerror}). Free or unlock it, or choose another "
            "--output-dir."
        ) from error
    return lock


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a disk without locks
            return
        owner = os.pread(lock, 1000, 0).decode(errors="replace")
        os.close(lock)
        raise ConfigError(
            f"output_dir={str(folder)!r}: another run writes there ({_owner(owner)}). Wait for its end or stop it, or choose "
            "another --output-dir."
        ) from error


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "which has just begun"


# ---- room -----------------------------------------------------------------------------------------------------------


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return about how much disk a checkpoint takes: weights (of an adapter the trained ones) and two moments of these."""
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the real one inside
    eight_bit = "8bit" in type(inner).__name__.lower()
    moments = sum(p.numel() * (2 if eight_bit else 2 * 4) for p in trained)
    return int(1.02 * (model_bytes(model) + moments)) + 2**20


def model_bytes(model: nn.Module) -> int:
    """Return how much a saved model takes: its weights, of an adapter those that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = trained if wrapped_by_peft(model) else [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in kept)


def check_room(folder: Path, one: int, present: int, to_come: int, keep: int, beside: int = 0) -> None:
    """Raise ConfigError where `folder` has no room for the checkpoints that will lie there together, and what is published `beside`."""
    copies = min(to_come, max(1, keep + 1 - present))  # one more than are kept, until the oldest may go
    need, have = copies * one + beside, free_bytes(folder)
    if need > have:
        raise ConfigError(
            f"disk full: {copies} checkpoints need {size(need)}, have {size(have)} in {folder}. Free space, choose another "
            f"--output-dir, or keep fewer than --keep-checkpoints {keep}."
        )


def free_bytes(folder: Path) -> int:
    """Return how much may still be written to a folder that is there or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of a library that writes by itself, says that the disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(f"os error {number}" in str(error) for number in FULL) or os.strerror(errno.ENOSPC) in str(error)


def size(count: float) -> str:
    """Return bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
