"""What others call the weights and settings of hfcustom/nano: nanoVLM, and SigLIP, Llama and Idefics3 of transformers.

    load_siglip(model, SiglipVisionModel.from_pretrained("google/siglip2-base-patch16-512"))
    load_llama(model, LlamaForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-360M-Instruct"))
    model.load_state_dict(from_idefics3(stock.state_dict()))

Shapes are equal but for two: the tower's query, key and value are one matrix here, its positions have a batch dimension.
nanoVLM's folders (https://github.com/huggingface/nanoVLM, models/) differ in two names and in their config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hfcustom.nano.config import NanoVLMConfig, check_only
from hfcustom.nano.model import NanoVLMForConditionalGeneration

State = Mapping[str, torch.Tensor]

# ---- SigLIP, Llama, Idefics3 ----------------------------------------------------------------------------------------

NAMES = {  # ours: those of Idefics3, N a layer's number; the longer of two that begin alike stands first
    "vision_encoder.patch_embedding.conv": "model.vision_model.embeddings.patch_embedding",
    "vision_encoder.patch_embedding.position_embedding": "model.vision_model.embeddings.position_embedding.weight",
    "vision_encoder.blocks.N.ln": "model.vision_model.encoder.layers.N.layer_norm",
    "vision_encoder.blocks.N.attn": "model.vision_model.encoder.layers.N.self_attn",
    "vision_encoder.blocks.N.mlp": "model.vision_model.encoder.layers.N.mlp",
    "vision_encoder.layer_norm": "model.vision_model.post_layernorm",
    "projector": "model.connector.modality_projection",
    "decoder.token_embedding": "model.text_model.embed_tokens",
    "decoder.blocks.N.norm1": "model.text_model.layers.N.input_layernorm",
    "decoder.blocks.N.norm2": "model.text_model.layers.N.post_attention_layernorm",
    "decoder.blocks.N.attn.out_proj": "model.text_model.layers.N.self_attn.o_proj",
    "decoder.blocks.N.attn": "model.text_model.layers.N.self_attn",
    "decoder.blocks.N.mlp": "model.text_model.layers.N.mlp",
    "decoder.norm": "model.text_model.norm",
    "lm_head": "lm_head",
}
EMBEDDING = "decoder.token_embedding.weight"
POSITIONS = "vision_encoder.patch_embedding.position_embedding"
QKV = ("q_proj", "k_proj", "v_proj")


def to_idefics3(state: State) -> dict[str, torch.Tensor]:
    """Return a state dict of NanoVLMForConditionalGeneration as one of Idefics3ForConditionalGeneration."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stock = _rename(name, NAMES)
        if ".qkv_proj." in name:
            parts = tensor.chunk(3)
            renamed |= {stock.replace("qkv_proj", part): piece for part, piece in zip(QKV, parts, strict=True)}
        else:
            renamed[stock] = tensor[0] if name == POSITIONS else tensor
    return renamed


def from_idefics3(state: State) -> dict[str, torch.Tensor]:
    """Return a state dict of Idefics3ForConditionalGeneration as one of NanoVLMForConditionalGeneration."""
    table = {theirs: ours for ours, theirs in NAMES.items()}
    renamed: dict[str, torch.Tensor] = {}
    for stock, tensor in state.items():
        name = _rename(stock, table)
        part = next((part for part in QKV if f".{part}." in name and name.startswith("vision_encoder")), None)
        if part is None:
            renamed[name] = tensor[None] if name == POSITIONS else tensor
        else:
            keys = (stock.replace(part, other) for other in QKV)
            renamed[name.replace(part, "qkv_proj")] = torch.cat([state[key] for key in keys if key in state])
    return renamed


def _rename(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        found = re.match(re.escape(old).replace("N", r"(\d+)"), name)
        if found:
            return found.expand(new.replace("N", r"\1")) + name[found.end() :]
    raise ValueError(f"There is no place for {name!r}; names begin with {', '.join(table)}.")


def load_siglip(model: NanoVLMForConditionalGeneration, siglip: SiglipVisionModel) -> None:
    """Copy a SigLIP tower, without its pooling head; ValueError names what does not fit, and nothing is copied."""
    tower = {name: tensor for name, tensor in siglip.state_dict().items() if not name.startswith("head.")}
    state = from_idefics3({f"model.vision_model.{name}": tensor for name, tensor in tower.items()})
    _copy(model, siglip, "vision", state, ("num_attention_heads", "layer_norm_eps", "hidden_act"))


def load_llama(model: NanoVLMForConditionalGeneration, llama: LlamaForCausalLM) -> None:
    """Copy a Llama into decoder and head; ValueError names what does not fit, and nothing is copied."""
    names = {name: re.sub("^model", "model.text_model", name) for name in llama.state_dict()}
    state = from_idefics3({names[name]: tensor for name, tensor in llama.state_dict().items()})
    if model.config.tie_word_embeddings and not torch.equal(state["lm_head.weight"], state[EMBEDDING]):
        raise ValueError("This Llama's head is not its embedding; build the model with tie_word_embeddings=False.")
    _copy(model, llama, "text", state, ("num_attention_heads", "rms_norm_eps", "rope_parameters", "hidden_act"))


def _copy(model: Any, source: PreTrainedModel, part: str, state: State, facts: Iterable[str]) -> None:
    """Copy into the part, once names, shapes and the facts that shapes do not show are found to be equal."""
    prefixes = ("vision_encoder.",) if part == "vision" else ("decoder.", "lm_head.")
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    here, there = getattr(model.config, f"{part}_config"), source.config
    pairs = {fact: (getattr(there, fact), getattr(here, fact)) for fact in facts}
    pairs |= {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own.keys() & state.keys()}
    wrong = [f"{name} is {theirs}, here {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    wrong += [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} has no place here" for name in state.keys() - own.keys()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        cure = f"Build the model with {part}_config=source.config" + CURES[part]
        raise ValueError(
            f"{type(source).__name__} does not fit {type(model).__name__}: {'; '.join(sorted(wrong)[:5])}{more}. {cure}"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


CURES = {"vision": ".", "text": "; source.resize_token_embeddings(n) adds tokens."}

# ---- nanoVLM --------------------------------------------------------------------------------------------------------

WIDTHS = {  # of its two halves, vit_... and lm_...
    "hidden_size": "hidden_dim",
    "intermediate_size": "inter_dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_blocks",
}
VISION = {**WIDTHS, "image_size": "img_size", "layer_norm_eps": "ln_eps", "patch_size": "patch_size"}
TEXT = {
    **WIDTHS,
    "max_position_embeddings": "max_position_embeddings",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "rms_eps",
    "vocab_size": "vocab_size",
}
ONLY = {"vit_cls_flag": False, "vit_dropout": 0.0, "lm_dropout": 0.0, "lm_attn_scaling": 1.0}


def is_nanovlm(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is nanoVLM's, which names no model_type."""
    return "vit_hidden_dim" in values


def from_nanovlm(flat: dict[str, Any], image_token_id: int | None = None) -> dict[str, Any]:
    """Return the values of a NanoVLMConfig for those of a nanoVLM checkpoint (222M, 460M, ...)."""
    check_only("nanoVLM config", flat, ONLY)
    extra = list(flat.get("vlm_extra_tokens", ()))  # they follow the tokenizer's own, in this order
    if image_token_id is None:
        if "image_token" not in extra:
            raise ValueError(
                "This nanoVLM checkpoint has no image token (the first ones put the image before the text). Say which id "
                "is to stand for one: from_pretrained(..., image_token_id=...)."
            )
        image_token_id = flat["lm_base_vocab_size"] + extra.index("image_token")
    vision = {stock: flat[f"vit_{own}"] for stock, own in VISION.items()}
    text = {stock: flat[f"lm_{own}"] for stock, own in TEXT.items()}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": float(flat["lm_re_base"])}
    text["eos_token_id"] = flat.get("lm_eos_token_id", 2)  # <|im_end|> of SmolLM2-Instruct
    return {
        "model_type": NanoVLMConfig.model_type,
        "vision_config": vision,
        "text_config": text,
        "scale_factor": flat["mp_pixel_shuffle_factor"],
        "image_token_id": image_token_id,
        "tie_word_embeddings": flat["lm_tie_weights"],
    }


NANOVLM_KEYS: list[Any] = [
    WeightRenaming(r"^MP\.", r"^projector\."),
    WeightRenaming(r"^decoder\.head\.", r"^lm_head\."),
]
register_checkpoint_conversion_mapping(NanoVLMConfig.model_type, NANOVLM_KEYS, overwrite=True)
