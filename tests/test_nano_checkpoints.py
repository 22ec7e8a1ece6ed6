"""hfcustom/nano_checkpoints.py: weights of SigLIP, Llama and Idefics3, and folders as nanoVLM writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_models import PLACEHOLDER, close, idefics3, llama, nano, picture_batch, siglip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hfcustom.families.nano import CustomNanoVLMForConditionalGeneration
from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.model import NanoVLMForConditionalGeneration
from hfcustom.nano_checkpoints import from_idefics3, from_nanovlm, load_llama, load_siglip, to_idefics3

# ---- SigLIP, Llama, Idefics3 ----------------------------------------------------------------------------------------


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


def test_nanovlms_class_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="nanoVLM config has vit_cls_flag=True; NanoVLM knows False only"):
        from_nanovlm({**NANOVLM, "vit_cls_flag": True})
