"""The costliest batch: that it is found, tried before the first step, and leaves nothing behind; and what happens if it is too large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from safetensors.torch import load_file

import hfcustom
from hfcustom.custom_model import CustomModel
from hfcustom.data.collate import Collator
from hfcustom.data.packing import Packer
from hfcustom.data.sources import as_examples
from hfcustom.data.steps import Attempts
from hfcustom.data.turns import RowError
from hfcustom.runs.files import read_lines
from hfcustom.train_config import TrainConfig
from hfcustom.training.costliest import NoMemoryError, batch_size, costliest_batches

ROWS = [
    chat_row(images, at, turns) for at, (images, turns) in enumerate([(1, 1), (0, 9), (3, 2), (1, 2), (0, 1), (2, 1)])
]


def config(folder: Path, **options: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "lr": 1e-2, "log_steps": 1, "warmup_steps": 0}
    return TrainConfig(output_dir=str(folder), **{**fixed, **options})


def train(
    family: Family, folder: Path, dropout: float = 0.1, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = family.model()
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = dropout  # what random numbers decide has to be the same too
    result = hfcustom.fit(model, family.processor, ROWS, config(folder, **options))
    return [entry["loss"] for entry in result.history], load_file(result.model_dir / "model.safetensors")


@contextmanager
def memory_for(tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """A device with memory for a forward of so many tokens: a larger one fails as CUDA's allocator does."""
    asked: list[tuple[int, ...]] = []

    def allocate(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(module, CustomModel):
            asked.append(tuple(kwargs["input_ids"].shape))
            if kwargs["input_ids"].numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    call = torch.nn.Module.__call__

    def call_if_it_fits(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        allocate(self, args, kwargs)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", call_if_it_fits)
        yield asked


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_the_longest_rows_are_found_and_those_with_the_most_images(internvl: Family) -> None:
    rows, collate = Attempts(as_examples(ROWS)), Collator(internvl.processor)
    sizes = [batch_size(collate([row])) for row in ROWS]
    longest, most_images = costliest_batches(rows, collate, 1)
    assert longest.rows == [f"row {max(range(len(ROWS)), key=lambda at: sizes[at].tokens)}"]
    assert most_images.rows == [f"row {max(range(len(ROWS)), key=lambda at: sizes[at].crops)}"]
    assert longest.rows != most_images.rows
    assert costliest_batches(rows, collate, 9)[0]["input_ids"].shape[0] == 9  # rows come again where there are fewer
    assert [batch.rows for batch in costliest_batches(rows, collate, 1, most_rows=1)] == [["row 0"]]


def test_a_pack_is_as_full_as_it_gets(internvl: Family) -> None:
    collate = Collator(internvl.processor)
    lengths = sorted(collate([row])["input_ids"].numel() for row in ROWS)
    packer = Packer.of(internvl.model(), lengths[-1] + lengths[0])
    batch, *_ = costliest_batches(Attempts(as_examples(ROWS)), collate, 1, packer)
    assert batch["input_ids"].numel() == lengths[-1] + lengths[0]


def test_rows_that_cannot_be_used_are_not_tried(internvl: Family) -> None:
    collate = Collator(internvl.processor)
    bad = {"messages": [{"role": "user", "content": "alone " * 999}]}
    (batch,) = costliest_batches(Attempts(as_examples([bad, ROWS[0]])), collate, 1)
    assert batch.rows == ["row 1"]
    with pytest.raises(RowError, match="None of the 1 rows that were read can be used; the first says: row 0"):
        costliest_batches(Attempts(as_examples([bad])), collate, 1)


# ---- the trial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"packing": True, "pack_tokens": 256}], ids=str)
def test_a_run_with_a_trial_is_bit_equal_to_one_without(
    internvl: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    plain, weights = train(internvl, tmp_path / "plain", **options)
    tried, same = train(internvl, tmp_path / "tried", try_costliest=True, **options)
    assert plain == tried
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_costliest_batch_comes_first_and_fails_before_the_first_step(internvl: Family, tmp_path: Path) -> None:
    with memory_for(300) as asked, pytest.raises(NoMemoryError, match="No step was taken"):
        train(internvl, tmp_path, try_costliest=True)
    assert len(asked) == 1
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("options", [{}, {"packing": True, "pack_tokens": 800}], ids=str)
def test_micro_batches_are_halved_until_they_fit(
    internvl: Family, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"dropout": 0.0, "lr": 1e-4}
    whole, _ = train(internvl, tmp_path / "whole", **options)
    with memory_for(300) as asked:
        halved, _ = train(internvl, tmp_path / "halved", auto_micro_batch=True, try_costliest=True, **options)
    assert halved == pytest.approx(whole, rel=1e-5)
    sizes = [rows * length for rows, length in asked]
    assert sizes[0] > 300
    assert max(sizes[2:]) <= 300
    said = capsys.readouterr().out
    assert said.count("auto_micro_batch: ") == 2
    noted = [line for line in read_lines(tmp_path / "halved" / "faults.jsonl") if line["kind"] == "halved"]
    assert len(noted) == 2 and all(f"going on with {line['size']}." in said for line in noted)
    assert f"did not fit into memory; since step 0 with {noted[0]['size']}." in (
        tmp_path / "halved" / "report.html"
    ).read_text().replace("\n", " ")
    assert "costliest batch tried: " in said


def test_a_row_that_does_not_fit_alone_is_said(internvl: Family, tmp_path: Path) -> None:
    with memory_for(10), pytest.raises(NoMemoryError, match="1 x .* tokens, .* does not fit"):
        train(internvl, tmp_path, auto_micro_batch=True, try_costliest=True)


def test_another_error_in_the_trial_is_that_error(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="longer|tokens"):
        train(internvl, tmp_path, try_costliest=True, max_length=5)


def test_options_that_exclude_each_other() -> None:
    assert "auto_micro_batch has no effect with try_costliest=False" in str(
        TrainConfig(auto_micro_batch=True, try_costliest=False).problems()
    )
