"""InternVL 2.5 and 3 (OpenGVLab/InternVL3-1B-hf and the other -hf checkpoints).

InternViT -> drop CLS -> pixel shuffle x0.5 -> LayerNorm + two-layer MLP -> Qwen2 or Llama. 256 tokens a 448 px tile,
up to 12 tiles and a thumbnail. Paper: https://arxiv.org/abs/2504.10479; stock code: transformers/models/internvl.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import OptionalVideo, VideosAsImages
from hfcustom.registry import register


class CustomInternVLConfig(CustomConfig, InternVLConfig):
    """InternVLConfig with `connector` and `loss`."""

    model_type = "custom_internvl"


class CustomInternVLProcessor(VideosAsImages, OptionalVideo, InternVLProcessor):
    """InternVLProcessor that works without torchvision and keeps the frames of a video together."""

    video_processor_type = "InternVLVideoProcessor"
    crop_field = "image_seq_length"


class CustomInternVLForConditionalGeneration(CustomVLM, InternVLForConditionalGeneration):
    """InternVL with five seams; vision features are the tower's patches without CLS, before the pixel shuffle."""

    config_class = CustomInternVLConfig
    processor_class = CustomInternVLProcessor
    placeholder_field = "image_seq_length"

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of a crop after the pixel shuffle."""
        vision: Any = self.config.vision_config
        patches = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
        return int(patches * self.config.downsample_ratio**2)

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features from the tower: what reaches the projector is already shuffled."""
        vision = self.stock_parts().paths["vision"][0]
        hooks = [hook for hook in super().seam_hooks() if hook[2] != "_at_connector_input"]
        return [(vision, "register_forward_hook", "_at_vision_output", {}), *hooks]

    def _at_vision_output(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        layer: Any = self.config.vision_feature_layer
        cls = int(self.config.vision_feature_select_strategy == "default")
        features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]  # (P, CLS+patches, D)
        patches = self._vision_features(features[:, cls:])  # (P, patches, D)
        features = torch.cat([features[:, :cls], patches], 1)
        if layer == -1:
            outputs.last_hidden_state = features
        else:
            states = list(outputs.hidden_states)
            states[layer] = features
            outputs.hidden_states = tuple(states)
        return outputs


NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
CHAT_TEMPLATE = tiny.chat_template("<IMG_CONTEXT>\n", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomInternVLProcessor:
    """Return a processor for 28 px tiles of 4 tokens, with a tokenizer trained on the spot."""
    return CustomInternVLProcessor(
        image_processor=tiny.image_processor("GotOcr2ImageProcessor")(size={"height": 28, "width": 28}),
        tokenizer=tiny.train_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED_TOKENS),
        video_processor=tiny.video_processor("InternVLVideoProcessor", size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomInternVLConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomInternVLConfig(
        vision_config={**tiny.VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=AutoConfig.for_model("qwen2", **tiny.text_config(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomInternVLProcessor:
    """Return a processor with the image settings of InternVL3 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("GotOcr2ImageProcessor")(
        size={"height": 448, "width": 448}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    processor.image_seq_length = 256
    return processor


def _internvl3(vision: dict[str, Any], sizes: published.Sizes) -> dict[str, Any]:
    text = published.decoder("qwen2", sizes, 151674)
    return {"vision_config": vision, "text_config": text, "tie_word_embeddings": False}


CHECKPOINTS = {
    "OpenGVLab/InternVL3-1B-hf": _internvl3(published.INTERNVIT_300M, (896, 4864, 24, 14, 2)),
    "OpenGVLab/InternVL3-2B-hf": _internvl3(published.INTERNVIT_300M, (1536, 8960, 28, 12, 2)),
    "OpenGVLab/InternVL3-8B-hf": _internvl3(published.INTERNVIT_300M, (3584, 18944, 28, 28, 4)),
    "OpenGVLab/InternVL3-14B-hf": _internvl3(published.INTERNVIT_300M, (5120, 13824, 48, 40, 8)),
    "OpenGVLab/InternVL3-38B-hf": _internvl3(published.INTERNVIT_6B, (5120, 27648, 64, 40, 8)),
    "OpenGVLab/InternVL3-78B-hf": _internvl3(published.INTERNVIT_6B, (8192, 29568, 80, 64, 8)),
}


register(CustomInternVLForConditionalGeneration)
