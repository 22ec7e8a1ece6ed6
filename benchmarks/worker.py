"""One process of the benchmark: builds one variant and steps when it is told to, so that memory is its own.

Requests (name, job) come through a pipe, replies go back as mappings:

    "build"   -> parameters, trainable
    "step"    -> cpu_s, wall_s, memory_gb, loss, grad_norm; the first one also sketch
    "needed"  -> gflop
    "matmul"  -> gflops by shape

Memory is the growth of the peak during the step over what was resident before it (weights, optimiser state, libraries).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from needed_work import measure_matmul, needed_flop
from tasks import Job, plain_name
from variants import VARIANTS, UnavailableError

GIGA = 1e9
SKETCH = 8  # rows and columns of a gradient's sketch
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def serve(pipe: Connection, threads: int, log: Path) -> None:
    """Answer requests until the pipe closes; what libraries print goes to the log."""
    warnings.simplefilter("ignore")
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory ends, this process goes, not its parent
    torch.set_num_threads(threads)
    state: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            name, job = pipe.recv()
            try:
                reply = HANDLERS[name](state, job)
            except Exception as error:  # the parent shows it as this variant's result
                reply = {"failed": reason(error)}
                state.clear()
            pipe.send(reply)


def reason(error: Exception) -> str:
    """Say in words why a variant has no numbers."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: pip install {(error.name or '?').partition('.')[0]}"
    if isinstance(error, UnavailableError):
        return f"not available: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return "out of memory"
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {error}"


# ---- requests -------------------------------------------------------------------------------------------------------


def build(state: dict[str, Any], job: Job) -> dict[str, Any]:
    """Build a variant and its optimiser's state, so that the first step is like the next."""
    state.clear()
    gc.collect()
    bench = state["bench"] = VARIANTS[job.variant](job)
    create_state(bench.optimizer)
    counts = [(p.numel(), p.requires_grad) for p in bench.model.parameters()]
    return {
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trained in counts if trained),
    }


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser allocate its moments by a step of nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def step(state: dict[str, Any], job: Job | None) -> dict[str, Any]:
    """Run and measure one step; sketch the gradients of the first, outside its time."""
    bench = state["bench"]
    if state.get("stepped"):
        meter = Meter()
        loss, norm = bench.step()
        return {**meter.read(), "loss": loss, "grad_norm": norm}
    state["stepped"], sketch = True, Sketch(bench.model)
    hook = bench.optimizer.register_step_pre_hook(sketch)
    meter = Meter()
    loss, norm = bench.step()
    used = meter.read()
    hook.remove()
    used |= {"cpu_s": used["cpu_s"] - sketch.cpu_s, "wall_s": used["wall_s"] - sketch.wall_s}
    return {**used, "loss": loss, "grad_norm": norm, "sketch": sketch.values}


def needed(state: dict[str, Any], job: Job) -> dict[str, Any]:
    """Count the arithmetic that the job cannot do without."""
    return {"gflop": needed_flop(job) / GIGA}


def matmul(state: dict[str, Any], job: Job) -> dict[str, Any]:
    """Measure the rate of matrix products of the job's shapes."""
    return {"gflops": {name: rate / GIGA for name, rate in measure_matmul(job).items()}}


class Sketch:
    """Project each gradient on seeded random directions from both sides: (rows, columns) -> 8 x 8 numbers.

    The squared distance of two sketches is, on average over the directions, that of the two gradients.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.values: dict[str, list[float]] = {}

    def __call__(self, *_: Any) -> None:
        """Sketch what is there before the optimiser uses it, and take the time of it."""
        cpu, wall = time.process_time(), time.perf_counter()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.values[plain_name(name)] = self.project(plain_name(name), parameter.grad)
        self.cpu_s, self.wall_s = time.process_time() - cpu, time.perf_counter() - wall

    def project(self, name: str, grad: torch.Tensor) -> list[float]:
        """Return one gradient's sketch; its directions depend on the parameter's name alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ 1)
        grad = grad.detach().float()
        grad = grad.flatten(1) if grad.ndim > 1 else grad[None]  # (rows, columns)
        left, right = (torch.randn(SKETCH, size, generator=generator).to(grad.device) for size in grad.shape)
        return (left @ grad @ right.T / SKETCH).flatten().tolist()


# ---- measuring ------------------------------------------------------------------------------------------------------


class Meter:
    """Measure from its making to `read`: processor and wall seconds, and the growth of the peak of memory."""

    def __init__(self) -> None:
        gc.collect()
        self.cuda = torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before: float = torch.cuda.memory_allocated()
        else:
            give_back_memory()
            self.before = resident("VmRSS")
            CLEAR.write_text("5")  # the peak becomes what is resident now
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return what has been used since."""
        if self.cuda:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return {"cpu_s": cpu, "wall_s": wall, "memory_gb": (peak - self.before) / GIGA}


def give_back_memory() -> None:
    """Return what is free in glibc's heap to the system, so that the next step starts as the first one did."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}; memory is measured on Linux only.")


HANDLERS: dict[str, Callable[[dict[str, Any], Any], dict[str, Any]]] = {
    "build": build,
    "matmul": matmul,
    "needed": needed,
    "step": step,
}
