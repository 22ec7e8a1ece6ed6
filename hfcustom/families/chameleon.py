"""Chameleon (facebook/chameleon-7b, chameleon-30b), which reads an image as words of its vocabulary.

VQ-VAE encoder -> nearest of 8192 codes -> the embeddings of as many tokens of the vocabulary, 1024 for 512 x 512 px ->
Llama with normalised queries and keys. There is no connector, and no gradient reaches the VQ-VAE. Stock suppresses image
tokens in the logits. Paper: https://arxiv.org/abs/2405.09818; stock code: transformers/models/chameleon.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonModel, ChameleonProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import takes_pictures, works_before_projector
from hfcustom.families import tiny
from hfcustom.registry import register

INNER_INPUTS = tuple(inspect.signature(ChameleonModel.forward).parameters)[1:]


class CustomChameleonConfig(CustomConfig, ChameleonConfig):
    """ChameleonConfig with `connector` and `loss`."""

    model_type = "custom_chameleon"


class CustomChameleonProcessor(ChameleonProcessor):
    """ChameleonProcessor that keeps a chat template, and then leaves it to the template where turns are separated.

    Stock has no argument for a template, so that a saved one is lost, and writes `sep_token` after every text, also after
    one that ends with it.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 1024,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, image_seq_length, image_token)
        self.chat_template = chat_template

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Process as stock does; with a chat template, no separator follows the text unless it is asked for."""
        kwargs.setdefault("return_for_text_completion", self.chat_template is not None)
        return super().__call__(*args, **kwargs)


class CustomChameleonForConditionalGeneration(CustomVLM, ChameleonForConditionalGeneration):
    """Chameleon with five seams; vision features are what is quantised, and a connector reduces the codes' embeddings.

    A change of the vision features changes which codes are chosen, and cannot be trained: choosing has no gradient. So a
    connector that elsewhere works on vision features, a second tower's, works on the codes' embeddings here.
    """

    config_class = CustomChameleonConfig
    processor_class = CustomChameleonProcessor
    placeholder_field = "image_seq_length"
    no_feature_cache = "image features are embeddings of the language model's vocabulary"

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the VQ-VAE for images; stock does not know it by its name."""
        encoder: nn.Module = self.model.vqmodel if modality == "image" else super().get_encoder(modality)
        return encoder

    def stock_tokens_per_crop(self) -> int:
        """Return the codes of an image: each level of the encoder but the last halves its sides."""
        vq: Any = self.config.vq_config
        return int((vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)) ** 2)

    def looked_at_width(self) -> int:
        """Return the width of the codes' embeddings."""
        return int(self.config.get_text_config().hidden_size)

    def unreached(self) -> dict[str, str]:
        """Return the VQ-VAE."""
        return {"model.vqmodel.": "an image becomes codes, and choosing the nearest code has no gradient"}

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Put the seams around the inner model, which embeds, merges and decodes in one."""
        inner = self.inner_path()
        return [
            (inner, "register_forward_pre_hook", "_begin_pass", {"with_kwargs": True}),
            (inner, "register_forward_pre_hook", "_at_language_input", {"with_kwargs": True}),
            (inner, "register_forward_pre_hook", "_at_packed_rows", {"with_kwargs": True}),
            (inner, "register_forward_hook", "_at_language_output", {}),
            (inner, "register_forward_hook", "_end_pass", {"always_call": True}),
            (f"{inner}.vqmodel.quantize", "register_forward_pre_hook", "_at_quantizer_input", {}),
        ]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_image_features, which generate() calls too."""
        return [(self.inner_path(), "get_image_features", "_at_image_features")]

    def _at_quantizer_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        image = args[0]  # (P, D_vision, rows, columns)
        features = self._transformed(image.flatten(2).transpose(1, 2))  # (P, patches, D_vision)
        if self._pass is not None and self._pass.records:
            self._pass.vision_features = features
        return (features.transpose(1, 2).unflatten(2, image.shape[2:]),)

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, return_dict: Any = None, **kwargs: Any) -> Any:
        outputs = stock(*args, **kwargs, return_dict=True)  # pooler_output (P, N, D)
        if takes_pictures(self.custom_connector):
            self._pictures = inspect.signature(stock).bind(*args, **kwargs).arguments["pixel_values"]
        if works_before_projector(self.custom_connector):
            outputs.pooler_output = self._look_again(outputs.pooler_output)
        outputs.pooler_output = self._at_connector_output(self.model, (), outputs.pooler_output)  # (P, M, D)
        return outputs.to_tuple() if return_dict is False else outputs

    def _at_language_input(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Merge image features into the embeddings as stock's forward does (modeling_chameleon.py, 5.23.0)."""
        inputs = {**dict(zip(INNER_INPUTS, args, strict=False)), **kwargs}
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        pixels, encoded = inputs.get("pixel_values"), inputs.get("mm_encoder_outputs")
        if (ids is None) == (embeddings is None) or (pixels is not None and encoded is not None):
            return args, kwargs  # stock says what is wrong
        embeddings = module.embed_tokens(ids) if embeddings is None else embeddings  # (B, T, D)
        images = (encoded or {}).get("image")
        if pixels is not None:
            images = module.get_image_features(pixels, return_dict=True)
        if images is not None:
            features = images.pooler_output  # (P, M, D)
            mask = module.get_placeholder_mask(ids, inputs_embeds=embeddings, image_features=features)  # (B, T, 1)
            embeddings = embeddings.masked_scatter(mask, features)
        merged = ("input_ids", "pixel_values", "mm_encoder_outputs")
        rest = {name: value for name, value in inputs.items() if name not in merged}
        return super()._at_language_input(module, (), {**rest, "inputs_embeds": embeddings})

    @cached_property
    def _image_vocabulary(self) -> torch.Tensor:
        return torch.tensor(self.model.vocabulary_mapping.image_tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the head and suppress the tokens of images, as stock does: (..., D) -> (..., V)."""
        logits = self.lm_head(hidden_states)
        return logits.index_fill(-1, self._image_vocabulary.to(logits.device), torch.finfo(logits.dtype).min)


IMAGE_TOKEN, SEPARATOR = "<image>", "<reserved08706>"
CODES = tuple(f"IMGIMG{letter}Z" for letter in "ABCDEFGH")  # letters are digits: 0, 1, ..., 7
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", SEPARATOR, "<racm3:break>", "<eoss>", IMAGE_TOKEN, *CODES)


def tiny_processor() -> CustomChameleonProcessor:
    """Return a processor for images of 32 px and 16 tokens, with a tokenizer trained on the spot."""
    named = {"image_token": IMAGE_TOKEN, "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named=named)
    tokenizer.sep_token = SEPARATOR
    return CustomChameleonProcessor(
        tiny.image_processor("ChameleonImageProcessor")(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer,
        image_seq_length=16,
        chat_template=tiny.chat_template(IMAGE_TOKEN, "", "</s>", bos="<s>", prompt_end=SEPARATOR),
    )


def tiny_config() -> CustomChameleonConfig:
    """Return a config of the real architecture small enough for a test: 2 layers, 8 codes."""
    tokenizer = tiny_processor().tokenizer
    return CustomChameleonConfig(
        **tiny.text_config(tokenizer),
        vocabulary_map=dict(tokenizer.get_vocab()),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": len(CODES),
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    )


def published_processor() -> CustomChameleonProcessor:
    """Return a processor with the image settings of Chameleon and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("ChameleonImageProcessor")()
    processor.image_seq_length = 1024
    return processor


CHECKPOINTS = {"facebook/chameleon-7b": {"vocabulary_map": {IMAGE_TOKEN: 8711}, "tie_word_embeddings": False}}


register(CustomChameleonForConditionalGeneration)
