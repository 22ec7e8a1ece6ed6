"""hfcustom/nano: each part and the whole against transformers with the same weights, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, Family
from nano_models import (
    LLAMA,
    PLACEHOLDER,
    SIGLIP,
    VOCABULARY,
    close,
    idefics3,
    llama,
    nano,
    picture_batch,
    randomise,
    siglip,
)
from torch import nn
from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig, StaticCache

from hfcustom.families.nano import CustomNanoVLMConfig
from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.model import NanoVLMForConditionalGeneration
from hfcustom.nano_checkpoints import from_idefics3, load_llama, load_siglip


def test_it_is_read_in_one_sitting() -> None:
    files = (ROOT / "hfcustom" / "nano").glob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) <= 450


# ---- parity ---------------------------------------------------------------------------------------------------------


def test_the_vision_tower_equals_siglips() -> None:
    model, stock, pixels = nano(), siglip(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = stock(pixels).last_hidden_state
        assert not torch.allclose(model.vision_encoder(pixels), theirs, atol=1e-2)
        load_siglip(model, stock)
        close(model.vision_encoder(pixels), theirs)


BATCHES = {
    "plain": {},
    "padded on the right": {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])},
    "padded on the left": {
        "attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6]),
        "position_ids": torch.tensor([list(range(9)), [0, 0, 0, *range(6)]]),
    },
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2, 3]])},
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_decoder_equals_llamas(name: str) -> None:
    model, stock = nano(), llama()
    load_llama(model, stock)
    batch = {"input_ids": torch.randint(0, PLACEHOLDER, (2, 9)), **BATCHES[name]}
    real = batch.get("attention_mask", torch.ones(2, 9)).bool()
    with torch.no_grad():
        mine, theirs = (net(**batch, use_cache=False).logits for net in (model, stock))
    close(mine[real], theirs[real])
    assert torch.isfinite(mine).all()


def test_the_decoder_goes_on_from_a_cache_as_llamas_does() -> None:
    model, stock = nano(), llama()
    load_llama(model, stock)
    ids, mask = torch.randint(0, PLACEHOLDER, (2, 9)), torch.tensor([[1] * 9, [0] * 2 + [1] * 7])
    with torch.no_grad():
        whole = model(ids, mask, use_cache=False).logits
        pieces, caches = ([], []), [None, None]
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
            for at, net in enumerate((model, stock)):
                out = net(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=caches[at], use_cache=True)
                pieces[at].append(out.logits)
                caches[at] = out.past_key_values
    mine, theirs = (torch.cat(list(found), 1)[mask.bool()] for found in pieces)
    close(mine, theirs)
    close(mine, whole[mask.bool()])


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_the_whole_equals_idefics3_in_logits_loss_and_gradients(tie: bool) -> None:
    model = nano(tie)
    stock = randomise(idefics3(model.config, tie), seed=1)
    model.load_state_dict(from_idefics3(stock.state_dict()))
    flat, by_row = picture_batch([2, 0, 1])
    mine, theirs = model(**flat), stock(**by_row)
    close(mine.logits, theirs.logits)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-6, atol=0)
    mine.loss.backward()
    theirs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = from_idefics3({name: p.grad for name, p in stock.named_parameters()})
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("images", [[2, 1], [1, 1]], ids=["with padding", "without"])
def test_a_cache_of_fixed_size_generates_the_same(images: list[int], families: dict[str, Family]) -> None:
    family = families["nano"]
    model, inputs = family.model(), family.batch(images)
    del inputs["labels"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), plain)


@torch.no_grad()
def test_empty_places_of_a_cache_are_not_looked_at(families: dict[str, Family]) -> None:
    model, ids = families["nano"].model(), torch.arange(20, 30)[None]
    cache = StaticCache(model.config, max_cache_len=32)
    steps = [model(input_ids=part, past_key_values=cache).logits for part in (ids[:, :1], ids[:, 1:9], ids[:, 9:])]
    close(torch.cat(steps, 1), model(input_ids=ids).logits)


# ---- the config, and mistakes ---------------------------------------------------------------------------------------

CONFIGS = {
    "another decoder": ({"text_config": Qwen2Config()}, "text_config is a Qwen2Config; NanoVLM takes a LlamaConfig"),
    "biases": ({"text_config": {"attention_bias": True}}, "text_config has attention_bias=True; NanoVLM knows False only"),
    "activation": ({"vision_config": {"hidden_act": "relu"}}, "vision_config has hidden_act='relu'"),
    "scaled positions": (
        {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_parameters has rope_type='linear'",
    ),
    "shuffle": ({"scale_factor": 5}, "scale_factor=5 does not divide the 14 patches of a side"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_setting_that_would_not_be_followed_is_an_error(name: str) -> None:
    values, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        NanoVLMConfig(**{"scale_factor": 2, **values})


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    config = CustomNanoVLMConfig(vision_config=dict(SIGLIP), text_config=dict(LLAMA), scale_factor=2, loss="focal")
    config.save_pretrained(tmp_path)
    again = CustomNanoVLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(again.text_config) is LlamaConfig and type(again.vision_config) is SiglipVisionConfig


def test_other_attention_kernels_are_refused() -> None:
    config = NanoVLMConfig(vision_config=dict(SIGLIP), text_config=dict(LLAMA), scale_factor=2)
    with pytest.raises(ValueError, match="attn_implementation='eager'; NanoVLM knows 'sdpa' only"):
        NanoVLMForConditionalGeneration._from_config(config, attn_implementation="eager")


def test_pictures_that_do_not_fit_say_so() -> None:
    model, (batch, _) = nano(), picture_batch([1])
    with pytest.raises(ValueError, match=r"pixel_values are \(1, 3, 16, 16\); this tower takes .*32, 32\)"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"][..., :16, :16])
    with pytest.raises(
        ValueError, match=r"4 image placeholders \(id 59\), but 2 images make 8 tokens.*write 4 for each"
    ):
        model(batch["input_ids"], pixel_values=batch["pixel_values"].repeat(2, 1, 1, 1))


def test_what_is_not_recorded_is_an_error() -> None:
    with pytest.raises(ValueError, match="output_attentions: NanoVLM does not record it"):
        nano()(torch.tensor([[1]]), output_attentions=True)
    nano()(torch.tensor([[1]]), output_attentions=False)


def test_embeddings_stand_in_for_ids() -> None:
    model, (batch, _) = nano(), picture_batch([2, 1])
    ids = batch.pop("input_ids")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeddings, **batch).logits, model(ids, **batch).logits)


def test_dropout_is_for_training_only() -> None:
    model, (batch, _) = nano(attention_dropout=0.5), picture_batch([1])
    with torch.no_grad():
        first, second = (model.eval()(**batch).logits for _ in range(2))
        assert torch.equal(first, second)
        first, second = (model.train()(**batch).logits for _ in range(2))
        assert not torch.equal(first, second)


def test_new_words_get_rows_in_embedding_and_head() -> None:
    model = nano(tie=True)
    model.resize_token_embeddings(VOCABULARY + 4)
    assert model.lm_head.weight is model.decoder.token_embedding.weight
    assert model(torch.tensor([[VOCABULARY + 3]])).logits.shape == (1, 1, VOCABULARY + 4)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
