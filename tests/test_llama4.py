"""Llama 4: pixels in the model's dtype, a rotary table that stays complex, tiles with separators, one BOS."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from test_two_encoders import CONNECTORS, wake
from transformers import Llama4Processor

import hfcustom
from hfcustom.cache.refusals import why_not_cached
from hfcustom.data.collate import Collator
from hfcustom.families import missing_packages

needs_torchvision = pytest.mark.skipif(
    bool(missing_packages("llama4")), reason="the image processor needs torchvision"
)


@pytest.fixture
def llama4(families: dict[str, Family]) -> Family:
    return families["llama4"]


def batch_of(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return a row with one tile, made by hand."""
    ids = torch.arange(40, 60)[None]
    ids[:, 3:7] = model.placeholder_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28).to(dtype)}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_pixels_are_cast_to_the_towers_dtype(llama4: Family, weights: torch.dtype) -> None:
    model = llama4.model().to(weights)
    batch = batch_of(model, torch.bfloat16)
    expected = model(**batch).logits
    assert torch.equal(model(**{**batch, "pixel_values": batch["pixel_values"].float()}).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_the_rotary_table_of_the_tower_survives_a_change_of_dtype(llama4: Family, dtype: torch.dtype) -> None:
    model, untouched = llama4.model(), llama4.model()
    pixels = batch_of(model)["pixel_values"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Casting complex values to real")
        model.to(dtype).to(torch.float32)
    untouched.load_state_dict(model.state_dict())  # weights that were rounded; the table is none of them
    features, expected = (net.get_image_features(pixel_values=pixels).last_hidden_state for net in (model, untouched))
    assert torch.equal(features, expected)


@torch.no_grad()
def test_seams_are_in_effect_in_a_call_of_forward_itself(llama4: Family) -> None:
    """There is no inner model whose call would begin the pass."""

    class Shifted(llama4.model_class):  # type: ignore[misc, name-defined]
        def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            return embeddings + image_mask[..., None]

    plain, shifted = llama4.model(), llama4.model(Shifted)
    batch = batch_of(plain)
    assert torch.equal(shifted.forward(**batch).logits, shifted(**batch).logits)
    assert not torch.equal(shifted.forward(**batch).logits, plain.forward(**batch).logits)
    assert shifted._pass is None
    with pytest.raises(ValueError):
        shifted(**{**batch, "pixel_values": torch.zeros(1)})
    assert shifted._pass is None


# ---- the processor --------------------------------------------------------------------------------------------------


@needs_torchvision
def test_pixels_are_the_stock_ones_as_float32(llama4: Family) -> None:
    mine = llama4.processor
    stock = Llama4Processor(mine.image_processor, mine.tokenizer, patch_size=7, chat_template=mine.chat_template)
    images = [[picture(1), picture(2, (28, 60))], [picture(3, (70, 30))]]
    texts = ["<|image|> and <|image|>", "<|image|>"]
    theirs = stock(text=texts, images=images, padding=True, return_tensors="pt")
    for options in ({"return_tensors": "pt"}, {}):
        found = mine(text=texts, images=images, padding=True, **options)
        assert found["pixel_values"].dtype == torch.float32
        assert torch.equal(found["pixel_values"], theirs["pixel_values"].float())
        assert torch.equal(torch.as_tensor(found["input_ids"]), theirs["input_ids"])


@needs_torchvision
@pytest.mark.parametrize("connector", [None, "average_pool"])
def test_separators_stand_between_the_tiles_whatever_a_tile_becomes(llama4: Family, connector: str | None) -> None:
    model, processor = llama4.model(connector=connector), copy.deepcopy(llama4.processor)
    model.match_processor(processor)
    row = {**chat_row(1), "images": [picture(0, (56, 56))]}
    batch = Collator(processor)([row])
    tile = "<|patch|>" * model.tokens_per_crop()
    rows = f"{tile}<|tile_x_separator|>{tile}<|tile_y_separator|>" * 2
    assert f"<|image_start|>{rows}<|image|>{tile}<|image_end|>" in processor.tokenizer.decode(batch["input_ids"][0])
    assert batch["pixel_values"].shape == (5, 3, 28, 28)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


@needs_torchvision
def test_a_text_that_begins_with_bos_gets_no_second_one(llama4: Family) -> None:
    processor = llama4.processor
    bos = processor.tokenizer.bos_token_id
    rendered = processor.apply_chat_template([{"role": "user", "content": "hi"}])
    stock = Llama4Processor(processor.image_processor, processor.tokenizer)
    assert stock(text=[rendered])["input_ids"][0][:2] == [bos, bos]
    for text in (rendered, [rendered], [rendered, rendered]):
        assert all(ids.count(bos) == 1 for ids in processor(text=text)["input_ids"])
    assert processor(text=["hi"])["input_ids"][0].count(bos) == 1
    assert processor(text=[rendered], add_special_tokens=True)["input_ids"][0].count(bos) == 2
    assert processor(text=[rendered], text_kwargs={"add_special_tokens": True})["input_ids"][0].count(bos) == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_added_towers_see_the_tiles_of_each_beam(llama4: Family, use_cache: bool) -> None:
    """generate() runs the tower once, deals its features to beams, and projects them in each forward."""
    model = llama4.model(connector=CONNECTORS["several"] | {"num_queries": 4})
    wake(model.custom_connector)
    ids = torch.arange(40, 60).repeat(2, 1)
    ids[0, 3:11] = ids[1, 3:7] = model.placeholder_token_id  # two tiles, and one
    pixels = torch.randn(3, 3, 28, 28)
    options: Any = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    together = model.generate(input_ids=ids, pixel_values=pixels, **options)
    for row, tiles in enumerate((slice(2), slice(2, 3))):
        alone = model.generate(input_ids=ids[row : row + 1], pixel_values=pixels[tiles], **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        torch.testing.assert_close(together.sequences_scores[row], alone.sequences_scores[0])


def test_a_change_of_vision_features_is_inside_the_tower_so_it_is_not_cached(llama4: Family) -> None:
    class Shifted(llama4.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return features + 1

    for model_class, why in (
        (llama4.model_class, ""),
        (Shifted, "in this family vision features are changed inside of it"),
    ):
        model = llama4.model(model_class)
        hfcustom.freeze(model, ["vision"])
        assert why in why_not_cached(model) and bool(why) == bool(why_not_cached(model))
