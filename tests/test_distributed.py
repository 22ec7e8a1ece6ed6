"""Two processes train as one does: losses, weights, the same stop, one writer. All runs share one torchrun."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_run
import forked
import pytest
import torch
from conftest import RECIPES, ROOT
from distributed_run import CASES, EVALUATIONS, GROWN, MIXED, evaluated, mixed_steps, run
from loss_cases import assert_same_gradients, batch_of, family_of, gradients, model_of
from training import TERMS, relative_distance, user_losses

from hfcustom import train
from hfcustom.losses import LOSSES

Folders = tuple[Path, dict[str, Any], str]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two_ranks(folder: Path, script: str, code: int = 0) -> str:
    """Do what torchrun() does in two processes that are forked, the first of which to end does so with a code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forked.run_ranks([sys.executable, ROOT / "tests" / script, folder], 2, free_port(), environment)
    assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def torchrun(folder: Path, script: str = "distributed_run.py") -> str:
    """Run a file of tests/ in two processes; return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", free_port()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += [ROOT / "tests" / script, folder]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Train every case in this process, then in two."""
    folder = tmp_path_factory.mktemp("distributed")
    with user_losses():
        alone = {name: run(case, folder / name / "alone") for name, case in CASES.items()}
    alone["evaluated"] = evaluated()
    alone["mixed"] = mixed_steps()
    alone["grown"] = run(GROWN, folder / "grown" / "alone")
    run(GROWN, folder / "grown" / "out", max_steps=2)
    return folder, alone, torchrun(folder)


def ranks(runs: Folders, case: str, name: str = "rank") -> list[dict[str, Any]]:
    return [torch.load(runs[0] / case / f"{name}-{rank}.pt") for rank in range(2)]


def logged(result: dict[str, Any], *names: str) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in result["history"] if "loss" in entry]


def same_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first["end"][name], second["end"][name]) for name in first["end"])


@pytest.mark.parametrize("case", [*CASES, "grown"])
def test_losses_gradient_norms_and_weights_are_those_of_one_process(runs: Folders, case: str) -> None:
    alone, (first, second) = runs[1][case], ranks(runs, case)
    names = [name for name in alone["history"][0] if name in ("loss", *TERMS) or name.startswith("grad_norm")]
    by_part = [name for name in names if name.startswith("grad_norm_")]
    assert len(names) - len(by_part) == (5 if "terms" in case else 2)
    assert "grad_norm_connector" in by_part or case != "AdamW with clipping"  # SGD here has one group
    for expected, found in zip(logged(alone, *names), logged(first, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert relative_distance(first["end"], alone["end"], alone["start"]) < 1e-4
    assert same_weights(first, second)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_is_evaluated_on_two_ranks_is_what_one_finds(runs: Folders, name: str) -> None:
    first, second = ranks(runs, "evaluated")
    assert first[name] == second[name] == runs[1]["evaluated"][name]
    worked = [found["worked on"] for found in (first, second)]
    assert worked == [[0, 2, 4], [1, 3]]  # a batch each, by turns


@pytest.mark.parametrize("trained", ["in full", "with LoRA"])
@pytest.mark.parametrize("name", MIXED)
def test_a_rank_of_text_alone_waits_for_nobody_and_changes_nothing(runs: Folders, name: str, trained: str) -> None:
    for rank in range(2):
        found = torch.load(runs[0] / f"mixed-{rank}.pt")[f"{name} {trained}"]
        assert found == pytest.approx(runs[1]["mixed"][f"{name} {trained}"], rel=1e-5)


def test_processes_leave_each_other_before_the_interpreter_goes(runs: Folders) -> None:
    """What torch's threads do after that ends in a crash now and then."""
    assert [torch.load(runs[0] / f"connected-{rank}.pt") for rank in range(2)] == [False, False]


def test_mfu_is_that_of_all_ranks(runs: Folders) -> None:
    """Each counts what it does itself, against its own device; all log the mean, over seconds of their own."""
    shares = [
        [line["mfu"] / line["tokens_per_s"] for line in result["history"] if "mfu" in line]
        for result in ranks(runs, "unequal rows, micro-batches of 2")
    ]
    assert len(shares[0]) == 3 and min(shares[0]) > 0
    assert shares[0] == pytest.approx(shares[1])


def test_numbers_that_terms_record_are_means_over_all_ranks(runs: Folders) -> None:
    alone, (first, _) = runs[1]["preferences"], ranks(runs, "preferences")
    names = ("dpo_margin", "dpo_accuracy")
    expected = logged(alone, *names)
    assert len(expected) == 3 and any(margin for margin, _ in expected)
    for want, found in zip(expected, logged(first, *names), strict=True):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_of_two_processes_is_that_of_one(runs: Folders, name: str) -> None:
    both = torch.load(runs[0] / "every-loss-0.pt")[name]
    model, batch = model_of(name, family_of(name)), batch_of(name, family_of(name))
    loss = model(**batch).loss
    loss.backward()
    assert float(both.pop("value")) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(both, gradients(model), rtol=1e-3)


def test_a_row_that_one_rank_has_no_memory_for_is_left_out_or_ends_the_run_on_both(runs: Folders) -> None:
    first, second = (torch.load(runs[0] / f"too-large-{rank}.pt") for rank in range(2))
    assert first == second
    assert first["skip"].startswith("2 steps")
    lines = (runs[0] / "skip" / "bad_rows.jsonl").read_text().splitlines()
    assert lines and {json.loads(line)["code"] for line in lines} == {"memory"}
    assert re.match(r"Memory ran out at a micro-batch of 1 x \d+ tokens, .* \(row \d+\), on rank 1", first["error"])


def test_what_is_compared_would_show_a_gradient_averaged_over_ranks(runs: Folders) -> None:
    """SGD's weights tell half the gradient from the whole, and the ranks' equal ends do not come from equal starts."""
    alone = runs[1]["unequal rows"]
    halved = {name: (start + alone["end"][name]) / 2 for name, start in alone["start"].items()}
    assert relative_distance(halved, alone["end"], alone["start"]) > 0.9
    first, second = ranks(runs, "unequal rows")
    assert any(not torch.equal(first["start"][name], second["start"][name]) for name in first["start"])


def test_all_ranks_stop_when_one_is_asked_to(runs: Folders) -> None:
    for result in ranks(runs, "stopped"):
        assert (result["step"], result["interrupted"]) == (2, True)


def test_a_stopped_run_resumes_to_the_weights_of_an_unbroken_one(runs: Folders) -> None:
    for resumed, unbroken in zip(ranks(runs, "stopped", "resumed"), ranks(runs, "unbroken"), strict=True):
        assert not resumed["interrupted"]
        assert logged(resumed, "loss", "grad_norm") == logged(unbroken, "loss", "grad_norm")
        assert same_weights(resumed, unbroken)


def test_a_run_of_one_process_resumes_on_two_and_says_what_changes(runs: Folders) -> None:
    assert "Ranks then: 1, now: 2." in runs[2]


def test_each_line_is_printed_and_written_once(runs: Folders) -> None:
    folder, _, output = runs
    lines = (folder / "unequal rows" / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == [1, 2, 3]
    printed = [line for line in output.splitlines() if line.startswith("step 1/") and "loss" in line]
    # and the one with a row too large, `stopped` and `unbroken`; `forbid_writing` makes a write by rank 1 an error
    assert len(printed) == len(CASES) + 3
    assert output.count("Resuming from") == 2


def test_each_rank_saves_its_own_random_state(runs: Folders) -> None:
    checkpoints = runs[0] / "stopped" / "out" / "checkpoints"
    files = [(checkpoints / "step-000002" / f"rng-{rank}.safetensors").read_bytes() for rank in range(2)]
    assert files[0] != files[1]


def test_processes_that_accelerate_does_not_see_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"2 processes were launched, but Accelerate counts 1.*accelerate launch --cpu"
    ):
        train.make_accelerator(distributed_run.short_config(tmp_path))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_ask_for_the_process_state_that_knows_cpus(recipe: Path) -> None:
    """A bare PartialState() before fit() makes each of several CPU processes believe that it is alone."""
    calls = [node.func for node in ast.walk(ast.parse(recipe.read_text())) if isinstance(node, ast.Call)]
    assert "PartialState" not in {call.id for call in calls if isinstance(call, ast.Name)}
