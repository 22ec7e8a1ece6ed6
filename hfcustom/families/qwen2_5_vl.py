"""Qwen2.5-VL (Qwen/Qwen2.5-VL-3B-Instruct, 7B, 32B, 72B).

ViT of any image size with attention in windows of 112 px -> 2 x 2 merge + RMSNorm + two-layer MLP, inside the tower ->
Qwen2.5 with positions in time, height and width. One token for 28 x 28 px; a video's positions in time are seconds.
Paper: https://arxiv.org/abs/2502.13923; stock code: transformers/models/qwen2_5_vl.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.mrope import WindowedImages
from hfcustom.processors import GridProcessor, OptionalVideo
from hfcustom.registry import register


class CustomQwen2_5_VLConfig(CustomConfig, Qwen2_5_VLConfig):
    """Qwen2_5_VLConfig with `connector` and `loss`."""

    model_type = "custom_qwen2_5_vl"


class CustomQwen2_5_VLProcessor(GridProcessor, OptionalVideo, Qwen2_5_VLProcessor):
    """Qwen2_5_VLProcessor that works without torchvision and follows the model's connector."""

    video_processor_type = "Qwen2VLVideoProcessor"


class CustomQwen2_5_VLForConditionalGeneration(WindowedImages, CustomVLM, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with five seams; vision features are one image's patches, or a frame's, the four of a token side by side."""

    config_class = CustomQwen2_5_VLConfig
    processor_class = CustomQwen2_5_VLProcessor


def tiny_processor() -> CustomQwen2_5_VLProcessor:
    """Return a processor for patches of 7 px and images of 4 to 16 tokens, with a tokenizer trained on the spot."""
    sizes = {"patch_size": 7, "merge_size": 2, "size": {"shortest_edge": 4 * 14**2, "longest_edge": 16 * 14**2}}
    return CustomQwen2_5_VLProcessor(
        tiny.image_processor("Qwen2VLImageProcessor")(**sizes),
        tiny.train_tokenizer(tiny.QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>"),
        tiny.video_processor("Qwen2VLVideoProcessor", **sizes),
        chat_template=tiny.QWEN_TEMPLATE,
    )


def tiny_config() -> CustomQwen2_5_VLConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, windows of 2 x 2 tokens."""
    tokenizer = tiny_processor().tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return CustomQwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 4,
            "patch_size": 7,
            "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        text_config={**tiny.text_config(tokenizer), "rope_parameters": rope},
        tie_word_embeddings=False,
        **tiny.token_ids(
            tokenizer,
            image="<|image_pad|>",
            video="<|video_pad|>",
            vision_start="<|vision_start|>",
            vision_end="<|vision_end|>",
        ),
    )


def published_processor() -> CustomQwen2_5_VLProcessor:
    """Return a processor with the image settings of Qwen2.5-VL and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Qwen2VLImageProcessor")(
        size={"shortest_edge": 56 * 56, "longest_edge": 12845056}
    )
    return processor


def _qwen2_5_vl(vocabulary: int, vision_intermediate: int, tied: bool, sizes: published.Sizes) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"hidden_size": 1280, "intermediate_size": vision_intermediate, "out_hidden_size": sizes[0]}
    text = {**published.decoder("qwen2_5_vl_text", sizes, vocabulary), "rope_parameters": rope}
    return {"vision_config": vision, "text_config": text, "tie_word_embeddings": tied}


CHECKPOINTS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(151936, 3420, True, (2048, 11008, 36, 16, 2)),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(152064, 3420, False, (3584, 18944, 28, 28, 4)),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(152064, 3456, False, (5120, 27648, 64, 40, 8)),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen2_5_vl(152064, 3456, False, (8192, 29568, 80, 64, 8)),
}


register(CustomQwen2_5_VLForConditionalGeneration)
