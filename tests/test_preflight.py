"""hfcustom preflight, and a planted corpus: what it says of each row is what training does with it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scan_tasks
import torch
from bad_corpus import MAX_LENGTH, TOO_LONG, Corpus, row, write_corpus
from conftest import FAMILIES, KINDS, Family, chat_row, picture
from PIL import Image
from training import curve, relative_distance, train, uneven_rows, weights

from hfcustom import load_rows
from hfcustom.cli import main
from hfcustom.data import token_checks
from hfcustom.data.collate import Collator
from hfcustom.data.findings import Finding, code_of
from hfcustom.data.messages import RowError, read_row
from hfcustom.data.scan import TRAIN, RowFacts, RowReader, ScanOptions, ScanState, run_chunks
from hfcustom.encoders import load_encoder
from hfcustom.preflight import add_findings_over_all
from hfcustom.registry import REGISTERED

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
    errors = [finding for each in facts for finding in each.findings if finding.severity == "error"]
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
    assert {bad: skipped[bad] for bad in found} == found  # the same words

    clean, good = family.model(), [rows[at] for at in range(len(rows)) if rows.name_of(at) in corpus.good]
    result = train(clean, family, tmp_path / "good", good, max_length=MAX_LENGTH, max_steps=2, batch_size=len(good))
    assert curve(result) == pytest.approx(losses, rel=1e-5)
    assert relative_distance(weights(model), weights(clean), start) < 1e-3


def test_rows_excluded_beforehand_train_bit_for_bit_as_rows_skipped(
    internvl: Family, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, skipping, excluding = load_rows(str(corpus.path)), internvl.model(), internvl.model()
    options = {**SKIP, "batch_size": len(rows) // 4 * 2, "micro_batch_size": len(rows) // 4}
    train(skipping, internvl, tmp_path / "skip", rows, **options)
    capsys.readouterr()
    options |= {"on_bad_row": "error", "exclude": str(tmp_path / "skip" / "bad_rows.jsonl")}
    train(excluding, internvl, tmp_path / "exclude", rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(skipping).values(), weights(excluding).values(), strict=True))
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("name", CORPUS_FAMILIES)
def test_every_family_reads_the_shapes_that_the_loader_lets_through(name: str, families: dict[str, Family]) -> None:
    sizes = [(4, 4), (4, 800), (800, 4), (7, 1400)]
    rows = [{**chat_row(1), "images": [picture(size=size)]} for size in sizes]
    assert Collator(families[name].processor)(rows).images == len(sizes)
    for size, code in {(3, 300): "tiny", (300, 3): "tiny", (4, 804): "aspect", (804, 4): "aspect"}.items():
        with pytest.raises(RowError) as caught:
            Collator(families[name].processor)([{**chat_row(1), "images": [picture(size=size)]}])
        assert code_of(caught.value) == code


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures and 70 good rows in rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    for at in range(3):
        picture(at, (60 + 40 * at, 40)).save(f"{at}.png")
    write(tmp_path / "rows.jsonl", good_rows())
    return tmp_path


def good_rows(count: int = 70) -> list[Any]:
    rows = [row("0.png", f"Is it {at}?", f"It is {at}.") for at in range(count)]
    rows[1]["images"] = ["1.png"]
    return rows


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def preflight(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON that the command prints."""
    code = main(["preflight", *argv, "--json", "--workers", "0"])
    printed = capsys.readouterr().out
    return code, json.loads(printed) if printed else {}


def findings(path: str = "bad_rows.jsonl") -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(line["set"], line["row"], line["code"]) for line in lines]


def test_the_exit_code_says_whether_training_would_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary = preflight(capsys, "rows.jsonl")
    assert code == summary["exit_code"] == 0 and summary["rows"]["train"] == 70
    assert summary["numbers"]["images"]["total"] == 70 and sum(summary["numbers"]["characters"]["counts"]) == 70
    assert findings() == [("train", "rows.jsonl, line 1", "duplicate_image")]  # a warning
    write(folder / "rows.jsonl", [*good_rows(), row("2.png", answer=" "), row("none.png")])
    code, summary = preflight(capsys, "rows.jsonl", "--max-bad-share", "0.1")
    assert code == 1 and summary["rows"]["bad"] == 2
    assert [(reason["code"], reason["first"]) for reason in summary["reasons"] if reason["severity"] == "error"] == [
        ("empty_answer", ["rows.jsonl, line 71"]),
        ("missing", ["rows.jsonl, line 72"]),
    ]
    assert preflight(capsys, "rows.jsonl")[0] == 4
    assert main(["preflight", "rows.jsonl"]) == 4
    printed = capsys.readouterr().out
    assert "2 of 72 rows cannot be used." in printed and "'none.png' is no file" in printed
    assert not Path("bad_rows.jsonl.part").exists()


def test_held_out_rows_may_be_a_mixture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "rows.jsonl", good_rows(4))
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", [*good_rows(2), "no row"])
    code, summary = preflight(capsys, "rows.jsonl", "--eval", '{"a.jsonl": 1, "b.jsonl": 2}')
    assert code == 1 and summary["rows"] == {"train": 4, "eval": 6, "bad": 0, "bad_eval": 2}


def test_warnings_name_what_training_takes_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [picture(at, (20, 20)) for at in range(3)]
    frames[0].save("film.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (30, 30), "red").save("red.png")
    picture(8, (40, 5)).save("low.png")
    odd = ["a\0b", "a\u202eb", "see <image> there", "  ", "x" * 100_001]
    text = [
        {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "So."}]} for words in odd
    ]
    write(folder / "rows.jsonl", [*map(row, ("film.gif", "red.png", "low.png")), *text, text[0], *good_rows(2)])
    write(folder / "held.jsonl", [row("1.png", "Another?"), text[1], "no row"])
    code, summary = preflight(capsys, "rows.jsonl", "--eval", "held.jsonl")
    assert code == 1 and summary["rows"] == {"train": 11, "eval": 3, "bad": 0, "bad_eval": 1}
    codes = ["animated", "one_colour", "small", "odd_character", "odd_character", "leaked_row", "typed_placeholder"]
    lines = [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 11]
    codes += ["empty_question", "long_text", "odd_character", "duplicate_row", "leaked_image"]
    expected = [("train", f"rows.jsonl, line {line}", code) for line, code in zip(lines, codes, strict=True)]
    assert findings() == [
        *expected,
        ("eval", "held.jsonl, line 2", "odd_character"),
        ("eval", "held.jsonl, line 3", "form"),
    ]


def test_rows_of_another_kind_than_the_first_are_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "rows.jsonl", [7, *good_rows(2), {"prompt": "Which?", "chosen": "This.", "rejected": "That."}])
    preflight(capsys, "rows.jsonl")
    assert findings() == [("train", "rows.jsonl, line 1", "form"), ("train", "rows.jsonl, line 4", "kind")]


def test_with_a_processor_tokens_tiles_and_the_costliest_batch_are_known(
    folder: Path, internvl: Family, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_checks, "load_processor", lambda *_: (internvl.processor, None))
    rows = good_rows(6)
    rows[3]["messages"][1]["content"] = "Yes. " * 60
    rows[4]["messages"][0]["content"][1]["text"] = "Say <|im_end|>."
    write(folder / "rows.jsonl", [*rows, row("2.png", "word " * 900)])
    code, summary = preflight(capsys, "rows.jsonl", "--family", "internvl", "--max-length", "500", "--batch-size", "2")
    batch = Collator(internvl.processor)([read_row(each, "row", folder) for each in rows])
    assert code == 4 and summary["numbers"]["tokens"]["max"] > 500
    assert summary["costliest_batch"]["rows"][0] == "rows.jsonl, line 4"
    assert summary["costliest_batch"]["padded_tokens"] == 2 * batch["input_ids"].shape[1]
    labels = int((batch["labels"] != -100).sum())
    assert labels < summary["numbers"]["labels"]["total"] < labels + 10  # the long row's few
    assert summary["numbers"]["tiles"]["total"] > len(batch["pixel_values"])
    assert [code for _, _, code in findings() if "duplicate" not in code] == ["control_token", "too_long"]


def test_mixtures_and_videos_are_read_as_training_is_told_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [picture(seed) for seed in range(4)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    rows = good_rows(2)
    rows[1] = {
        "messages": [{"role": "user", "content": [{"type": "video"}]}, rows[1]["messages"][1]],
        "videos": ["clip.gif"],
    }
    write(folder / "more.jsonl", rows)
    mixture = '{"rows.jsonl": 0.5, "more.jsonl": 0.5}'
    code, summary = preflight(capsys, mixture, "--family", "nano")
    assert code == 4 and summary["rows"]["bad"] == 1 and "videos" in summary["reasons"][0]["example"]
    code, summary = preflight(capsys, mixture, "--family", "nano", "--video-as-images", "--max-frames", "3")
    assert (code, summary["rows"]["bad"], summary["rows"]["train"]) == (0, 0, 72)
    assert preflight(capsys, '{"rows.jsonl": ', "--family", "nano")[0] == 2


def test_rows_of_an_image_and_its_text_are_read_as_an_encoder_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_encoder("clip")
    REGISTERED["custom_clip"](module.tiny_config()).save_pretrained("clip")
    module.tiny_processor().save_pretrained("clip")
    rows: list[Any] = [{"image": f"{at}.png", "text": text} for at, text in enumerate(("a cat", " ", "cat " * 500))]
    write(folder / "rows.jsonl", [*rows, good_rows()[0]])
    preflight(capsys, "rows.jsonl", "--captions")
    assert [code for _, _, code in findings()][:2] == ["duplicate_image", "empty_answer"]
    code, summary = preflight(capsys, "rows.jsonl", "--captions", "--model", "clip")
    assert code == 4 and summary["numbers"]["tokens"]["max"] > 500
    assert [code for _, _, code in findings()] == ["duplicate_image", "empty_answer", "cut_text", "image_count"]
    preflight(capsys, "rows.jsonl", "--captions", "--model", "clip", "--max-length", "20")
    assert [code for _, _, code in findings()] == ["duplicate_image", "empty_answer", "too_long", "image_count"]


def test_an_interrupted_scan_goes_on_where_it_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "rows.jsonl", [*good_rows(), row("none.png"), row("none.png", "Else?")])
    _, expected = preflight(capsys, "rows.jsonl")
    lines, read, asked = Path("bad_rows.jsonl").read_text(), RowReader.__call__, []

    def stop_at(self: RowReader, place: Any) -> Any:
        asked.append(place)
        if len(asked) == 40:
            raise KeyboardInterrupt
        return read(self, place)

    monkeypatch.setattr(RowReader, "__call__", stop_at)
    assert main(["preflight", "rows.jsonl", "--workers", "0"]) == 7
    assert "32 of 72 rows are checked. Go on with --resume." in capsys.readouterr().err
    assert main(["preflight", "rows.jsonl"]) == 2
    assert "go on with --resume, or forget it with --overwrite" in capsys.readouterr().err
    assert main(["preflight", "rows.jsonl", "--resume", "--min-pixels", "9"]) == 2
    assert "min_pixels was 16 and is 9" in capsys.readouterr().err
    assert preflight(capsys, "rows.jsonl", "--resume") == (4, expected)
    assert Path("bad_rows.jsonl").read_text() == lines
    assert len(asked) == 80 and len(set(asked)) == 72  # the eight before the interruption are read again


@pytest.mark.parametrize("data", ["rows.jsonl", ".", '{"rows.jsonl": 1}'])
def test_an_interrupted_scan_does_not_go_on_with_other_rows(
    data: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: RowReader, place: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(RowReader, "__call__", interrupt)
    assert main(["preflight", data, "--workers", "0", "--output", "out/bad.jsonl"]) == 7
    content = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(content.replace("Is it 3?", "Is it 8?"))
    assert main(["preflight", data, "--resume", "--workers", "0", "--output", "out/bad.jsonl"]) == 2
    assert "is of another scan: train_content was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.jsonl"], "There is no file none.jsonl"),
        (["rows.jsonl", "--max-length", "9"], "--max-length has no effect without --model or --family"),
        (["rows.jsonl", "--allowed-tokens", "<b>"], "--allowed-tokens has no effect without"),
        (["rows.jsonl", "--eval-split", "test"], "--eval-split has no effect without --eval"),
        (["rows.jsonl", "--batch-size", "0", "--workers", "-1"], "--batch-size 0 must be positive; --workers -1 must"),
        (["rows.jsonl", "--resume", "--overwrite"], "exclude each other"),
        (["rows.jsonl", "--family", "intervl"], "Did you mean 'internvl'?"),
    ],
)
def test_wrong_usage_is_said(folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", *argv]) == 2
    assert message in capsys.readouterr().err


def test_histograms_are_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(capsys, "rows.jsonl", "--plot", "plots/sizes.png")[0] == 0
    with Image.open("plots/sizes.png") as image:
        assert image.width > 3 * image.height > 500


# ---- processes ------------------------------------------------------------------------------------------------------


def test_processes_yield_in_order_and_one_that_is_killed_costs_its_item_alone() -> None:
    chunks = [[0, 1], [2, 3, 4], [5], [6, 7]]
    assert list(run_chunks(scan_tasks.make, chunks, 2, lambda item: -item)) == [[0, 10], [20, -3, 40], [50], [60, 70]]
    with pytest.raises(ValueError, match="no such model"):
        list(run_chunks(scan_tasks.cannot, chunks, 1, abs))


# ---- large sets -----------------------------------------------------------------------------------------------------


def work_over_all(path: Path, num_rows: int, same: str) -> int:
    """Return the steps of the database, in hundreds, that findings over all rows take where all rows have the same text or image."""
    state = ScanState(path)
    digests = {"row": "same" if same == "row" else "", "image": "same"}
    images = [(digests["image"], 30, 30)] if same == "image" else []
    for first in range(0, num_rows, 100):
        places = [(TRAIN, at) for at in range(first, first + 100)]
        state.add([RowFacts(place, f"row {place[1]}", "ordinary", digests["row"], 9, images) for place in places])
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    state.db.set_progress_handler(count, 100)
    add_findings_over_all(state)
    state.db.set_progress_handler(None, 0)
    (found,) = state.db.execute("SELECT count(*) FROM findings").fetchone()
    assert found == (num_rows - 1 if same == "row" else 1)
    state.close(delete=True)
    return steps[0]


@pytest.mark.parametrize("same", ["row", "image"])
def test_four_times_the_copies_take_four_times_the_work(same: str, tmp_path: Path) -> None:
    few, many = (work_over_all(tmp_path / f"{count}.part", count, same) for count in (500, 2000))
    assert many < 6 * few


def test_a_scan_that_is_stopped_while_its_rows_are_found_ends_as_any_stopped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(options: ScanOptions) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScanOptions, "load_sets", interrupt)
    assert main(["preflight", str(tmp_path / "rows.jsonl")]) == 7
    assert capsys.readouterr().err == "Stopped before rows were checked. Give the same command again.\n"


def test_what_a_killed_scan_has_written_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ScanState(tmp_path / "a.part")
    row = partial(RowFacts, kind="ordinary", findings=[Finding("row", "reason")])
    state.add([row((TRAIN, 0), "row 0")])
    state._commit()
    state.add([row((TRAIN, 1), "row 1")])
    assert state.count() == 2

    def interrupt(findings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "add_findings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        state.add([row((TRAIN, 2), "row 2")])
    state.close(delete=False)
    again = ScanState(tmp_path / "a.part")
    counts = [again.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("rows", "findings")]
    assert counts == [1, 1]
    assert [place for chunk in again.missing({TRAIN: 4}) for place in chunk] == [(TRAIN, at) for at in (1, 2, 3)]
