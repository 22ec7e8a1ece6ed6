"""Small models with random weights: hfcustom/nano's, and those of transformers that it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hfcustom.families import tiny
from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.model import NanoVLMForConditionalGeneration

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
