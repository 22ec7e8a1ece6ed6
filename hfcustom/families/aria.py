"""Aria (rhymes-ai/Aria), a mixture of experts: 3.9 of 25.3 B parameters run for a token.

ViT -> cross-attention of 128 (490 px) or 256 (980 px) learned queries + MLP -> MoE decoder whose routed experts are 3-D
Parameters, not Linear modules. Paper: https://arxiv.org/abs/2410.05993; stock code: transformers/models/aria.
"""

from __future__ import annotations

from typing import Any

from transformers import AriaConfig, AriaForConditionalGeneration, AriaProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomAriaConfig(CustomConfig, AriaConfig):
    """AriaConfig with `connector` and `loss`."""

    model_type = "custom_aria"


class CustomAriaProcessor(AriaProcessor):
    """AriaProcessor whose own `images_kwargs`, where they were changed (`resize_images`), are saved with it.

    Its default of 980 pixels wins over the image processor's max_image_size; stock forgets another one.
    """

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as stock does, keeping changed defaults."""
        others = {name: value for name, value in processor_dict.items() if name != "images_kwargs"}
        result = super().from_args_and_dict(args, others, **kwargs)
        if "images_kwargs" in processor_dict:
            (result[0] if isinstance(result, tuple) else result).images_kwargs = processor_dict["images_kwargs"]
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialise, with changed defaults."""
        changed = self.images_kwargs != AriaProcessor.images_kwargs
        return super().to_dict() | ({"images_kwargs": self.images_kwargs} if changed else {})


class CustomAriaForConditionalGeneration(CustomVLM, AriaForConditionalGeneration):
    """Aria with five seams; vision features are the tower's patches, before the projector's cross-attention."""

    config_class = CustomAriaConfig
    processor_class = CustomAriaProcessor

    def unreached(self) -> dict[str, str]:
        """Return the tower's last norm."""
        return {"model.vision_tower.post_layernorm.": "features are the hidden states before it"}

    def stock_tokens_per_crop(self) -> int:
        """Return the tokens of a crop of the largest size; smaller ones have fewer (`match_processor` sets them all)."""
        config: Any = self.config
        return max(config.projector_patch_to_query_dict.values())

    def match_processor(self, processor: Any) -> Any:
        """Make the processor write as many placeholders as this model makes tokens, for each image size."""
        config: Any = self.config
        patch_size = config.vision_config.patch_size
        queries = config.projector_patch_to_query_dict  # {patches: tokens}
        sizes = processor.size_conversion  # {image size: tokens}
        processor.size_conversion = {size: self.tokens_per_crop(queries[(size // patch_size) ** 2]) for size in sizes}
        return processor


def tiny_processor() -> CustomAriaProcessor:
    """Return a processor with a tokenizer trained on the spot; the image sizes 490 and 980 are fixed in Aria's code."""
    specials = ["<unk>", "<s>", "</s>", "<fim_prefix>", "<fim_suffix>", "<|im_start|>", "<|im_end|>", "<|img|>"]
    return CustomAriaProcessor(
        tiny.image_processor("AriaImageProcessor")(max_image_size=490),
        tiny.train_tokenizer(specials, bos="<s>", eos="<|im_end|>", pad="<unk>", named={"image_token": "<|img|>"}),
        size_conversion={490: 4, 980: 16},
        chat_template=tiny.chat_template("<fim_prefix><|img|><fim_suffix>", "<|im_start|>{role}\n", "<|im_end|>\n"),
    )


def tiny_config() -> CustomAriaConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, 4 experts, 70 px patches."""
    processor = tiny_processor()
    experts = {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2}
    return CustomAriaConfig(
        vision_config={**tiny.VISION, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 70},
        text_config={**tiny.text_config(processor.tokenizer), **experts},
        projector_patch_to_query_dict={49: 4, 196: 16},
        image_token_index=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomAriaProcessor:
    """Return a processor with the image settings of Aria and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("AriaImageProcessor")()
    processor.size_conversion = {490: 128, 980: 256}
    return processor


CHECKPOINTS = {
    "rhymes-ai/Aria": {
        "vision_config": published.so400m(980, model_type="idefics3_vision"),
        "text_config": {
            **published.decoder("aria_text", (2560, 1664, 28, 20, 20), 100352),
            "moe_num_experts": 64,
            "moe_topk": 6,
            "moe_num_shared_experts": 2,
        },
        "projector_patch_to_query_dict": {1225: 128, 4900: 256},
        "tie_word_embeddings": False,
    },
}


register(CustomAriaForConditionalGeneration)
