"""Findings: their line in bad_rows.jsonl, and the rows that are left out by such a list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_corpus import row

from hfcustom.data.findings import Finding, find_excluded
from hfcustom.data.messages import RowError, read_row

NAMES = ["a.jsonl, line 1", "a.jsonl, line 2", "a.jsonl, line 4"]


def write(path: Path, *lines: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        ({**row(), "images": []}, "image_count", "message 0"),
        (row(answer=" "), "empty_answer", "message 1"),
        (row(image={"path": "no.png"}), "outside", "image 0"),
        (row(question=1.5), "content", "message 0, block 1"),
        ("words", "form", ""),
    ],
)
def test_a_finding_has_the_field_and_the_code_of_its_error(bad: object, code: str, field: str) -> None:
    with pytest.raises(RowError) as caught:
        read_row(bad, "a: b, line 7")  # type: ignore[arg-type]
    found = Finding.of(caught.value, "a: b, line 7")
    assert (found.code, found.field, found.severity) == (code, field, "error")
    assert json.loads(found.to_json(set="train")) == {**vars(found), "set": "train"}


def test_what_stands_in_a_row_cannot_write_to_a_terminal() -> None:
    with pytest.raises(RowError) as caught:
        read_row({"messages": [{"role": "\x1b[31m\u202e\ud83d" + "x" * 10_000, "content": ""}]}, "row 0")
    reason = str(caught.value)
    assert r"\x1b[31m\u202e\ud83d" in reason and len(reason) < 9000
    assert all(char.isprintable() for char in reason)


def test_errors_of_training_rows_are_excluded_and_nothing_else(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        {"row": NAMES[2], "reason": "a run wrote it"},
        {"row": NAMES[1], "reason": "drawn twice", "severity": "warning"},
        {"row": NAMES[0], "reason": "held out", "severity": "error", "set": "eval"},
    )
    assert find_excluded(path, NAMES) == {2: "a run wrote it"}


def test_a_list_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="exclude=none.jsonl: there is no such file; `hfcustom preflight` writes"
    ):
        find_excluded("none.jsonl", NAMES)
    other = write(tmp_path / "other.jsonl", {"row": "b.jsonl, line 1", "reason": ""}, {"row": NAMES[0], "reason": ""})
    with pytest.raises(
        ValueError, match=r"1 of its 2 rows are none of the data \(b.jsonl, line 1\), whose first row is a"
    ):
        find_excluded(other, NAMES)
    everything = write(tmp_path / "all.jsonl", *({"row": name, "reason": ""} for name in NAMES))
    with pytest.raises(ValueError, match="names all 3 rows, so there is nothing to train on"):
        find_excluded(everything, NAMES)
    with pytest.raises(ValueError, match="names a.jsonl, line 4, which 2 rows of the data are called"):
        find_excluded(write(tmp_path / "one.jsonl", {"row": NAMES[2], "reason": ""}), [*NAMES, NAMES[2]])
    (tmp_path / "bad.jsonl").write_text('{"row": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: '\{\"row\": 3\}' is no"):
        find_excluded(str(tmp_path / "bad.jsonl"), NAMES)
