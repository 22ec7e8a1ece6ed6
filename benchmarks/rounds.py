"""Measure a group of variants in interleaved rounds, each in a process of its own, and compare what they computed.

A round asks each variant for one step and then measures the matmul limit, so that whatever else the machine does meets all
of them alike. Only one process computes at a time. No torch here: the parent's memory stays out of the way.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from about import GROUPS
from tasks import Job, Task, scaling_task

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, in float32
PRELOAD = (
    "worker",
    "transformers.models.internvl.modeling_internvl",
    "transformers.trainer",
    "hfcustom.train",
    "peft",
)

Reply = dict[str, Any]
Report = Callable[[str], None]  # told what is about to run


class Worker:
    """A process of worker.py, forked from a server that has imported the libraries and computed nothing."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, settings.threads, settings.log), daemon=True, name="hfcustom-benchmark"
        )
        self.process.start()
        theirs.close()

    def ask(self, name: str, job: Job | None = None) -> Reply:
        """Send a request and wait for its reply; a process that died replies with what ended it."""
        try:
            self.pipe.send((name, job))
            return self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            return {"failed": "out of memory (killed)" if code == -9 else f"failed: its process ended with {code}"}

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def _serve(*arguments: Any) -> None:
    from worker import serve  # torch, which the parent does without

    serve(*arguments)


def start_server(settings: Settings) -> None:
    """Set what every worker inherits, and let the server import the libraries."""
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if settings.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))


@dataclass
class Measured:
    """What one variant did in one group."""

    variant: str
    status: str = "measured"
    loss: float | None = None
    grad_norm: float | None = None
    loss_difference: float | None = None  # relative, to the first variant that was measured
    gradient_distance: float | None = None  # relative, likewise
    worst_gradient: str | None = None  # the parameter whose gradient is farthest
    agrees: bool | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    memory_gb: float | None = None
    share_of_limit: float | None = None
    trainable: int | None = None  # parameters
    steps: list[dict[str, float]] = field(default_factory=list)
    sketch: dict[str, list[float]] = field(default_factory=dict)  # of the first step's gradients

    def take_build(self, reply: Reply) -> None:
        """Keep what a worker said about its model."""
        self.status, self.trainable = reply.get("failed", "measured"), reply.get("trainable")

    def take_step(self, reply: Reply) -> None:
        """Keep one step: the least time of all, the memory of the latest, the loss and gradients of the first."""
        if "failed" in reply:
            self.status = reply["failed"]
            return
        if not self.steps:
            self.loss, self.grad_norm, self.sketch = reply["loss"], reply["grad_norm"], reply.pop("sketch")
        self.steps.append(reply)
        self.cpu_s, self.wall_s = (min(step[name] for step in self.steps) for name in ("cpu_s", "wall_s"))
        self.memory_gb = reply["memory_gb"]

    def as_json(self) -> Reply:
        """Return everything but the sketch."""
        return {name: value for name, value in asdict(self).items() if name != "sketch"}


@dataclass
class Settings:
    """How to measure."""

    task: Task
    rounds: int
    threads: int
    device: str
    dtype: str
    log: Path

    def job(self, variant: str, group: str, task: Task | None = None) -> Job:
        """Return what a worker needs to build a variant."""
        lora, objective = GROUPS[group]
        return Job(variant, objective, lora, task or self.task, self.dtype, self.device)


def measure_group(group: str, variants: Sequence[str], settings: Settings, report: Report) -> Reply:
    """Return a group's results: what is needed, the limit, and one Measured a variant."""
    workers = {name: Worker(settings) for name in (*variants, "limit")}
    found = {name: Measured(name) for name in variants}
    limits: list[dict[str, float]] = []
    try:
        job = settings.job(variants[0], group)
        needed = workers["limit"].ask("needed", job)
        assert "gflop" in needed, f"the needed work could not be counted: {needed}"
        for name in variants:
            report(f"{group}: {name}, building")
            found[name].take_build(workers[name].ask("build", settings.job(name, group)))
            if found[name].status != "measured":
                workers[name].close()
        for number in range(settings.rounds):
            for name in variants:
                report(f"{group}: {name}, round {number + 1}")
                if found[name].status == "measured":
                    found[name].take_step(workers[name].ask("step"))
            limits.append(workers["limit"].ask("matmul", job)["gflops"])
    finally:
        for worker in workers.values():
            worker.close()
    limit = {shape: max(rates[shape] for rates in limits) for shape in limits[0]}
    compare(list(found.values()), judge=settings.dtype == "float32")
    _share(list(found.values()), needed["gflop"], max(limit.values()), by_cpu=counts_processor_time(settings))
    lora, objective = GROUPS[group]
    return {
        "group": group,
        "objective": objective,
        "lora": lora,
        "needed_gflop": needed["gflop"],
        "limit_gflops": limit,
        "variants": [measured.as_json() for measured in found.values()],
    }


def counts_processor_time(settings: Settings) -> bool:
    """Whether a step's seconds are the processor's, which other processes do not disturb; with threads they are the wall's."""
    return settings.device == "cpu" and settings.threads == 1


def _share(found: Sequence[Measured], needed_gflop: float, limit_gflops: float, by_cpu: bool) -> None:
    for measured in found:
        seconds = measured.cpu_s if by_cpu else measured.wall_s
        if seconds is not None:
            measured.share_of_limit = needed_gflop / seconds / limit_gflops


# ---- agreement ------------------------------------------------------------------------------------------------------


def compare(found: Sequence[Measured], judge: bool) -> None:
    """Compare each variant's first step with that of the first variant that has one."""
    stepped = [(measured, measured.loss) for measured in found if measured.loss is not None]
    for measured, loss in stepped:
        first, expected = stepped[0]
        measured.loss_difference = abs(loss - expected) / abs(expected)
        measured.gradient_distance, measured.worst_gradient = distance(_unclipped(measured), _unclipped(first))
        if judge:
            measured.agrees = (
                measured.loss_difference < LOSS_TOLERANCE and measured.gradient_distance < GRADIENT_TOLERANCE
            )


def _unclipped(measured: Measured) -> dict[str, list[float]]:
    scale = max(measured.grad_norm or 0.0, 1.0)  # the gradients were clipped to a norm of 1
    return {name: [scale * value for value in values] for name, values in measured.sketch.items()}


def distance(mine: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[float, str]:
    """Return the relative distance of two sketches over all parameters, and the parameter that contributes most."""
    if mine.keys() != theirs.keys():
        return math.inf, ", ".join(sorted(mine.keys() ^ theirs.keys())[:3])
    squares = {name: math.dist(values, theirs[name]) ** 2 for name, values in mine.items()}
    size = sum(value * value for values in theirs.values() for value in values)
    return math.sqrt(sum(squares.values()) / size), max(squares, key=lambda name: squares[name])


# ---- growth ---------------------------------------------------------------------------------------------------------


def measure_scaling(vocabularies: Sequence[int], lengths: Sequence[int], settings: Settings, report: Report) -> Reply:
    """Return memory and time of stock and ours against the vocabulary (at a length) and the length (at a vocabulary)."""
    middle = vocabularies[len(vocabularies) // 2 - 1], lengths[len(lengths) // 2 - 1]
    points = {
        "vocabulary": [(size, size, middle[1]) for size in vocabularies],
        "length": [(size, middle[0], size) for size in lengths],
    }
    result: Reply = {"at_length": middle[1], "at_vocabulary": middle[0], **{axis: [] for axis in points}}
    for variant in ("stock", "ours"):
        worker = Worker(settings)
        for axis, sizes in points.items():
            for size, vocabulary, length in sizes:
                report(f"growth with {axis}: {variant}, {size}")
                job = settings.job(variant, "lora-cross_entropy", scaling_task(vocabulary, length))
                reply = worker.ask("build", job)
                for _ in range(0 if "failed" in reply else 2):  # the first one also warms up
                    reply = worker.ask("step")
                kept = {name: reply.get(name) for name in ("cpu_s", "wall_s", "memory_gb")}
                result[axis].append(
                    {"variant": variant, "size": size, "status": reply.get("failed", "measured"), **kept}
                )
        worker.close()
    return result
