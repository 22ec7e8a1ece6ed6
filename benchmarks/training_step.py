"""Compare one training step of stock transformers, Trainer, trl and hfcustom: time, memory, and that they agree.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --task B --rounds 2
    python benchmarks/training_step.py --groups full-focal --variants trainer ours

Every variant trains the same weights on the same rows, each in a process of its own, in interleaved rounds; benchmarks/README.md
says what each is. Writes results.json, results.md, results.png and workers.log to --output-dir. Exits with 1 when losses or gradients of two
variants disagree or one of them fails.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

from hfcustom.naming import unknown
from hfcustom.options import parse


@dataclass(kw_only=True)
class BenchmarkConfig:
    """What to compare; each annotation is the flag's help."""

    task: Annotated[Literal["B", "T", "tiny"], "T: tiny body, real vocabulary; B: InternVL3-1B's shapes"] = "T"
    groups: Annotated[list[str], "what to train, such as full-cross_entropy or lora-dpo; by default the task's"] = (
        field(default_factory=list)
    )
    variants: Annotated[list[str], "stock, trainer, trl, trl_good, ours, ours_packed, ours_cached; by default all"] = (
        field(default_factory=list)
    )
    rounds: Annotated[int, "measured steps of each variant"] = 3
    threads: Annotated[int, "processor threads"] = 1
    device: Annotated[Literal["cpu", "cuda"] | None, "by default cuda if there is one"] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, "of the weights; by default the task's"] = None
    scaling: Annotated[bool, "measure memory against vocabulary and length too"] = True
    output_dir: Annotated[str, "folder for the results and the log of the processes"] = "outputs/benchmark"

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is unknown or out of range, in words."""
        from about import ABOUT, GROUPS

        found = [unknown("group", name, GROUPS) for name in self.groups if name not in GROUPS]
        found += [unknown("variant", name, ABOUT) for name in self.variants if name not in ABOUT]
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must be positive")
        return found


if __name__ == "__main__":
    CONFIG = parse(BenchmarkConfig, __doc__)  # answers --help and a mistyped flag before rich is imported

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from about import ABOUT
from results import describe_machine, draw, failures, markdown, show
from rounds import Settings, measure_group, measure_scaling, start_server
from tasks import TASKS

GROWTH = {"vocabulary": [32_000, 64_000, 128_000, 256_000], "length": [256, 512, 1024, 2048]}
TINY_GROWTH = {"vocabulary": [128, 256], "length": [32, 64]}


def main(config: BenchmarkConfig) -> int:
    """Measure, print, draw; return the exit code."""
    task = TASKS[config.task]
    groups = config.groups or list(task.groups)
    variants = config.variants or list(ABOUT)
    growth = (TINY_GROWTH if config.task == "tiny" else GROWTH) if config.scaling else {}
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device, log = config.device or default_device(), folder / "workers.log"
    log.unlink(missing_ok=True)
    settings = Settings(task, config.rounds, config.threads, device, config.dtype or task.dtype, log)
    start_server(settings)
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    command = " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    results: dict[str, Any] = {"machine": describe_machine(settings, command), "groups": [], "scaling": None}
    steps = len(groups) * len(variants) * (1 + config.rounds) + 2 * sum(len(sizes) for sizes in growth.values())
    with progress_bar(out) as bar:
        line = bar.add_task("starting", total=steps)

        def report(what: str) -> None:
            bar.update(line, advance=1, description=what)
            if not out.is_terminal:
                out.print(what)

        for group in groups:
            results["groups"].append(measure_group(group, variants, settings, report))
            write(results, folder)
        if growth:
            results["scaling"] = measure_scaling(growth["vocabulary"], growth["length"], settings, report)
    write(results, folder)
    (folder / "results.md").write_text(markdown(results))
    draw(results, folder / "results.png")
    show(results, out)
    out.print(f"Written: results.json, results.md and results.png in {folder}")
    return 1 if failures(results) else 0


def write(results: dict[str, Any], folder: Path) -> None:
    """Write what has been measured so far."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def default_device() -> Literal["cpu", "cuda"]:
    """Return cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def progress_bar(out: Console) -> Progress:
    """Return a bar that says what runs now; silent where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=out, transient=True, disable=not out.is_terminal)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
