"""LLaVA-NeXT, or LLaVA 1.6 (llava-hf/llava-v1.6-mistral-7b-hf, vicuna-7b, vicuna-13b, 34b).

CLIP ViT-L/14 at 336 px, features of its last layer but one without CLS -> two-layer MLP -> Mistral, Llama or Yi. 576 tokens
a base view, then up to 4 tiles without their padding, a learned newline after each row: 2064 tokens for 800 x 1300 px.
Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/; stock code: transformers/models/llava_next.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from hfcustom.anyres import AnyresImages, AnyresProcessor
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register
from hfcustom.towers import unread


class CustomLlavaNextConfig(CustomConfig, LlavaNextConfig):
    """LlavaNextConfig with `connector` and `loss`."""

    model_type = "custom_llava_next"


class CustomLlavaNextProcessor(AnyresProcessor, LlavaNextProcessor):
    """LlavaNextProcessor that follows the model's connector."""

    def base_tokens(self, image_inputs: dict[str, Any]) -> int:
        """Return the patches of a base view."""
        height, width = image_inputs["pixel_values"][0][0].shape[-2:]
        return (height // self.patch_size) * (width // self.patch_size)


class CustomLlavaNextForConditionalGeneration(AnyresImages, CustomVLM, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with five seams; vision features are the patches of base views and tiles that the projector gets."""

    config_class = CustomLlavaNextConfig
    processor_class = CustomLlavaNextProcessor

    def unreached(self) -> dict[str, str]:
        """Return what lies behind the layer that features are read from."""
        return unread(self, "model.vision_tower", self.config.vision_feature_layer)


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tiny_processor() -> CustomLlavaNextProcessor:
    """Return a processor for 28 px crops of 16 tokens, with a tokenizer trained on the spot."""
    return CustomLlavaNextProcessor(
        tiny.image_processor("LlavaNextImageProcessor")(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        ),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "<image>"}),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.chat_template("<image>\n", "{role}:", "</s>\n"),
    )


def tiny_config() -> CustomLlavaNextConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomLlavaNextConfig(
        vision_config={**tiny.VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        text_config=AutoConfig.for_model("mistral", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )


def published_processor() -> CustomLlavaNextProcessor:
    """Return a processor with the image settings of LLaVA-1.6 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("LlavaNextImageProcessor")(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor.patch_size = 14
    return processor


def _llava_next(text: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": published.CLIP_L_336, "text_config": text}


CHECKPOINTS = {
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next(
        published.decoder("mistral", (4096, 14336, 32, 32, 8), 32064),
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(published.decoder("llama", (4096, 11008, 32, 32, 32), 32064)),
    "llava-hf/llava-v1.6-34b-hf": _llava_next(published.decoder("llama", (7168, 20480, 60, 56, 8), 64064)),
}


register(CustomLlavaNextForConditionalGeneration)
