"""PaliGemma: the prompt sees itself whole, the answer is causal, and the processor takes every row a chat can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture, stock_config
from conversations import IMAGE, conversation, labelled, turn
from transformers import AutoConfig, PaliGemmaProcessor

from hfcustom.data.collate import Collator
from hfcustom.data.labels import expanded_position
from hfcustom.families import paligemma as module
from hfcustom.losses import IGNORE

PROMPTS, ANSWERS = ["What is it?", "Read the digits from left to right"], ["A cat", "0 1 2"]


@pytest.fixture
def family(families: dict[str, Family]) -> Family:
    return families["paligemma"]


@pytest.fixture
def stock_processor(family: Family) -> Any:
    ours = family.module.tiny_processor()
    return PaliGemmaProcessor(ours.image_processor, ours.tokenizer, chat_template=ours.chat_template)


def seen_by(model: Any, batch: dict[str, torch.Tensor], token: int) -> torch.Tensor:
    """Return which positions of the first row change when a token of the text does: (T,)."""
    other = batch["input_ids"].clone()
    other[0, token] += 1
    with torch.no_grad():
        hidden = [
            model.model(**{**batch, "input_ids": ids}).last_hidden_state[0] for ids in (batch["input_ids"], other)
        ]
    return (hidden[0] != hidden[1]).any(-1)


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_chat_row_is_what_stock_makes_of_a_prompt_and_a_suffix(family: Family, stock_processor: Any) -> None:
    images = [[picture(1)], [picture(2), picture(3)]]
    texts = ["<image>" * len(row) + prompt for row, prompt in zip(images, PROMPTS, strict=True)]
    stock = stock_processor(text=texts, suffix=ANSWERS, images=images, padding=True, return_tensors="pt")
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": prompt}, *[IMAGE] * len(row)]},
                {"role": "assistant", "content": answer},
            ],
            "images": row,
        }
        for row, prompt, answer in zip(images, PROMPTS, ANSWERS, strict=True)
    ]
    batch = Collator(family.processor)(rows)
    assert batch.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(batch[name], tensor), name


def test_a_suffix_makes_the_tensors_of_stock(family: Family, stock_processor: Any) -> None:
    options = {"text": ["<image>" + PROMPTS[0]], "images": [[picture(1)]], "return_tensors": "pt"}
    for suffix in (None, ANSWERS[:1]):
        stock, ours = (p(**options, suffix=suffix) for p in (stock_processor, family.processor))
        assert stock.keys() - ours.keys() == (set() if suffix else {"labels"})
        for name, tensor in ours.items():
            assert torch.equal(tensor, stock[name]), name


ROWS = ["<image>What?", "What?", "see <image> and <image> now", "<image>", ""]


@pytest.mark.parametrize("rows", [ROWS, ROWS[1::3], ROWS[:1], ["<bos>said", "<image><bos>said"]], ids=str)
def test_every_row_begins_once_and_its_words_are_found(family: Family, rows: list[str]) -> None:
    images = [[picture(at)] * row.count("<image>") for at, row in enumerate(rows)]
    features = family.processor(
        text=rows,
        images=images if any(images) else None,
        return_text_replacement_offsets=True,
        padding=True,
        padding_side="right",
    )
    tokenizer = family.processor.tokenizer
    for row, ids, mask, records in zip(
        rows, features["input_ids"], features["attention_mask"], features["text_replacement_offsets"], strict=True
    ):
        written = tokenizer.decode([token for token, real in zip(ids, mask, strict=True) if real])
        assert written.count("<bos>") == 1
        if "<bos>" not in row:
            before, after = row.rpartition("<image>")[0::2]
            expected = f"{before}<image><bos>{after}\n" if "<image>" in row else f"<bos>{row}\n"
        assert written.replace("<image>" * 16, "<image>") == (row if "<bos>" in row else expected)
        at = 0
        for word in row.replace("<image>", " ").split():
            at = row.index(word, at)
            assert written[expanded_position(at, records) :].startswith(word)


def test_a_template_without_a_beginning_gets_stocks(family: Family) -> None:
    processor = copy.copy(family.processor)
    processor.chat_template = processor.chat_template.replace("<bos>", "")
    row = conversation(
        turn("user", IMAGE, "Both? "), turn("assistant", "Yes."), turn("user", IMAGE, "?"), turn("assistant", "No.")
    )
    batch = Collator(processor)([row, chat_row(0)])
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
    assert labelled(processor, batch["labels"][0]) == ["Yes.<eos>", "No.<eos>"]
    assert labelled(processor, batch["labels"][1]) == ["It is 0 of 0.<eos>"]


def test_rows_of_different_lengths_need_no_padding(family: Family) -> None:
    features = family.processor(text=["a", "a longer one"])
    assert len(features["input_ids"][0]) < len(features["input_ids"][1])


def test_the_stock_processor_is_refused(stock_processor: Any) -> None:
    with pytest.raises(ValueError, match=r"PaliGemmaProcessor makes labels of its own.*model.processor_class"):
        Collator(stock_processor)([chat_row(1)])


# ---- who sees whom --------------------------------------------------------------------------------------------------


def test_the_prompt_sees_itself_whole_and_the_answer_is_causal(family: Family) -> None:
    model, batch = family.model(), family.batch([2])
    types, length = batch["token_type_ids"][0], batch["input_ids"].shape[1]
    assert torch.equal(types == 1, batch["labels"][0] != IGNORE)
    prompt = int((types == 0).sum())
    everything = torch.arange(length)
    assert seen_by(model, inputs_of(batch), prompt - 3).all()
    for token in (prompt, length - 2):
        assert torch.equal(seen_by(model, inputs_of(batch), token), everything >= token)


def turns(*weights: float | None) -> dict[str, Any]:
    row = chat_row(1, turns=len(weights))
    for message, weight in zip(row["messages"][1::2], weights, strict=True):
        message["weight"] = weight
    return row


@pytest.mark.parametrize(("weights", "prompts"), [((1.0, 1.0), 1), ((0.0, 1.0), 2), ((1.0, 0.0), 1)], ids=str)
def test_a_prompt_ends_where_the_first_trained_answer_begins(
    family: Family, weights: tuple[float, ...], prompts: int
) -> None:
    row = turns(*weights)
    batch = Collator(family.processor)([chat_row(2, turns=4), row])
    prompt = family.processor.apply_chat_template(row["messages"][: 2 * prompts - 1], add_generation_prompt=True)
    shown = family.processor(text=[prompt], images=[row["images"]])
    length, real = len(shown["input_ids"][0]), int(batch["attention_mask"][1].sum())
    assert batch["input_ids"][1, :length].tolist() == shown["input_ids"][0]
    assert not any(shown["token_type_ids"][0])  # what generation is given
    assert batch["token_type_ids"][1].tolist() == [0] * length + [1] * (real - length) + [0] * (
        len(batch["labels"][1]) - real
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_without_types_hides_what_is_to_come(family: Family, attention: str, padded: bool) -> None:
    batch = {name: tensor[:1] for name, tensor in inputs_of(family.batch([1, 2] if padded else [1])).items()}
    types = batch.pop("token_type_ids")
    assert padded == (not batch["attention_mask"].all())
    seen = {}
    for causal in (False, True):
        model = family.model(causal_without_types=causal)
        model.set_attn_implementation(attention)
        seen[causal] = seen_by(Called(model), batch, 8 + int((types == 0).sum()))
    assert not seen[True][: 8 + int((types == 0).sum())].any()
    leaks = attention == "sdpa" and not padded
    assert seen[False][0] == leaks, "what stock does without token_type_ids"


class Called:
    """A model whose `model` is called through its head, so that what forward() adds is there."""

    def __init__(self, model: Any) -> None:
        self.outer = model

    def model(self, **inputs: torch.Tensor) -> Any:
        outputs = self.outer(**inputs, output_hidden_states=True)
        outputs.last_hidden_state = outputs.hidden_states[-1]
        return outputs


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings as they come; warning_once remembers those of other tests."""
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning_once", said.append, raising=False)
    return said


def test_training_without_types_is_warned_about(family: Family, said: list[str]) -> None:
    batch = dict(family.batch([1]))
    family.model().train()(**batch)
    assert not said
    del batch["token_type_ids"]
    family.model().eval()(**batch)
    family.model(causal_without_types=True).train()(**batch)
    assert not said
    family.model().train()(**batch)
    assert "PaliGemma is trained without token_type_ids" in said[0]


def test_a_mask_is_kept_for_prompts_that_see_ahead(family: Family) -> None:
    batch = family.batch([2, 0, 1])
    text_config = family.module.tiny_config().text_config
    text_config.use_bidirectional_attention = False  # token_type_ids alone look ahead
    kinds = (None, family.stock_class)
    losses = [family.model(kind, text_config=text_config).train()(**batch).loss for kind in kinds]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


# ---- PaliGemma 2 ----------------------------------------------------------------------------------------------------


def second(family: Family, cap: float | None = 0.5) -> Any:
    """Return the config of a tiny PaliGemma 2: Gemma 2 with a window of 16 tokens in one layer, and a low cap."""
    config = family.module.tiny_config()
    text = {name: getattr(config.text_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config.text_config = AutoConfig.for_model(
        "gemma2", **text, **layers, sliding_window=16, final_logit_softcapping=cap, use_bidirectional_attention=True
    )
    return config


@pytest.mark.parametrize("cap", [0.5, None])
def test_paligemma_2_caps_its_logits_and_trains_as_stock(family: Family, cap: float | None) -> None:
    batch, results = family.batch([2, 0, 1]), []
    for model_class in (family.model_class, family.stock_class):
        config = second(family, cap)
        torch.manual_seed(0)
        model = model_class(config if model_class is family.model_class else stock_config(model_class, config))
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        assert (float(logits.abs().max()) <= 0.5) or cap is None
        loss = model.train()(**batch).loss
        loss.backward()
        results.append((logits, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        if model_class is family.model_class:
            assert (model.loss_head().linear is None) == (cap is not None)
    (logits, loss, grads), (stock_logits, stock_loss, stock_grads) = results
    assert torch.equal(logits, stock_logits)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)
    assert grads.keys() == stock_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, stock_grads[name], rtol=1e-4, atol=1e-7)


def test_paligemma_2_generates_with_cache_as_without(family: Family) -> None:
    torch.manual_seed(0)
    model = family.model_class(second(family)).eval()
    row = chat_row(2)
    prompt = family.processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    inputs = family.processor(text=[prompt], images=[row["images"]], return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)
