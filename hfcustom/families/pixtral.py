"""Pixtral (mistral-community/pixtral-12b): on the hub a `llava` checkpoint whose vision tower is `pixtral`.

Pixtral ViT of any image size, 2-D RoPE -> two-layer MLP -> Mistral. One token for 16 x 16 px, rows of tokens end with
[IMG_BREAK], the last one with [IMG_END]. Paper: https://arxiv.org/abs/2410.07073; stock code: transformers/models/llava
and transformers/models/pixtral.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import SizedProcessor
from hfcustom.ragged import SizedImages
from hfcustom.registry import register

REQUIRES = ("torchvision",)


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with a pixtral tower is this family's: Mistral 3 has that tower too."""
    return bool(config["model_type"] == "llava")


class CustomPixtralConfig(CustomConfig, LlavaConfig):
    """LlavaConfig of a Pixtral checkpoint with `connector` and `loss`."""

    model_type = "custom_pixtral"


class CustomPixtralProcessor(SizedProcessor, PixtralProcessor):
    """PixtralProcessor that follows the model's connector, rows included."""


class CustomPixtralForConditionalGeneration(SizedImages, CustomVLM, LlavaForConditionalGeneration):
    """Pixtral with five seams; vision features are one image's patches, before the projector."""

    config_class = CustomPixtralConfig
    processor_class = CustomPixtralProcessor

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("image_sizes") is None:  # the tower then takes each image whole
            pixels = args[0] if args else kwargs["pixel_values"]
            kwargs["image_sizes"] = [tuple(pixels.shape[-2:])] * len(pixels)
        return super()._at_image_features(stock, *args, **kwargs)


SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT_TEMPLATE = tiny.chat_template("[IMG]", "[INST]{role}[/INST]", "</s>\n", bos="<s>")


def tiny_processor() -> CustomPixtralProcessor:
    """Return a processor for patches of 14 px and images of at most 56 px, with a tokenizer trained on the spot."""
    return CustomPixtralProcessor(
        tiny.image_processor("PixtralImageProcessor")(
            size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}
        ),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "[IMG]"}),
        patch_size=14,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomPixtralConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomPixtralConfig(
        vision_config={**tiny.VISION, "model_type": "pixtral", "image_size": 56, "patch_size": 14},
        text_config=AutoConfig.for_model("mistral", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def published_processor() -> CustomPixtralProcessor:
    """Return a processor with the image settings of Pixtral-12B and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("PixtralImageProcessor")()
    processor.patch_size = 16
    return processor


CHECKPOINTS = {
    "mistral-community/pixtral-12b": {
        "vision_config": published.vision(1024, 4096, 24, 16, 1024, 16, model_type="pixtral"),
        "text_config": {**published.decoder("mistral", (5120, 14336, 40, 32, 8), 131072), "head_dim": 128},
    },
}


register(CustomPixtralForConditionalGeneration)
