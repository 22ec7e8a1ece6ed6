"""The plan on one screen: a table of the parts, the peak of a GPU, which GPUs it fits, and what could be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from hfcustom.plan.advice import Advice
from hfcustom.plan.measure import Measured
from hfcustom.plan.sharding import ALLOWANCE, FRAGMENTED, Share

SIZES = (16, 24, 40, 48, 80, 141)  # GiB of the GPUs that there are
COLUMNS = ("weights", "adapters", "gradients", "optimizer", "average")
ESTIMATE = (
    "Weights, adapters, gradients, optimizer state and average are exact. Activations are counted tensor by tensor in one step of this "
    "run's own code, without values, on this machine's CPU path; a GPU's kernels may take a little more or less, and the "
    f"allowance for CUDA ({ALLOWANCE / 2**30:.2f} GiB and {FRAGMENTED:.0%}) is an estimate."
)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yield what says, on the error stream, what is being tried."""
    err = Console(stderr=True, highlight=False)
    if quiet or not err.is_terminal:
        yield lambda text: None
        return
    with err.status("planning") as status:
        yield lambda text: status.update(f"planning: {text}")


@dataclass
class Plan:
    """A plan to print."""

    config: Any
    model: str  # in words
    measured: Measured
    share: Share
    advice: list[Advice] = field(default_factory=list)

    @property
    def verdict(self) -> dict[float, bool]:
        """GiB of a GPU -> whether the run fits: of the GPU that was named, or of all that there are."""
        memory = self.config.gpu_memory()
        sizes = SIZES if memory is None else (memory,)
        return {size: self.share.needed <= size * 2**30 for size in sizes}

    @property
    def fits(self) -> bool | None:
        """Whether the run fits the GPU that was named; None where none was."""
        return None if self.config.gpu_memory() is None else all(self.verdict.values())


def show(plan: Plan, title: str = "") -> None:
    """Print a plan."""
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = 120
    out.print(f"{title + ', ' if title else ''}{plan.measured.class_name}: {plan.model}")
    out.print(_facts(plan.config, plan.measured))
    out.print(_parts(plan.measured))
    out.print(_peak(plan.config, plan.measured, plan.share))
    for size, fits in plan.verdict.items():
        left = size * 2**30 - plan.share.needed
        words = ("fits", "left") if fits else ("does not fit", "too much")
        out.print(f"  {size:>6g} GiB: {words[0]}, {_size(abs(left))} {words[1]}")
    if plan.advice:
        out.print(_advice(plan.advice, list(plan.verdict)))
    out.print(ESTIMATE)


def _facts(config: Any, measured: Measured) -> str:
    batch = measured.batch
    rows = f"{batch['rows']} row{'s' * (batch['rows'] > 1)} of {batch['tokens']:,} tokens"
    accumulated = " of several a step" if measured.micro_batches > 1 else ""
    crops = f"{batch['crops']} image crop{'s' * (batch['crops'] != 1)}"
    recomputed = ", layers recomputed" if config.gradient_checkpointing else ""
    return (
        f"{measured.trainable:,} trainable parameters, {measured.precision}{recomputed}; micro-batch{accumulated}: {rows}, {crops}, "
        f"{batch['supervised']:,} supervised tokens"
    )


def _parts(measured: Measured) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [name for name in COLUMNS if name != "average" or measured.total(name)]
    for name in ("part", *columns, "together", "dtypes"):
        table.add_column(name, justify="left" if name in ("part", "dtypes") else "right")
    for part in measured.parts:
        values = [vars(part)[name] for name in columns]
        table.add_row(part.part, *map(_size, values), _size(part.total), part.dtypes or "tied")
    totals = [measured.total(name) for name in columns]
    table.add_row("total", *map(_size, totals), _size(sum(totals)), "")
    return table


def _peak(config: Any, measured: Measured, share: Share) -> str:
    kinds = {"weights": share.weights, "gradients": share.gradients, "optimizer": share.optimizer}
    kinds["average"] = share.average
    kinds["DDP's buckets" if config.shard == "none" else "gathered for a moment"] = share.exchange
    kinds["activations, and the batch"] = share.activations
    if config.shard == "none":  # what is there when it is most
        kinds["gradients"] = measured.at_peak.get("gradients", 0)
    words = ", ".join(f"{_size(size)} {kind}" for kind, size in kinds.items() if size)
    each = f" of each of {config.gpus} GPUs" if config.gpus > 1 else ""
    if measured.offloaded:
        words += f", {_size(measured.offloaded)} of activations in the CPU's memory besides"
    return f"peak{each}: {_size(share.peak)} ({words}); with CUDA's own {_size(share.needed)}"


def _advice(advice: Sequence[Advice], sizes: Sequence[float]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="what could be changed", title_justify="left")
    for name in ("change", "flags", "peak", "with CUDA", "fits" if len(sizes) == 1 else "fits from"):
        table.add_column(name, justify="left" if name in ("change", "flags") else "right")
    for item in advice:
        enough = [size for size in sizes if item.needed <= size * 2**30]
        fits = f"{enough[0]:g} GiB" if enough else "no"
        table.add_row(item.change, item.flags, _size(item.peak), _size(item.needed), fits)
    return table


def _size(size: int | float) -> str:
    """Return bytes with a unit, in three digits."""
    if not size:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale * 0.995:
            value = size / scale
            return f"{value:,.{max(0, 3 - len(str(int(value))))}f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values; sizes are in bytes."""
    facts = asdict(plan.measured)
    for name in ("parameters", "largest_unit"):
        del facts[name]
    return {
        "model": plan.model,
        "gpus": plan.config.gpus,
        "shard": plan.config.shard,
        **facts,
        "per_gpu": {**asdict(plan.share), "needed": plan.share.needed},
        "fits": {f"{size:g}": fits for size, fits in plan.verdict.items()},
        "advice": [asdict(item) for item in plan.advice],
        "exact": list(COLUMNS),
        "estimated": ["activations", "exchange", "peak", "needed"],
    }
