"""A disk that fails: every call that changes it is counted, and the k-th raises, or is where the process dies.

Faulty(k, Killed()) is a process that dies at its k-th change: neither that nor any later one happens, so that no clean-up of its
own helps it. Faulty(k, OSError(ENOSPC)) is a full disk: the k-th write fails, and so do later ones until something is deleted.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfcustom import randomness
from hfcustom.training import optimizer_state

CHANGES = ("rename", "unlink", "rmdir", "mkdir", "link", "fsync")
WRITES = ("mkdir", "link", "open", "save_file")


class Killed(BaseException):
    """The process is no more; nothing that catches errors catches this."""


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faulty:
    """Counts changes below a folder; `log` has each with its path."""

    def __init__(self, folder: Path, at: int = -1, error: Callable[[], BaseException] = Killed) -> None:
        self.folder, self.at, self.error = str(folder), at, error
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[], None] = lambda: None  # looked at before each change
        self.failed = False

    def __call__(self, name: str, path: Any) -> None:
        """Take note of a change that is about to happen; raise where it is not to."""
        if self.folder not in str(path):
            return
        self.before()
        killed = self.failed and self.error is Killed
        full = self.failed and not killed and name in WRITES
        if name in ("unlink", "rmdir") and self.error is not Killed:
            self.failed = False  # there is room again
        self.log.append((name, str(path)))
        if killed or full or len(self.log) - 1 == self.at:
            self.failed = True
            raise self.error()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between Python and the disk."""
        descriptors: dict[int, str] = {}

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                path = descriptors.get(args[0], "") if name == "fsync" else args[0]
                within = kwargs.get("dir_fd")
                self(name, f"{descriptors.get(within, '')}/{path}" if within is not None else path)
                return real(*args, **kwargs)

            patch.setattr(os, name, call)

        for name in CHANGES:
            wrap(name)
        real_os_open, real_open = os.open, io.open

        def os_open(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
            descriptor = real_os_open(path, flags, *args, dir_fd=dir_fd, **kwargs)
            descriptors[descriptor] = f"{descriptors.get(dir_fd, '')}/{path}" if dir_fd is not None else str(path)
            return descriptor

        def any_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" not in mode or "+" in mode:
                self("open", path)
            return real_open(path, mode, *args, **kwargs)

        patch.setattr(os, "open", os_open)
        patch.setattr(io, "open", any_open)
        patch.setattr("builtins.open", any_open)
        for module in (optimizer_state, randomness):
            self._wrap_save_file(module, patch)

    def _wrap_save_file(self, module: Any, patch: pytest.MonkeyPatch) -> None:
        real = module.save_file

        def save_file(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
            self("save_file", path)
            if (
                self.error is Killed and len(self.log) == self.at
            ):  # the next change is the last: half of this one is there
                path.write_bytes(b"half")
                return
            real(tensors, path, *args, **kwargs)

        patch.setattr(module, "save_file", save_file)
