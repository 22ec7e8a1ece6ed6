"""What a run prints: one screen of facts at the start, a progress bar or lines, metrics to file and trackers."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from hfcustom.data.turns import RowError
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.losses import IGNORE, LOSSES, WeightedLoss, count_all_tokens
from hfcustom.losses.chunked import product_dtype
from hfcustom.losses.kernels import DESCRIPTIONS, choose_kernel
from hfcustom.parts import expert_matrices, part_table, unwrap
from hfcustom.runs.files import MetricsFile, RunFiles
from hfcustom.runs.trackers import Trackers
from hfcustom.train_config import TrainConfig
from hfcustom.training.optimizers import rate_and_decay

if TYPE_CHECKING:
    from hfcustom.data.collate import Batch
    from hfcustom.data.packing import Cut
    from hfcustom.train import StepReport
    from hfcustom.training.work import Work

logger = logging.get_logger("hfcustom")
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # brackets in a path are no style
if not out.is_terminal:
    out.width = 140  # a log file has no width of its own; rich would assume 80 and cut module paths


class TrainLog:
    """Collect step reports; every `log_steps` print them, append them to metrics.jsonl and send them to trackers."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        losses: Sequence[WeightedLoss],
        start: int,
        max_steps: int,
        history: Iterable[Mapping[str, float]] = (),
        sources: Sequence[str] = (),
        model: Any = None,
        work: Work | None = None,
    ) -> None:
        self.config = config
        self.work = work  # of which mfu is made
        self.model = model  # for the page of the run, which there is not without it
        self.accelerator = accelerator
        self.trackers = Trackers(config, accelerator, start)
        self.losses = list(losses)
        self.names = [item.loss.name for item in losses]
        self.sources = list(sources)  # of a mixture, whose shares of the tokens are logged
        self.start = start
        self.max_steps = max_steps
        self.history = [dict(entry) for entry in history]
        self.window: list[StepReport] = []
        self.window_began = self.stepped = time.perf_counter()
        self.flop = 0.0  # of the window, on this rank
        self.files: RunFiles | None = None
        self.last_step = start
        self.bar = _progress_bar(enabled=accelerator.is_main_process and out.is_terminal)

    def __enter__(self) -> TrainLog:
        self.trackers.begin()
        if self.accelerator.is_main_process:
            folder = Path(self.config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if self.model is not None:
                self.files = RunFiles(self.config, self.start, self.max_steps)
                self.files.begin(self.model, self.names)
            self.file = MetricsFile(folder, self.history)
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.max_steps, completed=self.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.files is not None:
            self.files.end(self.last_step, error)
        self.trackers.end()

    @contextlib.contextmanager
    def counting(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Count what the step over these micro-batches costs, where mfu is logged."""
        if self.work is None or not batches:
            yield
            return
        with self.work.step(batches):
            yield
        self.flop += self.work.flop

    def step(self, step: int, report: StepReport | None, optimizer: torch.optim.Optimizer) -> None:
        """Take one step's report; None is a step of which no row could be used, so that nothing was computed."""
        if report is not None:
            for name in self.sources:
                share = [report.source_tokens.get(name, 0), sum(report.source_tokens.values())]
                report.metrics[f"tokens/{name}"] = torch.tensor(share, dtype=torch.float64)
            if report.positions:  # the rest is padding
                share = [report.tokens, report.positions]
                report.metrics["useful_tokens"] = torch.tensor(share, dtype=torch.float64)
            report.at = step - 1
            self.window.append(report)
        self.last_step = step
        self.bar.update(self.task, completed=step)
        if self.window and (step % self.config.log_steps == 0 or step == self.max_steps):
            self.metrics(step, self._close_window(step, optimizer), progress=True)
        if self.files is not None and self.config.save_steps and step % self.config.save_steps == 0:
            self.files.write_page()
        self.stepped = time.perf_counter()

    def metrics(self, step: int, values: Mapping[str, float], progress: bool = False) -> None:
        """Record named numbers of a step; `progress` keeps them in the bar where there is one."""
        self.history.append({"step": step, **values})
        if not progress:  # an evaluation, whose time is none of training
            self.window_began += time.perf_counter() - self.stepped
            self.stepped = time.perf_counter()
        self.trackers.log(values, step)
        if not self.accelerator.is_main_process:
            return
        self.file.add_last(self.history)
        shown = {
            name: value for name, value in values.items() if not name.startswith("grad_norm_")
        }  # by part: in the file
        if self.files is not None and not progress:  # an evaluation
            self.files.write_page()
        facts = [f"{name} {_short(value)}" for name, value in shown.items()]
        if progress and out.is_terminal:
            self.bar.facts = facts
            self.bar.refresh()
        else:
            out.print("  ".join([f"step {step}/{self.max_steps}", *facts]))

    def pending(self) -> list[dict[str, Any]]:
        """Return losses, metrics and norms of each step since the last log line, over all ranks; every rank has to ask."""
        steps = []
        for report, values, more in zip(self.window, self._window_losses(), self._window_metrics(), strict=True):
            norms = {part: float(norm) for part, norm in report.part_norms.items()}
            seen = {"losses": dict(zip(self.names, values, strict=True)), "metrics": more}
            steps.append({**seen, "step": report.at + 1, "grad_norm": float(report.grad_norm), "part_norms": norms})
        return steps

    def restore_window(self, pending: Sequence[Mapping[str, Any]]) -> None:
        """Take back what `pending` returned, so that the next log line of a resumed run is that of an unbroken one."""
        from hfcustom.train import StepReport

        share = torch.tensor(float(self.accelerator.is_main_process), dtype=torch.float64)  # the sum is over ranks
        for number, step in enumerate(pending, self.last_step - len(pending) + 1):
            if list(step["losses"]) == self.names:  # else the run goes on with another loss
                losses = {name: share * value for name, value in step["losses"].items()}
                metrics = {
                    name: share * torch.tensor([value, 1.0], dtype=torch.float64)
                    for name, value in step["metrics"].items()
                }
                report = StepReport(step.get("step", number) - 1, losses, metrics)  # older checkpoints do not say
                report.grad_norm, report.part_norms = step.get("grad_norm", 0.0), step.get("part_norms", {})
                self.window.append(report)

    def rewind(self, step: int, history: Iterable[Mapping[str, float]], pending: Sequence[Mapping[str, Any]]) -> None:
        """Go back to what was logged up to a step, as a run does that is resumed there."""
        self.history, self.window, self.last_step = [dict(entry) for entry in history], [], step
        self.window_began, self.flop = time.perf_counter(), 0.0
        self.restore_window(pending)
        self.bar.update(self.task, completed=step)
        if self.accelerator.is_main_process:
            self.file.rewrite(self.history)
        if self.files is not None:
            self.files.drop_samples(step)

    def fault(self, kind: str, **facts: Any) -> None:
        """Note for the page of the run something that went wrong."""
        if self.files is not None:
            self.files.fault(kind, **facts)

    def _sum_over_ranks(self, values: list[Any]) -> list[Any]:
        if self.accelerator.num_processes == 1 or not values:
            return values
        local = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(local, "sum").tolist()

    def _window_losses(self) -> list[list[float]]:
        """Return each loss's mean over the rows of a step, of all ranks, for each step of the window."""
        return self._sum_over_ranks([[float(report.losses[name]) for name in self.names] for report in self.window])

    def _window_metrics(self) -> list[dict[str, float]]:
        """Return what terms recorded, as means over the rows of a step, of all ranks, for each step of the window."""
        own = [{name: value.tolist() for name, value in report.metrics.items()} for report in self.window]
        # which numbers there are may differ by rank, where a micro-batch has none of what a term counts
        ranks = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        means = []
        for reports in zip(*ranks, strict=True):
            names = dict.fromkeys(name for report in reports for name in report)
            totals = {
                name: [sum(pair) for pair in zip(*(r[name] for r in reports if name in r), strict=True)]
                for name in names
            }
            means.append({name: total / count for name, (total, count) in totals.items() if count})
        return means

    def _close_window(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the window's means: the total, each loss raw and, where there are several, weighted; rates; speed.

        Between losses and rates stand the numbers that terms recorded.
        """
        steps = [report.at for report in self.window]
        raw: dict[str, float] = dict.fromkeys(self.names, 0.0)
        weighted: dict[str, float] = dict.fromkeys(self.names, 0.0)
        for at, values in zip(steps, self._window_losses(), strict=True):
            for item, value in zip(self.losses, values, strict=True):
                raw[item.loss.name] += value / len(steps)
                weighted[item.loss.name] += item.weight_at(at) * value / len(steps)
        done = [float(sum(getattr(report, name) for report in self.window)) for name in ("tokens", "images")]
        tokens, images, busy = self._sum_over_ranks([*done, self.flop / self.work.rate if self.work else 0.0])
        seconds = time.perf_counter() - self.window_began
        entry = {"loss": sum(weighted.values())}
        several = len(self.losses) > 1
        for item in self.losses:
            name = item.loss.name
            if several or item.is_weighted:  # else it is the loss
                entry[name] = raw[name]
            if several and item.is_weighted:
                entry[f"{name}_weighted"] = weighted[name]
        metrics = self._window_metrics()
        for name in dict.fromkeys(name for step in metrics for name in step):
            values = [step[name] for step in metrics if name in step]
            entry[name] = sum(values) / len(values)
        rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
        same = len(set(rates.values())) == 1
        entry |= {"lr": next(iter(rates.values()))} if same else {f"lr_{part}": rate for part, rate in rates.items()}
        last = self.window[-1]
        entry |= {"grad_norm": float(last.grad_norm)}
        entry |= {f"grad_norm_{part}": float(norm) for part, norm in last.part_norms.items()}
        entry |= {"tokens_per_s": tokens / seconds, "images_per_s": images / seconds}
        if self.work is not None and not self.work.blind:
            entry["mfu"] = busy / seconds / self.accelerator.num_processes
        if self.accelerator.device.type == "cuda":
            entry["peak_gib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
        self.window, self.window_began, self.flop = [], time.perf_counter(), 0.0
        return entry


class Stages:
    """Name and time the stages of a recipe: `with stages("train"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Print the stage's name now and keep its time."""
        out.print(f"\n== {name}")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def rows(self) -> list[tuple[str, float]]:
        """Return (stage, seconds) and the total."""
        return [*self.seconds.items(), ("total", sum(self.seconds.values()))]


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a plain table; numbers are aligned right, floats shown with 4 digits."""
    table = Table(box=None, pad_edge=False)
    rows = [list(row) for row in rows]
    for at, name in enumerate(columns):
        table.add_column(
            name, overflow="fold", justify="right" if all(isinstance(row[at], int | float) for row in rows) else "left"
        )
    for row in rows:
        table.add_row(*(_short(value) if isinstance(value, float) else str(value) for value in row))
    out.print(table)


class Bar(Progress):
    """A progress bar with time left, and below it the newest numbers, which would squeeze it out of its own line."""

    facts: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar's line, and the numbers in as many as they take; `out` itself wraps none."""
        yield from super().get_renderables()
        whole = "  ".join(fact.replace(" ", "\xa0") for fact in self.facts)  # a name and its number stay together
        for line in textwrap.wrap(whole, out.width):
            yield Text(line.replace("\xa0", " "))


def _progress_bar(enabled: bool) -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TimeRemainingColumn(), TextColumn("left"))
    return Bar(*columns, *left, console=out, disable=not enabled)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


# ---- start-up facts -------------------------------------------------------------------------------------------------


def show_cut(cut: Cut, whole: bool) -> None:
    """Say once that rows are larger than a packed micro-batch; the `whole` of it says what packing saves, too."""
    if whole:
        out.print(f"packing: {cut}")
    if cut.too_long:
        logger.warning_once(
            f"Some rows have more than pack_tokens={cut.budget} tokens; each is a micro-batch by itself. max_length refuses "
            "them, a larger pack_tokens packs them."
        )


def show_parts(model: Any, title: str = "", config: TrainConfig | None = None) -> None:
    """Print the part table: modules, parameters, trainable, memory, dtype, LoRA's shapes; with a config, rates and decay too."""
    table = Table(title=title or type(unwrap(model)).__name__, title_justify="left", box=None, pad_edge=False)
    rows = part_table(model)
    for name in ("part", "modules"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "trainable", "MiB"):
        table.add_column(name, justify="right")
    adapted = any(row.adapter for row in rows)
    for name in ("dtype", *(["LoRA"] if adapted else []), *(["peak lr", "decay"] if config else [])):
        table.add_column(name)
    for row in rows:
        trainable = f"{row.trainable:,}" if row.trainable else "frozen" if row.parameters else "tied"
        more = [row.adapter] if adapted else []
        if config:
            more += [f"{value:.4g}" if row.trainable else "" for value in rate_and_decay(config, row.part)]
        table.add_row(
            row.part, row.modules, f"{row.parameters:,}", trainable, f"{row.bytes / 2**20:.2f}", row.dtypes, *more
        )
    totals = (f"{sum(row.parameters for row in rows):,}", f"{sum(row.trainable for row in rows):,}")
    table.add_row("total", "", *totals, f"{sum(row.bytes for row in rows) / 2**20:.2f}", "")
    out.print(table)


def show_start(model: Any, processor: Any, row: Any, config: TrainConfig) -> None:
    """Print what a person wants to know before a run: parts, seams in effect, image tokens, where values came from."""
    from hfcustom.data.sources import Examples
    from hfcustom.train import choose_precision, make_collator

    show_parts(model, config=config)
    core = unwrap(model)
    example = Examples([row])[0]
    out.print(f"seams in effect: {', '.join(core.overridden_seams()) or 'none (stock)'}")
    try:
        batch = make_collator(core, processor, config, example.columns)([example])
    except RowError as error:
        if config.on_bad_row == "error":
            raise
        out.print(f"the first row cannot be used: {error}")
    else:
        out.print(f"first row{_row_facts(core, batch)}")
    with torch.autocast(core.device.type, torch.bfloat16, enabled=choose_precision(model, config) == "bf16"):
        facts = execution_facts(core)
    for fact in facts:
        out.print(fact)
    for name, source in config.sources.items():
        out.print(f"  {name} = {getattr(config, name)!r}  ({source})")


def _row_facts(core: Any, batch: Batch) -> str:
    """Say what a row becomes; a contrastive encoder has no placeholders and no labels."""
    if "labels" not in batch:
        return f": {count_all_tokens(batch)} tokens, {batch.images} image"
    token = core.placeholder_token_id
    image_tokens = "an unknown number" if token is None else int((batch["input_ids"] == token).sum())
    supervised = int((batch["labels"] != IGNORE).sum())
    return (
        f"{' (both answers)' if len(batch['labels']) == 2 else ''}: {count_all_tokens(batch)} tokens, {batch.images} images "
        f"as {image_tokens} of them, {supervised} supervised"
    )


def execution_facts(core: Any) -> list[str]:
    """Say what code runs the losses, the attention and the experts, in words: what is chosen silently can be slow."""
    if isinstance(core, CustomDualEncoder):
        bias = "" if core.logit_bias is None else f" with a bias of {float(core.logit_bias.detach()):.3g}"
        scale = float(core.logit_scale.detach().exp())
        return [
            f"losses: {core.losses()[0].loss.name} among all pairs of a step; cosines times {scale:.3g}{bias}, learned",
            f"attention: {core.config.vision_config._attn_implementation}",
        ]
    head = core.loss_head()
    names = ", ".join(item.loss.name for item in core.losses())
    facts = [f"losses: {names}; the head is {'a plain Linear' if head.linear is not None else 'called as a module'}"]
    if names == "cross_entropy":
        hidden = core.get_output_embeddings().weight
        asked = core.losses()[0].options.get("kernel", "auto")
        kernel = choose_kernel(asked, hidden.device, head.linear, product_dtype(hidden))
        facts[0] += f"; evaluated by {DESCRIPTIONS[kernel]}"
    text = core.config.get_text_config()
    facts.append(f"attention: {text._attn_implementation}")
    if experts := expert_matrices(core):
        holders = tuple(name.rpartition(".")[0].removesuffix(".base_layer") + "." for name, _ in experts)
        adapted = any(name.startswith(holders) and ".lora_" in name for name, _ in core.named_parameters())
        facts.append(
            f"experts: {len(experts)} stacked matrices, run by {text._experts_implementation}"
            f"{_slow_experts(text._experts_implementation, experts[0][1])}; {'LoRA' if adapted else 'no LoRA'} and no 8 bits on them"
        )
    return facts


def _slow_experts(implementation: str, weight: torch.Tensor) -> str:
    """Say where grouped_mm has no kernel and transformers runs a loop instead (integrations/moe.py, 5.23.0)."""
    if implementation != "grouped_mm":
        return ""
    old = weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0)
    return " (in a loop: this GPU is older than compute capability 8.0)" if old else ""


# ---- what there is to choose from -----------------------------------------------------------------------------------


def show_losses() -> None:
    """Print every registered loss: its kind, what it is divided by, its options with their defaults, its formula."""
    rows = []
    for name, loss in sorted(LOSSES.items()):
        options = [
            option if parameter.default is parameter.empty else f"{option}={parameter.default}"
            for option, parameter in loss.options().items()
        ]
        count = loss.count if isinstance(loss.count, str) else loss.count.__name__.removeprefix("count_")
        formula = (loss.function.__doc__ or "").partition("\n\n")[0].partition(">>>")[0]
        rows.append((name, loss.kind, count, ", ".join(options), " ".join(formula.split())))
    show_table(("loss", "kind", "divided by", "options", "formula and source"), rows)
