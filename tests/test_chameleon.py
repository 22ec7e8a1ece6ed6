"""Chameleon: logits without image tokens, merging as stock does it, and a processor that keeps its template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from transformers import AutoProcessor, ChameleonProcessor

from hfcustom.families.chameleon import CODES, SEPARATOR


@pytest.fixture
def chameleon(families: dict[str, Family]) -> Family:
    return families["chameleon"]


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_head_are_those_of_stock_image_tokens_suppressed(chameleon: Family, dtype: torch.dtype) -> None:
    model, batch = chameleon.model().to(dtype), without_labels(chameleon.batch([1, 0]))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    stock = chameleon.model(chameleon.stock_class).to(dtype)
    logits = model.compute_logits(model.model(**batch).last_hidden_state)
    assert torch.equal(logits, stock(**batch).logits)
    codes = chameleon.processor.tokenizer.convert_tokens_to_ids(list(CODES))
    assert (logits[..., codes] == torch.finfo(dtype).min).all()
    assert (logits > torch.finfo(dtype).min).sum(-1).unique().tolist() == [logits.shape[-1] - len(CODES)]


@torch.no_grad()
def test_the_inner_model_takes_what_stock_takes(chameleon: Family) -> None:
    class Shifted(chameleon.model_class):  # type: ignore[misc, name-defined]
        def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            return embeddings + image_mask[..., None]

    batch = without_labels(chameleon.batch([2, 1]))
    ids, pixels, mask = (batch.pop(name) for name in ("input_ids", "pixel_values", "attention_mask"))
    inner, stock = chameleon.model().model, chameleon.model(chameleon.stock_class).model
    images = {"image": stock.get_image_features(pixels, return_dict=True)}
    embeddings = stock.embed_tokens(ids)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids, pixels, mask), {}),
        ((ids,), {"attention_mask": mask, "mm_encoder_outputs": images}),
        ((), {"inputs_embeds": embeddings, "pixel_values": pixels, "attention_mask": mask}),
        ((), {"inputs_embeds": embeddings, "attention_mask": mask}),
    ]
    shifted = chameleon.model(Shifted).model
    for args, kwargs in calls:
        expected = stock(*args, **kwargs).last_hidden_state
        assert torch.equal(inner(*args, **kwargs).last_hidden_state, expected)
        assert not torch.equal(shifted(*args, **kwargs).last_hidden_state, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        inner(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        inner(ids, pixels, mm_encoder_outputs=images)


def test_a_template_separates_turns_itself_and_travels(chameleon: Family, tmp_path: Path) -> None:
    processor = copy.copy(chameleon.processor)
    processor.save_pretrained(tmp_path)
    chameleon.module.tiny_config().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    prompt = processor.apply_chat_template(chat_row(1)["messages"][:1], add_generation_prompt=True)
    separator = processor.tokenizer.convert_tokens_to_ids(SEPARATOR)
    given: dict[str, Any] = {"text": [prompt], "images": [chat_row(1)["images"]]}
    for reader in (processor, again):
        assert (reader(**given)["input_ids"] == separator).nonzero()[:, 1].tolist() == [
            reader(**given)["input_ids"].shape[1] - 1
        ]
    assert processor(**given, return_for_text_completion=False)["input_ids"][0, -2:].tolist() == [separator] * 2


def test_without_a_template_the_processor_makes_what_stock_makes(chameleon: Family) -> None:
    mine = copy.copy(chameleon.processor)
    mine.chat_template = None
    stock = ChameleonProcessor(mine.image_processor, mine.tokenizer, mine.image_seq_length)
    given: dict[str, Any] = {"text": ["<image> what?", "Hi"], "images": [chat_row(1)["images"], []], "padding": True}
    for options in ({}, {"return_for_text_completion": True}):
        found, expected = mine(**given, **options), stock(**given, **options)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
