"""Files of rows: damage costs the rows that it hits and names them, and nothing leads out of the data set's folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from source_files import TEXT_ROW, answer_of, number_of, numbered, png, write_groups, write_jsonl, write_tar

from hfcustom.data.findings import Finding
from hfcustom.data.sources import load_rows
from hfcustom.data.steps import Attempts


def outcome(rows: Any) -> list[str]:
    """Return the answer of each row, or what is wrong with it."""
    return [f"{row.row}: BAD {row.reason}" if isinstance(row, Finding) else answer_of(row) for row in Attempts(rows)]


def assert_outcome(rows: Any, expected: list[str]) -> None:
    """Each row is as expected; "name: reason" of a bad one are its name and part of the reason."""
    found = outcome(rows)
    assert len(found) == len(expected), found
    for seen, wanted in zip(found, expected, strict=True):
        name, _, reason = wanted.partition(": ")
        assert seen == wanted or (reason and seen.startswith(f"{name}: BAD {name}") and reason in seen), seen


# ---- text: the bytes that files really hold -------------------------------------------------------------------------

HALF = '{"messages": [{"role": "user", "content": "Hi \\ud83d?"}, {"role": "assistant", "content": "Ho."}]}'
LINE = json.dumps(TEXT_ROW)
CORPUS: dict[str, tuple[bytes, list[str]]] = {
    "byte order mark": (b"\xef\xbb\xbf" + LINE.encode() + b"\n", ["Ho."]),
    "byte order mark and a blank line": (b"\xef\xbb\xbf\n" + LINE.encode(), ["Ho."]),
    "CRLF": (f"{LINE}\r\n\r\n{LINE}\r\n".encode(), ["Ho.", "Ho."]),
    "blank lines": (f"\n  \n{LINE}\n\t\n{{\n".encode(), ["Ho.", "a.jsonl, line 5: Expecting property name"]),
    "a cut last line": (f"{LINE}\n{LINE[:40]}".encode(), ["Ho.", "a.jsonl, line 2: Expecting"]),
    "invalid UTF-8": (b'{"messages": "caf\xe9"}\n' + LINE.encode(), ["a.jsonl, line 1: 'utf-8' codec", "Ho."]),
    "half of a letter": (f"{HALF}\n{LINE}".encode(), ["a.jsonl, line 1: half of a letter", "Ho."]),
    "NUL": (b"\0\n" + LINE.encode(), ["a.jsonl, line 1: Expecting value", "Ho."]),
    "nested without end": (b"[" * 100_000 + b"\n" + LINE.encode(), ["a.jsonl, line 1: recursion", "Ho."]),
    "a number without end": (b'{"a": ' + b"9" * 5000 + b"}\n" + LINE.encode(), ["a.jsonl, line 1: Exceeds", "Ho."]),
    "no object": (
        b'[1]\n"a"\nnull\n' + LINE.encode(),
        [*(f"a.jsonl, line {at}: not an object" for at in (1, 2, 3)), "Ho."],
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_bad_line_is_named_and_the_others_load(name: str, tmp_path: Path) -> None:
    content, expected = CORPUS[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    assert_outcome(load_rows(tmp_path / "a.jsonl"), expected)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_wide_letters_are_told(encoding: str, suffix: str, tmp_path: Path) -> None:
    bom = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / f"a.{suffix}").write_text(bom + LINE, encoding=encoding)
    with pytest.raises(ValueError, match="is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"):
        load_rows(tmp_path / f"a.{suffix}")


def test_csv_cells_hold_text_or_json_and_bad_records_are_named(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    turns = json.dumps(TEXT_ROW["messages"]).replace('"', '""')
    records = [
        b"prompt,completion,image,messages",
        b'"What, then?","[Ho].",a.png,',
        b"",
        f',,,"{turns}"'.encode(),
        b"too,few",
        b"caf\xe9,b,,",
        b'"a\nb",Two lines.,,',
    ]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(records))
    rows = load_rows(tmp_path / "a.csv")
    bad = ["a.csv, line 5: 2 cells, but the header names 4 columns", "a.csv, line 6: not UTF-8"]
    assert_outcome(rows, ["[Ho].", "Ho.", *bad, "Two lines."])
    assert rows[0].images[0].tobytes() == picture(1).tobytes() and rows[4].name == "a.csv, line 8"
    (tmp_path / "b.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match="the header names 'a' twice"):
        load_rows(tmp_path / "b.csv")


# ---- Parquet --------------------------------------------------------------------------------------------------------


def damage_group(path: Path, number: int) -> None:
    """Overwrite the bytes of a row's answer, and with them the pages of its group."""
    content = bytearray(path.read_bytes())
    at = content.index(f"Number {number}.".encode())
    content[at - 40 : at + 10] = b"\xff" * 50
    path.write_bytes(content)


def test_a_damaged_row_group_is_named_and_the_others_load(tmp_path: Path) -> None:
    for at in range(2):
        write_groups(tmp_path / "rows" / f"{at}.parquet", [numbered(10 * at + row) for row in range(6)], group=2)
    damage_group(tmp_path / "rows" / "1.parquet", 13)
    good = [f"Number {number}." for number in range(6)]
    bad = [f"rows/1.parquet row {at}: row group 1 cannot be read" for at in (2, 3)]
    others = [f"Number {number}." for number in (10, 11, 14, 15)]
    assert_outcome(load_rows(tmp_path / "rows"), [*good, *others[:2], *bad, *others[2:]])
    (tmp_path / "rows" / "0.parquet").write_bytes((tmp_path / "rows" / "0.parquet").read_bytes()[:-30])
    rows = load_rows(tmp_path / "rows")
    assert_outcome(rows, ["rows/0.parquet: the file is cut or no Parquet", *others[:2], *bad, *others[2:]])


def test_a_parquet_file_alone_and_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    for name in ("a.parquet", "b[1].parquet"):
        write_groups(tmp_path / name, [numbered(row) for row in range(5)], group=2)
        rows = load_rows(tmp_path / name)
        assert [number_of(row) for row in rows] == list(range(5)) and rows[4].name == f"{name} row 4"


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def test_members_of_one_key_are_one_row(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, TEXT_ROW["messages"][1]]
    members: dict[str, Any] = {
        "./000.json": {"messages": ask},
        "./000.0.png": png(1),
        "./000.1.PNG": png(2),
        "001.jpg": png(3),
        "001.txt": b"\xef\xbb\xbfA cat.",
        "001.cls": b"7",
        "001.pyd": b"(dp0",
        "a/002.json": {"messages": ask, "images": ["002.right.png", "left.png"]},
        "a/002.left.png": png(4),
        "a/002.right.png": png(5),
        "003.json": {
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A hen."}],
            "image": "coco/3.jpg",
        },
        "003.jpg": png(6),
        "README": b"hello",
    }
    rows = load_rows(write_tar(tmp_path / "shard.tar", members))
    assert [row.name for row in rows] == [f"shard.tar, {key}" for key in ("./000", "001", "a/002", "003")]
    assert [answer_of(row) for row in rows] == ["Ho.", "A cat.", "Ho.", "A hen."]
    seeds = {picture(seed).tobytes(): seed for seed in range(8)}
    assert [[seeds[image.tobytes()] for image in row.images] for row in rows] == [[1, 2], [3], [5, 4], [6]]
    assert rows[1].columns == {"cls": 7}


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_bad_members_cost_their_row_only(tmp_path: Path) -> None:
    row = {"messages": TEXT_ROW["messages"], "score": 1}
    members: dict[str, Any] = {
        "000.json": row,
        "/etc/001.json": row,
        "../002.json": row,
        "003.json": link("003.json", tarfile.SYMTYPE, "/etc/passwd"),
        "004.json": link("004.json", tarfile.LNKTYPE, "000.json"),
        "005.json": link("005.json", tarfile.FIFOTYPE),
        "006.json": link("006.json", tarfile.CHRTYPE),
        "007.json": b'{"messages": ',
        "008.json": {**row, "images": ["gone.png"]},
        "008.0.png": png(1),
        "008.1.png": png(1),
        "009.json": row,
        "009.score.npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "010.json": {"messages": [{"role": "user", "content": [{"type": "image", "image": "../a.png"}]}]},
        "011.json": {**row, "cls": 1},
        "011.cls": b"2",
        "012.json": row,
        "012.teacher.npy": npy(np.arange(3)),
    }
    rows = load_rows(write_tar(tmp_path / "s.tar", members))
    reasons = {
        "/etc/001": "leads out of the archive",
        "../002": "leads out of the archive",
        **{key: "a link, a device or sparse" for key in ("003", "004", "005", "006")},
        "007": "Expecting value",
        "008": "images names 'gone.png', but the row's members are 0.png, 1.png",
        "009": "score.npy cannot be read: Object arrays cannot be loaded",
        "010": "lies outside",
        "011": "the JSON has a 'cls' too",
    }
    assert_outcome(rows, ["Ho.", *(f"s.tar, {key}: {reason}" for key, reason in reasons.items()), "Ho."])
    assert rows[-1].columns["teacher_npy"].tolist() == [0, 1, 2]


def test_a_cut_shard_gives_what_lies_before_the_cut(tmp_path: Path) -> None:
    path = Path(
        write_tar(tmp_path / "s.tar", {f"{at:03}.json": {**numbered(at), "pad": "x" * 600} for at in range(4)})
    )
    content = path.read_bytes()
    start = content.index(b"002.json")
    for cut, expected in {
        start: [],
        start + 100: ["s.tar, the rest: the archive is damaged after '001'"],
        start + 600: ["s.tar, 002: the archive is cut within '002.json'"],
    }.items():
        path.write_bytes(content[:cut])
        found = outcome(load_rows(path))
        assert found[:2] == ["Number 0.", "Number 1."] and len(found) >= 2 + len(expected)
        for seen, wanted in zip(found[2:], expected, strict=False):
            name, _, reason = wanted.partition(": ")
            assert seen.startswith(f"{name}: BAD") and reason in seen
    path.write_bytes(content[:start] + b"\xff" * 512 + content[start + 512 :])
    assert_outcome(load_rows(path), ["Number 0.", "Number 1.", "s.tar, the rest: the archive is damaged after '001'"])
    path.write_bytes(b"\x1f\x8b" + content[2:])
    assert_outcome(load_rows(path), ["s.tar, the rest: A compressed shard must be unpacked to .tar first"])


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["", "test"])
def test_a_folder_of_images_with_metadata(kind: str, place: str, tmp_path: Path) -> None:
    folder = tmp_path / "cats" / place
    (folder / "more").mkdir(parents=True)
    picture(1).save(folder / "1.png")
    picture(2).save(folder / "more" / "2.png")
    rows = [
        {"file_name": "1.png", "text": "A cat.", "prompt": None, "completion": None},
        {"file_name": "more/2.png", "text": None, "prompt": "What?", "completion": "A dog."},
        {"file_name": "../../secret.png", "text": "No.", "prompt": None, "completion": None},
    ]
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        write_groups(path, rows, group=9)
    elif kind == "jsonl":
        write_jsonl(path, *rows, {"text": "No file."})
    else:
        path.write_text(
            "file_name,text,prompt,completion\n" + "\n".join(",".join(v or "" for v in row.values()) for row in rows)
        )
    (tmp_path / "secret.png").write_bytes(png(3))
    loaded = load_rows(tmp_path / "cats", place or None)
    label = f"cats/{place + '/' if place else ''}metadata.{kind}"
    where = f"{label} row 2" if kind == "parquet" else f"{label}, line {4 if kind == 'csv' else 3}"
    more = [f"{label}, line 4: no file_name (columns: text)"] if kind == "jsonl" else []
    assert_outcome(loaded, ["A cat.", "A dog.", f"{where}: lies outside", *more])
    assert [row.images[0].tobytes() for row in loaded[:2]] == [picture(1).tobytes(), picture(2).tobytes()]
    with pytest.raises(ValueError, match="tset"):
        load_rows(tmp_path / "cats", "tset")


def test_a_folder_of_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXT_ROW)
    write_groups(tmp_path / "b.parquet", [TEXT_ROW], group=1)
    with pytest.raises(ValueError, match=r"files of several kinds \(.jsonl, .parquet\); give one file"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    "named", ["https://example.org/a.jsonl", "zip://a.jsonl::b.zip", "/etc/passwd", "../a.jsonl", "hf://datasets/a/b"]
)
def test_a_card_that_names_data_elsewhere_is_refused(named: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXT_ROW)
    card = (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [{named!r}]\n---\n# Rows\n"
    )
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=f"README.md names '{named}' as data, which is not below the folder"):
        load_rows(tmp_path)


def test_a_card_chooses_among_the_folders_own_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", numbered(1))
    write_jsonl(tmp_path / "b.jsonl", numbered(2))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert [number_of(row) for row in load_rows(tmp_path)] == [2]


@pytest.mark.parametrize(
    "source", ["zip://a.png::{}/a.zip", "file://{}/a.png", "hf://datasets/a/b.png", "ftp://a/b.png"]
)
def test_no_other_way_to_name_a_file_is_followed(source: str, tmp_path: Path) -> None:
    ask = {"role": "user", "content": [{"type": "image", "image": source.format(tmp_path)}]}
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", {"messages": [ask, TEXT_ROW["messages"][1]]}))
    assert_outcome(rows, ["a.jsonl, line 1: is a URL; none is fetched"])


def test_pipes_are_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows" / "a.png")
    os.mkfifo(tmp_path / "b.jsonl")
    ask = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    rows = load_rows(write_jsonl(tmp_path / "rows" / "a.jsonl", {"messages": [ask, TEXT_ROW["messages"][1]]}))
    assert len(outcome(rows)) == 1 and "a.jsonl, line 1: BAD" in outcome(rows)[0]
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_rows(tmp_path / "b.jsonl")
