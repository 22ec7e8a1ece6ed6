"""Memory that runs out in the middle of a run: the step is what it would have been, in smaller micro-batches, or says what to do."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch
from conftest import Family
from distributed_run import as_pair
from encoder_cases import encoders
from full_memory import Room, Where, room_for
from torch.nn.parallel import DistributedDataParallel
from training import add_dropout, curve, relative_distance, train, uneven_rows, weights

import hfcustom
from hfcustom.data.steps import TooManyBadRows
from hfcustom.distributed.reduction import Reduction, meets_at_the_end
from hfcustom.exits import EXIT_CONFIG
from hfcustom.runs.files import read_lines
from hfcustom.training.memory import NoMemoryError, out_of_memory

LONG = 700  # tokens of a forward, with padding, that there is memory for; the longest of the eight rows has 162
ROWS = uneven_rows()


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What the tests before have left is not looked through by each collection of garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


def assert_same_run(
    family: Any, folder: Path, tokens: int = LONG, build: Any = None, where: Where = "forward", **options: Any
) -> Room:
    """Train with and without memory; losses and weights are the same to rounding."""
    build = build or family.model
    whole, start = build(), weights(build())
    options = {"max_steps": 2, "lr": 1e-4, **options}
    expected = curve(train(whole, family, folder / "whole", **options))
    cut = build()
    with room_for(tokens, where) as room:
        found = curve(train(cut, family, folder / "cut", **options))
    assert room.failures, room.sizes
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative_distance(weights(cut), weights(whole), start) < 2e-2
    return room


# ---- the same step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (LONG, {"gradient_checkpointing": True, "on_bad_row": "skip", "max_bad_share": 0.5}),
        (400, {"micro_batch_size": 4, "num_workers": 2}),
        (200, {"packing": True, "pack_tokens": 400}),
    ],
    ids=str,
)
def test_the_step_is_what_it_would_have_been(
    internvl: Family, tmp_path: Path, tokens: int, options: dict[str, Any]
) -> None:
    rows = ROWS
    if "on_bad_row" in options:  # one that is left out before, in the middle of the others
        rows = [*ROWS[:3], {"messages": [], "images": []}, *ROWS[3:]]
        options |= {"batch_size": 9}
    room = assert_same_run(internvl, tmp_path, tokens, rows=rows, **options)
    assert max(room.sizes[-2:]) <= tokens


def test_images_may_come_from_a_cache(internvl: Family, tmp_path: Path) -> None:
    def build() -> Any:
        model = internvl.model()
        hfcustom.freeze(model, ["vision", "connector"])
        return model

    caches = {"cache_images": str(tmp_path / "images"), "cache_features": str(tmp_path / "features")}
    assert_same_run(internvl, tmp_path, build=build, **caches)


def test_memory_may_run_out_in_the_backward_pass(internvl: Family, tmp_path: Path) -> None:
    assert_same_run(internvl, tmp_path, where="backward")


def test_terms_across_the_rows_of_a_step_see_them_all(internvl: Family, tmp_path: Path) -> None:
    loss = {"cross_entropy": 1.0, "contrastive": 1.0}
    assert_same_run(internvl, tmp_path, build=lambda: internvl.model(loss=loss), max_steps=1)


def test_pairs_of_answers_stay_together(internvl: Family, tmp_path: Path) -> None:
    rows = [as_pair(row) for row in ROWS]
    build = lambda: hfcustom.lora(internvl.model(loss="dpo"), rank=2)  # noqa: E731
    assert_same_run(internvl, tmp_path, build=build, rows=rows[:4], batch_size=4, max_steps=1)


def test_pairs_of_images_and_texts(tmp_path: Path) -> None:
    encoder = encoders()["clip"]
    rows = [{"image": row["images"][0], "text": f"number {at}"} for at, row in enumerate(uneven_rows([1] * 8))]
    assert_same_run(encoder, tmp_path, tokens=40, rows=rows, max_steps=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_stream_are_read_once_more(tmp_path: Path, workers: int) -> None:
    """Transformed at random, shuffled, from where each loading process stood."""
    from hfcustom.data.streams import Stream

    def rows() -> Any:
        return Stream(tiny_run.streamed("torch"), shuffle_buffer=3)

    whole = curve(train(tiny_run.FAMILY.model(), tiny_run.FAMILY, tmp_path / "whole", rows(), num_workers=workers))
    with room_for(LONG) as room:
        cut = curve(train(tiny_run.FAMILY.model(), tiny_run.FAMILY, tmp_path / "cut", rows(), num_workers=workers))
    assert room.failures
    assert cut == pytest.approx(whole, rel=1e-4)


def test_a_failed_attempt_leaves_nothing_behind(internvl: Family, tmp_path: Path) -> None:
    """Random numbers, a buffer that moves; that its tensors are freed is looked at in every test here."""

    class Counting(internvl.model_class):  # type: ignore[name-defined,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def transform_hidden_states(self, hidden: torch.Tensor) -> torch.Tensor:
            self.seen += 1 if self.training else 0
            return hidden + 0 * self.seen

    model = internvl.model(Counting)
    add_dropout(model, 0.1)
    with room_for(LONG) as room, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfcustom.train.check_registered", lambda core: None)
        patch.setattr("hfcustom.training.checkpoint.Checkpoints.save", lambda *_: None)
        patch.setattr("hfcustom.training.checkpoint.Checkpoints.publish", lambda self: tmp_path)
        train(model, internvl, tmp_path, max_steps=1)
    assert room.sizes[0] > LONG and torch.equal(room.random[0], room.random[1])
    assert int(model.seen) == len(room.sizes) - room.failures == 2


def test_what_is_as_large_is_cut_beforehand_from_then_on(internvl: Family, tmp_path: Path) -> None:
    with room_for(LONG) as room:
        train(internvl.model(), internvl, tmp_path, max_steps=4)
    assert room.failures == 1 and len(room.sizes) == 1 + 4 * 2


def test_each_attempt_at_a_step_shares_buffers_once(tmp_path: Path) -> None:
    """Also where the attempt before has failed before its first forward, in the first look at a step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp: Any = DistributedDataParallel(torch.nn.BatchNorm1d(2))
        shared: list[int] = []
        ddp._sync_buffers = lambda: shared.append(1)
        for attempt in (1, 2):
            Reduction(ddp).share_buffers()
            assert len(shared) == attempt
        ddp(torch.ones(3, 2))
        assert len(shared) == 2
    finally:
        torch.distributed.destroy_process_group()


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_it_is_said_once_and_noted(internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with room_for(400):
        result = train(internvl.model(), internvl, tmp_path, max_steps=2)
    said = capsys.readouterr().out
    assert said.count("Out of memory: 8 x ") == 1 and "image crops (row " in said and "and 4 more)" in said
    assert "times; the micro-batch was cut in two each time" in said
    faults = [line for line in read_lines(tmp_path / "faults.jsonl") if line["kind"] == "memory"]
    assert len(faults) >= 2 and all(line["then"] == "cut" for line in faults)
    assert "Memory ran out in the step after 0: a micro-batch of 8 x " in (tmp_path / "report.html").read_text()
    record = json.loads((result.model_dir / "hfcustom.json").read_text())
    assert record["training"][-1]["cut_for_memory"] == len(faults)


def test_a_row_that_does_not_fit_alone_ends_the_run_with_its_name(internvl: Family, tmp_path: Path) -> None:
    train(internvl.model(), internvl, tmp_path, max_steps=1, save_steps=1)
    with room_for(150), pytest.raises(NoMemoryError) as told:
        train(internvl.model(), internvl, tmp_path, max_steps=3, resume=True)
    message = str(told.value)
    assert told.value.exit_code == EXIT_CONFIG
    for words in (
        "a micro-batch of 1 x 162 tokens, 7 image crops (row 6), and it is one row",
        "--on-bad-row skip",
        "The last good checkpoint is",
        "step-000001; continue with --resume",
        "--gradient-checkpointing",
    ):
        assert words in message, message


def test_or_is_left_out_where_rows_may_be(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"on_bad_row": "skip", "max_bad_share": 0.5, "max_steps": 3, "lr": 1e-4}
    expected, found = internvl.model(), internvl.model()
    start = weights(expected)
    rows = [row for at, row in enumerate(ROWS) if at != 6]
    train(expected, internvl, tmp_path / "without", rows, batch_size=7, max_steps=3, lr=1e-4)
    with room_for(150) as room:
        train(found, internvl, tmp_path / "cut", **options)
    assert relative_distance(weights(found), weights(expected), start) < 5e-2
    (line,) = read_lines(tmp_path / "cut" / "bad_rows.jsonl")
    assert (line["row"], line["code"]) == ("row 6", "memory")
    assert capsys.readouterr().out.count("left out: row 6: memory is not enough for it alone (1 x 162 tokens") == 1
    assert room.sizes.count(162) == 2  # once more, for memory may have been in pieces; not in the steps after
    with room_for(10), pytest.raises(TooManyBadRows):
        train(internvl.model(), internvl, tmp_path / "none", **options)


def test_a_row_alone_is_tried_once_more_for_memory_may_have_been_in_pieces(internvl: Family, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 1, "max_steps": 2}
    whole = curve(train(internvl.model(), internvl, tmp_path / "whole", ROWS[6:7], **options))
    with room_for(150, times=1) as room:
        again = curve(train(internvl.model(), internvl, tmp_path / "again", ROWS[6:7], **options))
    assert again == whole and room.sizes == [162] * 3
    assert "was run once more as it is" in (tmp_path / "again" / "report.html").read_text()


def test_without_the_option_the_run_ends(internvl: Family, tmp_path: Path) -> None:
    with (
        room_for(LONG),
        pytest.raises(NoMemoryError, match=r"micro-batch of 8 x .*, and split_on_oom is off.*--micro"),
    ):
        train(internvl.model(), internvl, tmp_path, split_on_oom=False)


def test_ranks_that_share_weights_cannot_try_again(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: Any = SimpleNamespace(num_processes=2)
    assert not meets_at_the_end(torch.nn.Linear(1, 1), shared)
    monkeypatch.setattr("hfcustom.training.splitting.meets_at_the_end", lambda *_: False)
    with (
        room_for(LONG),
        pytest.raises(NoMemoryError, match=r"8 x 162 tokens.*FSDP, ZeRO\) wait for each other in every"),
    ):
        train(internvl.model(), internvl, tmp_path)


def test_in_the_optimizers_step_it_is_said_that_no_smaller_batch_helps(internvl: Family, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(NoMemoryError, match=r"optimizer's step.*--optimizer ada"),
    ):
        patch.setattr(torch.optim.AdamW, "step", full)
        train(internvl.model(), internvl, tmp_path, max_steps=1)


def test_an_error_is_known_for_what_it_is() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    assert out_of_memory(real.value) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
