"""Idefics3 (HuggingFaceM4/Idefics3-8B-Llama3) and SmolVLM v1, whose checkpoints are idefics3 too.

SigLIP-style ViT -> pixel shuffle x2 + one bias-free Linear -> Llama. 169 tokens a 364 px tile, tiles and a global view.
Paper: https://arxiv.org/abs/2408.12637; stock code: transformers/models/idefics3.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomIdefics3Config(CustomConfig, Idefics3Config):
    """Idefics3Config with `connector` and `loss`."""

    model_type = "custom_idefics3"


class CustomIdefics3Processor(Idefics3Processor):
    """Idefics3Processor under the custom model's name."""


class CustomIdefics3ForConditionalGeneration(CustomVLM, Idefics3ForConditionalGeneration):
    """Idefics3 with five seams; vision features are the tower's patches, before the pixel shuffle."""

    config_class = CustomIdefics3Config
    processor_class = CustomIdefics3Processor
    crop_dims = {"pixel_values": 1, "pixel_attention_mask": 1}  # tiles of a row
    placeholder_field = "image_seq_len"

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of a crop after the pixel shuffle."""
        vision: Any = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2


def tiny_processor() -> CustomIdefics3Processor:
    """Return a processor for 32 px tiles of 4 tokens, with a tokenizer trained on the spot."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", *tiny.IDEFICS_TOKENS]
    return CustomIdefics3Processor(
        tiny.image_processor("Idefics3ImageProcessor")(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, return_row_col_info=True
        ),
        tiny.train_tokenizer(specials, bos=specials[0], eos="<end_of_utterance>", pad="<|pad|>"),
        image_seq_len=4,
        chat_template=tiny.chat_template("<image>", "{role}:", "<end_of_utterance>\n", bos=specials[0]),
    )


def tiny_config() -> CustomIdefics3Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomIdefics3Config(
        vision_config={**tiny.VISION, "image_size": 32, "patch_size": 8},
        text_config=AutoConfig.for_model("llama", **tiny.text_config(processor.tokenizer)),
        scale_factor=2,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomIdefics3Processor:
    """Return a processor with the image settings of Idefics3-8B and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Idefics3ImageProcessor")(
        size={"longest_edge": 1456}, max_image_size={"longest_edge": 364}, return_row_col_info=True
    )
    processor.image_seq_len = 169
    return processor


CHECKPOINTS = {
    "HuggingFaceM4/Idefics3-8B-Llama3": {
        "vision_config": published.so400m(364),
        "text_config": published.decoder("llama", (4096, 14336, 32, 32, 8), 128259),
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolVLM-256M-Instruct": {
        "vision_config": published.vision(768, 3072, 12, 12, 512, 16),
        "text_config": published.decoder("llama", (576, 1536, 30, 9, 3), 49280),
        "scale_factor": 4,
        "tie_word_embeddings": False,
    },
}


register(CustomIdefics3ForConditionalGeneration)
