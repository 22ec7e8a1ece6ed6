"""Gemma 3 (google/gemma-3-4b-it, 12b, 27b; the 1b has no images).

SigLIP -> 4 x 4 average pool + RMSNorm + one matrix -> Gemma 3, five layers of sliding window for each of full attention; the
tokens of one image see each other both ways. 256 tokens an 896 px image, pan and scan adds crops of as many.
Paper: https://arxiv.org/abs/2503.19786; stock code: transformers/models/gemma3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor

from hfcustom import seams
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomGemma3Config(CustomConfig, Gemma3Config):
    """Gemma3Config with `connector` and `loss`.

    `mark_images` finds the tokens of images in a batch without token_type_ids (processor and collator always make them),
    where stock, without a word, lets each see only what is before it. With a static cache generate() makes the mask, as
    stock does.
    """

    model_type = "custom_gemma3"
    mark_images: bool = False


class CustomGemma3Processor(Gemma3Processor):
    """Gemma3Processor under the custom model's name."""


class CustomGemma3ForConditionalGeneration(CustomVLM, Gemma3ForConditionalGeneration):
    """Gemma 3 with five seams; vision features are the tower's patches, before the pooling."""

    config_class = CustomGemma3Config
    processor_class = CustomGemma3Processor
    placeholder_field = "image_seq_length"

    def stock_tokens_per_crop(self) -> int:
        """Return the tokens of a crop after the pooling."""
        config: Any = self.config
        return int(config.mm_tokens_per_image)

    def match_processor(self, processor: Any) -> Any:
        """Renew the text of an image too, which the processor composed when it was built."""
        token = processor.tokenizer.image_token
        before = token * processor.image_seq_length
        super().match_processor(processor)
        after = token * processor.image_seq_length
        processor.full_image_sequence = processor.full_image_sequence.replace(before, after)
        return processor

    def stock_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the stock forward takes; with `config.mark_images`, token_type_ids where the batch has none."""
        call = super().stock_inputs(inputs)
        config: Any = self.config
        cache = call.get("past_key_values")
        begins = cache is None or not cache.get_seq_length()
        if config.mark_images and begins and call.get("token_type_ids") is None:
            images = seams.find_placeholders(self, call.get("input_ids"), call.get("inputs_embeds"))  # (B, T)
            call["token_type_ids"] = images.long()
        return call

    def _at_packed_rows(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the mask of a window out of the full one, where stock looks for images at wrong places (5.23.0)."""
        masks = kwargs.get("attention_mask")
        if self._pass is not None and self._pass.rows is not None and isinstance(masks, Mapping):
            full = masks["full_attention"]  # (1, 1, T, T), True or 0 where a token may look
            if full is not None:
                places = torch.arange(full.shape[-1], device=full.device)
                far = places <= places[:, None] - module.config.sliding_window  # (T, T)
                hidden = False if full.dtype == torch.bool else torch.finfo(full.dtype).min
                kwargs = {**kwargs, "attention_mask": {**masks, "sliding_attention": full.masked_fill(far, hidden)}}
        return super()._at_packed_rows(module, args, kwargs)


NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *NAMED_TOKENS.values())


def tiny_processor() -> CustomGemma3Processor:
    """Return a processor for 32 px images of 4 tokens, with a tokenizer trained on the spot that begins with <bos>."""
    tokenizer = tiny.train_tokenizer(SPECIAL_TOKENS, bos="<bos>", eos="<end_of_turn>", pad="<pad>", named=NAMED_TOKENS)
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    return CustomGemma3Processor(
        tiny.image_processor("Gemma3ImageProcessor")(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=tiny.chat_template(
            "<start_of_image>", "<start_of_turn>{role}\n", "<end_of_turn>\n", bos="<bos>"
        ),
    )


def tiny_config() -> CustomGemma3Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, a window of 16 tokens in one."""
    processor = tiny_processor()
    text = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return CustomGemma3Config(
        vision_config={**tiny.VISION, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        text_config={**tiny.text_config(processor.tokenizer), **text},
        mm_tokens_per_image=4,
        boi_token_index=processor.tokenizer.boi_token_id,
        eoi_token_index=processor.tokenizer.eoi_token_id,
        image_token_index=processor.tokenizer.image_token_id,
    )


def wake(model: nn.Module) -> None:
    """Redraw what starts at zero, the projector's matrix, so that images have an effect in a random model."""
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))


def published_processor() -> CustomGemma3Processor:
    """Return a processor with the image settings of Gemma 3 and the tiny tokenizer."""
    settings = tiny.image_processor("Gemma3ImageProcessor")(size={"height": 896, "width": 896})
    tokenizer = tiny_processor().tokenizer
    return CustomGemma3Processor(settings, tokenizer, image_seq_length=256)


def _gemma3(head_dim: int, sizes: published.Sizes) -> dict[str, Any]:
    return {
        "vision_config": published.so400m(896, model_type="siglip_vision_model", vision_use_head=False),
        "text_config": {**published.decoder("gemma3_text", sizes, 262208), "head_dim": head_dim},
        "mm_tokens_per_image": 256,
    }


CHECKPOINTS = {
    "google/gemma-3-4b-it": _gemma3(256, (2560, 10240, 34, 8, 4)),
    "google/gemma-3-12b-it": _gemma3(256, (3840, 15360, 48, 16, 8)),
    "google/gemma-3-27b-it": _gemma3(128, (5376, 21504, 62, 32, 16)),
}


register(CustomGemma3ForConditionalGeneration)
