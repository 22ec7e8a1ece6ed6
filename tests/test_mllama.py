"""Llama 3.2 Vision: what stock gets wrong in a mixed batch, its processor's crashes, reduced cross-attention states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model, chat_row, picture
from transformers import AutoModelForImageTextToText, MllamaProcessor

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.parts import find_parts

ROWS = [chat_row(2, 0), chat_row(0, 1), chat_row(1, 2)]
POOLED = {"name": "average_pool", "size": 4}  # 16 patches become 1


@pytest.fixture
def mllama(families: dict[str, Family]) -> Family:
    return families["mllama"]


def without_labels(batch: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


# ---- tokens that must not see an image ------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("connector", [None, POOLED], ids=["stock", "pooled"])
@torch.no_grad()
def test_only_with_masked_text_rows_does_a_batch_equal_its_rows(mllama: Family, masked: bool, connector: Any) -> None:
    model, collate = mllama.model(mask_text_rows=masked, connector=connector), Collator(mllama.processor)
    together = model(**collate(ROWS)).logits
    for at, row in enumerate(ROWS):
        alone = model(**collate([row])).logits[0]
        difference = float((together[at, : len(alone)] - alone).abs().max())
        assert difference < 2e-6 if masked else difference > 1e-4 or at == 0  # the first row has the most images


@torch.no_grad()
def test_text_before_the_first_image_is_read_as_without_images(mllama: Family) -> None:
    batch = without_labels(mllama.batch([2]))
    first = int((batch["input_ids"][0] == mllama.model().placeholder_token_id).nonzero()[0])
    text = {name: batch[name][:, :first] for name in ("input_ids", "attention_mask")}
    for masked in (False, True):
        model = mllama.model(mask_text_rows=masked)
        same = torch.allclose(model(**batch).logits[:, :first], model(**text).logits, rtol=1e-4, atol=2e-6)
        assert same == masked


def test_masked_text_rows_are_generated_alike_whatever_the_batch_and_the_cache(mllama: Family) -> None:
    model = mllama.model(mask_text_rows=True, connector=POOLED)
    prompts = [mllama.processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True) for row in ROWS]
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = mllama.processor(text=prompts, images=[row["images"] for row in ROWS], **inputs)
    answers = model.generate(**batch, **options)[:, -5:]
    for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **options, **cache)[:, -5:], answers)
    for at, row in enumerate(ROWS):
        alone = mllama.processor(text=prompts[at], images=row["images"] or None, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[0, -5:], answers[at])


def test_the_correction_travels_and_leaves_gradients_where_images_are_seen(mllama: Family, tmp_path: Path) -> None:
    model = mllama.model(mask_text_rows=True)
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.mask_text_rows
    batch = mllama.batch([0, 1])
    batch["labels"][1] = -100  # only the row without images is learnt from
    model.train()(**batch).loss.backward()
    seen = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert seen and not [name for name in seen if "cross_attn" in name or find_parts(model).part_of(name) == "vision"]


# ---- the connector ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_connector_shortens_the_keys_of_cross_attention_and_leaves_cls_alone(mllama: Family) -> None:
    lengths: list[int] = []
    features = []
    for connector in (None, POOLED):
        model = mllama.model(connector=connector)
        cross = model.model.language_model.layers[1].cross_attn
        cross.k_proj.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
        batch = mllama.batch([2, 0, 1])
        features.append(model.loss_context(batch, batch["labels"]).image_features)
    assert lengths == [17, 2]
    tiles = int(mllama.batch([2, 0, 1])["cross_attention_mask"].any(1).sum())
    assert [tuple(found.shape) for found in features] == [(tiles, 17, 64), (tiles, 2, 64)]
    assert torch.equal(features[1][:, 0], features[0][:, 0])
    torch.testing.assert_close(features[1][:, 1], features[0][:, 1:].mean(1))


def test_terms_count_the_image_tokens_that_cross_attention_gets(mllama: Family) -> None:
    @hfcustom.term(count="image_tokens")
    def image_energy(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        energy = context.image_features.square().mean(-1)  # (P, M)
        return energy.sum(), energy.numel()

    model, batch = mllama.model(loss="image_energy", connector=POOLED), mllama.batch([2, 0, 1])
    rows = model.image_token_rows(batch)
    model.train()(**batch).loss.backward()
    assert model.loss_values["image_energy"].count == len(rows) == 2 * int(batch["cross_attention_mask"].any(1).sum())
    assert rows.tolist() == sorted(rows.tolist()) and set(rows.tolist()) == {0, 2}
    text = mllama.batch([0])
    assert float(model(**text).loss.detach()) == 0.0


def test_cross_attention_states_that_are_given_pass_the_connector_too(mllama: Family) -> None:
    model = mllama.model(connector=POOLED)
    batch = without_labels(mllama.batch([1]))
    images = {name: batch.pop(name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        states = model.model.multi_modal_projector(model.model.vision_model(**images).last_hidden_state)
        found = model(**batch, cross_attention_states=states.flatten(0, 2)).logits
        assert torch.equal(found, model(**batch, **images).logits)
        labels = mllama.batch([1])["labels"]
        given = model.loss_context({**batch, "labels": labels, "cross_attention_states": states.flatten(0, 2)}, labels)
    assert (
        len(given.image_rows) == given.image_features.shape[:2].numel() == 2 * int(images["aspect_ratio_mask"].sum())
    )


# ---- the processor --------------------------------------------------------------------------------------------------


def processed(processor: Any, rows: list[Any], nested: bool = True, **options: Any) -> dict[str, torch.Tensor]:
    texts = [processor.apply_chat_template(row["messages"]) for row in rows]
    images = [row["images"] for row in rows] if nested else [image for row in rows for image in row["images"]]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **options))


def test_a_row_without_images_may_stand_anywhere(mllama: Family) -> None:
    expected = processed(mllama.processor, ROWS)
    stock = MllamaProcessor(
        mllama.processor.image_processor, mllama.processor.tokenizer, mllama.processor.chat_template
    )
    theirs = processed(stock, ROWS, add_special_tokens=False)
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())
    for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1]):
        found = processed(mllama.processor, [ROWS[at] for at in order])
        assert all(torch.equal(found[name], tensor[order]) for name, tensor in expected.items())


def test_no_images_in_any_nesting_are_no_images(mllama: Family) -> None:
    texts = ["one", "another"]
    expected = mllama.processor(text=texts, padding=True)
    for images in ([], [[], []], None):
        found = mllama.processor(text=texts, images=images, padding=True)
        assert found == expected and set(found) == {"input_ids", "attention_mask"}


def test_a_flat_list_of_images_is_dealt_out_by_the_marks(mllama: Family) -> None:
    nested, flat = (processed(mllama.processor, ROWS, nested) for nested in (True, False))
    assert all(torch.equal(flat[name], tensor) for name, tensor in nested.items())
    with pytest.raises(ValueError, match="should be the same as the number of images"):
        mllama.processor(text=["<|image|>", "<|image|>"], images=[picture()])


@pytest.mark.parametrize("tiles", [1, 2, 3])
@pytest.mark.parametrize("by", ["call", "attribute"])
def test_fewer_tiles_fill_the_models_slots(mllama: Family, tiles: int, by: str) -> None:
    sizes = {1: (28, 28), 2: (28, 56), 3: (84, 28)}  # images that are no more tiles with all four allowed
    row = {**chat_row(1), "images": [picture(0, sizes[tiles])]}
    large = {**chat_row(1), "images": [picture(0, (112, 112))]}
    expected = processed(mllama.processor, [row])
    processor = copy.deepcopy(mllama.processor)
    options = {"max_image_tiles": tiles} if by == "call" else {}
    if by == "attribute":
        processor.image_processor.max_image_tiles = tiles
    found = processed(processor, [row], **options)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    batch = processed(processor, [large, ROWS[1]], **options)
    assert batch["pixel_values"].shape[2] == batch["cross_attention_mask"].shape[-1] == 4
    assert int(batch["aspect_ratio_mask"][0].sum()) <= tiles
    with torch.no_grad():
        assert mllama.model()(**batch).logits.isfinite().all()


def test_numpy_comes_back_where_it_is_asked_for(mllama: Family) -> None:
    import numpy as np

    options = {"images": [[picture()]], "return_tensors": "np", "max_image_tiles": 1}
    assert {type(value) for value in mllama.processor(text=["<|image|>"], **options).values()} == {np.ndarray}


def test_every_text_has_one_bos(mllama: Family) -> None:
    processor = mllama.processor
    bos, image = processor.tokenizer.bos_token_id, processor.image_token_id
    stock = MllamaProcessor(processor.image_processor, processor.tokenizer)
    rendered = processor.apply_chat_template(ROWS[1]["messages"])
    for text in (rendered, "hi"):
        assert stock(text=[text])["input_ids"][0].count(bos) == 2
        for one in (text, [text], [text, text]):
            assert all(ids[0] == bos and ids.count(bos) == 1 for ids in processor(text=one)["input_ids"])
    ids = processor(text="<|image|>hi", images=[picture()])["input_ids"][0]
    assert ids[:2] == [image, bos] and ids.count(bos) == 1
    assert processor(text=rendered, add_special_tokens=True)["input_ids"][0].count(bos) == 2
    assert processor(text=rendered, text_kwargs={"add_special_tokens": True})["input_ids"][0].count(bos) == 2


BARE_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for block in message['content'] %}{{ '<|image|>' if block['type'] == 'image' else block['text'] }}{% endfor %}"
    "{% endif %}<|eot_id|>{% endfor %}"
)


@pytest.mark.parametrize("images_first", [0, 1, 2])
def test_labels_stay_in_place_where_the_template_writes_no_bos(mllama: Family, images_first: int) -> None:
    """Stock then puts BOS into the text, behind images at its start, which moves what follows."""
    question = [{"type": "image"}] * images_first + [{"type": "text", "text": "What?"}, {"type": "image"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is."}]
    row = {"messages": messages, "images": [picture(at) for at in range(images_first + 1)]}
    bare = copy.deepcopy(mllama.processor)
    bare.chat_template = BARE_TEMPLATE
    batch = Collator(bare)([row, chat_row(0)])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids[images_first] == bare.tokenizer.bos_token_id
    assert bare.tokenizer.decode(labels[labels != -100]) == "It is.<|eot_id|>"


# ---- labels and the vocabulary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "stock"])
def test_a_label_that_the_head_has_no_logit_for_is_told(mllama: Family, loss: str) -> None:
    """<|image|> is the first id beyond the head."""
    batch = mllama.batch([1])
    assert int(batch["labels"].max()) < mllama.model().lm_head.out_features == mllama.processor.image_token_id
    batch["labels"] = batch["input_ids"]
    with pytest.raises(ValueError, match=r"labels hold 326, and 1 such in all; the head has logits for 0 to 325\."):
        mllama.model(loss=loss)(**batch)


@pytest.mark.parametrize("multiple", [None, 64])
def test_tokens_can_be_added(mllama: Family, tmp_path: Path, multiple: int | None) -> None:
    model, processor = mllama.model(), copy.deepcopy(mllama.processor)
    before = model.get_input_embeddings().weight.detach().clone()
    processor.tokenizer.add_tokens(["<one>", "<two>"])
    size = len(processor.tokenizer) if multiple is None else 384
    embedding = model.resize_token_embeddings(len(processor.tokenizer), multiple)
    assert (embedding.num_embeddings, model.lm_head.out_features) == (size + 8, size)
    assert model.config.text_config.vocab_size == model.vocab_size == size
    assert torch.equal(embedding.weight[: len(before)], before)
    once = embedding.weight.detach().clone()
    assert torch.equal(model.resize_token_embeddings(size).weight, once)
    batch = mllama.batch([1, 0], processor)
    batch["labels"][0, 1] = len(processor.tokenizer) - 1
    model.train()(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    model.eval().save_pretrained(tmp_path)
    for model_class in (mllama.model_class, mllama.stock_class):
        assert_same_model(model_class.from_pretrained(tmp_path), model, without_labels(batch))


# ---- frames -----------------------------------------------------------------------------------------------------------

AVERAGE = {"name": "frame_average", "frames": 2}


def frames_batch(family: Family, counts: list[int], sizes: list[tuple[int, int]] | None = None) -> dict[str, Any]:
    rows = [chat_row(count, seed) for seed, count in enumerate(counts)]
    for row in rows if sizes else ():
        row["images"] = [picture(at, size) for at, size in enumerate(sizes or ())][: len(row["images"])]
    return dict(Collator(family.processor)(rows))


@torch.no_grad()
def test_the_same_tile_of_neighbouring_images_is_averaged(mllama: Family) -> None:
    batch = frames_batch(mllama, [4, 0, 2])
    given, found = (
        mllama.corrected(connector=connector).loss_context(batch, batch["labels"]).image_features
        for connector in (None, AVERAGE)
    )
    tiles = batch["aspect_ratio_mask"][0, 0].sum()
    assert tiles > 1 and len(given) == 6 * tiles
    clips = given.unflatten(0, (3, 2, tiles))  # (clips, frames, tiles, CLS + 16, D)
    assert torch.equal(found.unflatten(0, (3, 2, tiles))[..., 0, :], clips[..., 0, :])  # CLS stays
    average = clips[..., 1:, :].mean(
        1
    )  # (clips, tiles, 16, D), the first half of it stands in the first frame's places
    torch.testing.assert_close(found[:, 1:].unflatten(0, (3, 2, tiles)), torch.stack(average.chunk(2, 2), 1))


@torch.no_grad()
def test_text_that_sees_one_frame_of_a_clip_sees_all_of_it(mllama: Family) -> None:
    batch, seen = frames_batch(mllama, [4]), []
    model = mllama.corrected(connector=AVERAGE)
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["cross_attention_mask"]), with_kwargs=True
    )
    model(**batch)
    by_image = (seen[0][0, 0] == 0).unflatten(-1, (4, -1)).any(-1)  # (T, images)
    stock = batch["cross_attention_mask"][0].any(-1)  # (T, images): a text sees the images just before it
    shown = stock.any(-1)
    expected = stock.unflatten(-1, (2, 2)).any(-1).repeat_interleave(2, -1)
    assert torch.equal(by_image[shown], expected[shown]) and not torch.equal(expected, stock)


@torch.no_grad()
def test_frames_that_make_no_clip_are_named(mllama: Family) -> None:
    model = mllama.corrected(connector=AVERAGE)
    with pytest.raises(
        ValueError, match="takes 2 neighbouring images together, but a row of the batch has 3. Give each"
    ):
        model(**frames_batch(mllama, [3]))
    with pytest.raises(
        ValueError, match=r"those from 0 on in row 1 have \[\d, 0\] tiles. Give each row a multiple of 2"
    ):
        model(**frames_batch(mllama, [2, 1]))
    with pytest.raises(ValueError, match=r"those from 0 on in row 0 have \[2, 1\] tiles. .* images of one size"):
        model(**frames_batch(mllama, [2], [(56, 28), (28, 28)]))


def test_frames_are_generated_from_alike_with_and_without_a_cache(mllama: Family) -> None:
    inputs = without_labels(frames_batch(mllama, [4, 2]))
    options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for connector in (AVERAGE, {"name": "temporal_dedup", "frames": 2, "keep_ratio": 0.75}):
        model = mllama.corrected(connector=connector)
        cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
        for a, b in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
