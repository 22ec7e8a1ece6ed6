"""SmolVLM2 (HuggingFaceTB/SmolVLM2-256M-Video-Instruct, 500M, 2.2B). SmolVLM v1 checkpoints are idefics3.

SigLIP -> pixel shuffle x4 (2.2B: x3) + one bias-free Linear -> SmolLM2 (Llama). 64 tokens a 512 px tile (2.2B: 81 a
384 px tile), tiles and a global view. Paper: https://arxiv.org/abs/2504.05299; stock code: transformers/models/smolvlm.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, ProcessorMixin, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
from transformers.utils import is_torchvision_available

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import OptionalVideo, VideosAsImages, check_one_kind
from hfcustom.registry import register

REQUIRES = ("num2words",)


class CustomSmolVLMConfig(CustomConfig, SmolVLMConfig):
    """SmolVLMConfig with `connector` and `loss`."""

    model_type = "custom_smolvlm"


class CustomSmolVLMProcessor(VideosAsImages, OptionalVideo, SmolVLMProcessor):
    """SmolVLMProcessor that works without torchvision and keeps the frames of a video together."""

    video_processor_type = "SmolVLMVideoProcessor"
    crop_field = "image_seq_len"

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Process as stock does, which would put the frames of a video in the place of the images beside it."""
        check_one_kind("SmolVLM", images, videos)
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render as stock does; stock asks its video processor for frame counts even when there is no video."""
        if is_torchvision_available():
            return super().apply_chat_template(*args, **kwargs)
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)


class CustomSmolVLMForConditionalGeneration(CustomVLM, SmolVLMForConditionalGeneration):
    """SmolVLM2 with five seams; vision features are the tower's patches, before the pixel shuffle."""

    config_class = CustomSmolVLMConfig
    processor_class = CustomSmolVLMProcessor
    crop_dims = {"pixel_values": 1, "pixel_attention_mask": 1}  # tiles of a row
    placeholder_field = "image_seq_len"

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of a crop after the pixel shuffle."""
        vision: Any = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2


def tiny_processor() -> CustomSmolVLMProcessor:
    """Return a processor for 32 px tiles of 4 tokens, with a tokenizer trained on the spot."""
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    specials = ["<|im_start|>", "<|im_end|>", *tiny.IDEFICS_TOKENS]
    return CustomSmolVLMProcessor(
        tiny.image_processor("SmolVLMImageProcessor")(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tiny.train_tokenizer(specials, bos="<|im_start|>", eos="<end_of_utterance>", pad="<|im_end|>", named=named),
        tiny.video_processor("SmolVLMVideoProcessor", size={"longest_edge": 32}, max_image_size={"longest_edge": 32}),
        image_seq_len=4,
        chat_template=tiny.chat_template("<image>", "{role}:", "<end_of_utterance>\n", bos="<|im_start|>"),
    )


def tiny_config() -> CustomSmolVLMConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomSmolVLMConfig(
        vision_config={**tiny.VISION, "image_size": 32, "patch_size": 8},
        text_config=AutoConfig.for_model("llama", **tiny.text_config(processor.tokenizer)),
        scale_factor=2,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
    )


def published_processor() -> CustomSmolVLMProcessor:
    """Return a processor with the image settings of SmolVLM2-256M and -500M and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("SmolVLMImageProcessor")(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    processor.image_seq_len = 64
    return processor


def _smolvlm2(vision: dict[str, Any], scale: int, sizes: published.Sizes) -> dict[str, Any]:
    text = published.decoder("llama", sizes, 49280)
    return {"vision_config": vision, "text_config": text, "scale_factor": scale, "tie_word_embeddings": False}


_SIGLIP_B_512 = published.vision(768, 3072, 12, 12, 512, 16)
CHECKPOINTS = {
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": _smolvlm2(_SIGLIP_B_512, 4, (576, 1536, 30, 9, 3)),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm2(_SIGLIP_B_512, 4, (960, 2560, 32, 15, 5)),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _smolvlm2(published.so400m(384), 3, (2048, 8192, 24, 32, 32)),
}


register(CustomSmolVLMForConditionalGeneration)
