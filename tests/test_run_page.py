"""The files of a run and the page made of them: true, safe, and of a resumed run as of one that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from test_report import HOSTILE, Page
from training import short_config, uneven_rows

import hfcustom
from hfcustom import evaluate
from hfcustom.curves import MOST, chart, thin
from hfcustom.data.messages import Example
from hfcustom.evaluate import Answer
from hfcustom.losses import NonFiniteError
from hfcustom.runs import files as run_files
from hfcustom.runs.files import keep_samples, note_fault, read_lines, read_object
from hfcustom.runs.page import SENTENCES, group_curves, tell_fault, write_run_page

SPEED = ("tokens_per_s", "images_per_s")


def run(family: Family, folder: Path, **options: Any) -> Any:
    """Train four steps with an evaluation by generation every two and a checkpoint after each; stop where told."""
    stop_after = options.pop("stop_after", None)
    config = short_config(folder, **{"max_steps": 4, "eval_steps": 2, "save_steps": 1, **options})

    def evaluation(model: Any, step: int) -> dict[str, float]:
        answers = hfcustom.generate_answers(model, family.processor, [chat_row(1), chat_row(0)], max_new_tokens=3)
        keep_samples(folder, step, answers)
        if step == stop_after:
            raise RuntimeError("pulled the plug")
        return {"exact_match": evaluate.exact_match(answers)}

    torch.manual_seed(0)
    return hfcustom.fit(family.model(), family.processor, uneven_rows(), config, evaluate=evaluation)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def words_of(folder: Path) -> str:
    return " ".join(" ".join(page_of(folder).words).split())


def test_a_run_leaves_a_page_with_curves_answers_parts_and_options(internvl: Family, tmp_path: Path) -> None:
    run(internvl, tmp_path)
    page, words = page_of(tmp_path), words_of(tmp_path)
    assert {"loss", "learning rate", "gradient norm", "tokens per second", "exact_match"} <= set(
        page.values("aria-label")
    )
    assert "step 4 of 4" in words and "model.vision_tower" in words and "'save_steps'" not in words
    options = read_object(tmp_path / "run.json")["options"]
    assert options["save_steps"] == 1 and "save_steps" in words and "output_dir" not in words
    samples = read_lines(tmp_path / "samples.jsonl")
    assert [entry["step"] for entry in samples] == [2, 4]
    assert all(entry["rows"][0]["truth"] in words for entry in samples)
    assert len(page.images()) == 1 and max(page.images()[0].size) <= run_files.THUMBNAIL
    assert words.count("Faults met None.") == 1
    assert not {"script", "link", "iframe", "object", "embed", "form", "a"} & set(page.tags)


def test_a_resumed_run_has_the_page_of_an_unbroken_one_but_for_faults_and_speed(
    internvl: Family, tmp_path: Path
) -> None:
    run(internvl, tmp_path / "unbroken" / "run")
    cut = tmp_path / "cut" / "run"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(internvl, cut, stop_after=4)
    assert "Ended by an error after step 4: RuntimeError: pulled the plug" in words_of(cut)
    assert [entry["step"] for entry in read_lines(cut / "samples.jsonl")] == [2, 4]
    run(internvl, cut, resume=True)
    assert "Resumed after step 3; the attempt before it had logged up to step 4." in words_of(cut)
    for folder in (cut, tmp_path / "unbroken" / "run"):
        (folder / "faults.jsonl").unlink(missing_ok=True)
        lines = [{k: v for k, v in line.items() if k not in SPEED} for line in read_lines(folder / "metrics.jsonl")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        facts = read_object(folder / "run.json")
        facts["options"]["output_dir"] = facts["seconds"] = None
        (folder / "run.json").write_text(json.dumps(facts))
        write_run_page(folder)
    pages = [(tmp_path / name / "run" / "report.html").read_text() for name in ("cut", "unbroken")]
    assert pages[0] == pages[1]


def test_a_run_that_starts_afresh_forgets_the_one_before(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(internvl, tmp_path, stop_after=4)
    run(internvl, tmp_path, overwrite=True, max_steps=2)
    assert [entry["step"] for entry in read_lines(tmp_path / "samples.jsonl")] == [2]
    assert not (tmp_path / "faults.jsonl").exists()


def test_a_loss_that_is_no_number_is_on_the_page(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        hfcustom.fit(model, internvl.processor, uneven_rows(), short_config(tmp_path))
    assert "Ended by an error after step 0: NonFiniteError: The gradient's norm is nan" in words_of(tmp_path)


@pytest.mark.parametrize("kind", [*sorted(SENTENCES), "drifting labels"])
def test_every_kind_of_fault_is_told_with_its_step_and_time(kind: str, tmp_path: Path) -> None:
    note_fault(tmp_path, kind, step=7, text="step 8: 9.1", rows=["a, line 1", "a, line 2"], checkpoint="c", error="e")
    write_run_page(tmp_path)
    (entry,) = read_lines(tmp_path / "faults.jsonl")
    words = words_of(tmp_path)
    assert f"when after step what {entry['time']} 7 {tell_fault(entry)}" in words
    if kind not in SENTENCES:
        told = "Drifting labels. step 8: 9.1 rows: a, line 1, a, line 2; checkpoint: c; error: e"
        assert tell_fault(entry) == told


def test_a_checkpoint_that_was_set_aside_is_told_once(internvl: Family, tmp_path: Path) -> None:
    for name in ("checkpoints/damaged-step-000004", "checkpoints/step-000003"):
        (tmp_path / name).mkdir(parents=True)
    for _ in range(2):
        (tmp_path / "run.json").write_text('{"seconds": 1}')
        files = run_files.RunFiles(short_config(tmp_path, resume=True), 3, 6)
        files.begin(internvl.model(), ["cross_entropy"])
        files.end(6, None)
    assert words_of(tmp_path).count("damaged-step-000004 was found damaged and set aside.") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_of_rows_answers_and_errors_are_text(text: str, tmp_path: Path) -> None:
    pages = []
    for name, said in (("harmless", "plain"), ("hostile", text)):
        folder = tmp_path / name
        keep_samples(folder, 1, [Answer(Example([], [picture(0)], said), said, said, "other")])
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, said: 1.0, "loss/x": float("nan")}) + "\n{half")
        (folder / "faults.jsonl").write_text(json.dumps({"kind": "stopped", "step": 1, "error": said}) + "\n")
        (folder / "bad_rows.jsonl").write_text(json.dumps({said: said}) + "\n")
        facts = {"model": said, "losses": [said], "options": {said: said}, "changed": [said], "parts": [{said: said}]}
        (folder / "run.json").write_text(json.dumps(facts))
        write_run_page(folder)
        pages.append(page_of(folder))
    assert pages[0].tags == pages[1].tags
    assert [name for name, _ in pages[0].attributes] == [name for name, _ in pages[1].attributes]
    assert "".join(pages[1].words).count(text) >= 6


def test_a_picture_is_read_from_the_folder_of_the_run_only(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "secret.png")
    rows = [{"name": "a", "question": "q", "truth": "t", "answer": "a", "images": ["../secret.png", "absent.png"]}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps({"step": 1, "rows": rows}) + "\n")
    write_run_page(tmp_path / "run")
    assert page_of(tmp_path / "run").images() == []


def test_equal_answers_in_a_row_are_told_once(tmp_path: Path) -> None:
    for step, said in ((1, "a"), (2, "a"), (3, "b")):
        keep_samples(tmp_path, step, [Answer(Example([], [], "row"), "which?", said, "b")])
    words = words_of(tmp_path)
    assert "steps 1 to 2: a" in words and "step 3: b" in words


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run_files, "write_text", full)
    monkeypatch.setattr("hfcustom.runs.page.Report.write", full)
    assert run(internvl, tmp_path).step == 4


def test_curves_group_parts_sources_and_weighted_shares() -> None:
    line = {"step": 2, "loss": 1.0, "z": 2.0, "z_weighted": 0.1, "lr_vision": 0.1, "lr_head": 0.2, "grad_norm": 1.0}
    groups = group_curves([line | {"grad_norm_head": 0.5, "tokens/a.jsonl": 0.3, "exact_match/a": 0.1, "ok": True}])
    assert {title: list(lines) for title, lines in groups.items()} == {
        "loss": ["loss"],
        "z": ["z"],
        "z_weighted": ["z_weighted"],
        "learning rate": ["vision", "head"],
        "gradient norm": ["all parts", "head"],
        "share of the tokens": ["a.jsonl"],
        "exact_match": ["a"],
    }


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(step, 1.0 if step != 7777 else 99.0) for step in range(20000)]
    kept = thin(points)
    assert len(kept) <= 2 * MOST and (7777, 99.0) in kept and (kept[0], kept[-1]) == (points[0], points[-1])


@pytest.mark.parametrize("points", [[], [(1, float("nan"))]])
def test_no_finite_point_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert chart("loss", {"run": points}) == ""


@pytest.mark.parametrize("points", [[(3, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -1e9), (2, 1e9)], [(1, 1e-9), (2, 1e3)]])
def test_a_chart_stays_in_its_frame(points: list[tuple[float, float]]) -> None:
    drawn = chart("loss", {"run": points})
    assert "nan" not in drawn and "inf" not in drawn and ("<circle" in drawn or "<polyline" in drawn)
