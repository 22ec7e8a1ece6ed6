"""CLIP (openai/clip-vit-base-patch32, openai/clip-vit-large-patch14-336, ...): an image and a text as one vector each.

ViT, its CLS token -> Linear; causal Transformer, its end-of-text token -> Linear; a learned scale, at first 1 / 0.07. Loss:
InfoNCE over the batch. Paper: https://arxiv.org/abs/2103.00020; stock code: transformers/models/clip.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.modeling_clip import CLIPOutput

from hfcustom.dual_encoder import CustomDualEncoder, CustomEncoderConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomCLIPConfig(CustomEncoderConfig, CLIPConfig):
    """CLIPConfig with `loss` and `max_logit_scale`."""

    model_type = "custom_clip"


class CustomCLIPProcessor(CLIPProcessor):
    """CLIPProcessor under the custom model's name."""


class CustomCLIPModel(CustomDualEncoder, CLIPModel):
    """CLIP with seams; vision features are the tower's tokens, CLS first: the image embedding is made of that one alone."""

    config_class = CustomCLIPConfig
    processor_class = CustomCLIPProcessor
    output_class = CLIPOutput
    image_head = "visual_projection"
    text_head = "text_projection"


START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_processor() -> CustomCLIPProcessor:
    """Return a processor for images of 28 px, with a tokenizer trained on the spot that frames a text as CLIP's does."""
    tokenizer = tiny.train_tokenizer((START, END), bos=START, eos=END, pad=END)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (START, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    image_processor = tiny.image_processor("CLIPImageProcessor")(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return CustomCLIPProcessor(image_processor, tokenizer)


def tiny_config() -> CustomCLIPConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, embeddings of 16."""
    text: dict[str, Any] = {**tiny.text_config(tiny_processor().tokenizer), "max_position_embeddings": 77}
    text.pop("num_key_value_heads")
    return CustomCLIPConfig(
        text_config={**text, "projection_dim": 16},
        vision_config={**tiny.VISION, "image_size": 28, "patch_size": 7, "projection_dim": 16},
        projection_dim=16,
    )


def published_processor() -> CustomCLIPProcessor:
    """Return a processor with the image settings of CLIP ViT-B/32 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("CLIPImageProcessor")(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    return processor


def _clip(vision: dict[str, Any], width: int, heads: int, projection: int) -> dict[str, Any]:
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": 12,
    }
    return {
        "vision_config": {**vision, "projection_dim": projection},
        "text_config": {**text, "projection_dim": projection, "vocab_size": 49408},
        "projection_dim": projection,
    }


CHECKPOINTS = {
    "openai/clip-vit-base-patch32": _clip(published.vision(768, 3072, 12, 12, 224, 32), 512, 8, 512),
    "openai/clip-vit-large-patch14": _clip(published.vision(1024, 4096, 24, 16, 224, 14), 768, 12, 768),
    "openai/clip-vit-large-patch14-336": _clip(published.vision(1024, 4096, 24, 16, 336, 14), 768, 12, 768),
}


register(CustomCLIPModel)
