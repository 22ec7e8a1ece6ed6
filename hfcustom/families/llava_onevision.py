"""LLaVA-OneVision (llava-hf/llava-onevision-qwen2-0.5b-ov-hf, 7b, 72b).

SigLIP at 384 px, features of its last layer -> two-layer MLP -> Qwen2. A row's only image: 729 tokens a base view, then up
to 36 tiles without their padding, made smaller when they exceed 9 tiles, a learned newline after each row. Rows with more
images: 729 tokens and a newline each. A video: 196 tokens a frame, pooled bilinearly, and one newline.
Paper: https://arxiv.org/abs/2408.03326; stock code: transformers/models/llava_onevision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from hfcustom.anyres import AnyresImages, AnyresProcessor, square
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import count_tokens_out
from hfcustom.families import published, tiny
from hfcustom.processors import OptionalVideo
from hfcustom.registry import register
from hfcustom.towers import unread
from hfcustom.videos import VideoFrames


class CustomLlavaOnevisionConfig(CustomConfig, LlavaOnevisionConfig):
    """LlavaOnevisionConfig with `connector` and `loss`."""

    model_type = "custom_llava_onevision"


class CustomLlavaOnevisionProcessor(AnyresProcessor, OptionalVideo, LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor that works without torchvision and follows the model's connector.

    A flat list of images is nested by the placeholders of each text: stock would take each for the only one of its row, and
    tile it, which a row of several images is not when they come nested.
    """

    video_processor_type = "LlavaOnevisionVideoProcessor"

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Bring the inputs into stock's layout, images nested by row."""
        images, text, videos, audio = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if isinstance(images, list | tuple) and images and not isinstance(images[0], list | tuple) and text:
            counts = [row.count(self.image_token) for row in text]
            if sum(counts) == len(images):  # else stock says what is wrong
                rest = iter(images)
                images = [[next(rest) for _ in range(count)] for count in counts]
        return images, text, videos, audio

    def base_tokens(self, image_inputs: dict[str, Any]) -> int:
        """Return the patches of a base view."""
        return int(self.num_image_tokens) - (self.vision_feature_select_strategy == "default")

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of a video: as many a frame as the connector makes of the pooled ones, and a newline."""
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        module = self.connector_module()
        if module is None:
            return text
        token: str = self.video_token
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        pooled = (len(text) // len(token) - 1) // frames
        return token * (frames * count_tokens_out(module, pooled, square(pooled)) + 1)


class CustomLlavaOnevisionForConditionalGeneration(
    VideoFrames, AnyresImages, CustomVLM, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision with five seams; vision features are the patches that the projector gets of base views, tiles and frames.

    A frame reaches the connector as stock pools it, a square; the newline stays behind a video's last frame.
    """

    config_class = CustomLlavaOnevisionConfig
    processor_class = CustomLlavaOnevisionProcessor

    def processor_settings(self, processor: Any) -> dict[str, Any]:
        """Return what the processor must have in common with the model's config."""
        return super().processor_settings(processor) | {"vision_aspect_ratio": processor.vision_aspect_ratio}

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector and the tokens of a crop; save it with the model."""
        vision: Any = self.config.vision_config
        processor.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        return super().match_processor(processor)

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for apply_pooling too, which frames of videos pass after the projector."""
        return [*super().seam_methods(), (self.inner_path(), "apply_pooling", "_at_pooling")]

    def _at_pooling(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        pooled: torch.Tensor = stock(*args, **kwargs)  # (V * F, N, D)
        if self.custom_connector is None or self.video_inputs is None:
            return pooled
        return self.reduce_videos(pooled, square(pooled.shape[1]), besides_video=1)  # (V * F, M, D)

    def unreached(self) -> dict[str, str]:
        """Return what lies behind the layer that features are read from."""
        return unread(self, "model.vision_tower", self.config.vision_feature_layer)


PINPOINTS = [[28 * rows, 28 * columns] for rows in range(1, 4) for columns in range(1, 4)]
NAMED_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())


def tiny_processor() -> CustomLlavaOnevisionProcessor:
    """Return a processor for 28 px crops of 16 tokens, with a tokenizer trained on the spot."""
    size = {"height": 28, "width": 28}
    return CustomLlavaOnevisionProcessor(
        tiny.image_processor("LlavaOnevisionImageProcessor")(size=size, image_grid_pinpoints=PINPOINTS),
        tiny.train_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED_TOKENS),
        tiny.video_processor("LlavaOnevisionVideoProcessor", size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tiny.chat_template("<image>\n", "<|im_start|>{role}\n", "<|im_end|>\n"),
        vision_aspect_ratio="anyres_max_2",
    )


def tiny_config() -> CustomLlavaOnevisionConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, no more than 2 tiles."""
    processor = tiny_processor()
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False}
    return CustomLlavaOnevisionConfig(
        vision_config={**tiny.VISION, **vision},
        text_config=AutoConfig.for_model("qwen2", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )


def published_processor() -> CustomLlavaOnevisionProcessor:
    """Return a processor with the image settings of LLaVA-OneVision and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("LlavaOnevisionImageProcessor")()
    processor.num_image_tokens = 729
    processor.vision_aspect_ratio = "anyres_max_9"
    return processor


def _onevision(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    vision = {
        **published.so400m(384, model_type="siglip_vision_model", vision_use_head=False),
        "num_hidden_layers": 26,
    }
    return {"vision_config": vision, "text_config": text, "tie_word_embeddings": tied}


CHECKPOINTS = {
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _onevision(
        published.decoder("qwen2", (896, 4864, 24, 14, 2), 152000), True
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _onevision(
        published.decoder("qwen2", (3584, 18944, 28, 28, 4), 152128), False
    ),
}


register(CustomLlavaOnevisionForConditionalGeneration)
