"""Qwen2-VL (Qwen/Qwen2-VL-2B-Instruct, 7B, 72B).

ViT of any image size -> 2 x 2 merge + LayerNorm + two-layer MLP, inside the tower -> Qwen2 with positions in time, height
and width. One token for 28 x 28 px. Paper: https://arxiv.org/abs/2409.12191; stock code: transformers/models/qwen2_vl.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.mrope import MRopeImages
from hfcustom.processors import GridProcessor, OptionalVideo
from hfcustom.registry import register


class CustomQwen2VLConfig(CustomConfig, Qwen2VLConfig):
    """Qwen2VLConfig with `connector` and `loss`."""

    model_type = "custom_qwen2_vl"


class CustomQwen2VLProcessor(GridProcessor, OptionalVideo, Qwen2VLProcessor):
    """Qwen2VLProcessor that works without torchvision and follows the model's connector."""

    video_processor_type = "Qwen2VLVideoProcessor"


class CustomQwen2VLForConditionalGeneration(MRopeImages, CustomVLM, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with five seams; vision features are one image's patches, or a frame's, the four that are merged side by side."""

    config_class = CustomQwen2VLConfig
    processor_class = CustomQwen2VLProcessor

    def vision_width(self) -> int:
        """Return the tower's width; its config's hidden_size is the language model's."""
        config: Any = self.config
        return int(config.vision_config.embed_dim)


def tiny_processor() -> CustomQwen2VLProcessor:
    """Return a processor for patches of 7 px and images of 4 to 16 tokens, with a tokenizer trained on the spot."""
    sizes = {"patch_size": 7, "merge_size": 2, "size": {"shortest_edge": 4 * 14**2, "longest_edge": 16 * 14**2}}
    return CustomQwen2VLProcessor(
        tiny.image_processor("Qwen2VLImageProcessor")(**sizes),
        tiny.train_tokenizer(tiny.QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>"),
        tiny.video_processor("Qwen2VLVideoProcessor", **sizes),
        chat_template=tiny.QWEN_TEMPLATE,
    )


def tiny_config() -> CustomQwen2VLConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    tokenizer = tiny_processor().tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return CustomQwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 7,
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


def published_processor() -> CustomQwen2VLProcessor:
    """Return a processor with the image settings of Qwen2-VL and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Qwen2VLImageProcessor")(
        size={"shortest_edge": 56 * 56, "longest_edge": 12845056}
    )
    return processor


def _qwen2_vl(vocabulary: int, tied: bool, sizes: published.Sizes) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**published.decoder("qwen2_vl_text", sizes, vocabulary), "rope_parameters": rope}
    return {"vision_config": {"hidden_size": sizes[0]}, "text_config": text, "tie_word_embeddings": tied}


CHECKPOINTS = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(151936, True, (1536, 8960, 28, 12, 2)),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(152064, False, (3584, 18944, 28, 28, 4)),
    "Qwen/Qwen2-VL-72B-Instruct": _qwen2_vl(152064, False, (8192, 29568, 80, 64, 8)),
}


register(CustomQwen2VLForConditionalGeneration)
