"""When memory runs out: the error that says so, how it is known, and what is put back where an attempt is to leave no trace."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hfcustom import randomness
from hfcustom.exits import EXIT_CONFIG, RunError


class NoMemoryError(RunError, RuntimeError):
    """A batch does not fit into memory; the message has its numbers and what to change."""

    exit_code = EXIT_CONFIG


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, a GPU's or this machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (isinstance(error, Exception) and should_reduce_batch_size(error)) or any(
        sign in str(error) for sign in signs
    )


class StateBefore:
    """Random numbers, buffers and what a model notes of a step, as they are before something that is to leave no trace."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.random = randomness.rng_state()
        self.buffers = [(buffer, buffer.clone()) for buffer in core.buffers()]
        self.loss_step = core.loss_step

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        self.core.loss_step, self.core.loss_values, self.core.loss_metrics = self.loss_step, {}, {}
        randomness.set_rng_state(self.random)
