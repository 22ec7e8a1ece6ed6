"""A loss far above those before it is named with its rows; a run may end there, or go back and leave the step out, exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from kills import start, wait
from ranks import free_port, take_part
from torch.nn import functional as F
from training import short_config, uneven_rows, user_losses

import hfcustom
from hfcustom.data.order import step_rows
from hfcustom.exits import EXIT_NUMERIC, exit_codes
from hfcustom.train import TrainResult, fit
from hfcustom.train_config import TrainConfig
from hfcustom.training.spikes import SpikeError, Spikes, limit_of, to_skip

STEPS, BATCH = 8, 2
SPIKE = 6  # the step in which the poisoned row is
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": BATCH,
    "micro_batch_size": 1,
    "save_steps": 2,
    "keep_checkpoints": STEPS,
    "spike_window": 6,
}


@pytest.fixture(scope="module", autouse=True)
def scaled_loss() -> Iterator[None]:
    """A loss that the weight of a row multiplies, and its count does not."""
    with user_losses():

        @hfcustom.token_loss(inputs=("token_weights",), columns=("token_weights",))
        def scaled(logits: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, targets, reduction="none") * token_weights

        yield


def rows_of(poison: float = 1000.0, steps: tuple[int, ...] = (SPIKE,)) -> list[dict[str, Any]]:
    """Return the rows of eight steps; the loss of the first row of some steps counts many times."""
    rows = uneven_rows() + uneven_rows()
    for step in steps:
        rows[step_rows(len(rows), step - 1, BATCH, 0)[0]]["messages"][-1]["weight"] = poison
    return rows


def poisoned(step: int = SPIKE) -> str:
    return f"row {step_rows(16, step - 1, BATCH, 0)[0]}"


def streamed(poison: float) -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(stream_rows, gen_kwargs={"poison": poison})


def stream_rows(poison: float) -> Iterator[dict[str, Any]]:
    """Yield the poisoned row where a stream has that of the sixth step: as the eleventh."""
    rows = uneven_rows() + uneven_rows()
    rows[BATCH * (SPIKE - 1)]["messages"][-1]["weight"] = poison
    yield from rows


def run(folder: Path, rows: Any = None, **options: Any) -> TrainResult:
    evaluate = {name: options.pop(name) for name in ("evaluate",) if name in options}
    model = tiny_run.FAMILY.model(loss=options.pop("loss", "scaled"))
    rows = rows_of() if rows is None else rows
    return fit(model, tiny_run.FAMILY.processor, rows, short_config(folder, **{**OPTIONS, **options}), **evaluate)


def faults_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end_of(folder: Path) -> dict[str, Any]:
    return {**tiny_run.end_of(folder), "state": json.loads((tiny_run.newest(folder) / "spikes.json").read_text())}


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back once."""
    folder = tmp_path_factory.mktemp("spikes") / "run"
    run(folder, on_spike="rewind", ema_decay=0.9)
    return folder


def test_a_spike_is_a_warning_that_names_the_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("hfcustom").propagate = True
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path)
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert told.startswith(f"step {SPIKE}: the loss is ") and told.endswith(f"Look at {poisoned()}.")
    assert "that of the 5 steps before it 5." in told and result.step == STEPS
    (fault,) = faults_of(tmp_path)
    assert fault["kind"] == "spike" and fault["step"] == SPIKE and fault["rows"] == [poisoned()]
    assert "Spike of the loss at step 6" in (tmp_path / "report.html").read_text()


def test_a_run_goes_back_and_leaves_the_step_out_and_says_so(
    rewound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, rows_of(poison=500.0), on_spike="rewind", ema_decay=0.9)
    first, second = end_of(rewound), end_of(tmp_path)
    assert first == second, "the step has left no trace, however large its loss"
    logged = [step for step, *_ in first["losses"]]
    assert logged == [1, 2, 3, 4, 5, 7, 8]
    printed = capsys.readouterr().out
    assert "Going back to step 4; step 6 is skipped (rewind 1 of 3)." in printed
    assert f"step 6 is skipped: {poisoned()}, row " in printed
    kinds = [(fault["kind"], fault["step"]) for fault in faults_of(tmp_path)]
    assert kinds == [("spike", 6), ("rewound", 6)]
    page = (tmp_path / "report.html").read_text()
    assert "Went back from step 6 to step 4; skipped since: 6." in page
    record = json.loads((tmp_path / "model" / "hfcustom.json").read_text())["training"][-1]
    assert poisoned() in record["skipped"]["6"] and len(record["skipped"]["6"]) == BATCH
    assert "Steps that were skipped after a spike of the loss:" in (tmp_path / "model" / "README.md").read_text()
    metrics = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics == logged
    assert first["state"]["skipped"] == record["skipped"] and first["state"]["rewinds"] == 1


@pytest.mark.parametrize("step", [5, 7])
def test_killed_after_going_back_it_resumes_bit_equal(step: int, rewound: Path, tmp_path: Path) -> None:
    """Before the list of what is skipped is in a checkpoint, and after."""
    reached: list[int] = []

    def evaluate(model: Any, now: int) -> dict[str, float]:
        reached.append(now)
        if now == step and (reached.count(5) == 2):
            raise KeyboardInterrupt
        return {}

    options: dict[str, Any] = {"on_spike": "rewind", "ema_decay": 0.9}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, evaluate=evaluate, eval_steps=1, **options)
    run(tmp_path, resume=True, **options)
    assert end_of(tmp_path) == end_of(rewound)


def test_a_stream_goes_back_too(tmp_path: Path) -> None:
    ends = []
    for poison in (1000.0, 500.0):
        folder = tmp_path / str(poison)
        run(folder, streamed(poison), on_spike="rewind", num_workers=1)
        assert [fault["kind"] for fault in faults_of(folder)] == ["spike", "rewound"]
        ends.append(end_of(folder))
    assert ends[0] == ends[1] and list(ends[0]["state"]["skipped"]) == ["6"]


def test_a_run_may_end_there(tmp_path: Path) -> None:
    with pytest.raises(
        SpikeError, match=rf"step 6: .*Look at {poisoned()}\. on_spike=stop.*step-000004; continue"
    ) as told:
        run(tmp_path, on_spike="stop")
    assert told.value.exit_code == EXIT_NUMERIC == 5
    assert tiny_run.newest(tmp_path).name == "step-000004"


def test_it_goes_back_so_often_and_no_more(tmp_path: Path) -> None:
    rows = rows_of(steps=(5, 7))
    with pytest.raises(SpikeError, match=r"step 7: .*gone back 1 times already.*skipped were steps 5\. .*step-000006"):
        run(tmp_path, rows, on_spike="rewind", spike_rewinds=1)


def test_weights_that_an_earlier_step_has_thrown_are_gone_back_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what step 4 did to the weights made every loss after it large: the checkpoint of step 4 has it, too."""
    monkeypatch.setattr(Spikes, "_total", lambda self, step, _: 50.0 if step > 4 and 4 not in self.skipped else 5.0)
    run(tmp_path, uneven_rows() + uneven_rows(), on_spike="rewind")
    told = [(entry["step"], entry["to"], entry["skipped"]) for entry in faults_of(tmp_path) if "to" in entry]
    assert told == [(5, 4, [5]), (6, 2, [4, 5, 6])]
    assert [step for step, *_ in end_of(tmp_path)["losses"]] == [1, 2, 3, 7, 8]
    assert list(end_of(tmp_path)["state"]["skipped"]) == ["4", "5", "6"]


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    with pytest.raises(SpikeError, match=r"step 6: save_steps=7 has left no checkpoint yet to go back to"):
        run(tmp_path, on_spike="rewind", save_steps=7)


def test_two_processes_go_back_together(tmp_path: Path) -> None:
    port = free_port()

    def work(rank: int) -> None:
        take_part(rank, port)
        with exit_codes():
            run(tmp_path / "run", on_spike="rewind", rank_seconds=20.0)

    pids = [start(lambda rank=rank: work(rank), tmp_path / f"rank-{rank}.log") for rank in range(2)]
    codes = [wait(pid) for pid in pids]
    printed = (tmp_path / "rank-0.log").read_text()
    assert codes == [0, 0], printed + (tmp_path / "rank-1.log").read_text()
    assert f"Look at {poisoned()}." in printed and "Going back to step 4; step 6 is skipped" in printed
    (skipped,) = end_of(tmp_path / "run")["state"]["skipped"].values()
    assert len(skipped) == BATCH and poisoned() in skipped


def test_what_a_run_that_goes_back_logs_is_that_of_the_steps_it_took(tmp_path: Path) -> None:
    options = {"on_spike": "rewind", "save_steps": 4, "loss": {"scaled": {"weight": 1.0, "warmup_steps": STEPS}}}
    each = run(tmp_path / "each", rows_of(1e6), log_steps=1, **options).history
    (middle, last) = run(tmp_path / "all", rows_of(1e6), log_steps=6, **options).history
    steps = [entry for entry in each if entry["step"] <= SPIKE]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]  # the sixth is skipped
    assert middle["loss"] == pytest.approx(sum(entry["loss"] for entry in steps) / 5, rel=1e-6)
    assert last["loss"] == pytest.approx(sum(entry["loss"] for entry in each[5:]) / 2, rel=1e-6)


def test_a_step_that_is_skipped_after_a_checkpoint_does_not_hide_the_gradients_norm(tmp_path: Path) -> None:
    options = {"on_spike": "rewind", "save_steps": SPIKE - 1, "log_steps": SPIKE}
    before = run(tmp_path / "before", log_steps=1, max_steps=SPIKE - 1, schedule="constant").history[-1]
    entry = run(tmp_path / "run", max_steps=SPIKE, schedule="constant", **options).history[-1]
    norms = [name for name in before if name.startswith("grad_norm")]
    assert len(norms) > 1 and {name: entry.get(name) for name in norms} == {name: before[name] for name in norms}


def test_what_is_far_is_told_from_what_is_usual() -> None:
    assert limit_of([2.0, 2.1, 1.9, 2.2, 1.8], 10.0) == pytest.approx(2.0 + 10 * 1.4826 * 0.1)
    assert limit_of([2.0, 2.1, 1.9, 2.2, 3.4], 10.0) == pytest.approx(2.1 + 10 * 1.4826 * 0.1)  # for the spread
    assert limit_of([2.0, 2.1, 1.9, 2.2, 9.0], 10.0) == 9.0  # rows of a rare kind are nothing new
    assert limit_of([2.0] * 5, 10.0) == pytest.approx(3.0)  # a loss that hardly moves
    assert limit_of([-2.0] * 5, 10.0) == pytest.approx(-1.0)


def test_what_follows_a_skipped_step_widens_what_is_skipped() -> None:
    assert list(to_skip(37, {})) == [37]
    assert list(to_skip(38, {37: []})) == [36, 37, 38]
    assert list(to_skip(39, {36: [], 37: [], 38: []})) == [*range(33, 40)]
    assert list(to_skip(3, {2: []})) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"on_spike": "stop", "spike_factor": 0.0}, "on_spike=stop has no effect with spike_factor=0"),
        ({"on_spike": "rewind"}, "on_spike=rewind has no checkpoint to go back to without save_steps"),
    ],
)
def test_options_that_cannot_be_are_told(options: dict[str, Any], problem: str) -> None:
    assert TrainConfig(**options).problems() == [problem]
