"""MiniCPM-V 4.6 (openbmb/MiniCPM-V-4.6).

SigLIP-like ViT of any image size, 2 x 2 patches merged by attention after one of its layers -> 2 x 2 merge and MLP -> Qwen 3.5,
linear and full attention. 64 tokens for a view of about 448 x 448 px (256 with downsample_mode "4x"): the whole image, then
up to 9 slices. Paper of MiniCPM-V: https://arxiv.org/abs/2408.01800; stock code: transformers/models/minicpmv4_6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from hfcustom import patches
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import Grid, frames_together, grid_out
from hfcustom.families import published, tiny
from hfcustom.processors import MatchedProcessor, OptionalVideo, RaggedVideos, WithoutVideo
from hfcustom.ragged import RaggedImages
from hfcustom.registry import register
from hfcustom.videos import VideoFrames


class CustomMiniCPMV4_6Config(CustomConfig, MiniCPMV4_6Config):
    """MiniCPMV4_6Config with `connector` and `loss`."""

    model_type = "custom_minicpmv4_6"


class CustomMiniCPMV4_6Processor(RaggedVideos, MatchedProcessor, OptionalVideo, MiniCPMV4_6Processor, WithoutVideo):
    """MiniCPMV4_6Processor that works without torchvision and follows the connector in the whole image and in each slice."""

    video_processor_type = "MiniCPMV4_6VideoProcessor"
    video_processor: Any = SimpleNamespace(slice_mode=True, downsample_mode="16x")  # read where torchvision is missing

    def reduced_inputs(
        self, image_inputs: Mapping[str, Any], image_idx: int, module: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return patch grids of as many tokens as the connector makes of each view."""
        counts = image_inputs["num_patches_per_image"]  # views of each image
        first = sum(counts[:image_idx])
        sizes = image_inputs["target_sizes"][first : first + counts[image_idx]]
        return {
            "grids": [image_inputs["grids"][image_idx]],
            "num_patches_per_image": [counts[image_idx]],
            "target_sizes": reduced_sizes(module, sizes, kwargs["image_token_divisor"]),
        }

    def _process_videos(self, videos: Any, **kwargs: Any) -> Any:
        stacked = kwargs.get("stack_frames") or self.video_processor.stack_frames
        if self.connector is not None and stacked > 1 and frames_together(self.connector_module()) > 1:
            raise ValueError(
                f"connector={self.connector!r} takes neighbouring frames together, but stack_frames={stacked} puts a picture of "
                "several frames behind each one. Pass stack_frames=1."
            )
        return super()._process_videos(videos, **kwargs)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return what stock writes for frames of as many tokens a view as the connector makes."""
        module = self.connector_module()
        if module is not None:
            self._check_clips(frames_together(module), video_inputs, video_idx)
            sizes = reduced_sizes(module, video_inputs["target_sizes_videos"], kwargs["video_token_divisor"])
            video_inputs = {**video_inputs, "target_sizes_videos": sizes}
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return text

    def _check_clips(self, frames: int, video_inputs: Mapping[str, Any], video_idx: int) -> None:
        """Raise ValueError where frames are not to be taken together: the model sees neither slices nor where a video ends."""
        if frames == 1:
            return
        counts = video_inputs["num_frames_per_video"]
        given, first = int(counts[video_idx]), int(sum(counts[:video_idx]))
        slices = max(int(rows) * int(columns) for rows, columns in video_inputs["grids_videos"][first : first + given])
        if slices:
            raise ValueError(
                f"connector={self.connector!r} takes {frames} neighbouring frames together, but video {video_idx} has frames of "
                f"{slices} slices, which would be taken for frames. Pass slice_mode=False in videos_kwargs."
            )
        if given % frames:
            raise ValueError(
                f"connector={self.connector!r} takes {frames} neighbouring frames together, but video {video_idx} has {given}. "
                "Give it a multiple of that: sample other frames, or repeat the last."
            )


def reduced_sizes(module: Any, sizes: Any, divisor: int) -> torch.Tensor:
    """Return patch grids, (P, 2), of as many tokens as a connector makes of those in `sizes`; `divisor` patches are a token."""
    side = math.isqrt(divisor)
    grids = [(int(rows) // side, int(columns) // side) for rows, columns in sizes]
    return torch.tensor([grid_out(module, rows * columns, (rows, columns)) for rows, columns in grids]) * side


class CustomMiniCPMV4_6ForConditionalGeneration(
    VideoFrames, RaggedImages, CustomVLM, MiniCPMV4_6ForConditionalGeneration
):
    """MiniCPM-V 4.6 with five seams; vision features are one view's, already merged once inside the tower."""

    config_class = CustomMiniCPMV4_6Config
    processor_class = CustomMiniCPMV4_6Processor
    state_modules = (Qwen3_5GatedDeltaNet,)
    ignores_logits_to_keep = True

    def clip_lengths(self, tokens: list[int]) -> list[int]:
        """Return the tokens of each frame: the model is not told which are of one video."""
        return tokens

    @classmethod
    def merge_images(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join the image tensors of rows; patches of all views lie side by side, (1, 3, patch, widths of all)."""
        beside = ("pixel_values", "pixel_values_videos")
        merged = super().merge_images([{name: row[name] for name in row if name not in beside} for row in rows])
        for name in beside:
            if parts := [row[name] for row in rows if name in row]:
                merged[name] = torch.cat(parts, -1)
        return merged

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the merger behind the tower."""
        merger = self.stock_parts().paths["connector"][0]
        return [*super().seam_hooks(), (merger, "register_forward_pre_hook", "_at_merger_input", {})]

    def _at_merger_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        features, sizes = args  # (1, patches of all views, D_vision), (P, 2)
        grids = [(rows, columns) for rows, columns in sizes.tolist()]
        return self.transform_ragged(features[0], grids)[None], sizes

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the picture of each view."""
        vision: Any = self.config.vision_config
        side, grids = vision.patch_size, inputs["target_sizes"].tolist()
        strips = inputs["pixel_values"][0].split([rows * columns * side for rows, columns in grids], -1)
        return [
            patches.from_strip(strip, (rows, columns), side)
            for strip, (rows, columns) in zip(strips, grids, strict=True)
        ]

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return the rows and columns of each view after both merges."""
        mode = inputs.get("downsample_mode") or self.config.downsample_mode
        merge_rows, merge_columns = (side**self.config.merger_times for side in self.config.merge_kernel_size)
        inside = 1 if mode == "4x" else 2
        sizes = inputs["target_sizes"].tolist()
        return [(rows // inside // merge_rows, columns // inside // merge_columns) for rows, columns in sizes]


NAMED_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
CHAT_TEMPLATE = tiny.chat_template("<|image_pad|>", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomMiniCPMV4_6Processor:
    """Return a processor for views of about 32 x 32 px, 4 tokens, with a tokenizer trained on the spot."""
    sizes = {"max_slice_nums": 4, "scale_resolution": 32, "patch_size": 4}
    return CustomMiniCPMV4_6Processor(
        tiny.image_processor("MiniCPMV4_6ImageProcessor")(**sizes),
        tiny.video_processor("MiniCPMV4_6VideoProcessor", **sizes),
        tiny.train_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomMiniCPMV4_6Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, one of each kind of attention."""
    processor = tiny_processor()
    attention = {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 3, 3],
        },
    }
    return CustomMiniCPMV4_6Config(
        vision_config={**tiny.VISION, "image_size": 32, "patch_size": 4},
        text_config={**tiny.text_config(processor.tokenizer), **attention, "model_type": "qwen3_5_text"},
        insert_layer_id=0,
        image_size=32,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )


def wake(model: nn.Module) -> None:
    """Give linear attention slow decays: with stock's, up to 16 a token, it forgets at once, and their gradient is rounding."""
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            parameter.data.copy_(torch.linspace(0.01, 0.2, len(parameter)).log())


def published_processor() -> CustomMiniCPMV4_6Processor:
    """Return a processor with the image settings of MiniCPM-V 4.6 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("MiniCPMV4_6ImageProcessor")()
    return processor


CHECKPOINTS = {
    "openbmb/MiniCPM-V-4.6": {
        "vision_config": published.so400m(980),
        "text_config": {
            **published.decoder("qwen3_5_text", (1024, 3584, 24, 8, 2), 248094),
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
        },
        "tie_word_embeddings": True,
    },
}


register(CustomMiniCPMV4_6ForConditionalGeneration)
