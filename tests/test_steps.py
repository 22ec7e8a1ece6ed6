"""Rows that cannot be used: left out of their step, named once, too many of them stop the run; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_corpus import encode
from conftest import Family, picture
from training import curve, relative_distance, train, uneven_rows, weights

from hfcustom.data.messages import RowError
from hfcustom.data.order import step_rows
from hfcustom.data.sources import Examples
from hfcustom.data.steps import TooManyBadRows

UNREADABLE = {"messages": [{"role": "user", "content": "no answer follows"}]}
SKIP: dict[str, Any] = {"on_bad_row": "skip", "max_bad_share": 1.0}


def with_bad_rows() -> list[dict[str, Any]]:
    """Return eight good rows and four bad ones: no mapping, a missing image, nothing to learn, too long."""
    bad: list[Any] = ["text", {**uneven_rows()[0], "images": []}, UNREADABLE, uneven_rows([0], [400])[0]]
    rows = uneven_rows()
    for at, row in zip((0, 3, 7, 11), bad, strict=True):
        rows.insert(at, row)
    return rows


def run(family: Family, folder: Path, rows: list[Any], **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = family.model()
    result = train(model, family, folder, rows, max_length=300, batch_size=len(rows), **options)
    return weights(model), curve(result)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4, "num_workers": 2}, {"micro_batch_size": 1}], ids=str)
def test_a_run_with_bad_rows_ends_where_one_without_them_does(
    internvl: Family, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    start = weights(internvl.model())
    clean, clean_losses = run(internvl, tmp_path / "clean", uneven_rows())
    found, losses = run(internvl, tmp_path / "bad", with_bad_rows(), **SKIP, **options)
    assert losses == pytest.approx(clean_losses, rel=1e-5)
    assert relative_distance(found, clean, start) < 1e-3
    lines = [json.loads(line) for line in (tmp_path / "bad" / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == ["row 0", "row 11", "row 3", "row 7"]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert all(reason.startswith(row) for row, reason in reasons.items())
    assert "max_length=300" in reasons["row 11"] and "images" in reasons["row 3"]
    assert capsys.readouterr().out.count("left out: row 7") == 1  # though three steps met it


def test_too_many_bad_rows_stop_the_run_and_are_named(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(TooManyBadRows, match=r"4 of 12 rows cannot be used, more than max_bad_share=0.25[^$]*row 0"):
        run(internvl, tmp_path, with_bad_rows(), on_bad_row="skip", max_bad_share=0.25)
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 4


def test_by_default_a_bad_row_is_an_error(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="row 0"):
        run(internvl, tmp_path, with_bad_rows())


def test_rows_of_which_none_can_be_read_are_an_error(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(TooManyBadRows, match="None of the 2 rows can be read.*row 0"):
        run(internvl, tmp_path, ["one", "two"], **SKIP)


def test_a_step_without_a_usable_row_changes_no_weight(internvl: Family, tmp_path: Path) -> None:
    rows = [uneven_rows([0], [1])[0], UNREADABLE]
    options = {"batch_size": 1, "weight_decay": 0.5, "schedule": "constant"}
    twice, once = internvl.model(), internvl.model()
    result = train(twice, internvl, tmp_path / "twice", rows, max_steps=2, **SKIP, **options)
    train(once, internvl, tmp_path / "once", rows[:1], max_steps=1, **options)
    assert result.step == 2 and len(curve(result)) == 1  # no line for the step of the bad row
    assert all(torch.equal(a, b) for a, b in zip(weights(twice).values(), weights(once).values(), strict=True))


def test_a_resumed_run_names_no_row_twice(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ({"max_steps": 1}, {"max_steps": 2, "resume": True}):
        train(internvl.model(), internvl, tmp_path, [*uneven_rows()[:2], UNREADABLE], batch_size=3, **SKIP, **options)
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 1
    assert capsys.readouterr().out.count("left out") == 1


def test_frames_that_are_dropped_are_named_once_and_rows_of_another_kind_are_left_out(
    internvl: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = uneven_rows()
    frames = [picture(at, (60, 40)) for at in range(3)]
    rows[2]["images"][1] = encode(frames[0], save_all=True, append_images=frames[1:])
    pair = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    options = {"batch_size": 9, "micro_batch_size": 3, "on_bad_row": "skip", "max_bad_share": 0.2}
    with caplog.at_level("WARNING", logger="hfcustom"):
        result = train(internvl.model(), internvl, tmp_path, [*rows, pair], **options)
    assert len(curve(result)) == 3
    told = [record.message for record in caplog.records if "frames" in record.message]
    assert told == ["row 2, image 1: 3 frames, of which the first is used and the others are dropped."]
    line = json.loads((tmp_path / "bad_rows.jsonl").read_text())
    assert line["code"] == "kind" and line["reason"].startswith("row 8 is a pair")
    with pytest.raises(RowError, match="row 8 is a pair.* but the first row is an ordinary row"):
        train(internvl.model(), internvl, tmp_path / "strict", [*rows, pair], batch_size=9, micro_batch_size=1)


def test_a_resumed_run_reads_no_row_of_the_steps_it_skips(internvl: Family, tmp_path: Path) -> None:
    read: list[int] = []

    class Watched(Examples):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    rows = Watched(uneven_rows())
    options = {"batch_size": 2, "schedule": "constant"}
    train(internvl.model(), internvl, tmp_path, rows, max_steps=3, **options)
    assert len(read) == 1 + 6  # the first row says which columns there are
    read.clear()
    train(internvl.model(), internvl, tmp_path, rows, max_steps=4, resume=True, **options)
    assert read == [0, *step_rows(8, 3, 2, seed=0)]


def test_a_row_that_is_excluded_is_not_read_and_does_not_count_as_bad(internvl: Family, tmp_path: Path) -> None:
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps({"row": "row 0", "reason": "seen by preflight"}) + "\n")
    options = {"batch_size": 9, "exclude": str(listed), "on_bad_row": "skip", "max_bad_share": 0.0}
    result = train(internvl.model(), internvl, tmp_path / "run", ["no row", *uneven_rows()], **options)
    assert result.step == 3 and not (tmp_path / "run" / "bad_rows.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="exclude=nowhere.jsonl"):
        train(internvl.model(), internvl, tmp_path / "none", uneven_rows(), exclude="nowhere.jsonl")
