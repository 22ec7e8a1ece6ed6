"""`hfcustom runs`: the newest and best numbers of runs, and what was set differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

from hfcustom.cli import main


def write_run(folder: Path, losses: list[float], scores: list[float] = (), **options: Any) -> None:  # type: ignore[assignment]
    folder.mkdir(parents=True)
    lines = [{"step": at, "loss": loss, "tokens_per_s": 100.0 * at} for at, loss in enumerate(losses, start=1)]
    lines += [{"step": at, "exact_match": score} for at, score in enumerate(scores, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        "losses": ["loss"],
        "steps": 9,
        "seconds": 12.4,
        "options": {"lr": 0.1, "output_dir": str(folder), **options},
    }
    (folder / "run.json").write_text(json.dumps(facts))


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "a", [3.0, 1.0, 2.0], [0.5, 0.75, 0.25], seed=1)
    write_run(tmp_path / "runs" / "b", [4.0, float("nan")], lr=0.2, seed=1)
    return tmp_path / "runs"


def test_a_folder_of_runs_is_a_table_and_what_differs(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(two_runs)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3/9 12 0 2 (1 at 2) 0.25 (0.75 at 2) 200" in printed
    assert "2/9 12 0 nan (4 at 1)" in printed
    assert "Options that differ" in printed and "lr 0.1 0.2" in printed
    assert "seed" not in printed and "output_dir" not in printed


def test_rows_left_out_speeds_and_the_peak_of_memory_are_compared(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (two_runs / "a" / "bad_rows.jsonl").write_text('{"row": "x"}\n' * 3)
    with (two_runs / "a" / "metrics.jsonl").open("a") as log:
        log.write(
            '{"step": 4, "loss": 1.5, "mfu": 0.25, "peak_gib": 2.0}\n{"step": 5, "mfu": 0.75, "peak_gib": 3.0}\n'
        )
    assert main(["runs", str(two_runs)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[:1] == ["a"])[3:5] == ["0", "3"]
    assert next(line for line in lines if line[:1] == ["a"])[-2:] == ["0.5", "3"]


def test_json_is_strict_and_holds_every_number(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(two_runs / "b"), str(two_runs / "a"), str(two_runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    a, b = str(two_runs / "a"), str(two_runs / "b")
    assert list(found["runs"]) == [b, a]  # as named, each once
    assert found["runs"][a]["numbers"]["loss"] == {
        "last": 2.0,
        "lowest": {"value": 1.0, "step": 2},
        "highest": {"value": 3.0, "step": 1},
        "mean": 2.0,
    }
    assert found["runs"][b]["numbers"]["loss"]["last"] is None
    assert found["differ"] == {"lr": {b: 0.2, a: 0.1}}


def test_the_page_has_a_line_a_run_and_no_script(two_runs: Path, tmp_path: Path) -> None:
    assert main(["runs", str(two_runs), "--html", str(tmp_path / "runs.html")]) == 0
    page = Page((tmp_path / "runs.html").read_text())
    assert page.values("aria-label") == ["loss", "tokens_per_s", "exact_match"]
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert page.tags.count("polyline") + page.tags.count("circle") == 2 + 2 + 1


def test_a_run_of_which_only_the_log_is_left_is_compared(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two_runs / "a" / "run.json").unlink()
    (two_runs / "b" / "run.json").write_text("{half")
    assert main(["runs", str(two_runs)]) == 0
    assert "3/?" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "problem"), [("empty", "holds no run"), ("absent", "is no folder")])
def test_no_run_is_an_error_that_says_what_to_name(
    name: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / name} {problem}: name the output_dir of a training" in said
