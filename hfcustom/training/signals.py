"""Ask a run to stop at the end of its step: SIGTERM, Ctrl-C and SIGUSR1 set a flag instead of killing it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, the first signal is a request and a second one interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.name = signal.Signals(number).name

    def agreed(self, accelerator: Accelerator) -> bool:
        """Return whether any rank was asked to stop; every rank gets the same answer."""
        asked = self.name is not None
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)


def ignore_stop_signals(worker: int = 0) -> None:
    """Keep a data-loading process alive: Ctrl-C and schedulers signal every process, and the trainer has yet to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
