"""What a run prints and records: facts at the start, a line every log_steps, metrics.jsonl, stages."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import Family, chat_row
from kinds import family_of_each_kind  # noqa: F401
from rich.console import Console

import hfcustom
from hfcustom import console
from hfcustom.losses import LOSSES, parse_losses
from hfcustom.options import read
from hfcustom.parts import expert_matrices
from hfcustom.train import StepReport
from hfcustom.train_config import TrainConfig

STEP_SECONDS = 0.5


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to a log file: the toolkit's own console, its stream replaced."""
    stream = io.StringIO()
    monkeypatch.setattr(console.out, "_file", stream)  # `file` would stay on this test's stdout
    monkeypatch.setattr(console.out, "width", 140)
    return stream


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a person at a terminal sees."""
    stream = io.StringIO()
    monkeypatch.setattr(
        console, "out", Console(file=stream, force_terminal=True, width=140, markup=False, soft_wrap=True)
    )
    return stream


def table_of(text: str) -> dict[str, list[str]]:
    """Return the words of each line of a printed table, by its first word; a list with commas is one."""
    lines = [line.replace(", ", ",").split() for line in text.splitlines() if line.strip()]
    return {line[0]: line for line in lines}


# ---- TrainLog -------------------------------------------------------------------------------------------------------


def optimizer(**rates: float) -> Any:
    return SimpleNamespace(param_groups=[{"part": part, "lr": rate} for part, rate in rates.items()])


def report(step: int, **losses: float) -> StepReport:
    """Return the report of a step of 100 tokens and 2 images."""
    values = {name: torch.tensor(value) for name, value in losses.items()}
    return StepReport(losses=values, tokens=100, images=2, grad_norm=torch.tensor(float(step)))


def run_log(
    folder: Path,
    clock: Clock,
    reports: list[StepReport],
    *,
    losses: Any = "cross_entropy",
    start: int = 0,
    **options: Any,
) -> list[dict[str, float]]:
    """Log some steps of half a second each; return the lines of metrics.jsonl."""
    history = options.pop("history", ())
    rates = options.pop("rates", {"language": 0.1})
    config = TrainConfig(output_dir=str(folder), **options)
    end = start + len(reports)
    with console.TrainLog(config, Accelerator(), parse_losses(losses), start, end, history) as log:
        for step, item in enumerate(reports, start + 1):
            clock.now += STEP_SECONDS
            log.step(step, item, optimizer(**rates))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == log.history
    return lines


def test_a_line_every_log_steps_and_at_the_end_with_means_of_its_steps(
    tmp_path: Path, clock: Clock, screen: Any
) -> None:
    reports = [report(step, cross_entropy=float(step)) for step in range(1, 6)]
    lines = run_log(tmp_path / "new" / "run", clock, reports, log_steps=2)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [(2, 1.5, 2), (4, 3.5, 4), (5, 5, 5)]
    assert list(lines[0]) == ["step", "loss", "lr", "grad_norm", "tokens_per_s", "images_per_s"]


def test_throughput_counts_what_the_window_processed(tmp_path: Path, clock: Clock, screen: Any) -> None:
    reports = [report(step, cross_entropy=1.0) for step in range(1, 6)]
    for line in run_log(tmp_path, clock, reports, log_steps=2):
        assert line["tokens_per_s"] == pytest.approx(100 / STEP_SECONDS)
        assert line["images_per_s"] == pytest.approx(2 / STEP_SECONDS)


def test_each_term_is_recorded_and_the_total_is_weighted(tmp_path: Path, clock: Clock, screen: Any) -> None:
    losses = {"cross_entropy": 1.0, "focal": {"weight": 0.5, "gamma": 1.0}, "z_loss": 0.1}
    reports = [
        report(1, cross_entropy=2.0, focal=4.0, z_loss=10.0),
        report(2, cross_entropy=4.0, focal=6.0, z_loss=30.0),
    ]
    (line,) = run_log(tmp_path, clock, reports, losses=losses, log_steps=10)
    assert [line[name] for name in losses] == [3.0, 5.0, 20.0]
    assert line["loss"] == pytest.approx(3.0 + 0.5 * 5.0 + 0.1 * 20.0)


def test_numbers_that_terms_recorded_are_means_over_the_rows_of_a_step(
    tmp_path: Path, clock: Clock, screen: Any
) -> None:
    """A step whose batch has none of what a term counts leaves the number out."""
    reports = [report(step, dpo=0.5) for step in range(1, 5)]
    for at, (total, count) in enumerate([(6.0, 2), (3.0, 3), (0.0, 0)]):
        reports[at].metrics["dpo_margin"] = torch.tensor([total, count])
    lines = run_log(tmp_path, clock, reports, losses="dpo", log_steps=3)
    assert [line.get("dpo_margin") for line in lines] == [2.0, None]
    assert list(lines[0]) == ["step", "loss", "dpo_margin", "lr", "grad_norm", "tokens_per_s", "images_per_s"]


def test_a_resumed_window_goes_on_where_it_was(tmp_path: Path, clock: Clock, screen: Any) -> None:
    reports = [report(step, dpo=float(step)) for step in (1, 2, 3)]
    for step, item in enumerate(reports, 1):
        item.metrics["dpo_margin"] = torch.tensor([10.0 * step, 2.0])
    (whole,) = run_log(tmp_path / "whole", clock, reports, losses="dpo", log_steps=3)
    config = TrainConfig(output_dir=str(tmp_path / "cut"), log_steps=3)
    with console.TrainLog(config, Accelerator(), parse_losses("dpo"), 0, 3) as log:
        for step in (1, 2):
            log.step(step, reports[step - 1], optimizer(language=0.1))
        pending = json.loads(json.dumps(log.pending()))
    for losses in ("dpo", "ipo"):
        with console.TrainLog(config, Accelerator(), parse_losses(losses), 2, 3) as log:
            log.restore_window(pending)
            last = report(3, **{losses: 3.0})
            last.metrics["dpo_margin"] = torch.tensor([30.0, 2.0])
            clock.now += STEP_SECONDS
            log.step(3, last, optimizer(language=0.1))
        line = log.history[0]
        if losses == "dpo":
            assert {name: line[name] for name in ("loss", "dpo_margin")} == {"loss": 2.0, "dpo_margin": 10.0}
            assert (whole["loss"], whole["dpo_margin"]) == (2.0, 10.0)
        else:  # another loss starts a window of its own
            assert (line["loss"], line["dpo_margin"]) == (3.0, 15.0)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"language": 0.1, "vision": 0.1}, {"lr": 0.1}),
        ({"language": 0.1, "vision": 0.2}, {"lr_language": 0.1, "lr_vision": 0.2}),
    ],
)
def test_learning_rates_are_named_by_part_where_they_differ(
    rates: dict[str, float], expected: dict[str, float], tmp_path: Path, clock: Clock, screen: Any
) -> None:
    (line,) = run_log(tmp_path, clock, [report(1, cross_entropy=1.0)], rates=rates)
    assert {name: value for name, value in line.items() if name.startswith("lr")} == expected


def test_the_printed_line_holds_step_and_numbers(tmp_path: Path, clock: Clock, screen: io.StringIO) -> None:
    run_log(tmp_path, clock, [report(1, cross_entropy=1.23456)], start=41)
    assert screen.getvalue() == ("step 42/42  loss 1.235  lr 0.1  grad_norm 1  tokens_per_s 200  images_per_s 4\n")


def test_a_resumed_run_keeps_the_lines_before_it_and_drops_those_it_repeats(
    tmp_path: Path, clock: Clock, screen: Any
) -> None:
    run_log(tmp_path, clock, [report(step, cross_entropy=1.0) for step in (1, 2, 3)], log_steps=1)
    kept = [{"step": 1, "loss": 1.0}]
    lines = run_log(tmp_path, clock, [report(2, cross_entropy=7.0)], start=1, log_steps=1, history=kept)
    assert lines[0] == kept[0]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 7.0)]


def test_other_metrics_are_recorded_and_printed(tmp_path: Path, screen: io.StringIO) -> None:
    config = TrainConfig(output_dir=str(tmp_path))
    with console.TrainLog(config, Accelerator(), parse_losses("focal"), 0, 10) as log:
        log.metrics(5, {"exact_match": 0.25})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 5, "exact_match": 0.25}  # at once
    assert screen.getvalue() == "step 5/10  exact_match 0.25\n"
    assert log.history == [{"step": 5, "exact_match": 0.25}]


def test_a_terminal_shows_a_bar_with_time_left_and_the_numbers_below(
    tmp_path: Path, clock: Clock, terminal: io.StringIO
) -> None:
    console.out.width = 80  # in which the numbers alone would not fit
    losses = {"cross_entropy": 1.0, "focal": 0.5, "z_loss": 0.1}
    reports = [report(step, cross_entropy=1.5, focal=2.0, z_loss=3.0) for step in (1, 2)]
    lines = run_log(tmp_path, clock, reports, log_steps=1, losses=losses)
    assert lines[0]["cross_entropy"] == 1.5
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).splitlines()
    assert re.search(r"^training .* 2/2 \d:\d\d:\d\d \d:\d\d:\d\d left", shown[-3])
    assert shown[-2].startswith("loss 2.8  cross_entropy 1.5  focal 2 ") and "images_per_s 4" in shown[-1]


# ---- start-up facts -------------------------------------------------------------------------------------------------


def test_the_part_table_shows_counts_frozen_parts_and_totals(family: Family, screen: io.StringIO) -> None:
    model = family.model()
    parts = hfcustom.find_parts(model)
    frozen = [part for part in ("vision", "connector") if part in family.parts]
    hfcustom.freeze(model, frozen)
    for name, parameter in model.named_parameters():
        if parts.part_of(name) == "language":
            parameter.data = parameter.data.to(torch.bfloat16)
    console.show_parts(model)
    printed = screen.getvalue()
    assert printed.splitlines()[0].strip() == family.model_class.__name__
    lines, parameters = table_of(printed), dict(model.named_parameters())
    for part in ("vision", "language"):
        sizes = [value.numel() for name, value in parameters.items() if parts.part_of(name) == part]
        assert lines[part][2] == f"{sum(sizes):,}"
    assert {lines[part][3] for part in frozen} == {"frozen"}
    assert lines["language"][3] == lines["language"][2]
    assert (lines["vision"][-1], lines["language"][-1]) == ("float32", "bfloat16")
    assert lines["total"][1] == f"{sum(value.numel() for value in parameters.values()):,}"
    assert lines["total"][2] == f"{sum(value.numel() for value in parameters.values() if value.requires_grad):,}"
    size = sum(value.numel() * value.element_size() for value in parameters.values())
    assert float(lines["total"][3]) == pytest.approx(size / 2**20, abs=0.01)


def test_the_part_table_shows_what_trains_at_which_rate_and_the_shapes_of_lora(
    internvl: Family, screen: io.StringIO
) -> None:
    model = hfcustom.lora(
        internvl.model(), ["vision", "language"], rank={"vision": 2, "language": 4}, train=["connector"]
    )
    config = TrainConfig(lr=0.002, connector_lr=0.001, part_weight_decay={"connector": 0.5})
    console.show_parts(model, config=config)
    lines = {line.split()[0]: line for line in screen.getvalue().splitlines() if line.strip()}
    assert lines["part"].split()[-4:] == ["LoRA", "peak", "lr", "decay"]
    assert lines["vision"].endswith("float32  rank 2, alpha 4  0.002    0.01 ")
    assert lines["language"].endswith("float32  rank 4, alpha 8  0.002    0.01 ")
    assert lines["connector"].rstrip().endswith("0.001    0.5") and "rank" not in lines["connector"]
    assert lines["head"].rstrip().endswith("float32")


def test_a_title_takes_the_place_of_the_class_name(internvl: Family, screen: io.StringIO) -> None:
    console.show_parts(internvl.model(), "before [bold]merging[/bold] :cat:")
    assert screen.getvalue().splitlines()[0].strip() == "before [bold]merging[/bold] :cat:"


def test_the_start_shows_seams_image_tokens_and_where_values_came_from(
    internvl: Family, screen: io.StringIO, tmp_path: Path
) -> None:
    class Seamed(internvl.model_class):  # type: ignore[misc, name-defined]
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    (tmp_path / "run.yaml").write_text("batch_size: 4\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--lr", "0.5", "--output-dir", "out/[/x][bold]"]
    config = read(TrainConfig, None, flags)
    console.show_start(internvl.model(Seamed, loss="focal"), internvl.processor, chat_row(2), config)
    printed = screen.getvalue()
    assert "seams in effect: transform_hidden_states, loss 'focal'\n" in printed
    batch = internvl.batch([2])
    tokens, images = batch["input_ids"].shape[1], int((batch["input_ids"] == internvl.processor.image_token_id).sum())
    supervised = int((batch["labels"] != -100).sum())
    assert f"first row: {tokens} tokens, 2 images as {images} of them, {supervised} supervised\n" in printed
    assert printed.splitlines()[-3:] == [
        f"  batch_size = 4  ({tmp_path / 'run.yaml'})",
        "  lr = 0.5  (--lr)",
        "  output_dir = 'out/[/x][bold]'  (--output-dir)",
    ]


def test_a_stock_model_and_a_plain_config_are_told_so(family: Family, screen: io.StringIO) -> None:
    model = family.model()
    console.show_start(model, family.processor, chat_row(1), TrainConfig())
    head = "a plain Linear" if model.loss_head().linear is not None else "called as a module"
    assert "seams in effect: none (stock)\n" in screen.getvalue()
    facts = screen.getvalue().splitlines()
    kernel = "hfcustom's chunked product (hfcustom/losses/chunked.py)"
    at = next(at for at, line in enumerate(facts) if line.startswith("first row: "))
    assert facts[at + 1 : at + 3] == [
        f"losses: cross_entropy; the head is {head}; evaluated by {kernel}",
        "attention: sdpa",
    ]
    stacked, how = len(expert_matrices(model)), model.config.get_text_config()._experts_implementation
    experts = [f"experts: {stacked} stacked matrices, run by {how}; no LoRA and no 8 bits on them"]
    assert facts[at + 3 :] == (experts if stacked else [])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_listed_with_its_options_and_formula(name: str, screen: io.StringIO) -> None:
    console.show_losses()
    line = next(line for line in screen.getvalue().splitlines() if line.split()[:1] == [name])
    assert line.split()[1] == LOSSES[name].kind
    text = " ".join(screen.getvalue().split())
    assert all(option in text for option in LOSSES[name].options())


# ---- tables and stages ----------------------------------------------------------------------------------------------


def test_a_table_aligns_numbers_right_and_rounds_floats(screen: io.StringIO) -> None:
    console.show_table(("name", "count", "share"), [("[red]a[/red]", 7, 0.123456), ("long name", 1234, 250.0)])
    assert [line.rstrip() for line in screen.getvalue().splitlines()] == [
        "name          count   share",
        "[red]a[/red]      7  0.1235",
        "long name      1234     250",
    ]


def test_a_long_cell_is_folded_not_cut(screen: io.StringIO) -> None:
    console.show_table(("modules",), [("x" * 300,)])
    assert sum(line.count("x") for line in screen.getvalue().splitlines()) == 300


def test_stages_are_named_when_they_begin_and_timed(clock: Clock, screen: io.StringIO) -> None:
    stages = console.Stages()
    for name, seconds in (("make rows", 1.5), ("train", 40.0)):
        with stages(name):
            assert screen.getvalue().endswith(f"\n== {name}\n")
            clock.now += seconds
    assert stages.rows() == [("make rows", 1.5), ("train", 40.0), ("total", 41.5)]


def test_a_stage_that_fails_is_not_counted(clock: Clock, screen: io.StringIO) -> None:
    stages = console.Stages()
    with pytest.raises(RuntimeError), stages("train"):
        raise RuntimeError
    assert stages.rows() == [("total", 0)]
