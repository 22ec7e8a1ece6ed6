"""Show where one training step of hfcustom spends its time, as a Markdown table: operators, grouped by what they do.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --task B --lora --steps 1
    python benchmarks/profile_step.py --variant trainer --objective focal

An operator's time is its own, without those it calls; on a CPU wall time, which a busy machine lengthens, on a GPU that of
its kernels. Prints to the terminal only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hfcustom.naming import unknown
from hfcustom.options import parse


@dataclass(kw_only=True)
class ProfileConfig:
    """What to profile; each annotation is the flag's help."""

    task: Annotated[Literal["B", "T", "tiny"], "T: tiny body, real vocabulary; B: InternVL3-1B's shapes"] = "T"
    variant: Annotated[str, "any of training_step.py"] = "ours"
    objective: Annotated[str, "cross_entropy, focal, label_smoothing or dpo"] = "cross_entropy"
    lora: Annotated[bool, "LoRA on the language model instead of all weights"] = False
    steps: Annotated[int, "profiled steps, after one that warms up"] = 2
    threads: Annotated[int, "processor threads"] = 1
    top: Annotated[int, "operators to list"] = 15
    device: Annotated[Literal["cpu", "cuda"] | None, "by default cuda if there is one"] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, "of the weights; by default the task's"] = None

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is unknown or out of range, in words."""
        from about import ABOUT, GROUPS, OBJECTIVES

        found = [] if self.variant in ABOUT else [unknown("variant", self.variant, ABOUT)]
        found += [] if self.objective in OBJECTIVES else [unknown("objective", self.objective, OBJECTIVES)]
        if not found and f"{'lora' if self.lora else 'full'}-{self.objective}" not in GROUPS:
            found.append(f"objective={self.objective} needs --lora: its reference is the model without the adapter")
        for name in ("steps", "threads", "top"):
            if getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must be positive")
        return found


if __name__ == "__main__":
    CONFIG = parse(ProfileConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import os
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tasks import TASKS, Job
from variants import VARIANTS

# The first kind of which a word is in an operator's name; what matches none is element-wise or a reduction.
KINDS: dict[str, tuple[str, ...]] = {
    "autograd and Python": ("autograd::", "function"),
    "attention": ("attention", "flash"),
    "matmul": ("mm", "matmul", "linear", "conv", "gemm", "bmm"),
    "optimiser": ("adam", "foreach", "clip_grad"),
    "softmax": ("softmax", "logsumexp", "nll_loss", "cross_entropy"),
    "copy": (
        "copy",
        "clone",
        "_to",
        "contiguous",
        "cat",
        "zero",
        "fill",
        "empty",
        "scatter",
        "index",
        "gather",
        "memcpy",
    ),
    "norm": ("norm",),
    "views": ("view", "stride", "transpose", "aten::t", "expand", "slice", "select", "split", "reshape", "squeeze"),
}
REST = "element-wise"


def kind_of(operator: str) -> str:
    """Return what an operator does."""
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def run(config: ProfileConfig) -> list[tuple[str, float, int]]:
    """Return (operator, seconds a step, calls a step), the longest first."""
    torch.set_num_threads(config.threads)
    task, device = TASKS[config.task], config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    job = Job(config.variant, config.objective, config.lora, task, config.dtype or task.dtype, device)
    bench = VARIANTS[job.variant](job)
    bench.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as recorded:
        for _ in range(config.steps):
            bench.step()
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU  # on a GPU the kernels, not who launched them
    events = [event for event in recorded.key_averages() if event.device_type == wanted]
    rows = [(event.key, _seconds(event, device) / config.steps, event.count) for event in events]
    rows = [(name, seconds, count // config.steps) for name, seconds, count in rows if seconds > 0]
    return sorted(rows, key=lambda row: -row[1])


def _seconds(event: Any, device: str) -> float:
    return (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6


def tables(rows: list[tuple[str, float, int]], top: int) -> str:
    """Return two Markdown tables: by kind, and the longest operators."""
    total = sum(seconds for _, seconds, _ in rows)
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds, _ in rows:
        kinds[kind_of(name)] += seconds
    lines = ["| kind | s a step | share |", "|---|---|---|"]
    for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"| {kind} | {seconds:.3f} | {seconds / total:.0%} |")
    lines += [
        f"| all | {total:.3f} | 100% |",
        "",
        "| operator | kind | s a step | share | calls |",
        "|---|---|---|---|---|",
    ]
    for name, seconds, calls in rows[:top]:
        lines.append(f"| `{name}` | {kind_of(name)} | {seconds:.3f} | {seconds / total:.0%} | {calls} |")
    return "\n".join(lines)


def main(config: ProfileConfig) -> None:
    """Profile and print."""
    warnings.simplefilter("ignore")
    print(tables(run(config), config.top))


if __name__ == "__main__":
    main(CONFIG)
