"""Video-LLaVA (LanguageBind/Video-LLaVA-7B-hf).

One CLIP-shaped tower for images, one for frames, at 224 px, features of the last layer but one -> the same two-layer MLP
-> Llama (Vicuna). 256 tokens an image, 257 a frame, CLS included. Paper: https://arxiv.org/abs/2311.10122; stock code:
transformers/models/video_llava.
"""

from __future__ import annotations

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
from hfcustom.connectors import count_tokens_out, takes_pictures
from hfcustom.families import published, tiny
from hfcustom.processors import MatchedProcessor, OptionalVideo, WithoutVideo, match_connector
from hfcustom.registry import register
from hfcustom.towers import unread
from hfcustom.videos import VideoFrames


class CustomVideoLlavaConfig(CustomConfig, VideoLlavaConfig):
    """VideoLlavaConfig with `connector` and `loss`."""

    model_type = "custom_video_llava"


class CustomVideoLlavaProcessor(MatchedProcessor, OptionalVideo, VideoLlavaProcessor, WithoutVideo):
    """VideoLlavaProcessor that works without torchvision and follows the model's connector.

    Images are `pixel_values`, the name that forward() takes; stock's default is the deprecated `pixel_values_images`.
    """

    video_processor_type = "VideoLlavaVideoProcessor"
    images_kwargs: Any = {"return_tensors": "pt", "return_legacy_image_output": False}

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of a video: as many a frame as the connector makes of its patches, and CLS."""
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        module = self.connector_module()
        if module is None:
            return text
        token, cls = self.video_token, self.num_additional_image_tokens
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        patches = len(text) // len(token) // frames - cls
        return str(token * (frames * (cls + count_tokens_out(module, patches))))


class CustomVideoLlavaForConditionalGeneration(VideoFrames, CustomVLM, VideoLlavaForConditionalGeneration):
    """Video-LLaVA with five seams; vision features are the patches of images and frames that the projector gets.

    Stock shows the CLS of a frame to the language model too: it goes before the frame's tokens as it is, unseen by the seams.
    """

    config_class = CustomVideoLlavaConfig
    processor_class = CustomVideoLlavaProcessor

    def unreached(self) -> dict[str, str]:
        """Return the tower for videos, and what lies behind the layer that features are read from."""
        videos = {"model.video_tower.": "it is for videos"}
        return unread(self, "model.image_tower", self.config.vision_feature_layer) | videos

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Let a connector that looks at pictures see those of the tower for videos too."""
        tower = f"{self.inner_path()}.video_tower"
        pictures: list[tuple[str, str, str, dict[str, bool]]] = [
            (tower, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        return [*super().seam_hooks(), *(pictures if takes_pictures(self.custom_connector) else [])]

    def _split_frames(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take CLS off the frames of videos, (V * F, CLS + N, D): (V * F, CLS, D) and (V * F, N, D)."""
        vision: Any = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return features[:, :-patches], features[:, -patches:]

    def _at_connector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.video_inputs is None:
            return super()._at_connector_input(module, args)
        cls, patches = self._split_frames(args[0])
        return (torch.cat([cls, self._vision_features(patches)], 1), *args[1:])

    def _at_connector_output(self, module: nn.Module, args: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        if self.video_inputs is None:
            return super()._at_connector_output(module, args, features)
        if self.custom_connector is None:
            return features
        cls, patches = self._split_frames(features)
        return torch.cat(
            [cls, self.reduce_videos(patches, None, besides_frame=cls.shape[1])], 1
        )  # (V * F, CLS + M, D)


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
