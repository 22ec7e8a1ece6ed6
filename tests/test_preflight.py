"""hfcustom preflight, and a planted corpus: what it says of each row is what training does with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_corpus import MAX_LENGTH, TOO_LONG, Corpus, png, row, write_corpus
from conftest import FAMILIES, KINDS, Family, picture
from PIL import Image
from training import curve, relative_distance, train, uneven_rows, weights

from hfcustom import load_rows
from hfcustom.cli import main
from hfcustom.data import scan, token_checks
from hfcustom.data.scan import TRAIN, RowReader, ScanOptions, run_chunks

CORPUS_FAMILIES = [name for name in (*KINDS, "gemma3", "idefics3") if name in FAMILIES]
SKIP: dict[str, Any] = {"on_bad_row": "skip", "max_bad_share": 1.0, "max_length": MAX_LENGTH, "max_steps": 2}
Found = dict[str, tuple[str, str]]  # row -> code, reason


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "rows"
    folder.mkdir()
    return write_corpus(folder, uneven_rows())


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A pipe that is waited for is an error, not a suite that never ends."""

    def stop(*_: object) -> None:
        raise AssertionError("a row hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def table(corpus: Corpus, found: Found, wanted: dict[str, str]) -> str:
    """Return the rows whose code is another than the wanted one, one a line, nothing where all is right."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        code, reason = found.get(name, ("", ""))
        if code != wanted.get(name, ""):
            what = corpus.bad.get(name, ("a good row", ""))[0]
            lines.append(f"{name:22} {what:50} wanted {wanted.get(name, ''):14} found {code:14} {reason:.200}")
    return "\n".join(lines)


def preflight_of(corpus: Corpus, **options: Any) -> Found:
    """Return the errors that the scan of one row after another finds."""
    read = RowReader(ScanOptions(str(corpus.path), max_length=MAX_LENGTH, **options))
    facts = [read((TRAIN, at)) for at in range(len(read.sets[TRAIN]))]
    errors = [finding for row in facts for finding in row.findings if finding.severity == "error"]
    assert len(errors) == len({finding.row for finding in errors})
    return {finding.row: (finding.code, finding.reason) for finding in errors}


def listed(path: Path) -> Found:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["row"]: (line["code"], line["reason"]) for line in lines if line["severity"] == "error"}


# ---- the corpus -----------------------------------------------------------------------------------------------------


def test_the_corpus_is_named_row_by_row_without_a_model(corpus: Corpus) -> None:
    assert len(corpus.bad) >= 100
    known = {name: code for name, (what, code) in corpus.bad.items() if what != TOO_LONG and code != "kind"}
    found = preflight_of(corpus)
    assert not table(corpus, found, known), "\n" + table(corpus, found, known)
    assert all(reason.startswith(name) for name, (_, reason) in found.items())


@pytest.mark.parametrize("name", CORPUS_FAMILIES)
def test_training_skips_what_preflight_names_and_ends_as_without_it(
    name: str, families: dict[str, Family], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families[name]
    monkeypatch.setattr(token_checks, "load_processor", lambda *_: (family.processor, None))
    known = {name: code for name, (_, code) in corpus.bad.items()}
    found = preflight_of(corpus, family=name)
    without_kinds = {name: code for name, code in known.items() if code != "kind"}
    assert not table(corpus, found, without_kinds), "\n" + table(corpus, found, without_kinds)

    rows, model = load_rows(str(corpus.path)), family.model()
    start = weights(model)
    losses = curve(train(model, family, tmp_path / "all", rows, batch_size=len(rows), **SKIP))
    skipped = listed(tmp_path / "all" / "bad_rows.jsonl")
    assert not table(corpus, skipped, known), "\n" + table(corpus, skipped, known)
    assert {row: skipped[row] for row in found} == found  # the same words

    clean, good = family.model(), [rows[at] for at in range(len(rows)) if rows.name_of(at) in corpus.good]
    result = train(clean, family, tmp_path / "good", good, max_length=MAX_LENGTH, max_steps=2, batch_size=len(good))
    assert curve(result) == pytest.approx(losses, rel=1e-5)
    assert relative_distance(weights(model), weights(clean), start) < 1e-3


def test_rows_excluded_beforehand_train_bit_for_bit_as_rows_skipped(
    internvl: Family, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, skipping, excluding = load_rows(str(corpus.path)), internvl.model(), internvl.model()
    options = {**SKIP, "batch_size": len(rows) // 2, "micro_batch_size": len(rows) // 4}
    train(skipping, internvl, tmp_path / "skip", rows, **options)
    capsys.readouterr()
    options |= {"on_bad_row": "error", "exclude": str(tmp_path / "skip" / "bad_rows.jsonl")}
    train(excluding, internvl, tmp_path / "exclude", rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(skipping).values(), weights(excluding).values(), strict=True))
    assert "left out" not in capsys.readouterr().out
