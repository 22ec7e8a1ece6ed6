"""Llama 4 (meta-llama/Llama-4-Scout-17B-16E-Instruct, Maverick-17B-128E), a mixture of experts: 17 B parameters run for a token.

ViT of 336 px tiles -> pixel shuffle x0.5 + two-layer MLP, inside the tower -> Linear -> MoE decoder whose routed experts are
3-D Parameters. 144 tokens a tile, up to 16 tiles with separators between them, then a global view. Paper: none, see
https://ai.meta.com/blog/llama-4-multimodal-intelligence; stock code: transformers/models/llama4, which keeps both models in
one flat class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4Processor
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import MatchedProcessor, SingleBos, match_connector
from hfcustom.registry import register

REQUIRES = ("torchvision",)


@dataclass(kw_only=True)
class CustomLlama4Config(CustomConfig, Llama4Config):
    """Llama4Config with `connector` and `loss`; `stacked_experts` says that a checkpoint holds experts as 3-D tensors.

    save_pretrained sets it. bitsandbytes leaves stacked experts as they are, but transformers reads every quantised checkpoint
    of this family as if each expert were a module of Linears (quantizers/base.py, 5.23.0), as in some on the hub.
    """

    model_type = "custom_llama4"
    stacked_experts: bool = False


class StackedExperts(Llama4TextExperts):
    """Llama4TextExperts under a name for which transformers has no replacement."""


class CustomLlama4Processor(MatchedProcessor, SingleBos, Llama4Processor):
    """Llama4Processor that follows the model's connector and gives pixels as float32 (stock gives bfloat16 to any model)."""

    @property
    def placeholder_token(self) -> str:
        """The token that stands for one image token; `image_token` stands before the global view."""
        return self.img_patch_token

    @property
    def _image_token_ids(self) -> list[int]:
        """The ids of all that is written for an image, separators of tiles included; `image_token_ids` returns them."""
        tokens = (self.img_patch_token, self.image_token, self.start_of_img_token, self.end_of_img_token)
        ids: list[int] = self.tokenizer.convert_tokens_to_ids([*tokens, self.tile_token, self.tile_global_token])
        return ids

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        features, replacements = super()._process_images(images, **kwargs)
        pixels = features["pixel_values"]  # without return_tensors one (tiles, 3, H, W) an image
        features["pixel_values"] = torch.cat(list(pixels)) if isinstance(pixels, list) else pixels  # (P, 3, H, W)
        features["pixel_values"] = features["pixel_values"].float()
        return features, replacements


class CustomLlama4ForConditionalGeneration(CustomVLM, Llama4ForConditionalGeneration):
    """Llama 4 with five seams; vision features are the tower's patches without CLS, before the pixel shuffle."""

    config_class = CustomLlama4Config
    processor_class = CustomLlama4Processor
    no_connector_cache = "in this family the connector runs outside get_image_features"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for module in self.modules() if self.config.stacked_experts else ():
            if type(module) is Llama4TextExperts:
                module.__class__ = StackedExperts

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as every custom model does, and say how the experts are laid out."""
        self.config.stacked_experts = any(isinstance(module, Llama4TextExperts) for module in self.modules())
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def max_packed_tokens(self) -> int | None:
        """Layers without positions scale their queries by a token's place in the tensor, in steps of so many."""
        text: Any = self.config.get_text_config()
        return text.floor_scale - 1 if text.attn_temperature_tuning else None

    def get_decoder(self) -> Any:
        """Return the language model without its head; stock returns the two together."""
        return self.language_model.model

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of a tile after the pixel shuffle."""
        vision: Any = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders a tile; save it with the model."""
        return match_connector(self, processor)

    def stock_inputs(self, inputs: Any) -> dict[str, Any]:
        """Return what the stock forward takes, pixels in the tower's dtype."""
        call = super().stock_inputs(inputs)
        if call.get("pixel_values") is not None:
            call["pixel_values"] = call["pixel_values"].to(self.vision_model.dtype)
        return call

    def _expand_multimodal_outputs(
        self, input_ids: torch.Tensor, mm_encoder_output: Any, expand_size: int = 1, inputs_embeds: Any = None
    ) -> Any:
        """Deal the tiles of each row to its beams; stock (transformers 5.23.0) does so with a pooler_output alone, and raises."""
        image, token = mm_encoder_output.get("image"), int(self.config.image_token_id)
        if image is not None:
            tokens = torch.eq(input_ids, token).sum(1)  # (B,)
            tiles = (tokens // self.tokens_per_crop()).tolist()
            rows = image.last_hidden_state.split(tiles)  # (tiles, N, D) each
            image.last_hidden_state = torch.cat([row.repeat(expand_size, 1, 1) for row in rows])
            if self.looks_behind_projector:
                image.pictures = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in image.pictures.split(tiles)])
        return mm_encoder_output

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Return what stock does, and with it the pictures for a connector that looks at them: generate() projects later."""
        outputs: Any = super().get_image_features(pixel_values, **kwargs)
        if self.looks_behind_projector and not isinstance(outputs, tuple):
            outputs.pictures = self._pictures
        return outputs

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin_pass(module, args, kwargs)
        image = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if image is not None:
            self._pictures = vars(image).get("pictures")

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the pixel shuffle, which the tower does itself, and keep its rotary table complex."""
        vision = self.stock_parts().paths["vision"][0]
        hooks = [hook for hook in super().seam_hooks() if hook[2] != "_at_connector_input"]
        return [
            (f"{vision}.vision_adapter", "register_forward_pre_hook", "_at_connector_input", {}),
            (f"{vision}.rotary_embedding", "register_forward_pre_hook", "_at_rotary_input", {}),
            *hooks,
        ]

    def _at_rotary_input(self, module: Any, args: tuple[Any, ...]) -> None:
        """Make the table anew where model.to(dtype) has cut it to its real part."""
        if not module.freqs_ci.is_complex():
            module.freqs_ci = module._compute_freqs_ci(module.config).to(module.freqs_ci.device)

    def _at_connector_output(self, module: nn.Module, args: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        crops = features.unflatten(0, (-1, self.stock_tokens_per_crop()))  # (P, N, D)
        return super()._at_connector_output(module, args, crops).flatten(0, 1)  # (P * M, D)


SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|finetune_right_pad|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
BOS = SPECIAL_TOKENS[0]
CHAT_TEMPLATE = tiny.chat_template("<|image|>", "<|header_start|>{role}<|header_end|>\n\n", "<|eot|>", bos=BOS)


def tiny_tokenizer() -> Any:
    """Return a tokenizer trained on the spot that writes BOS itself, as the real one does."""
    return tiny.train_tokenizer(SPECIAL_TOKENS, bos=BOS, eos="<|eot|>", pad="<|finetune_right_pad|>", adds_bos=True)


def tiny_processor() -> CustomLlama4Processor:
    """Return a processor for 28 px tiles of 4 tokens, at most 4 of them, with a tokenizer trained on the spot."""
    return CustomLlama4Processor(
        tiny.image_processor("Llama4ImageProcessor")(size={"height": 28, "width": 28}, max_patches=4),
        tiny_tokenizer(),
        patch_size=7,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomLlama4Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, one with 4 experts."""
    tokenizer = tiny_tokenizer()
    ids = {
        f"{name}_token_index": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("boi", "<|image_start|>"), ("eoi", "<|image_end|>"), ("image", "<|patch|>"))
    }
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    projector = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    return CustomLlama4Config(
        vision_config={
            **{**tiny.VISION, "intermediate_size": 128},  # what the pixel shuffle makes of four patches
            **projector,
            "image_size": 28,
            "patch_size": 7,
            "rope_parameters": rope,
        },
        text_config={**tiny.text_config(tokenizer), **experts, "rope_parameters": rope},
        **ids,
    )


def published_processor() -> CustomLlama4Processor:
    """Return a processor with the image settings of Llama 4 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Llama4ImageProcessor")(
        size={"height": 336, "width": 336}, max_patches=16
    )
    processor.patch_size = 14
    return processor


def _llama4(experts: int, **text: Any) -> dict[str, Any]:
    sizes = {"vision_output_dim": 4096, "projector_input_dim": 4096, "projector_output_dim": 4096}
    return {
        "vision_config": published.vision(1408, 5632, 34, 16, 336, 14, pixel_shuffle_ratio=0.5, **sizes),
        "text_config": {"num_local_experts": experts, **text},
    }


CHECKPOINTS = {
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": _llama4(16),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": _llama4(128, interleave_moe_layer_step=2),
}


register(CustomLlama4ForConditionalGeneration)
