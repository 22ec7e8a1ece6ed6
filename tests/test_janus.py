"""Janus: labels below the hub's system prompt, and images made as in stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from conversations import end_of_turn, labelled, with_markers
from transformers import JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from hfcustom.data.collate import Collator


@pytest.fixture
def janus(families: dict[str, Family]) -> Family:
    return families["janus"]


def with_system_prompt(processor: Any) -> Any:
    processor = copy.copy(processor)
    processor.use_default_system_prompt = True
    return processor


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "generation markers"])
def test_the_system_prompt_moves_no_label(janus: Family, images: int, marked: bool) -> None:
    processor = with_system_prompt(with_markers(janus.processor) if marked else janus.processor)
    rows = [chat_row(images, seed=3, turns=2), chat_row(0, seed=4)]
    batch = Collator(processor)(rows)
    end = end_of_turn(processor)
    found = [labelled(processor, labels) for labels in batch["labels"]]
    assert found == [[f"It is 3 of 0.{end}", f"It is 3 of 1.{end}"], [f"It is 4 of 0.{end}"]]
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith(DEFAULT_SYSTEM_PROMPT)


@pytest.mark.parametrize("mode", ["text", "image"])
@pytest.mark.parametrize("prompt", [False, True], ids=["no system prompt", "system prompt"])
def test_the_processor_makes_what_stock_makes(janus: Family, mode: str, prompt: bool) -> None:
    mine = with_system_prompt(janus.processor) if prompt else janus.processor
    stock = JanusProcessor(
        mine.image_processor, mine.tokenizer, use_default_system_prompt=prompt, num_image_tokens=mine.num_image_tokens
    )
    given: dict[str, Any] = {"text": ["<image_placeholder> what?", "Hi"], "padding": True, "generation_mode": mode}
    given["images"] = [chat_row(1)["images"], []]
    found, expected = mine(**given), stock(**given)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_images_are_made_as_in_stock(janus: Family) -> None:
    inputs = janus.processor(text=["a cat", "no cat at all"], padding=True, generation_mode="image")
    made = []
    for model_class in (janus.model_class, janus.stock_class):
        model = janus.model(model_class)
        model.generation_config.generation_kwargs = {"boi_token_id": janus.processor.tokenizer.boi_token_id}
        torch.manual_seed(0)
        codes = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=3.0)
        made += [codes, model.decode_image_tokens(codes)]
    assert made[0].shape == (2, 16) and len(made[0].unique()) > 1
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
