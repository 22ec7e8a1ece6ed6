"""MiniCPM-V 4.6 beside what every family must do: views of an image, fewer merges on request."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, picture


@pytest.fixture
def minicpm(families: dict[str, Family]) -> Family:
    return families["minicpmv4_6"]


def matched(minicpm: Family, connector: str | None) -> tuple[Any, Any]:
    processor = copy.deepcopy(minicpm.processor)
    model = minicpm.model(connector=connector)
    return model, model.match_processor(processor)


@pytest.mark.parametrize(
    ("connector", "whole", "piece"), [(None, 4, 4), ("average_pool", 1, 1)], ids=["stock", "token-reducing"]
)
def test_the_whole_image_and_each_slice_have_their_own_tokens(
    minicpm: Family, connector: str | None, whole: int, piece: int
) -> None:
    _, processor = matched(minicpm, connector)
    ids = processor(text=["<|image_pad|>"], images=[[picture(0, (60, 60))]], return_tensors="pt")["input_ids"][0]
    views = f"<slice>{piece * 'I'}</slice>" * 2
    text = processor.tokenizer.decode(ids).replace("<|image_pad|>", "I")
    assert text == f"<image_id>0</image_id><image>{whole * 'I'}</image>{views}\n{views}"  # 2 rows of 2 slices


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_fewer_merges_may_be_asked_for_in_a_call(minicpm: Family, connector: str | None) -> None:
    model, processor = matched(minicpm, connector)
    inputs = {"text": ["<|image_pad|>What?"], "images": [[picture()]], "return_tensors": "pt"}
    plain, fine = processor(**inputs), processor(**inputs, downsample_mode="4x")
    counts = [int((batch["input_ids"] == model.placeholder_token_id).sum()) for batch in (plain, fine)]
    assert counts[1] > 2 * counts[0]
    with torch.no_grad():
        logits = model(**fine, downsample_mode="4x").logits
        if connector is None:
            stock = minicpm.model(minicpm.stock_class)
            assert torch.equal(logits, stock(**fine, downsample_mode="4x").logits)
