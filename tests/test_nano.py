"""hfcustom/nano: each part and the whole against transformers with the same weights, and the checkpoints of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Family
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hfcustom.families import tiny
from hfcustom.families.nano import CustomNanoVLMConfig, CustomNanoVLMForConditionalGeneration
from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.model import NanoVLMForConditionalGeneration
from hfcustom.nano_checkpoints import from_idefics3, from_nanovlm, load_llama, load_siglip, to_idefics3

VOCABULARY, PLACEHOLDER = 60, 59
SIGLIP = {**tiny.VISION, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-4}
LLAMA = {  # heads wider than hidden_size / heads, other frequencies than the default's, a head of its own
    **tiny.TEXT,
    "vocab_size": VOCABULARY,
    "head_dim": 24,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
}


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every tensor at random, also those that start as zeros and ones, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def nano(tie: bool = False, **text: Any) -> NanoVLMForConditionalGeneration:
    config = NanoVLMConfig(
        vision_config=dict(SIGLIP),
        text_config={**LLAMA, **text},
        scale_factor=2,
        image_token_id=PLACEHOLDER,
        tie_word_embeddings=tie,
    )
    return randomise(NanoVLMForConditionalGeneration(config))


def siglip(**changes: Any) -> SiglipVisionModel:
    return randomise(SiglipVisionModel(SiglipVisionConfig(**{**SIGLIP, **changes})), seed=1)


def llama(**changes: Any) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})), seed=1)


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float(theirs.abs().max()) > 0.1
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


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


def idefics3(config: Any, tie: bool) -> Idefics3ForConditionalGeneration:
    vision = {name: getattr(config.vision_config, name) for name in SIGLIP}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=vision,
            text_config=LlamaConfig(**config.text_config.to_dict()),
            scale_factor=config.scale_factor,
            image_token_id=config.image_token_id,
            tie_word_embeddings=tie,
        )
    )


def picture_batch(counts: list[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a batch for NanoVLM, whose images stand one after the other, and for Idefics3, whose stand by rows."""
    ids, pixels = torch.randint(0, PLACEHOLDER, (len(counts), 14)), torch.randn(sum(counts), 3, 32, 32)
    by_row, at = torch.zeros(len(counts), max(counts), 3, 32, 32), 0
    for row, count in enumerate(counts):
        ids[row, 1 : 1 + 4 * count] = PLACEHOLDER
        by_row[row, :count] = pixels[at : at + count]
        at += count
    labels = ids.masked_fill(ids == PLACEHOLDER, -100)
    text = {"input_ids": ids, "labels": labels}
    return {**text, "pixel_values": pixels}, {**text, "pixel_values": by_row}


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


def test_names_go_to_idefics3_and_back() -> None:
    model = nano()
    state = model.state_dict()
    stock = idefics3(model.config, tie=False)
    stock.load_state_dict(to_idefics3(state))
    again = from_idefics3(stock.state_dict())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"There is no place for 'model\.audio_tower\.weight'; names begin with"):
        from_idefics3({"model.audio_tower.weight": torch.zeros(1)})


def test_a_cache_of_fixed_size_generates_the_same(families: dict[str, Family]) -> None:
    family = families["nano"]
    model, inputs = family.model(), family.batch([2, 1])
    del inputs["labels"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), plain)


# ---- loading SigLIP and Llama ---------------------------------------------------------------------------------------

MISFITS = {
    "narrower tower": (lambda model: load_siglip(model, siglip(hidden_size=16)), r"blocks.0.attn.qkv_proj.weight is \(48, 16\), here \(96, 32\)"),
    "other patches": (lambda model: load_siglip(model, siglip(patch_size=16)), r"position_embedding is \(1, 4, 32\), here \(1, 16, 32\)"),
    "other heads": (lambda model: load_siglip(model, siglip(num_attention_heads=2)), "num_attention_heads is 2, here 4"),
    "a layer less": (lambda model: load_siglip(model, siglip(num_hidden_layers=1)), r"blocks.1.attn.out_proj.bias is missing"),
    "a layer more": (lambda model: load_llama(model, llama(num_hidden_layers=3)), r"blocks.2.attn.k_proj.weight has no place here"),
    "fewer words": (lambda model: load_llama(model, llama(vocab_size=50)), r"lm_head.weight is \(50, 64\), here \(60, 64\).*resize_token_embeddings"),
    "other frequencies": (lambda model: load_llama(model, llama(rope_parameters={"rope_type": "default", "rope_theta": 9.0})), "rope_parameters is .*9.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_copied(name: str) -> None:
    model = nano()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load, message = MISFITS[name]
    with pytest.raises(ValueError, match=f"does not fit NanoVLMForConditionalGeneration: .*{message}"):
        load(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_head_of_its_own_does_not_fit_a_tied_model() -> None:
    with pytest.raises(ValueError, match="head is not its embedding; build the model with tie_word_embeddings=False"):
        load_llama(nano(tie=True), llama())
    model, stock = nano(tie=True), llama(tie_word_embeddings=True)
    load_llama(model, stock)
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


def test_only_the_part_is_copied() -> None:
    model = nano()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_siglip(model, siglip())
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"vision_encoder"}
    load_llama(model, llama())
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"vision_encoder", "decoder", "lm_head"}


# ---- nanoVLM's checkpoints ------------------------------------------------------------------------------------------

EXTRA = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", "r1c1": "<row_1_col_1>"}
NANOVLM = {  # models/config.py of nanoVLM with the values of nanoVLM-460M-8k
    "vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16, "vit_img_size": 512, "vit_n_heads": 12,
    "vit_dropout": 0.0, "vit_n_blocks": 12, "vit_ln_eps": 1e-6, "vit_cls_flag": False,
    "vit_model_type": "google/siglip2-base-patch16-512",
    "lm_hidden_dim": 960, "lm_inter_dim": 2560, "lm_rms_eps": 1e-5, "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192, "lm_base_vocab_size": 49152, "extra_token_amount": 66, "lm_vocab_size": 49218,
    "lm_n_heads": 15, "lm_n_kv_heads": 5, "lm_dropout": 0.0, "lm_n_blocks": 32, "lm_attn_scaling": 1.0,
    "lm_max_length": 4096, "lm_use_tokens": False, "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct", "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_chat_template": "{% for message in messages %}...", "mp_pixel_shuffle_factor": 4, "mp_image_token_length": 64,
    "max_img_size": 2048, "resize_to_max_side_len": True, "vlm_extra_tokens": EXTRA,
    "vlm_load_backbone_weights": True, "vlm_checkpoint_path": "checkpoints", "hf_repo_name": "nanoVLM",
}  # fmt: skip
FIRST = {  # those of nanoVLM-222M, which has no image token
    **{name: value for name, value in NANOVLM.items() if name != "vlm_extra_tokens"},
    "vit_img_size": 224, "vit_model_type": "google/siglip-base-patch16-224", "lm_hidden_dim": 576, "lm_inter_dim": 1536,
    "lm_vocab_size": 49152, "lm_n_heads": 9, "lm_n_kv_heads": 3, "lm_n_blocks": 30, "mp_pixel_shuffle_factor": 2,
    "lm_eos_token_id": 0,
}  # fmt: skip
SMALL = {
    "vit_hidden_dim": 32, "vit_inter_dim": 48, "vit_patch_size": 8, "vit_img_size": 32, "vit_n_heads": 4,
    "vit_n_blocks": 2, "lm_hidden_dim": 64, "lm_inter_dim": 96, "lm_base_vocab_size": 57, "lm_vocab_size": 60,
    "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 2, "mp_pixel_shuffle_factor": 2,
}  # fmt: skip


def nanovlm_tensors(flat: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return tensors under the names and in the shapes that nanoVLM's modules have (models/*.py)."""
    width, text, wide = flat["vit_hidden_dim"], flat["lm_hidden_dim"], flat["lm_inter_dim"]
    groups = text // flat["lm_n_heads"] * flat["lm_n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.position_embedding": (1, (flat["vit_img_size"] // flat["vit_patch_size"]) ** 2, width),
        "vision_encoder.patch_embedding.conv.weight": (width, 3, flat["vit_patch_size"], flat["vit_patch_size"]),
        "vision_encoder.patch_embedding.conv.bias": (width,),
        "vision_encoder.layer_norm.weight": (width,),
        "vision_encoder.layer_norm.bias": (width,),
        "MP.proj.weight": (text, width * flat["mp_pixel_shuffle_factor"] ** 2),
        "decoder.token_embedding.weight": (flat["lm_vocab_size"], text),
        "decoder.rotary_embd.inv_freq": (text // flat["lm_n_heads"] // 2,),
        "decoder.norm.weight": (text,),
        "decoder.head.weight": (flat["lm_vocab_size"], text),
    }  # fmt: skip
    for block in range(flat["vit_n_blocks"]):
        linears = {"attn.qkv_proj": (3 * width, width), "attn.out_proj": (width, width)}
        linears |= {"mlp.fc1": (flat["vit_inter_dim"], width), "mlp.fc2": (width, flat["vit_inter_dim"])}
        linears |= {"ln1": (width,), "ln2": (width,)}
        for name, shape in linears.items():
            shapes[f"vision_encoder.blocks.{block}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{block}.{name}.bias"] = shape[:1]
    for block in range(flat["lm_n_blocks"]):
        linears = {"attn.q_proj": (text, text), "attn.k_proj": (groups, text), "attn.v_proj": (groups, text)}
        linears |= {"attn.out_proj": (text, text), "mlp.gate_proj": (wide, text), "mlp.up_proj": (wide, text)}
        linears |= {"mlp.down_proj": (text, wide), "norm1": (text,), "norm2": (text,)}
        shapes |= {f"decoder.blocks.{block}.{name}.weight": shape for name, shape in linears.items()}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def write_nanovlm(folder: Path, tie: bool = True, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a folder as nanoVLM's save_pretrained does; safetensors' save_model keeps the first name of a tied pair."""
    flat = {**NANOVLM, **SMALL, "lm_tie_weights": tie, **changes}
    tensors = nanovlm_tensors(flat)
    if tie:
        del tensors["decoder.token_embedding.weight"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flat, indent=4))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("tie", [True, False], ids=["tied head", "own head"])
def test_a_folder_of_nanovlm_loads_whole(tie: bool, tmp_path: Path) -> None:
    tensors = write_nanovlm(tmp_path / "hub", tie)
    model, info = CustomNanoVLMForConditionalGeneration.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    config = model.config
    assert (config.image_token_id, config.scale_factor, config.text_config.eos_token_id) == (57, 2, 2)
    state = model.state_dict()
    used = set()
    for name, tensor in tensors.items():
        if name != "decoder.rotary_embd.inv_freq":
            here = name.replace("MP.", "projector.").replace("decoder.head", "lm_head")
            assert torch.equal(state[here], tensor), name
            used.add(here)
    assert used == state.keys() - ({"decoder.token_embedding.weight"} if tie else set())
    assert torch.equal(model.decoder.token_embedding.weight, model.lm_head.weight) == tie
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    lost = {"decoder.rotary_embd.inv_freq", "decoder.head.weight"} if tie else {"decoder.rotary_embd.inv_freq"}
    assert written.keys() >= tensors.keys() - lost
    assert all(torch.equal(written[name], tensors[name]) for name in tensors.keys() - lost)


def test_a_folder_of_nanovlm_computes_what_idefics3_computes(tmp_path: Path) -> None:
    write_nanovlm(tmp_path)
    model = CustomNanoVLMForConditionalGeneration.from_pretrained(tmp_path, image_token_id=PLACEHOLDER).eval()
    stock = idefics3(model.config, tie=True).eval()
    stock.load_state_dict(to_idefics3(model.state_dict()))
    flat, by_row = picture_batch([1, 3])
    with torch.no_grad():
        close(model(**flat).logits, stock(**by_row).logits)


@pytest.mark.parametrize("flat, millions", [(FIRST, 222), (NANOVLM, 460)], ids=["222M", "460M"])
def test_the_published_sizes_have_idefics3s_names_and_shapes(flat: dict[str, Any], millions: int) -> None:
    config = NanoVLMConfig(**from_nanovlm(flat, image_token_id=0))
    with torch.device("meta"):
        model, stock = NanoVLMForConditionalGeneration(config), idefics3(config, tie=True)
    mine, theirs = to_idefics3(model.state_dict()), stock.state_dict()
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: t.shape for name, t in theirs.items()}
    assert sum(p.numel() for p in model.parameters()) // 10**6 == millions


def test_a_first_nanovlm_needs_an_image_token(tmp_path: Path) -> None:
    write_nanovlm(tmp_path, vlm_extra_tokens={})
    with pytest.raises(ValueError, match=r"has no image token .*from_pretrained\(\.\.\., image_token_id="):
        CustomNanoVLMForConditionalGeneration.from_pretrained(tmp_path)
    model = CustomNanoVLMForConditionalGeneration.from_pretrained(tmp_path, image_token_id=7)
    assert model.config.image_token_id == 7


def test_a_tensor_missing_from_nanovlms_folder_is_named(tmp_path: Path) -> None:
    tensors = write_nanovlm(tmp_path)
    del tensors["MP.proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor for 'projector.proj.weight' .connector of CustomNanoVLM"):
        CustomNanoVLMForConditionalGeneration.from_pretrained(tmp_path)


# ---- the config, and mistakes ---------------------------------------------------------------------------------------

CONFIGS = {
    "another decoder": ({"text_config": Qwen2Config()}, "text_config is a Qwen2Config; NanoVLM takes a LlamaConfig"),
    "biases": ({"text_config": {"attention_bias": True}}, "text_config has attention_bias=True; NanoVLM knows False only"),
    "activation": ({"vision_config": {"hidden_act": "relu"}}, "vision_config has hidden_act='relu'"),
    "scaled positions": (
        {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_parameters has rope_type='linear'",
    ),
    "shuffle": ({"scale_factor": 5}, "scale_factor=5 does not divide the 14 patches of an image's side"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_setting_that_would_not_be_followed_is_an_error(name: str) -> None:
    values, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        NanoVLMConfig(**{"scale_factor": 2, **values})


def test_nanovlms_class_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="nanoVLM config has vit_cls_flag=True; NanoVLM knows False only"):
        from_nanovlm({**NANOVLM, "vit_cls_flag": True})


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
