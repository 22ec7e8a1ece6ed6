"""Video-LLaVA (LanguageBind/Video-LLaVA-7B-hf).

One CLIP-shaped tower for images, one for frames, at 224 px, features of the last layer but one -> the same two-layer MLP
-> Llama (Vicuna). 256 tokens an image, 257 a frame, CLS included. Paper: https://arxiv.org/abs/2311.10122; stock code:
transformers/models/video_llava.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import MatchedProcessor, OptionalVideo, WithoutVideo, match_connector
from hfcustom.registry import register
from hfcustom.towers import unread


class CustomVideoLlavaConfig(CustomConfig, VideoLlavaConfig):
    """VideoLlavaConfig with `connector` and `loss`."""

    model_type = "custom_video_llava"


class CustomVideoLlavaProcessor(MatchedProcessor, OptionalVideo, VideoLlavaProcessor, WithoutVideo):
    """VideoLlavaProcessor that works without torchvision and follows the model's connector.

    Images are `pixel_values`, the name that forward() takes; stock's default is the deprecated `pixel_values_images`.
    """

    video_processor_type = "VideoLlavaVideoProcessor"
    images_kwargs: Any = {"return_tensors": "pt", "return_legacy_image_output": False}


class CustomVideoLlavaForConditionalGeneration(CustomVLM, VideoLlavaForConditionalGeneration):
    """Video-LLaVA with five seams; vision features are the patches of images that the projector gets.

    Frames pass the same projector and keep stock's tokens: the seams are for images.
    """

    config_class = CustomVideoLlavaConfig
    processor_class = CustomVideoLlavaProcessor
    sees_video: bool = False  # while get_video_features runs

    def unreached(self) -> dict[str, str]:
        """Return the tower for videos, and what lies behind the layer that features are read from."""
        videos = {"model.video_tower.": "it is for videos"}
        return unread(self, "model.image_tower", self.config.vision_feature_layer) | videos

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_video_features, to know whose features reach the projector."""
        return [*super().seam_methods(), (self.inner_path(), "get_video_features", "_at_video_features")]

    def _at_video_features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.refuse_frames_of_videos()
        self.sees_video = True
        try:
            return stock(*args, **kwargs)
        finally:
            self.sees_video = False

    def _at_connector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.sees_video else super()._at_connector_input(module, args)

    def _at_connector_output(self, module: nn.Module, args: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        return features if self.sees_video else super()._at_connector_output(module, args, features)


NAMED_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", *NAMED_TOKENS.values())


def tiny_processor() -> CustomVideoLlavaProcessor:
    """Return a processor for 28 px images of 16 tokens, with a tokenizer trained on the spot."""
    size: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return CustomVideoLlavaProcessor(
        VideoLlavaImageProcessor(**size),
        tiny.video_processor("VideoLlavaVideoProcessor", **size),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named=NAMED_TOKENS),
        patch_size=7,
        chat_template=tiny.chat_template("<image>\n", "{role}:", "</s>\n"),
    )


def tiny_config() -> CustomVideoLlavaConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 + 2 layers."""
    processor = tiny_processor()
    return CustomVideoLlavaConfig(
        vision_config={**tiny.VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        text_config=AutoConfig.for_model("llama", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_seq_length=16,
        video_seq_length=8 * 17,
    )


def published_processor() -> CustomVideoLlavaProcessor:
    """Return a processor with the image settings of Video-LLaVA and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor, processor.patch_size = VideoLlavaImageProcessor(), 14
    return processor


CHECKPOINTS = {
    "LanguageBind/Video-LLaVA-7B-hf": {
        "vision_config": {**published.CLIP_L_336, "image_size": 224},
        "text_config": published.decoder("llama", (4096, 11008, 32, 32, 32), 32064),
    }
}


register(CustomVideoLlavaForConditionalGeneration)
