"""The benchmark's scripts: help at once, mistakes named, and a smoke run whose variants agree. Nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import BENCHMARKS, ROOT

SCRIPTS = ("profile_step", "training_step")
HAS_TRL = importlib.util.find_spec("trl") is not None


def script(name: str, *arguments: str, start: Any = forked.run) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return start(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_mistake_answer_before_torch_is_imported(name: str) -> None:
    done = script(name, "--help", start=subprocess.run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--task" in done.stdout
    done = script(
        name, "--variants" if name == "training_step" else "--variant", "our", "--threads", "0", start=subprocess.run
    )
    assert done.returncode == 3
    assert "Unknown variant 'our'. Did you mean 'ours'?" in done.stderr
    assert "threads=0 must be positive" in done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on the tiny task writes."""
    folder = tmp_path_factory.mktemp("benchmark")
    variants = ["stock", "trainer", "trl", "trl_good", "ours", "ours_packed", "ours_cached"]
    options = ["--task", "tiny", "--rounds", "1", "--device", "cpu", "--groups", "full-cross_entropy", "lora-focal"]
    done = script(
        "training_step", *options, "--variants", *variants, "--output-dir", str(folder), start=subprocess.run
    )
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "workers.log").read_text()
    assert (folder / "results.png").stat().st_size > 10_000
    found = json.loads((folder / "results.json").read_text())
    for group in found["groups"]:
        assert [row["variant"] for row in group["variants"]] == variants  # none is left out
        assert f"{group['group']} (1x is trainer)" in done.stdout
    return found


def test_results_say_where_and_how_they_were_measured(results: dict[str, Any]) -> None:
    machine = results["machine"]
    assert {
        "date",
        "command",
        "processor",
        "cores",
        "threads",
        "device",
        "dtype",
        "packages",
        "task",
    } <= machine.keys()
    assert machine["packages"]["torch"]
    assert machine["task"]["tokens"] < machine["task"]["padded"]
    assert [group["group"] for group in results["groups"]] == ["full-cross_entropy", "lora-focal"]
    assert all(rate > 0 for group in results["groups"] for rate in group["limit_gflops"].values())


def test_variants_that_ran_agree_and_the_others_say_why_not(results: dict[str, Any]) -> None:
    for group in results["groups"]:
        rows = {row["variant"]: row for row in group["variants"]}
        missing = {name for name, row in rows.items() if row["status"] != "measured"}
        trained = set() if group["lora"] else {"ours_cached"}  # the tower is
        lacking = {"stock"} if group["objective"] == "focal" else set()
        assert missing == lacking | trained | (set() if HAS_TRL else {"trl", "trl_good"})
        for name, row in rows.items():
            if name in missing:
                assert row["status"].startswith(("not available: ", "not installed: pip install trl"))
                continue
            assert row["agrees"] is True, row
            assert row["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-5)
            assert row["gradient_distance"] < 1e-4
            assert row["grad_norm"] > 0
            assert row["cpu_s"] > 0 and 0 < row["share_of_limit"] < 1
            assert row["memory_gb"] >= 0
            assert len(row["steps"]) == 1


def test_growth_is_measured_for_stock_and_ours(results: dict[str, Any]) -> None:
    for axis in ("vocabulary", "length"):
        points = results["scaling"][axis]
        assert {row["variant"] for row in points} == {"stock", "ours"}
        assert all(row["status"] == "measured" and row["memory_gb"] >= 0 for row in points)


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results
    import rounds

    first, same, other = (rounds.Measured(name, loss=2.0, grad_norm=0.5) for name in ("stock", "trainer", "ours"))
    first.sketch = same.sketch = {"head": [3.0, 4.0], "embedding": [0.0, 1e-3]}
    other.sketch = {"head": [3.0, 4.0], "embedding": [0.0, 2e-3]}
    rounds.compare([first, same, other], judge=True)
    assert (first.agrees, same.agrees, other.agrees) == (True, True, False)
    assert other.gradient_distance == pytest.approx(2e-4, rel=1e-3)
    rows = [measured.as_json() for measured in (first, same, other)]
    found = results.failures({"groups": [{"group": "full-focal", "variants": rows}]})
    assert found == ["full-focal: ours disagrees (worst: embedding)"]


def test_every_variant_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import about
    import results
    import variants

    assert variants.VARIANTS.keys() == about.ABOUT.keys() == results.COLORS.keys()
    text = Path(BENCHMARKS / "README.md").read_text()
    assert not [name for name in about.ABOUT if f"`{name}`" not in text]


SMALL = {
    "cache": (
        ["--task", "tiny", "--layers", "2", "--images", "2", "--side", "60"],
        ("no", "cache_images", "cache_features", "computed", "cached"),
    ),
    "cross_entropy": (
        ["--tokens", "40", "--hidden-size", "8", "--vocabulary", "50"],
        ("chunked", "torch", "liger", "cce"),
    ),
    "experts": (
        ["--tokens", "16", "--hidden-size", "32", "--intermediate-size", "32"],
        ("eager", "batched_mm", "grouped_mm"),
    ),
    "frames": (["--frames", "6", "--k", "2", "--encoder", "tiny"], ("cross_correlation", "embedding")),
    "scale": (["--rows", "200", "--copies", "0.5"], ("collated", "preflight", "stream")),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_benchmarks_name_every_way(name: str) -> None:
    options, ways = SMALL[name]
    done = script(name, *options, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} >= set(ways)
    wrong = script(name, "--rounds", "0")
    assert (wrong.returncode, wrong.stdout) == (3, "") and "rounds=0 must be positive" in wrong.stderr
