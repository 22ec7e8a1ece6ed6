"""cache_reference: what the reference says, once, as columns of the rows, and training with them instead of a second pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from kinds import family_of_each_kind  # noqa: F401
from pairs import IMAGES, WORDS, answered, pair_rows, perturb
from PIL import Image
from training import curve, short_config, weights

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.data.reference import RowsWithColumns
from hfcustom.data.sources import Examples
from hfcustom.data.steps import TooManyBadRows
from hfcustom.losses import loss_columns, parse_losses
from hfcustom.train import fit

LOG_2 = 0.6931471805599453
DPO = {"dpo": {"beta": 0.2}}


def judged_rows(count: int) -> list[dict[str, Any]]:
    rows = [answered(chat_row(IMAGES[at], seed=at), WORDS[at][0], 1) for at in range(count)]
    return [{**row, "label": at % 3 != 0} for at, row in enumerate(rows)]


def log_probs(model: Any, family: Family, rows: Any) -> list[float]:
    """Return log p of each answer, row by row."""
    found = []
    for row in rows:
        batch = Collator(family.processor)([row])
        with torch.no_grad():
            found += model.loss_context(batch, batch["labels"]).row_log_probs.tolist()
    return found


def test_pairs_get_a_column_for_each_answer(family: Family) -> None:
    model, rows = family.corrected(), pair_rows(IMAGES[:5])
    cached = hfcustom.cache_reference(model, family.processor, rows, batch_size=2)
    expected = log_probs(model, family, rows)
    found = [value for row in cached for value in row.columns.values()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(cached[0].columns) == ["chosen_reference_log_probs", "rejected_reference_log_probs"]
    assert cached.columns["rejected_reference_log_probs"] == found[1::2]
    assert (len(cached), cached[-1].columns) == (5, cached[4].columns)
    assert [row.columns for row in cached[1:3]] == [cached[1].columns, cached[2].columns]


@pytest.mark.parametrize("kind", ["judged", "ordinary"])
def test_other_rows_get_one_column(internvl: Family, kind: str) -> None:
    model = internvl.model()
    rows = judged_rows(4) if kind == "judged" else [chat_row(count, seed) for seed, count in enumerate([1, 0, 2])]
    cached = hfcustom.cache_reference(model, internvl.processor, rows)
    assert list(cached.columns) == ["reference_log_probs"]
    assert cached.columns["reference_log_probs"] == pytest.approx(log_probs(model, internvl, rows), rel=1e-5)


def test_columns_of_the_rows_are_kept_and_their_names_too(internvl: Family) -> None:
    rows = Examples([{**row, "score": 0.5} for row in pair_rows(IMAGES[:2])], "my row")
    cached = hfcustom.cache_reference(internvl.model(), internvl.processor, rows)
    assert cached[1].name == "my row 1"
    assert list(cached[1].columns) == ["score", "chosen_reference_log_probs", "rejected_reference_log_probs"]
    again = hfcustom.cache_reference(internvl.model(seed=1), internvl.processor, cached)
    assert again[0].columns["chosen_reference_log_probs"] != cached[0].columns["chosen_reference_log_probs"]


def test_the_reference_is_the_one_that_training_would_ask(internvl: Family) -> None:
    """The model given as such, else this one without its adapter; its state is as before."""
    rows = pair_rows(IMAGES[:3])
    base = internvl.model()
    plain, other = log_probs(base, internvl, rows), log_probs(internvl.model(seed=1), internvl, rows)
    model = hfcustom.lora(base, rank=2).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    for expected in (plain, other):
        found = hfcustom.cache_reference(model, internvl.processor, rows).columns.values()
        assert [value for pair in zip(*found, strict=True) for value in pair] == pytest.approx(expected, rel=1e-5)
        assert model.training and not any(
            module.disable_adapters for module in model.modules() if "_disable_adapters" in dir(module)
        )
        model.get_base_model().set_reference(internvl.model(seed=1))


@pytest.mark.parametrize("loss", [DPO, {"ipo": 1.0}], ids=str)
def test_training_with_the_columns_is_training_with_the_reference(
    internvl: Family, loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, results, ends = pair_rows(IMAGES), [], []
    for way in ("reference", "columns"):
        torch.manual_seed(0)
        model = hfcustom.lora(internvl.model(loss=loss), rank=2)
        given: Any = rows
        if way == "columns":
            given = hfcustom.cache_reference(model, internvl.processor, rows, batch_size=3)
            monkeypatch.setattr("hfcustom.losses.context.frozen_context", None)  # it is not asked
        config = short_config(tmp_path / way, batch_size=4, micro_batch_size=2, max_steps=4, lr=1e-2)
        results.append(fit(model, internvl.processor, given, config))
        ends.append(weights(model))
    name = next(iter(loss))
    for found in ("loss", f"{name}_margin", f"{name}_accuracy"):
        assert curve(results[1], found) == pytest.approx(curve(results[0], found), rel=1e-3, abs=1e-5)
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-2, atol=1e-4)
    if name == "dpo":
        assert curve(results[0])[0] == pytest.approx(LOG_2, abs=1e-6)
        assert curve(results[0], "dpo_accuracy")[0] <= 0.5 and curve(results[0])[-1] < LOG_2


def test_judged_answers_train_with_kto(internvl: Family, tmp_path: Path) -> None:
    model = hfcustom.lora(internvl.model(loss="kto"), rank=2)
    rows = hfcustom.cache_reference(model, internvl.processor, judged_rows(8))
    result = fit(model, internvl.processor, rows, short_config(tmp_path, max_steps=4, lr=1e-2))
    assert curve(result)[0] == pytest.approx(0.5, abs=1e-5)
    assert curve(result)[-1] < 0.5 and curve(result, "kto_margin")[-1] > 0


def test_a_model_in_16_bits_is_asked_under_autocast_as_in_training(internvl: Family, tmp_path: Path) -> None:
    base = perturb(internvl.model(loss=DPO)).to(torch.bfloat16)
    model = hfcustom.lora(base, rank=2)
    rows = hfcustom.cache_reference(model, internvl.processor, pair_rows(IMAGES[:4]))
    result = fit(model, internvl.processor, rows, short_config(tmp_path, batch_size=4, max_steps=1))
    assert curve(result)[0] == pytest.approx(LOG_2, abs=1e-5)


def spoiled_rows() -> list[dict[str, Any]]:
    """Pairs of which rows 2 (an image too small), 3 (no answer) and 6 (no pair) cannot be used."""
    rows: list[dict[str, Any]] = pair_rows((1, 0, 1, 1, 0, 1, 1, 0))
    rows[2]["images"] = [Image.new("RGB", (2, 2))]
    rows[3]["chosen"] = [*rows[3]["chosen"][:-1], {"role": "assistant", "content": " "}]
    rows[6] = chat_row(0)
    return rows


def test_bad_rows_are_left_out_by_the_cache_as_by_training(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, skip = spoiled_rows(), {"on_bad_row": "skip", "max_bad_share": 0.5}
    options = {**skip, "max_steps": 3, "lr": 1e-2}
    usable = [row for at, row in enumerate(rows) if at not in (2, 3, 6)]
    expected = hfcustom.cache_reference(internvl.model(), internvl.processor, usable)
    weighted = []
    for given in ("cached", "asked"):
        model = hfcustom.lora(perturb(internvl.model(loss=DPO)), rank=2)
        if given == "cached":
            found = hfcustom.cache_reference(internvl.model(), internvl.processor, rows, batch_size=3, **skip)  # type: ignore[arg-type]
            told = capsys.readouterr().out
        else:
            found = rows  # type: ignore[assignment]
            model.base_model.model.set_reference(internvl.model())
        fit(model, internvl.processor, found, short_config(tmp_path / given, **options))
        weighted.append(weights(model))
    assert [line.partition(":")[0] for line in told.splitlines() if "left out" in line] == ["left out"] * 3
    cached = hfcustom.cache_reference(internvl.model(), internvl.processor, rows, batch_size=3, **skip)  # type: ignore[arg-type]
    for name, values in cached.columns.items():
        assert [at for at, value in enumerate(values) if value != value] == [2, 3, 6]
        assert [value for value in values if value == value] == pytest.approx(expected.columns[name], rel=1e-5)
    for at in (2, 3, 6):
        with pytest.raises(hfcustom.RowError, match=f"^row {at}"):
            cached[at]
    listed = [(tmp_path / given / "bad_rows.jsonl").read_text() for given in ("cached", "asked")]
    assert sorted(listed[0].splitlines()) == sorted(listed[1].splitlines()) and listed[0].count("\n") == 3
    for key, value in weighted[0].items():
        torch.testing.assert_close(weighted[1][key], value, rtol=1e-3, atol=1e-5)


def test_too_many_bad_rows_end_the_cache_and_listed_ones_do_not_count(internvl: Family, tmp_path: Path) -> None:
    rows, model = spoiled_rows(), internvl.model()
    with pytest.raises(
        TooManyBadRows, match=r"3 of 8 rows cannot be used, more than max_bad_share=0.3 .*\n +row 2, image 0"
    ):
        hfcustom.cache_reference(model, internvl.processor, rows, on_bad_row="skip", max_bad_share=0.3)
    with pytest.raises(hfcustom.RowError, match="^row 3, chosen"):
        hfcustom.cache_reference(model, internvl.processor, rows)
    listed = tmp_path / "bad_rows.jsonl"
    listed.write_text("".join(f'{{"row": "row {at}", "reason": "row {at}: listed"}}\n' for at in (2, 3, 6)))
    cached = hfcustom.cache_reference(model, internvl.processor, rows, exclude=str(listed))
    assert set(cached.bad) == {2, 3, 6}


def test_what_cannot_be_cached_is_told(internvl: Family) -> None:
    with pytest.raises(TypeError, match="cache_reference.. wants a custom model; load the Linear"):
        hfcustom.cache_reference(torch.nn.Linear(1, 1), internvl.processor, pair_rows([0]))
    with pytest.raises(ValueError, match="0 rows in batches of 8"):
        hfcustom.cache_reference(internvl.model(), internvl.processor, [])
    with pytest.raises(ValueError, match="in batches of 0"):
        hfcustom.cache_reference(internvl.model(), internvl.processor, pair_rows([0]), batch_size=0)
    with pytest.raises(ValueError, match="Unknown on_bad_row 'skp'. Did you mean 'skip'"):
        hfcustom.cache_reference(internvl.model(), internvl.processor, pair_rows([0]), on_bad_row="skp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bad_share=5 must be in"):
        hfcustom.cache_reference(internvl.model(), internvl.processor, pair_rows([0]), max_bad_share=5)
    with pytest.raises(hfcustom.RowError, match="row 1 is an ordinary row .*, but the first row is a pair"):
        hfcustom.cache_reference(internvl.model(), internvl.processor, [*pair_rows([0]), chat_row(0)])
    with pytest.raises(ValueError, match="column 'score' has 1 values for 2 rows"):
        RowsWithColumns(pair_rows([0, 1]), {"score": [1.0]})


def test_fit_takes_the_columns_where_rows_have_them(internvl: Family) -> None:
    cached = hfcustom.cache_reference(internvl.model(), internvl.processor, pair_rows([0]))
    assert loss_columns(parse_losses(DPO), cached[0].columns) == ["reference_log_probs"]
    assert loss_columns(parse_losses(DPO), cached.rows[0].columns) == loss_columns(parse_losses("orpo"), ["x"]) == []


def test_a_missing_column_is_told_with_its_row(internvl: Family, tmp_path: Path) -> None:
    rows = copy.copy(pair_rows(IMAGES[:4]))
    rows[0] = {**rows[0], "chosen_reference_log_probs": -1.0, "rejected_reference_log_probs": -2.0}
    model = hfcustom.lora(internvl.model(loss=DPO), rank=2)
    with pytest.raises(hfcustom.RowError, match="row [123].*Unknown column 'reference_log_probs'"):
        fit(model, internvl.processor, rows, short_config(tmp_path, batch_size=4))
