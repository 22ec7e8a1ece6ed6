"""Gemma 3: images that see themselves whole, one beginning a row, and crops."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Family, chat_row, picture
from conversations import labelled

from hfcustom.data.collate import Collator, process
from hfcustom.data.messages import read_row


@pytest.fixture
def family(families: dict[str, Family]) -> Family:
    return families["gemma3"]


@pytest.mark.parametrize("images", [[0], [1, 0], [2, 3]], ids=str)
def test_the_collator_always_says_which_tokens_are_images(family: Family, images: list[int]) -> None:
    batch = family.batch(images)
    is_image = batch["input_ids"] == family.model().placeholder_token_id
    assert is_image.sum() == 4 * sum(images)
    assert torch.equal(batch["token_type_ids"] == 1, is_image)


def test_a_row_begins_once(family: Family) -> None:
    processor = family.processor
    bos, example = processor.tokenizer.bos_token_id, read_row(chat_row(1), "row")
    assert processor.tokenizer("hello")["input_ids"].count(bos) == 1  # the tokenizer begins a text by itself
    assert (family.batch([2, 0, 1])["input_ids"] == bos).sum(1).tolist() == [1, 1, 1]
    text = processor.apply_chat_template(example.messages)
    shown = process(processor, [text], [example], padding_side="left")
    assert int((shown["input_ids"] == bos).sum()) == 1


def test_the_tokens_of_an_image_see_each_other_and_no_later_image(family: Family) -> None:
    batch = {name: tensor for name, tensor in family.batch([2]).items() if name != "labels"}
    first, second = (batch["token_type_ids"][0] == 1).nonzero()[:, 0].split(4)
    hidden = []
    for changed in (None, 0, 1):
        pixels = batch["pixel_values"].clone()
        if changed is not None:
            pixels[changed, :, 16:] = 0  # the lower half, of which the last two tokens are made
        with torch.no_grad():
            hidden.append(family.model().model(**{**batch, "pixel_values": pixels}).last_hidden_state[0])
    assert (hidden[0] != hidden[1]).any(-1)[first[0] :].all()
    assert not (hidden[0] != hidden[1]).any(-1)[: first[0]].any()
    assert torch.equal((hidden[0] != hidden[2]).any(-1), torch.arange(len(hidden[0])) >= second[0])


def test_mark_images_finds_them_where_a_batch_does_not_say(family: Family) -> None:
    batch = family.batch([2, 0, 1])
    bare = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    stock, marking = family.model(), family.model(mark_images=True)
    with torch.no_grad():
        expected = stock(**batch).logits
        assert torch.equal(marking(**batch).logits, expected)
        assert torch.equal(marking(**bare).logits, expected)
        assert not torch.equal(stock(**bare).logits, expected)
        rows = family.batch([0, 0])
        del rows["token_type_ids"]
        assert torch.equal(marking(**rows).logits, stock(**rows).logits)
    grads = []
    for inputs in (batch, bare):
        model = family.model(mark_images=True).train()
        model(**inputs).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_mark_images_generates_what_marked_batches_do(family: Family) -> None:
    row, processor = chat_row(2), family.processor
    text = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    inputs = processor(text=[text], images=[row["images"]], return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = family.model().generate(**inputs, **options)
    del inputs["token_type_ids"]
    for use_cache in (True, False):
        assert torch.equal(family.model(mark_images=True).generate(**inputs, **options, use_cache=use_cache), expected)


def test_crops_of_pan_and_scan_are_images_of_their_own(family: Family) -> None:
    processor = copy.deepcopy(family.processor)
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
    processor.images_kwargs = {**processor.images_kwargs, **crops}
    row = chat_row(1)
    row["images"] = [picture(1, (90, 30))]
    for connector, tokens in ((None, 4), ("average_pool", 1)):
        model = family.model(connector=connector).train()
        model.match_processor(processor)
        batch = Collator(processor)([row, chat_row(0)])
        assert len(batch["pixel_values"]) > 2
        images = batch["input_ids"] == model.placeholder_token_id
        assert images.sum(1).tolist() == [tokens * len(batch["pixel_values"]), 0]
        assert labelled(processor, batch["labels"][0]) == ["It is 0 of 0.<end_of_turn>\n"]
        assert torch.isfinite(model(**batch).loss)
