"""Where rows come from: JSONL, folders of `datasets`; and that no source reaches past its own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from source_files import TEXT_ROW, answer_of, encode, write_jsonl

from hfcustom.data.feed import first_example
from hfcustom.data.messages import RowError
from hfcustom.data.sources import Examples, load_rows
from hfcustom.train_config import TrainConfig

BLOCK = {"type": datasets.Value("string"), "text": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(BLOCK)}),
        "images": datasets.List(datasets.Image()),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def image_row(number: int, *images: Any) -> dict[str, Any]:
    content = [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": f"Number {number}."}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": list(images),
    }


def make_dataset(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows), features=FEATURES)


def write_parquet(folder: Path, *images: dict[str, Any]) -> str:
    """Write rows whose images are stored exactly as given, which `datasets` itself would not write."""
    schema = make_dataset(image_row(0, picture())).data.table.schema
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([image_row(0, image) for image in images], schema), folder / "train.parquet")
    return str(folder)


def test_a_json_file_holds_one_list(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([TEXT_ROW, TEXT_ROW], indent=1))
    rows = load_rows(str(file))
    assert [row.name for row in rows[:2]] == ["rows.json row 0", "rows.json row 1"]
    for text, message in (
        (json.dumps(TEXT_ROW) + "\n" + json.dumps(TEXT_ROW), "rows.json: Extra data.*belongs into a .jsonl file"),
        (json.dumps(TEXT_ROW), "rows.json: the top level is dict, not a list of rows"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_rows(str(file))
    with pytest.raises(ValueError, match="has no splits, so split='test' has no effect"):
        load_rows(str(file), "test")


# ---- JSONL ----------------------------------------------------------------------------------------------------------


def test_jsonl_rows_with_paths_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows" / "pictures").mkdir(parents=True)
    picture(1).save(tmp_path / "rows" / "pictures" / "a.png")
    file = write_jsonl(tmp_path / "rows" / "train.jsonl", image_row(0, "pictures/a.png"), TEXT_ROW)
    monkeypatch.chdir(tmp_path)  # the folder that people start from is not the folder of the rows
    rows = load_rows(file)
    assert len(rows) == 2
    assert rows[0].images[0].tobytes() == picture(1).tobytes()
    assert (rows[1].images, answer_of(rows[1])) == ([], "Ho.")
    assert [row.name for row in rows] == ["train.jsonl, line 1", "train.jsonl, line 2"]


def test_blank_lines_are_no_rows_and_do_not_shift_line_numbers(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", "", TEXT_ROW, "   ", "\r", image_row(7), "")
    rows = load_rows(file)
    assert [row.name for row in rows] == ["a.jsonl, line 2", "a.jsonl, line 5"]
    assert answer_of(rows[-1]) == "Number 7."


def test_text_beyond_ascii_windows_line_ends_and_a_missing_last_newline(tmp_path: Path) -> None:
    row = json.dumps(
        {"messages": [{"role": "user", "content": "\u00fc\u4e2d"}, *TEXT_ROW["messages"][1:]]}, ensure_ascii=False
    )
    (tmp_path / "a.jsonl").write_bytes(f"{row}\r\n{row}".encode())
    rows = load_rows(str(tmp_path / "a.jsonl"))
    assert [row.messages[0]["content"][0]["text"] for row in rows] == ["\u00fc\u4e2d"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "Expecting value"),
        ("hello", "Expecting value"),
        ("[1, 2]", "list, not an object with 'messages'"),
        ('"hello"', "str, not an object with 'messages'"),
        (b'{"messages": "caf\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
        ({"text": "hello"}, r"no list of messages \(columns: text\)"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 0: Unknown role 'bot'.* Allowed: assistant"),
        (image_row(0, "../a.png"), "image 0: Image '../a.png' lies outside"),
        (image_row(0, "https://example.org/a.png"), "image 0: .* is a URL; none is fetched"),
    ],
    ids=str,
)
def test_a_bad_line_is_named_and_the_others_stay_readable(tmp_path: Path, line: Any, message: str) -> None:
    rows = load_rows(write_jsonl(tmp_path / "bad.jsonl", TEXT_ROW, "", line, TEXT_ROW))
    with pytest.raises(RowError, match=rf"^bad.jsonl, line 3[:,] ?{message}"):
        rows[1]
    assert answer_of(rows[2]) == "Ho."


def test_a_missing_file_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*gone.jsonl"):
        load_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match=r"blank.jsonl has no rows"):
        load_rows(write_jsonl(tmp_path / "blank.jsonl", "", "  "))


# ---- folders of `datasets` ------------------------------------------------------------------------------------------


def saved_dataset(folder: Path) -> tuple[str, str]:
    make_dataset(image_row(0, picture(3)), image_row(1)).save_to_disk(folder)
    return "train", f"{folder.name} row {{0}}"


def saved_splits(folder: Path) -> tuple[str, str]:
    splits = {"train": make_dataset(image_row(9)), "test": make_dataset(image_row(0, picture(3)), image_row(1))}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return "test", f"{folder.name} test row {{0}}"


def parquet_files(folder: Path) -> tuple[str, str]:
    folder.mkdir()
    make_dataset(image_row(9)).to_parquet(folder / "train.parquet")
    make_dataset(image_row(0, picture(3)), image_row(1)).to_parquet(folder / "test.parquet")
    return "test", f"{folder.name}/test.parquet row {{0}}"


def jsonl_files(folder: Path) -> tuple[str, str]:
    folder.mkdir()
    picture(3).save(folder / "a.png")
    write_jsonl(folder / "train-0.jsonl", image_row(0, "a.png"))
    write_jsonl(folder / "train-1.jsonl", image_row(1))
    return "train", f"{folder.name}/train-{{0}}.jsonl, line 1"


def image_folder(folder: Path) -> tuple[str, str]:
    folder.mkdir()
    picture(3).save(folder / "a.png")
    rows = [image_row(0, "a.png"), image_row(1)]
    metadata = [{"images_file_names": row["images"], "messages": row["messages"]} for row in rows]
    write_jsonl(folder / "metadata.jsonl", *metadata)
    return "train", f"{folder.name}/metadata.jsonl, line {{1}}"


FOLDERS = [saved_dataset, saved_splits, parquet_files, jsonl_files, image_folder]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", FOLDERS)
@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_gives_the_same_rows_however_it_was_written(
    make: Any, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split, name = make(tmp_path / "digits")
    single = make is saved_dataset
    if single:
        with pytest.raises(ValueError, match=r"digits has no splits, so split='train' has no effect; leave it out"):
            load_rows(str(tmp_path / "digits"), "train")
    rows = load_rows("digits" if relative else str(tmp_path / "digits"), None if single else split)
    assert [row.name for row in rows] == [name.format(at, at + 1) for at in (0, 1)]
    assert [answer_of(row) for row in rows] == ["Number 0.", "Number 1."]
    assert [image.tobytes() for image in rows[0].images] == [picture(3).tobytes()]
    assert rows[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert rows[1].images == []


@pytest.mark.parametrize("make", [saved_splits, parquet_files])
def test_an_unknown_split_names_those_there_are(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "digits")
    with pytest.raises(ValueError, match=r"digits: Unknown split 'tset'. Did you mean 'test'\? Allowed: test, train"):
        load_rows(str(tmp_path / "digits"), "tset")


@pytest.mark.parametrize("source", ["{}/gone", "./gone", "gone", "gone/too", "a/b/gone"])
def test_a_folder_that_does_not_exist_is_named(source: str, tmp_path: Path) -> None:
    source = source.format(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^{source} is no folder here, and the hub gave no data set"):
        load_rows(source)


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="bare doesn't contain any data files"):
        load_rows(str(tmp_path / "bare"))


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.gz"])
def test_a_file_of_another_kind_is_told_what_to_give(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(
        ValueError, match=rf"{name} is no .csv, .json, .jsonl, .parquet, .tar file; give one, or the folder"
    ):
        load_rows(str(tmp_path / name))


# ---- a data set of somebody else's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": None, "path": "../outside.png"}, "Image '../outside.png' lies outside"),
        ({"bytes": None, "path": "{}/outside.png"}, "Image '.*outside.png' lies outside .*digits, the folder of its"),
        (
            {"bytes": None, "path": "https://example.org/a.png"},
            "'https://example.org/a.png' is a URL; none is fetched",
        ),
        ({"bytes": encode(picture(), "EPS"), "path": None}, "is no readable BMP/"),
        ({"bytes": b"nonsense", "path": None}, "is no readable BMP/"),
    ],
    ids=["above", "absolute", "url", "eps", "no image"],
)
def test_images_of_a_data_set_go_through_the_image_loader(image: dict[str, Any], message: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "outside.png")
    path = image["path"] and image["path"].format(tmp_path)
    source = write_parquet(tmp_path / "digits", {"bytes": encode(picture(2)), "path": None}, {**image, "path": path})
    rows = load_rows(source)
    assert rows[0].images[0].tobytes() == picture(2).tobytes()
    with pytest.raises(RowError, match=f"digits/train.parquet row 1, image 0: .*{message}"):
        rows[1]


def test_images_that_datasets_downloaded_are_read_below_its_cache(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "hub").mkdir()
    picture(1).save(tmp_path / "hub" / "a.png")
    picture(2).save(tmp_path / "b.png")
    stored = [{"bytes": None, "path": str(tmp_path / name)} for name in ("hub/a.png", "b.png")]
    loaded = datasets.load_dataset(write_parquet(tmp_path / "rows", *stored), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: loaded)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hub"))
    rows = load_rows("someone/digits")
    assert rows[0].images[0].tobytes() == picture(1).tobytes()
    with pytest.raises(RowError, match="someone/digits train row 1, image 0: .*lies outside"):
        rows[1]


# ---- columns, weights and preferences -------------------------------------------------------------------------------


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """Write rows as a source of some kind; `datasets` fills the keys that a row lacks with None."""
    if kind in ("jsonl", "json"):
        folder.mkdir()
        file = folder / f"rows.{kind}"
        file.write_text(json.dumps(rows)) if kind == "json" else write_jsonl(file, *rows)
        return str(file)
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        return str(folder)
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "json", "saved", "parquet"])
def test_columns_and_weights_come_through_every_source(kind: str, tmp_path: Path) -> None:
    question, answer = TEXT_ROW["messages"]
    blocks = [{"type": "text", "text": "Ho", "weight": 3.0}, {"type": "text", "text": "."}]
    extra = {"score": 0.5, "teacher_ids": [[1, 2], [3, 4]], "tags": {"source": "web"}}
    rows = [
        {"messages": [question, {**answer, "weight": 0.5}], **extra},
        {"messages": [question, answer], "score": 1.0},
    ]
    first, second = load_rows(write_rows(tmp_path / "rows", kind, rows))
    assert (first.columns, second.columns) == (extra, {"score": 1.0})
    assert (first.messages[1]["weight"], "weight" in second.messages[1]) == (0.5, False)
    weighted = {"messages": [{"role": "user", "content": blocks[1:]}, {"role": "assistant", "content": blocks}]}
    (example,) = load_rows(write_rows(tmp_path / "blocks", kind, [weighted]))
    assert example.messages[1]["content"] == blocks


@pytest.mark.parametrize("kind", ["jsonl", "json", "saved", "parquet"])
def test_preferences_come_through_every_source(kind: str, tmp_path: Path) -> None:
    question, answer = TEXT_ROW["messages"]
    pair = {"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": "No."}], "margin": 2}
    (example,) = load_rows(write_rows(tmp_path / "pairs", kind, [pair]))
    assert example.rejected is not None
    assert [side[-1]["content"][0]["text"] for side in (example.messages, example.rejected)] == ["Ho.", "No."]
    assert example.columns == {"margin": 2}
    rows = [{"prompt": "Hi?", "completion": "Ho.", "label": label} for label in (True, False)]
    assert [row.preferred for row in load_rows(write_rows(tmp_path / "judged", kind, rows))] == [True, False]


# ---- rows in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_dataset", [False, True])
def test_examples_of_a_list_and_of_a_dataset(as_dataset: bool) -> None:
    listed = [image_row(0, picture(1)), image_row(1)]
    rows = Examples(make_dataset(*listed) if as_dataset else listed)
    assert (len(rows), rows[0].name, rows[1].name) == (2, "row 0", "row 1")
    assert rows[0].images[0].tobytes() == picture(1).tobytes()
    again = Examples(rows)
    assert again[1] == rows[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_images_may_lie_below_another_folder_if_it_is_named(tmp_path: Path, streaming: bool, mixed: bool) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "coco").mkdir()
    picture(3).save(tmp_path / "coco" / "a.png")
    picture(4).save(tmp_path / "b.png")
    rows = [
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Yes."}], "image": name}
        for name in ("a.png", "../b.png")
    ]
    file = tmp_path / "rows" / "llava.json"
    file.write_text(json.dumps(rows))
    source = {str(file): 1.0} if mixed else str(file)
    found = load_rows(source, image_root=tmp_path / "coco", streaming=streaming)
    assert first_example(found, TrainConfig()).images[0].tobytes() == picture(3).tobytes()
    with pytest.raises(RowError, match="'a.png' is no file below .*rows"):
        first_example(load_rows(source, streaming=streaming), TrainConfig())
    if not streaming:
        with pytest.raises(RowError, match="'../b.png' lies outside .*coco.*image_root"):
            found[1]
    with pytest.raises(FileNotFoundError, match="image_root='.*nowhere' is no folder"):
        load_rows(source, image_root=tmp_path / "nowhere")
