"""Qwen2.5-Omni's thinker (Qwen/Qwen2.5-Omni-7B, 3B): text, images, audio and video in, text out.

ViT of any image size with attention in windows of 112 px -> 2 x 2 merge + RMSNorm + two-layer MLP, inside the tower ->
Qwen2.5 with positions in time, height and width; a Whisper-like tower for audio (the part "other"). One token for 28 x 28
px. The talker and the vocoder of a whole checkpoint are not loaded.
Paper: https://arxiv.org/abs/2503.20215; stock code: transformers/models/qwen2_5_omni.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    ProcessorMixin,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.mrope import WindowedImages
from hfcustom.processors import GridProcessor, OptionalVideo, WithoutVideo
from hfcustom.registry import register


class CustomQwen2_5OmniThinkerConfig(CustomConfig, Qwen2_5OmniThinkerConfig):
    """Qwen2_5OmniThinkerConfig with `connector` and `loss`."""

    model_type = "custom_qwen2_5_omni"


class CustomQwen2_5OmniProcessor(GridProcessor, OptionalVideo, Qwen2_5OmniProcessor, WithoutVideo):  # type: ignore[misc]
    """Qwen2_5OmniProcessor that works without torchvision and follows the model's connector."""

    video_processor_type = "Qwen2VLVideoProcessor"

    @property
    def model_input_names(self) -> list[str]:
        """Return what forward() may get from here; stock wants the video processor for that."""
        names = ProcessorMixin.model_input_names.__get__(self)
        return list(dict.fromkeys([*names, "feature_attention_mask", "video_second_per_grid"]))


class CustomQwen2_5OmniThinkerForConditionalGeneration(
    WindowedImages, CustomVLM, Qwen2_5OmniThinkerForConditionalGeneration
):
    """The thinker with five seams; vision features are one image's patches, or a frame's, the four of a token side by side."""

    config_class = CustomQwen2_5OmniThinkerConfig
    processor_class = CustomQwen2_5OmniProcessor
    ignores_logits_to_keep = True
    position_input = "attention_mask"
    keeps_mask = True
    _keys_to_ignore_on_load_unexpected = [r"^talker", r"^token2wav"]  # as stock's inner model

    def get_rope_index(self, *args: Any, **kwargs: Any) -> Any:
        """Return positions, as the inner model does in forward(): generate() asks here."""
        return self._at_rope_index(super().get_rope_index, *args, **kwargs)


NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
CHAT_TEMPLATE = tiny.chat_template("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomQwen2_5OmniProcessor:
    """Return a processor for patches of 7 px and images of 4 to 16 tokens, with a tokenizer trained on the spot."""
    sizes = {"patch_size": 7, "merge_size": 2, "size": {"shortest_edge": 4 * 14**2, "longest_edge": 16 * 14**2}}
    return CustomQwen2_5OmniProcessor(
        tiny.image_processor("Qwen2VLImageProcessor")(**sizes),
        tiny.video_processor("Qwen2VLVideoProcessor", **sizes),
        WhisperFeatureExtractor(feature_size=16),
        tiny.train_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomQwen2_5OmniThinkerConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, windows of 2 x 2 tokens."""
    tokenizer = tiny_processor().tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return CustomQwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "max_source_positions": 64,
            "n_window": 8,
            "output_dim": 64,
        },
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
            image="<|IMAGE|>",
            video="<|VIDEO|>",
            audio="<|AUDIO|>",
            vision_start="<|vision_bos|>",
            vision_end="<|vision_eos|>",
            audio_start="<|audio_bos|>",
            audio_end="<|audio_eos|>",
        ),
    )


def published_processor() -> CustomQwen2_5OmniProcessor:
    """Return a processor with the image settings of Qwen2.5-Omni and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Qwen2VLImageProcessor")(
        size={"shortest_edge": 56 * 56, "longest_edge": 12845056}
    )
    return processor


CHECKPOINTS = {
    "Qwen/Qwen2.5-Omni-7B": {  # its thinker
        "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        "text_config": {
            **published.decoder("qwen2_5_omni_text", (3584, 18944, 28, 28, 4), 152064),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "tie_word_embeddings": False,
    },
}


register(CustomQwen2_5OmniThinkerForConditionalGeneration)
