"""Molmo 2 beside what every family must do: offsets in the text it was given, two grids an image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, picture
from conversations import with_markers

from hfcustom.connectors import AveragePool
from hfcustom.families import missing_packages
from hfcustom.families.molmo2 import POOLED

pytestmark = pytest.mark.skipif(bool(missing_packages("molmo2")), reason="works with torchvision only")


@pytest.fixture
def molmo2(families: dict[str, Family]) -> Family:
    return families["molmo2"]


@pytest.mark.parametrize("images", [[], [0]], ids=["text", "image"])
def test_the_assistant_mask_is_the_answer_and_its_end(molmo2: Family, images: list[int]) -> None:
    processor = with_markers(molmo2.processor)
    content: list[dict[str, Any]] = [{"type": "image", "image": picture(seed)} for seed in images]
    content.append({"type": "text", "text": "What is it?"})
    answer = [{"type": "text", "text": "It is nothing."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    outputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = outputs["input_ids"][0][outputs["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(said) == "It is nothing.<|im_end|>\n"


@pytest.mark.parametrize("beginning", ["", "<|im_end|>"], ids=["written by stock", "in the text"])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_offsets_are_those_in_the_text_that_was_given(molmo2: Family, beginning: str, tensors: str | None) -> None:
    text = f"{beginning}one<|image|>two"
    options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, "return_tensors": tensors}
    outputs = molmo2.processor(text=text, images=[[picture()]], **options)
    (replaced,) = outputs["text_replacement_offsets"][0]
    assert text[slice(*replaced["span"])] == "<|image|>"
    expanded = text.replace("<|image|>", replaced["replacement"])
    assert expanded[slice(*replaced["new_span"])] == replaced["replacement"]
    pairs = [tuple(map(int, pair)) for pair in outputs["offset_mapping"][0]]
    assert "".join(expanded[start:end] for start, end in pairs) == expanded


@pytest.mark.parametrize("marked", [True, False], ids=["rows marked", "whole image unmarked"])
def test_placeholders_follow_the_connector_in_both_grids(molmo2: Family, marked: bool) -> None:
    processor = copy.deepcopy(molmo2.processor)
    processor.use_single_crop_col_tokens = marked
    model = molmo2.model(connector="average_pool")
    model.match_processor(processor)
    text = processor.tokenizer.decode(molmo2.batch([1], processor)["input_ids"][0])
    whole, crops = "<im_patch>" + "<im_col>" * marked, "<im_patch><im_patch><im_col>"  # of 2 x 2 and 2 x 4 tokens
    assert f"<low_res_im_start>{whole}<im_end><im_start>{crops}<im_end>" in text


def test_crops_of_an_image_are_reduced_together(molmo2: Family) -> None:
    batch = molmo2.batch([1])
    inputs = {name: batch[name] for name in ("pixel_values", "image_token_pooling", "image_grids")}
    with torch.no_grad():
        (plain,) = molmo2.model().get_image_features(**inputs).pooler_output  # (4 + 8, D)
        (reduced,) = molmo2.model(connector="average_pool").get_image_features(**inputs).pooler_output
    whole, crops = plain.split([4, 8])
    pool = AveragePool(plain.shape[1])
    expected = torch.cat([pool(whole[None], (2, 2))[0], pool(crops[None], (2, 4))[0]])  # (1 + 2, D)
    assert torch.equal(reduced, expected)


def test_no_label_is_beyond_the_head(molmo2: Family) -> None:
    batch = molmo2.batch([2, 0, 1])
    assert int(batch["input_ids"].max()) >= molmo2.model().lm_head.out_features > int(batch["labels"].max())


def test_images_beside_videos_are_refused_with_the_cure(molmo2: Family) -> None:
    with pytest.raises(ValueError, match="images or videos in one micro-batch, not both: set video_as_images=True"):
        molmo2.processor(text=["<|image|>", "<|video|>"], images=[[picture()]], videos=[[picture(), picture()]])
    kinds = [{name: torch.zeros(1, 4, 3), pooled: torch.zeros(2, 4).long()} for name, pooled in POOLED.items()]
    with pytest.raises(ValueError, match="without packing where no row has both"):
        molmo2.model_class.merge_images(kinds)
