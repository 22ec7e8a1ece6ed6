"""LLaVA 1.5 (llava-hf/llava-1.5-7b-hf, 13b).

CLIP ViT-L/14 at 336 px, features of its last layer but one without CLS -> two-layer MLP -> Llama (Vicuna). 576 tokens an
image, which is one square crop. Paper: https://arxiv.org/abs/2310.03744; stock code: transformers/models/llava.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import MatchedProcessor, match_connector
from hfcustom.registry import register
from hfcustom.towers import unread


class CustomLlavaConfig(CustomConfig, LlavaConfig):
    """LlavaConfig with `connector` and `loss`."""

    model_type = "custom_llava"


class CustomLlavaProcessor(MatchedProcessor, LlavaProcessor):
    """LlavaProcessor that follows the model's connector."""


class CustomLlavaForConditionalGeneration(CustomVLM, LlavaForConditionalGeneration):
    """LLaVA 1.5 with five seams; vision features are the patches that the projector gets."""

    config_class = CustomLlavaConfig
    processor_class = CustomLlavaProcessor

    def __init__(self, config: Any) -> None:
        if config.vision_config.model_type == "pixtral":
            raise ValueError(
                f"{type(self).__name__} is for square crops, and this checkpoint's vision tower, 'pixtral', takes images of "
                "any size. Use the family 'pixtral' (hfcustom/families/pixtral.py)."
            )
        super().__init__(config)

    def unreached(self) -> dict[str, str]:
        """Return what lies behind the layer that features are read from."""
        return unread(self, "model.vision_tower", self.config.vision_feature_layer)

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)


SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tiny_processor() -> CustomLlavaProcessor:
    """Return a processor for 28 px images of 16 tokens, with a tokenizer trained on the spot."""
    return CustomLlavaProcessor(
        tiny.image_processor("CLIPImageProcessor")(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "<image>"}),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.chat_template("<image>\n", "{role}:", "</s>\n"),
    )


def tiny_config() -> CustomLlavaConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomLlavaConfig(
        vision_config={**tiny.VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        text_config=AutoConfig.for_model("llama", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )


def published_processor() -> CustomLlavaProcessor:
    """Return a processor with the image settings of LLaVA-1.5 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("CLIPImageProcessor")(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor.patch_size = 14
    return processor


CHECKPOINTS = {
    f"llava-hf/llava-1.5-{size}-hf": {
        "vision_config": published.CLIP_L_336,
        "text_config": published.decoder("llama", sizes, 32064),
    }
    for size, sizes in (("7b", (4096, 11008, 32, 32, 32)), ("13b", (5120, 13824, 40, 40, 40)))
}


register(CustomLlavaForConditionalGeneration)
