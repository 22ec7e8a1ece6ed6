"""Streams: ranks and loading processes read each row once, and a stopped one goes on where it stopped, in the same order."""

from __future__ import annotations

import gc
import json
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import Family
from source_files import number_of, numbered, png, write_groups, write_jsonl, write_tar
from training import curve, train, weights

from hfcustom.data.feed import as_rows, first_example
from hfcustom.data.findings import Finding
from hfcustom.data.jsonl import JsonlRows
from hfcustom.data.messages import RowError
from hfcustom.data.sources import as_examples, load_rows
from hfcustom.data.steps import StepBatches
from hfcustom.data.stream_loader import StepStream, StreamLoader
from hfcustom.data.streams import Share, Stream, check_shards
from hfcustom.train_config import TrainConfig

PER_STEP, STEPS, FILES, PER_FILE = 3, 20, 4, 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def jsonl_folder(folder: Path) -> str:
    for file in range(FILES):
        write_jsonl(folder / f"{file}.jsonl", *(numbered(PER_FILE * file + row) for row in range(PER_FILE)))
    return str(folder)


def parquet_file(folder: Path) -> str:
    return write_groups(folder / "a.parquet", [numbered(row) for row in range(FILES * PER_FILE)], group=PER_FILE)


def tar_shards(folder: Path) -> str:
    for file in range(FILES):
        members = {f"{row:03}.json": numbered(PER_FILE * file + row) for row in range(PER_FILE)}
        write_tar(folder / f"{file}.tar", members)
    return str(folder)


def saved_dataset(folder: Path) -> str:
    datasets.Dataset.from_list([numbered(row) for row in range(FILES * PER_FILE)]).save_to_disk(folder)
    return str(folder)


def json_lines_by_datasets(folder: Path) -> str:
    """A card sends the folder through `datasets`."""
    jsonl_folder(folder)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '*.jsonl'\n---\n"
    (folder / "README.md").write_text(card)
    return str(folder)


SOURCES = [jsonl_folder, parquet_file, tar_shards, saved_dataset, json_lines_by_datasets]


def collate(rows: Sequence[Any]) -> StepBatches:
    found: Any = [row.row if isinstance(row, Finding) else number_of(row) for row in rows]
    return StepBatches([found])


def read(stream: Any, steps: range = range(STEPS), *, num_workers: int = 0, **options: Any) -> list[StepBatches]:
    defaults: dict[str, Any] = {"rank": 0, "world_size": 1, "seed": 0, "positions": {}, "skip_bad_rows": False}
    loaded = StepStream(stream, collate, steps=steps, rows_per_step=PER_STEP, **{**defaults, **options})
    return list(StreamLoader(loaded, num_workers))


def numbers(steps: Sequence[StepBatches]) -> list[Any]:
    return [list(step.batches[0]) for step in steps]


def positions(steps: Sequence[StepBatches]) -> dict[int, Any]:
    """Return what a checkpoint keeps of these steps, as it comes back from the disk."""
    found = dict(step.position for step in steps if step.position is not None)
    return {int(worker): state for worker, state in json.loads(json.dumps(found)).items()}


def assert_goes_on(stream: Any, cuts: Sequence[int], **options: Any) -> list[StepBatches]:
    whole = read(stream, **options)
    for cut in cuts:
        rest = read(stream, range(cut, STEPS), positions=positions(whole[:cut]), **options)
        assert numbers(rest) == numbers(whole)[cut:], cut
    return whole


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_streams_each_row_once_an_epoch_and_goes_on(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "rows")
    plain = assert_goes_on(load_rows(source, streaming=True), [1, 7, 13, 14, 19])
    flat = [number for step in numbers(plain) for number in step]
    rows = FILES * PER_FILE
    assert flat == [at % rows for at in range(len(flat))] and [step.epoch for step in plain[12:15]] == [0, 1, 1]
    mixed = assert_goes_on(load_rows(source, streaming=True, shuffle_buffer=7), [1, 2, 7, 13, 14, 19])
    epochs = [number for step in numbers(mixed) for number in step]
    assert (
        sorted(epochs[:rows]) == list(range(rows)) != epochs[:rows] and epochs[rows:] != epochs[: len(epochs) - rows]
    )


@pytest.mark.parametrize("shuffle_buffer", [0, 7])
def test_loading_processes_share_a_stream_and_go_on(shuffle_buffer: int, tmp_path: Path) -> None:
    stream = load_rows(jsonl_folder(tmp_path / "rows"), streaming=True, shuffle_buffer=shuffle_buffer)
    whole = assert_goes_on(stream, [1, 2, 7, 16], num_workers=2)
    epoch = [number for step in whole if step.epoch == 0 for number in step.batches[0]]
    assert (
        len(epoch) == len(set(epoch)) >= FILES * PER_FILE - 2 * PER_STEP
    )  # but for what a step shares with the next epoch


@pytest.mark.parametrize("world_size", [2, 3])  # shards that can be shared evenly, and that cannot
@pytest.mark.parametrize("shuffle_buffer", [0, 7])
def test_ranks_read_other_rows_and_go_on(world_size: int, shuffle_buffer: int, tmp_path: Path) -> None:
    stream = load_rows(jsonl_folder(tmp_path / "rows"), streaming=True, shuffle_buffer=shuffle_buffer)
    ranks = [assert_goes_on(stream, [1, 4, 5], rank=rank, world_size=world_size) for rank in range(world_size)]
    own = [[n for step in steps if step.epoch == 0 for n in step.batches[0]] for steps in ranks]
    together = [number for rank in own for number in rank]
    assert len(together) == len(set(together)) >= FILES * PER_FILE - world_size * PER_STEP
    facts = check_shards(stream, world_size, 0)
    assert bool(facts) == (world_size == 3) and all("4 shards cannot be shared evenly by 3" in fact for fact in facts)


def test_too_many_loading_processes_are_told(tmp_path: Path) -> None:
    stream = load_rows(jsonl_folder(tmp_path / "rows"), streaming=True)
    with pytest.raises(ValueError, match="num_workers=3, but .*rows has 2 shards for each of 2 processes.*at most 2"):
        check_shards(stream, 2, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_of_streams_goes_on(num_workers: int, tmp_path: Path) -> None:
    sources = {jsonl_folder(tmp_path / "a"): 3.0, tar_shards(tmp_path / "b"): 1.0}
    stream = load_rows(sources, streaming=True, shuffle_buffer=4)
    whole = read(stream, num_workers=num_workers)
    for cut in (1, 6, 15):
        options = {"positions": positions(whole[:cut]), "num_workers": num_workers}
        assert numbers(read(stream, range(cut, STEPS), **options)) == numbers(whole)[cut:]
    cursor = stream.cursor(Share(), 0)
    names = [next(cursor).source for _ in range(40)]
    assert [names.count(name) for name in ("a", "b")] == [30, 10]


def test_a_bad_row_keeps_its_place_and_its_name(tmp_path: Path) -> None:
    for at in range(2):
        write_jsonl(tmp_path / "rows" / f"{at}.jsonl", numbered(0), "", "{", numbered(1))
    stream = load_rows(tmp_path / "rows", streaming=True)
    found = numbers(read(stream, range(3), skip_bad_rows=True))
    assert found == [[0, "rows/0.jsonl, line 3", 1], [0, "rows/1.jsonl, line 3", 1], found[0]]
    with pytest.raises(RowError, match=r"^rows/0.jsonl, line 3: Expecting"):
        read(stream, range(1))


def test_rows_of_a_hub_stream_are_named_by_who_reads_them_and_their_images_stay_encoded(tmp_path: Path) -> None:
    def rows(shards: list[int]) -> Any:
        for shard in shards:
            yield {"image": {"bytes": png(shard), "path": None}, "caption": f"Number {shard}.", "id": shard}

    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "id": datasets.Value("int64")}
    )
    data = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"shards": [0, 1, 2, 3]})
    stream = as_rows(data)
    example = first_example(stream, TrainConfig())
    assert (example.name, example.columns, len(example.images)) == ("row row 0", {"id": 0}, 1)
    assert numbers(read(stream, range(2), rank=1, world_size=2)) == [[1, 3, 1], [3, 1, 3]]
    for shuffled in (
        data.shuffle(0),
        data.shuffle(0).map(dict),
        datasets.concatenate_datasets([data, data.shuffle(0)]),
    ):
        with pytest.raises(ValueError, match="whose buffer is lost when a run is resumed. Leave it out, and pass"):
            as_rows(shuffled)
    assert_goes_on(Stream(data, shuffle_buffer=3), [1, 4, 9])


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_on_a_stream_is_bit_equal_to_an_unbroken_one(
    num_workers: int, internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl_folder(tmp_path / "rows")
    options: dict[str, Any] = {"batch_size": 6, "max_steps": 8, "num_workers": num_workers, "save_steps": 5}
    stream = load_rows(source, streaming=True, shuffle_buffer=9)
    unbroken = internvl.model()
    expected = train(unbroken, internvl, tmp_path / "unbroken", stream, **options)
    assert "The stream has ended and begins again: epoch 2." in capsys.readouterr().out
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000008")
    again = load_rows(source, streaming=True, shuffle_buffer=9)
    resumed = internvl.model()
    result = train(resumed, internvl, tmp_path / "broken", again, resume=True, **options)
    assert curve(result) == curve(expected) and len(curve(result)) == 8
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(unbroken).values(), strict=True))
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000008")
    other = load_rows(source, streaming=True, shuffle_buffer=8)
    for rows, changed, message in (
        (other, {}, "was trained on other data"),
        (again, {"num_workers": 1}, "'num_workers': .*, this run has {'num_workers': 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            train(internvl.model(), internvl, tmp_path / "broken", rows, resume=True, **{**options, **changed})


def test_a_changed_byte_of_the_data_is_refused_on_resume(internvl: Family, tmp_path: Path) -> None:
    path = Path(write_jsonl(tmp_path / "a.jsonl", *(numbered(row) for row in range(4))))
    train(internvl.model(), internvl, tmp_path / "out", load_rows(path), max_steps=1)
    shutil.copy(path, tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").rename(path)  # the same bytes, written later
    train(internvl.model(), internvl, tmp_path / "out", load_rows(path), max_steps=2, resume=True)
    path.write_bytes(path.read_bytes().replace(b"Number 3", b"Number 4"))
    with pytest.raises(ValueError, match=r"step-000002 was trained on other data.*or start afresh with --overwrite"):
        train(internvl.model(), internvl, tmp_path / "out", load_rows(path), max_steps=3, resume=True)


def test_what_a_stream_needs_is_told(internvl: Family, tmp_path: Path) -> None:
    stream = load_rows(write_jsonl(tmp_path / "a.jsonl", numbered(0)), streaming=True)
    with pytest.raises(ValueError, match="a stream, which has no length, so that max_steps must say when to stop"):
        train(internvl.model(), internvl, tmp_path, stream, max_steps=None)
    with pytest.raises(ValueError, match="shuffle_buffer=3 is for streaming=True"):
        load_rows(tmp_path / "a.jsonl", shuffle_buffer=3)
    with pytest.raises(ValueError, match="the stream has no rows"):
        read(load_rows(write_jsonl(tmp_path / "b.jsonl", ""), streaming=True), range(1))
    with pytest.raises(TypeError, match="rows is a Stream, which has no length; only fit\\(\\) takes streams"):
        as_examples(stream)
    with pytest.raises(TypeError, match="rows is a generator; pass hfcustom.load_rows"):
        as_rows(row for row in [numbered(0)])


# ---- memory ---------------------------------------------------------------------------------------------------------


def growth(read: Callable[[], object], first: int, last: int) -> int:
    """Return the bytes that Python holds more of after the last call than after the first ones."""
    held = []
    tracemalloc.start()
    try:
        for at in range(1, last + 1):
            read()
            if at in (first, last):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return held[1] - held[0]


@pytest.mark.parametrize(("kind", "shuffle_buffer"), [("jsonl", 0), ("mixture", 50)])
def test_a_long_stream_takes_no_more_memory_than_its_beginning(kind: str, shuffle_buffer: int, tmp_path: Path) -> None:
    rows = [numbered(at) for at in range(3000)]
    files = {
        "jsonl": write_jsonl(tmp_path / "a.jsonl", *rows),
        "parquet": write_groups(tmp_path / "a.parquet", rows, 500),
    }
    source: Any = {files["jsonl"]: 0.5, files["parquet"]: 0.5} if kind == "mixture" else files[kind]
    cursor = load_rows(source, streaming=True, shuffle_buffer=shuffle_buffer).cursor(Share(), 0)
    last = cursor.epoch
    assert growth(lambda: next(cursor), 1100, 2600) < 40_000  # bytes, of 1500 rows of several hundred
    assert cursor.epoch == last


def test_the_places_of_lines_take_16_bytes_a_row(tmp_path: Path) -> None:
    path = Path(write_jsonl(tmp_path / "a.jsonl", *["{}"] * 20_000))
    tracemalloc.start()
    try:
        rows = JsonlRows(path)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (len(rows), rows.name_of(19_999)) == (20_000, "a.jsonl, line 20000")
    assert held < 20 * len(rows)
