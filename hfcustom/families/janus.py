"""Janus and Janus-Pro (deepseek-community/Janus-Pro-1B, Janus-Pro-7B), which understand images and also make them.

SigLIP-L -> two-layer MLP ("aligner") -> Llama. 576 tokens an image of 384 px. What makes images (a VQ-VAE, embeddings, an
aligner and a head of its own) is the part `other`: neither the language model's loss nor the seams reach it, and
generate(generation_mode="image") runs as in stock. Paper: https://arxiv.org/abs/2501.17811; stock code:
transformers/models/janus.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomJanusConfig(CustomConfig, JanusConfig):
    """JanusConfig with `connector` and `loss`."""

    model_type = "custom_janus"


class CustomJanusProcessor(JanusProcessor):
    """JanusProcessor that knows its image token's id, and says where its system prompt moves the characters of a text."""

    @property
    def image_token_id(self) -> int:
        """The id of the image placeholder, which stock leaves out."""
        token: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return token

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Process as stock does; `text_replacement_offsets` count from the text as given, the system prompt included.

        The hub's processors write a system prompt before each text (use_default_system_prompt), a replacement of nothing.
        """
        features = super().__call__(*args, **kwargs)
        if "text_replacement_offsets" in features and self._writes_system_prompt(kwargs):
            rows = features["text_replacement_offsets"]
            features["text_replacement_offsets"] = [_count_from_given_text(row) for row in rows]
        return features

    def _writes_system_prompt(self, options: dict[str, Any]) -> bool:
        return self.use_default_system_prompt and options.get("generation_mode", self.generation_mode) == "text"


def _count_from_given_text(replacements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shift = len(DEFAULT_SYSTEM_PROMPT)
    moved = [{**found, "span": tuple(at - shift for at in found["span"])} for found in replacements]
    return [{"type": "text", "span": (0, 0), "new_span": (0, shift)}, *moved]


class CustomJanusForConditionalGeneration(CustomVLM, JanusForConditionalGeneration):
    """Janus with five seams; vision features are the tower's patches, before the aligner."""

    config_class = CustomJanusConfig
    processor_class = CustomJanusProcessor
    placeholder_field = "num_image_tokens"
    other_modules = (
        "model.vqmodel",
        "model.generation_embeddings",
        "model.generation_aligner",
        "model.generation_head",
    )

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of an image."""
        vision: Any = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)


NAMED_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", *NAMED_TOKENS.values())


def tiny_processor() -> CustomJanusProcessor:
    """Return a processor for images of 28 px and 16 tokens, with a tokenizer trained on the spot."""
    return CustomJanusProcessor(
        tiny.image_processor("JanusImageProcessor")(size={"height": 28, "width": 28}),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named=NAMED_TOKENS),
        num_image_tokens=16,
        chat_template=tiny.chat_template("<image_placeholder>\n", "<|{role}|>:", "</s>", bos="<s>"),
    )


def tiny_config() -> CustomJanusConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, 16 codes of 14 x 14 px images."""
    processor = tiny_processor()
    width = tiny.TEXT["hidden_size"]
    return CustomJanusConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            "image_size": 28,
            "patch_size": 7,
            "projection_dim": width,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
        text_config=AutoConfig.for_model("llama", **tiny.text_config(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomJanusProcessor:
    """Return a processor with the image settings of Janus-Pro-7B and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("JanusImageProcessor")()
    processor.num_image_tokens = 576
    return processor


CHECKPOINTS = {
    "deepseek-community/Janus-Pro-7B": {
        "vision_config": {"projection_dim": 4096},
        "text_config": published.decoder("llama", (4096, 11008, 30, 32, 32), 102400),
        "vq_config": {"projection_dim": 4096, "image_token_embed_dim": 4096, "num_patches": 24},
        "tie_word_embeddings": False,
    },
}


register(CustomJanusForConditionalGeneration)
