"""Packed rows: equal to separate ones in every family, none sees another, and a step's losses and gradients stay the same."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Family, chat_row, picture
from pairs import pair_rows
from torch.nn.attention.flex_attention import create_block_mask
from training import (
    add_dropout,
    assert_same_step,
    curve,
    relative_distance,
    run_step,
    train,
    uneven_rows,
    weights,
)
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

import hfcustom
from hfcustom import losses
from hfcustom.data.collate import Batch, Collator
from hfcustom.data.messages import RowError
from hfcustom.data.packing import (
    Packer,
    PackingCollator,
    Size,
    best_fit,
    group_by_length,
    make_packer,
    pack_rows,
    size_of,
)
from hfcustom.data.sources import Examples
from hfcustom.data.steps import StepCollator
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.packed import BY_ROW, keep_rows_apart, packed_row_ids, sdpa_by_row, why_not_packed
from hfcustom.train import checkpoint_activations
from hfcustom.train_config import TrainConfig

IMAGES, WORDS = (2, 1, 0, 0), (3, 40, 1, 12)


def rows_one_by_one(family: Family, processor: Any = None) -> list[Batch]:
    collate = Collator(processor or family.processor)
    return [collate([row]) for row in uneven_rows(IMAGES, WORDS)]


def packed(family: Family, singles: Sequence[Batch]) -> Batch:
    return pack_rows(singles, family.model_class.merge_images)


def logits_of(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """Return the logits of all tokens of batches of a row, or of packed rows, one after the other."""
    with torch.no_grad():
        return torch.cat([model(**batch, return_logits=True).logits[0] for batch in batches])  # (T, V)


def hidden_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.loss_context(batch, batch["labels"]).hidden_states[0]  # (T, D)


# ---- every family ---------------------------------------------------------------------------------------------------


def test_packed_rows_equal_separate_ones_or_the_family_says_why_not(family: Family) -> None:
    """Logits, loss and every gradient; attention row by row leaves no rounding in the logits."""
    singles = rows_one_by_one(family)
    model = family.model()
    if reason := why_not_packed(model):
        assert Packer.of(model).merge_images is None
        text = packed(family, [single for single in singles if size_of(single).crops == 0])
        with pytest.raises(ValueError, match=f"cannot keep apart: {reason}"):
            model(**text)
        return
    one = packed(family, singles)
    assert one["input_ids"].shape == (1, sum(size_of(single).tokens for single in singles))
    torch.testing.assert_close(logits_of(model, [one]), logits_of(model, singles), rtol=1e-5, atol=1e-6)
    found, expected = (run_step(family.model(), batches) for batches in ([one], singles))
    assert_same_step(found, expected, rtol=1e-5)


def test_no_token_of_packed_rows_sees_another_row(family: Family) -> None:
    """Another picture and other words in the first row change nothing in those behind it, and the last row none before it."""
    model = family.model()
    if why_not_packed(model):
        pytest.skip("not packed")
    singles = rows_one_by_one(family)
    seen = hidden_of(model, packed(family, singles))
    others = [Batch(single) for single in singles]
    for name, value in others[0].items():
        if name.startswith("pixel_values"):
            others[0][name] = value.flip(-1)
    changed = others[0]["input_ids"].clone()
    changed[0, -3] += 1  # a word of the answer
    others[0]["input_ids"] = changed
    first = size_of(singles[0]).tokens
    now = hidden_of(model, packed(family, others))
    assert not torch.equal(now[:first], seen[:first])
    torch.testing.assert_close(now[first:], seen[first:], rtol=0, atol=1e-6)
    last = size_of(singles[-1]).tokens
    torch.testing.assert_close(hidden_of(model, packed(family, singles[:-1])), seen[:-last], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in ("gemma3", "internvl", "paligemma", "qwen2_vl") if name in FAMILIES]
)
def test_a_mask_keeps_rows_apart_where_attention_is_eager(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    singles, model = rows_one_by_one(family), family.model()
    model.set_attn_implementation("eager")
    separate = logits_of(model, singles)
    torch.testing.assert_close(logits_of(model, [packed(family, singles)]), separate, rtol=1e-5, atol=2e-6)
    assert model.config.get_text_config()._attn_implementation == "eager"


# ---- attention ------------------------------------------------------------------------------------------------------


def test_rows_are_attended_to_one_by_one_without_a_mask(internvl: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, Any]] = []

    def watched(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[2], args[2]))
        return sdpa(module, query, *args, **kwargs)

    from hfcustom import packed as module

    sdpa = module.sdpa_attention_forward
    monkeypatch.setattr(module, "sdpa_attention_forward", watched)
    model, singles = internvl.model(), rows_one_by_one(internvl)
    hidden_of(model, packed(internvl, singles))
    lengths = [size_of(single).tokens for single in singles]
    assert calls == [(length, None) for length in lengths] * model.config.text_config.num_hidden_layers
    assert model.config.vision_config._attn_implementation == "sdpa"
    generated = model.generate(**{k: v for k, v in singles[0].items() if k != "labels"}, max_new_tokens=3)
    stock = internvl.model().generate(**{k: v for k, v in singles[0].items() if k != "labels"}, max_new_tokens=3)
    assert torch.equal(generated, stock)


def test_flash_attention_is_told_where_rows_end(internvl: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel, which no CPU has, gets what transformers would find by itself in each layer."""
    told: list[dict[str, Any]] = []

    def stand_in(module: Any, *args: Any, **kwargs: Any) -> Any:
        assert args[3] is None
        told.append(
            {name: kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        )
        lengths = told[-1]["cu_seq_lens_q"].diff().tolist()
        return sdpa_by_row(module, *args, row_lengths=lengths, scaling=kwargs["scaling"])

    model, singles = internvl.model(), rows_one_by_one(internvl)
    expected = logits_of(model, singles)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in)
    model.config.text_config._attn_implementation = "flash_attention_2"
    one = packed(internvl, singles)
    torch.testing.assert_close(logits_of(model, [one]), expected, rtol=1e-5, atol=1e-6)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(one["position_ids"])
    assert torch.equal(told[0]["cu_seq_lens_q"], ends) and told[0]["max_length_k"] == int(longest)


def test_a_mask_that_cannot_be_cut_is_an_error(internvl: Family) -> None:
    rows = torch.tensor([[0, 0, 1]])
    blocks = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 3, 3, device="cpu")
    with pytest.raises(ValueError, match="flex attention.*attn_implementation='sdpa'"):
        keep_rows_apart(torch.nn.Identity(), {"attention_mask": blocks}, rows)
    hidden = keep_rows_apart(torch.nn.Identity(), {"attention_mask": torch.zeros(1, 1, 3, 3)}, rows)["attention_mask"]
    assert (hidden == 0)[0, 0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_what_is_not_packed_is_not_taken_for_it() -> None:
    counted = torch.arange(4)[None]
    assert packed_row_ids({"position_ids": counted}) is None
    assert packed_row_ids({"position_ids": counted % 2, "attention_mask": torch.ones(1, 4)}) is None
    assert packed_row_ids({"position_ids": counted.expand(3, 1, 4) % 2}) is None  # M-RoPE without those of the text
    assert packed_row_ids({"position_ids": counted % 2}).tolist() == [[0, 0, 1, 1]]
    assert packed_row_ids({"position_ids": (counted % 2).expand(4, 1, 4)}).tolist() == [[0, 0, 1, 1]]
    assert packed_row_ids({"position_ids": (counted % 2).expand(2, 4)}).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_layers_that_carry_a_state_are_found_in_the_config(internvl: Family) -> None:
    model = internvl.model()
    model.config.text_config.layer_types = ["full_attention", "linear_attention"]
    assert (
        why_not_packed(model) == "its layers of linear_attention carry what they have read from one row into the next"
    )


@pytest.mark.parametrize("name", [name for name in ("minicpmv4_6",) if name in FAMILIES])
def test_a_state_that_cannot_begin_anew_is_an_error(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    model, one = family.model(), packed(family, rows_one_by_one(family)[2:])
    twice = {key: value.expand(2, -1) for key, value in one.items()}
    with pytest.raises(ValueError, match="only for rows packed into a batch of one row"):
        model(**twice)


def test_packing_has_no_meaning_for_an_encoder() -> None:
    with pytest.raises(ValueError, match="packing has no effect on CustomDualEncoder"):
        make_packer(CustomDualEncoder.__new__(CustomDualEncoder), TrainConfig(packing=True))


def test_a_connector_of_frames_knows_packed_rows(internvl: Family) -> None:
    """Two neighbouring crops are one clip, of one row."""
    model = internvl.model(connector={"name": "frame_average", "frames": 2})
    processor = model.match_processor(internvl.module.tiny_processor())
    collate = Collator(processor)

    def singles(*counts: int) -> list[Batch]:
        rows = [{**chat_row(count), "images": [picture(at, (28, 28)) for at in range(count)]} for count in counts]
        return [collate([row]) for row in rows]

    whole = singles(2, 4)
    found = logits_of(model, [packed(internvl, whole)])
    torch.testing.assert_close(found, logits_of(model, whole), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="row 0 of the batch ends amid"):
        model(**packed(internvl, singles(1, 3)))


# ---- which rows go together -----------------------------------------------------------------------------------------


def log_normal(count: int, seed: int = 0) -> list[Size]:
    """Return rows whose lengths are drawn as the benchmark's are: median 220, from 64 to 1024."""
    draw = random.Random(seed)
    lengths = [min(max(int(draw.lognormvariate(math.log(220), 0.8)), 64), 1024) for _ in range(count)]
    return [Size(length, draw.randrange(1, 5)) for length in lengths]


@pytest.mark.parametrize("crops", [None, 12])
@pytest.mark.parametrize("cut", [best_fit, group_by_length])
def test_every_row_goes_into_one_micro_batch_within_the_budget(cut: Any, crops: int | None) -> None:
    sizes = [*log_normal(64), Size(5000, 1), Size(10, 99)]
    groups = cut(sizes, 2048, crops)
    assert sorted(at for group in groups for at in group) == list(range(len(sizes)))
    for group in groups:
        tokens = [sizes[at].tokens for at in group]
        taken = sum(tokens) if cut is best_fit else max(tokens) * len(tokens)
        assert taken <= 2048 or group == [64]
        assert crops is None or sum(sizes[at].crops for at in group) <= crops or group == [65]


def test_the_budget_is_filled_and_little_is_padded() -> None:
    """The share of useful tokens in a full budget, packed, and of all that is computed, grouped by length."""
    sizes = log_normal(256)
    tokens = sum(size.tokens for size in sizes)
    assert tokens / (2048 * len(best_fit(sizes, 2048))) > 0.97
    groups = group_by_length(sizes, 2048)
    assert tokens / sum(max(sizes[at].tokens for at in group) * len(group) for group in groups) > 0.9
    assert tokens / (len(sizes) * max(size.tokens for size in sizes)) < 0.4  # in one padded batch


def test_crops_are_counted_in_each_layout() -> None:
    base = {"attention_mask": torch.ones(1, 7)}
    assert size_of(base) == Size(7, 0)
    for shape, crops in (((6, 3, 8, 8), 6), ((1, 5, 3, 8, 8), 5), ((30, 16, 147), 30), ((1, 2, 4, 3, 8, 8), 8)):
        assert size_of({**base, "pixel_values": torch.zeros(shape)}) == Size(7, crops)
    assert size_of({**base, "pixel_values": torch.zeros(360, 294), "image_grid_thw": torch.ones(2, 3)}) == Size(7, 2)


# ---- a step ---------------------------------------------------------------------------------------------------------


def micro_batches(
    model: Any, family: Family, rows: Sequence[Any], tokens: int, columns: Sequence[str] = ()
) -> list[Any]:
    """Return a step's rows packed, and as one padded batch, in float64."""
    collate = Collator(family.processor, columns=columns)
    examples = list(Examples(rows))
    cut = StepCollator(collate, 0, packer=Packer.of(model, tokens))(examples)
    assert len(cut.batches) > 1 and cut.cut is not None and cut.cut.computed == cut.cut.tokens
    batches = (cut.batches, [collate(examples)])
    return [
        [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in form]
        for form in batches
    ]


CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"loss": "contrastive"},
    "dpo": {"loss": "dpo", "rows": pair_rows((1, 0, 2, 1)), "lora": True},
    "gradient checkpointing": {"loss": {"cross_entropy": 1.0, "z_loss": 1e-3}, "checkpointing": True},
    "token weights": {"loss": "weighted_cross_entropy", "columns": ["token_weights"]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_step_is_that_of_padded_rows(case: str, internvl: Family) -> None:
    told = {"rows": uneven_rows(), "columns": [], "lora": False, "checkpointing": False, **CASES[case]}
    if told["columns"]:
        told["rows"][0]["messages"][-1]["weight"] = 0.25
    steps = []
    for form in (0, 1):
        model = internvl.model(loss=told["loss"]).double()
        if told["checkpointing"]:
            checkpoint_activations(model)
        batches = micro_batches(model, internvl, told["rows"], 150, told["columns"])[form]
        steps.append(run_step(hfcustom.lora(model, rank=2) if told["lora"] else model, batches))
    assert_same_step(*steps)
    assert any(float(gradient.norm()) for gradient in steps[0][1].values())


def test_columns_of_rows_and_of_tokens_follow_their_rows(internvl: Family) -> None:
    rows = uneven_rows(IMAGES, WORDS)
    for at, row in enumerate(rows):
        row["score"] = [float(at)] * 3
    collate = Collator(internvl.processor, columns=["score"])
    singles = [collate([row]) for row in rows]
    one = pack_rows(singles, internvl.model_class.merge_images, ["score"])
    assert one["score"].tolist() == [[float(at)] * 3 for at in range(4)]
    assert one["labels"].shape == one["position_ids"].shape and losses.count_rows(one) == 4
    assert one.images == 3 and one.rows == ["row 0"] * 4  # each was a batch by itself
    singles[1]["score"] = torch.zeros(1, 2)
    with pytest.raises(RowError, match=r"'score' has shapes \(3,\) and \(2,\)"):
        pack_rows(singles, internvl.model_class.merge_images, ["score"])


def test_a_row_begins_without_a_label(internvl: Family) -> None:
    """What a row's first token would be predicted from is another row's last."""
    singles = rows_one_by_one(internvl)
    for single in singles:
        single["labels"] = single["input_ids"].clone()
    one = packed(internvl, singles)
    assert one["labels"][one["position_ids"] == 0].tolist() == [losses.IGNORE] * len(singles)
    assert losses.count_tokens(one) == sum(map(losses.count_tokens, singles))


def test_rows_of_two_kinds_in_a_step_are_an_error(internvl: Family) -> None:
    rows = list(Examples([*uneven_rows([0], [3]), *pair_rows((0,))]))
    step = StepCollator(Collator(internvl.processor), 0, packer=Packer.of(internvl.model()))
    with pytest.raises(RowError, match="row 0: has no 'preference', which other rows of the step have"):
        step(rows)


# ---- fit() ----------------------------------------------------------------------------------------------------------


PACKING: dict[str, Any] = {"packing": True, "pack_tokens": 150}


@pytest.mark.parametrize("name", [name for name in ("mllama", "qwen2_vl") if name in FAMILIES])
def test_a_packed_run_ends_where_a_padded_one_does(
    name: str, families: dict[str, Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mllama's rows cannot be packed, and are grouped by length."""
    family = families[name]
    start = weights(family.corrected())
    found, results = [], []
    for at, options in enumerate(({}, {**PACKING, "num_workers": 2})):
        model = family.corrected()
        results.append(train(model, family, tmp_path / str(at), **options))
        found.append(weights(model))
    assert curve(results[1]) == pytest.approx(curve(results[0]), rel=1e-5)
    assert relative_distance(found[1], found[0], start) < 2e-3
    said, shares = capsys.readouterr().out, curve(results[1], "useful_tokens")
    assert said.count("packing: 8 rows in ") == 1
    assert ("cross-attention shows" in said) == (name == "mllama")
    assert shares == [1.0] * 3 if name != "mllama" else min(shares) > 0.5
    assert all(0 < share < 1 for share in curve(results[0], "useful_tokens"))  # padding


def test_a_stopped_packed_run_resumes_to_the_same_weights(internvl: Family, tmp_path: Path) -> None:
    ends = []
    for folder, parts in (("whole", [{}]), ("parts", [{"max_steps": 1}, {"resume": True}])):
        for options in parts:
            model = internvl.model()
            add_dropout(model, 0.1)
            train(model, internvl, tmp_path / folder, schedule="constant", **PACKING, **options)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_bad_rows_are_left_out_of_packs(internvl: Family, tmp_path: Path) -> None:
    rows = uneven_rows()
    rows.insert(2, {"messages": [{"role": "user", "content": "no answer follows"}]})
    ends = []
    for at, (given, options) in enumerate(((uneven_rows(), {}), (rows, {"on_bad_row": "skip", "max_bad_share": 1.0}))):
        model = internvl.model()
        train(model, internvl, tmp_path / str(at), given, max_steps=1, batch_size=len(given), **PACKING, **options)
        ends.append(weights(model))
    assert relative_distance(*ends, weights(internvl.model())) < 1e-3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"packing": True, "micro_batch_size": 2}, "micro_batch_size=2 and packing exclude each other"),
        ({"pack_tokens": 100}, "pack_tokens=100 has no effect without packing"),
        ({"packing": True, "pack_crops": 0}, "pack_crops=0 must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_problems(options: dict[str, Any], problem: str) -> None:
    assert [found for found in TrainConfig(**options).problems() if problem in found]


def test_a_family_with_a_limit_says_so(internvl: Family) -> None:
    class Limited(internvl.model_class):  # type: ignore[misc, name-defined]
        max_packed_tokens = 100

    model = internvl.model(Limited)
    with pytest.raises(ValueError, match="pack_tokens=4096.*at most 100"):
        Packer.of(model)
    with pytest.raises(ValueError, match="takes at most 100: pack fewer"):
        model(**packed(internvl, rows_one_by_one(internvl)))


# ---- transformers.Trainer -------------------------------------------------------------------------------------------


def test_trainer_trains_packed_rows_as_padded_ones(
    internvl: Family, families: dict[str, Family], tmp_path: Path
) -> None:
    rows, found = uneven_rows(), []
    for collate in (Collator(internvl.processor), PackingCollator(internvl.model(), internvl.processor)):
        arguments = {
            "use_cpu": True,
            "report_to": [],
            "remove_unused_columns": False,
            "max_steps": 2,
            "save_strategy": "no",
        }
        arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "disable_tqdm": True}
        model = internvl.model().train()
        made = TrainingArguments(output_dir=str(tmp_path), **arguments)
        Trainer(model, made, train_dataset=rows, data_collator=collate).train()
        found.append(weights(model))
    assert model.config.text_config._attn_implementation == BY_ROW
    assert relative_distance(*found, weights(internvl.model())) < 2e-3
    with pytest.raises(ValueError, match="cannot be trained on packed rows: cross-attention.*Use Collator"):
        PackingCollator(families["mllama"].model(), families["mllama"].processor)
