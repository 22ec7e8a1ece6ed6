"""Llama 3.2 Vision (meta-llama/Llama-3.2-11B-Vision-Instruct, 90B).

ViT of up to 4 tiles + gated global layers, concatenated with five earlier layers -> Linear -> keys and values of gated
cross-attention layers in Llama (8 of 40). An image is one <|image|> in the text and 1601 tokens (CLS and patches) a
560 px tile beside it. Paper: https://arxiv.org/abs/2407.21783, section 7; stock code: transformers/models/mllama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.cache_utils import StaticLayer

from hfcustom import losses
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import Told, frames_together, of_each, reduce_tokens, takes_pictures, takes_question
from hfcustom.families import published, tiny
from hfcustom.processors import NestedImages
from hfcustom.registry import register

TILE_SLOTS = 4  # of an image, in every checkpoint


@dataclass(kw_only=True)
class CustomMllamaConfig(CustomConfig, MllamaConfig):
    """MllamaConfig with `connector`, `loss` and `mask_text_rows`, see CustomMllamaForConditionalGeneration.corrections."""

    model_type = "custom_mllama"
    mask_text_rows: bool = False


class CustomMllamaProcessor(NestedImages, MllamaProcessor):
    """MllamaProcessor that writes one BOS, takes rows without images in any place, and fewer tiles than the model has."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Process as stock does, with add_special_tokens=False unless it is given: stock writes BOS into every text itself."""
        options = {**kwargs, **kwargs.get("text_kwargs", {})}
        kwargs |= {} if "add_special_tokens" in options else {"add_special_tokens": False}
        features = super().__call__(images=images, text=text, **kwargs)
        if "cross_attention_mask" in features:  # (B, T, images, tiles)
            features["cross_attention_mask"] = self._pad_tiles(features["cross_attention_mask"], 3)
            features.convert_to_tensors(options.get("return_tensors"))
        if options.get("return_text_replacement_offsets"):
            texts = [text] if isinstance(text, str) else text
            features["text_replacement_offsets"] = [self._written_bos(sample) for sample in texts]
        return features

    def _written_bos(self, text: str) -> list[dict[str, Any]]:
        """Return where stock puts BOS into a text that has none, in the words in which placeholders are reported."""
        if self.bos_token in text:
            return []
        at = 0
        while text.startswith(self.image_token, at):
            at += len(self.image_token)
        return [{"type": "text", "span": (at, at), "new_span": (at, at + len(self.bos_token))}]

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        """Process the rows with images as stock does, and put them among those without."""
        shown = [at for at, row in enumerate(images) if row]
        features, replacements = super()._process_images([images[at] for at in shown], **kwargs)
        tiles, slots = features["pixel_values"].shape[2], self._tile_slots()
        if tiles == slots and len(shown) == len(images):
            return features, replacements
        pixels, mask = (self._pad_tiles(features[name], 2) for name in ("pixel_values", "aspect_ratio_mask"))
        grids = torch.tensor([0, *(1 + tile_grids(slots).index(grid) for grid in tile_grids(tiles))])
        ids = grids[torch.as_tensor(features["aspect_ratio_ids"])]  # (rows, images): stock counts the grids of `tiles`
        for name, tensor in (("pixel_values", pixels), ("aspect_ratio_mask", mask), ("aspect_ratio_ids", ids)):
            features[name] = tensor.new_zeros(len(images), *tensor.shape[1:])  # (B, images, ...)
            if name == "aspect_ratio_mask":
                features[name][..., 0] = 1  # as stock has it where there is no image
            features[name][shown] = tensor
        num_tiles = iter(features["num_tiles"])
        features["num_tiles"] = [next(num_tiles) if row else [] for row in images]
        return features, replacements

    def _tile_slots(self) -> int:
        return max(TILE_SLOTS, self.image_processor.max_image_tiles)

    def _pad_tiles(self, features: Any, dim: int) -> torch.Tensor:
        """Fill up the tiles of a tensor to the model's slots: stock stops at `max_image_tiles`, and the model crashes."""
        tensor = torch.as_tensor(features)
        shape = [*tensor.shape[:dim], self._tile_slots() - tensor.shape[dim], *tensor.shape[dim + 1 :]]
        return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor


def tile_grids(tiles: int) -> list[tuple[int, int]]:
    """Return the grids (rows, columns) of at most so many tiles, in the order of aspect_ratio_ids, which start at 1."""
    sides = range(1, tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= tiles]


class CustomMllamaForConditionalGeneration(CustomVLM, MllamaForConditionalGeneration):
    """Llama 3.2 Vision with five seams: a connector reduces the patches of each tile and leaves its CLS token alone.

    Vision features are (P, CLS + patches, D_vision) of all tile slots of the batch, empty ones included, as the Linear
    gets them; what losses see of images is that of the slots with an image. A connector that looks at pictures works on the
    slots with one. One that takes frames together gets the same tile of neighbouring images of a row, which must be cut
    alike, and who may look at one of these images, may look at all.
    """

    config_class = CustomMllamaConfig
    processor_class = CustomMllamaProcessor
    lacks = {
        "placeholders": "image tokens are keys and values of cross-attention layers; the text has one mark an image"
    }
    no_feature_cache = "images reach the language model as keys and values of layers of their own, not as tokens"
    no_packing = "cross-attention shows the text before a row's first image the images of every row"
    corrections = {
        "mask_text_rows": "Tokens before a row's first image, and all tokens of a row without images in a batch with images, "
        "attend to every image slot of the batch, empty ones included: their keys are all masked, which softmax turns into "
        "equal weights (modeling_mllama.py, 5.23.0). With it they attend to none, as in the code that Meta released with the "
        "models (llama-models, CrossAttention: output * full_text_row_masked_out_mask), and a batch equals its rows alone."
    }

    _filled: torch.Tensor | None = None  # (B, images, tiles), which slots of the running forward hold a tile

    # ---- seams ------------------------------------------------------------------------------------------------------

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Reduce tokens where the language model gets them: stock folds the Linear's output by the number of patches."""
        vision, language = (self.stock_parts().paths[part][0] for part in ("vision", "language"))
        layers: Any = self.config.get_text_config().cross_attention_layers
        connector = self.custom_connector
        looks: list[tuple[str, str, str, dict[str, bool]]] = [
            (vision, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        return [
            *(hook for hook in super().seam_hooks() if hook[2] not in ("_at_connector_output", "_at_vision_input")),
            *(looks if takes_pictures(connector) or frames_together(connector) > 1 else []),
            *(
                (f"{language}.layers.{at}", "register_forward_hook", "_at_cross_layer", {"with_kwargs": True})
                for at in layers
            ),
        ]

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin_pass(module, args, kwargs)
        self._filled = None
        assert self._pass is not None
        if self._pass.records and has_images(kwargs):
            self._pass.crops = visible_tiles(kwargs).any(1).flatten()  # (P,)

    def vision_width(self) -> int:
        """Return the width of the tower's last layer and the earlier ones side by side."""
        config: Any = self.config
        return int(config.vision_config.vision_output_dim)

    def _at_vision_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = kwargs["aspect_ratio_ids"] > 0  # (B, images); where there is no image, stock's mask has a tile
        self._filled = kwargs["aspect_ratio_mask"].bool() & shown[..., None]
        if takes_pictures(self.custom_connector):
            pixels = kwargs["pixel_values"]  # (B, images, tiles, 3, H, W)
            together = frames_together(self.custom_connector) > 1
            self._pictures = pixels.flatten(0, 2) if together else pixels[self._filled]  # (P or filled, 3, H, W)

    def _look_again(self, features: torch.Tensor) -> torch.Tensor:
        """Let a connector see the patches of slots with a tile, and leave CLS and empty slots as they are."""
        assert self._filled is not None, "the tower has run"
        filled = self._filled.flatten().to(features.device)  # (P,)
        looked = super()._look_again(features[filled][:, 1:])  # (filled, patches, D_vision)
        return features.index_put((filled,), torch.cat([features[filled][:, :1], looked], 1))

    def _at_connector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features = args[0]  # (B, images, tiles, CLS + patches, D_vision)
        changed = self._vision_features(features.flatten(0, 2))  # (P, CLS + patches, D_vision)
        if self._pass is not None and self._pass.crops is not None:
            self._pass.vision_features = changed[self._pass.crops]
        return (changed.view(features.shape), *args[1:])

    def _at_language_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._pass is None:  # the language model is run by itself
            return args, kwargs
        states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"]
        given: Any = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if states is not None:
            states = self._reduce(states, len(given))  # (P, M, D)
            if self._pass.crops is not None:
                self._pass.image_features = states[self._pass.crops]
        if mask is not None and self.custom_connector is not None:
            mask = self._mask_of_reduced(mask)
        return super()._at_language_input(
            module, args, {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}
        )

    def _mask_of_reduced(self, mask: torch.Tensor) -> torch.Tensor:
        """Return what cross-attention may look at for the tokens that are left of each slot, 0 where it may.

        (B, 1, T, images * tiles * N) -> (B, 1, T, images * tiles * M)
        """
        by_slot = mask.unflatten(-1, (-1, self.stock_tokens_per_crop()))[..., 0]  # (B, 1, T, images * tiles)
        frames = frames_together(self.custom_connector)
        if frames > 1:
            clips = by_slot.unflatten(-1, (-1, frames, self._tiles()))  # (B, 1, T, clips, frames, tiles)
            by_slot = clips.amax(-2, keepdim=True).expand_as(clips).flatten(-3)
        return by_slot[..., None].expand(*by_slot.shape, self.tokens_per_crop()).flatten(-2)

    def _tiles(self) -> int:
        vision: Any = self.config.vision_config
        return int(vision.max_num_tiles)

    def _reduce(self, states: torch.Tensor, rows: int) -> torch.Tensor:
        """Run the connector on the patches of all slots of a batch of so many rows: (P, 1 + N, D) -> (P, 1 + M, D)."""
        if self.custom_connector is None:
            return states
        patches, order = states[:, 1:], self._clip_order(states, rows)
        told = (
            self._what_is_asked().of_rows(self._rows_of_slots(states)) if takes_question(self.custom_connector) else {}
        )
        if order is not None:
            self._pictures = None if self._pictures is None else self._pictures[order]
            patches = self._connect(patches[order], of_each(told, order.tolist()))[order.argsort()]
        elif self.looks_behind_projector and self._filled is not None:  # an empty slot's tokens are nothing
            filled = self._filled.flatten().to(states.device)  # (P,)
            told = of_each(told, filled.nonzero()[:, 0].tolist())
            looked = self._connect(patches[filled], told)  # (filled, M, D)
            patches = looked.new_zeros(len(states), *looked.shape[1:]).index_put((filled,), looked)
        else:
            patches = self._connect(patches, told)
        return torch.cat([states[:, :1], patches], 1)  # (P, 1 + M, D), CLS first

    def _connect(self, patches: torch.Tensor, told: Told) -> torch.Tensor:
        """Run the connector on slots, in whatever order: (P, N, D) -> (P, M, D)."""
        vision: Any = self.config.vision_config
        side = vision.image_size // vision.patch_size
        told = {**told, **self.pictures_of_tokens(patches)}
        return reduce_tokens(self.custom_connector, patches, (side, side), self.config.connector, told)

    def _clip_order(self, states: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Return the slots in an order in which the same tile of neighbouring images is a clip, (P,); None for no clips.

        ValueError where images that are to be taken together are not in one row, or not cut alike.
        """
        frames = frames_together(self.custom_connector)
        if frames == 1:
            return None
        slots = torch.arange(len(states)).view(rows, -1, self._tiles())  # (B, images, tiles)
        name = f"connector={self.config.connector!r} takes {frames} neighbouring images together, but"
        cure = f"Give each row a multiple of {frames} images of one size (repeat a still one)."
        if slots.shape[1] % frames:
            raise ValueError(f"{name} a row of the batch has {slots.shape[1]}. {cure}")
        if self._filled is not None and not torch.compiler.is_compiling():
            clips = self._filled.unflatten(1, (-1, frames))  # (B, clips, frames, tiles)
            for row, clip in (clips != clips[:, :, :1]).any(-1).any(-1).nonzero().tolist():
                tiles = clips[row, clip].sum(-1).tolist()
                raise ValueError(f"{name} those from {clip * frames} on in row {row} have {tiles} tiles. {cure}")
        return slots.transpose(1, 2).flatten()

    def _rows_of_slots(self, states: torch.Tensor) -> torch.Tensor:
        """Return the row of data of each tile slot, (P,): of the first text that sees it; an empty one is seen by none."""
        asked = self._what_is_asked()
        rows = asked.rows  # (B, T)
        if asked.inputs.get("cross_attention_mask") is None:
            return rows[:, 0].repeat_interleave(len(states) // len(rows))
        visible = visible_tiles(asked.inputs).flatten(2).to(rows.device)  # (B, T, images * tiles)
        return rows.gather(1, visible[:, : rows.shape[1]].int().argmax(1)).flatten()  # (P,)

    def _at_cross_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Give tokens that must not see an image back as they came, which is what attending to nothing leaves."""
        sees_image = kwargs.get("full_text_row_masked_out_mask")  # (B, 1, T, 1)
        if not self.config.mask_text_rows or sees_image is None:
            return None
        return torch.where(sees_image[:, 0].bool().to(output.device), output, args[0].to(output.device))  # (B, T, D)

    # ---- image tokens -----------------------------------------------------------------------------------------------

    def stock_tokens_per_crop(self) -> int:
        """Return the CLS token and the patches of a tile."""
        vision: Any = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def tokens_per_crop(self, num_tokens: int | None = None) -> int:
        """Return the tokens of a tile that cross-attention gets."""
        num_tokens = self.stock_tokens_per_crop() if num_tokens is None else num_tokens
        return 1 + super().tokens_per_crop(num_tokens - 1)

    def match_processor(self, processor: Any) -> Any:
        """Return the processor as it is: the text has one placeholder an image, whatever a connector makes of it."""
        return processor

    def image_token_rows(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the row of data of each image token, (P * N,): the row of the first text that sees its tile."""
        rows = losses.row_ids(batch)  # (B, T)
        if not has_images(batch):
            return rows.new_zeros(0)
        visible = visible_tiles(batch).flatten(2).to(rows.device)  # (B, T, images * tiles)
        of_tiles = rows.gather(1, visible.int().argmax(1))[visible.any(1)]  # (P,)
        return of_tiles.repeat_interleave(self.tokens_per_crop())

    # ---- generation and vocabulary ----------------------------------------------------------------------------------

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        cache = super()._prepare_static_cache(*args, **kwargs)
        for at in self.config.get_text_config().cross_attention_layers if self.custom_connector is not None else ():
            tiles = cache.layers[at].max_cache_len // self.stock_tokens_per_crop()
            cache.layers[at] = StaticLayer(max_cache_len=tiles * self.tokens_per_crop())
        return cache

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the head to a number of tokens, and the embedding to as many rows more as it always has.

        Stock makes both of one length, which no class can load, since each builds the embedding with the rows more.
        """
        text: Any = self.config.get_text_config()
        if pad_to_multiple_of is not None:
            new_num_tokens = -(-(new_num_tokens or text.vocab_size) // pad_to_multiple_of) * pad_to_multiple_of
        embeddings: nn.Embedding = super().resize_token_embeddings(new_num_tokens, None, mean_resizing)
        text.vocab_size = self.vocab_size = self.get_output_embeddings().out_features
        return embeddings

    def _get_resized_embeddings(
        self, old_embeddings: Any, new_num_tokens: int | None = None, *args: Any, **kw: Any
    ) -> Any:
        if new_num_tokens is not None:
            new_num_tokens += old_embeddings.num_embeddings - self.get_output_embeddings().out_features
        return super()._get_resized_embeddings(old_embeddings, new_num_tokens, *args, **kw)


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has images, or what the vision tower made of them."""
    return any(inputs.get(name) is not None for name in ("pixel_values", "cross_attention_states"))


def visible_tiles(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return which tile slots each text token may see, (B, T, images, tiles); without a mask all of them, (B, 1, ...)."""
    mask = inputs.get("cross_attention_mask")
    if mask is None:
        rows, images, tiles = inputs["pixel_values"].shape[:3]
        return torch.ones(rows, 1, images, tiles, dtype=torch.bool, device=inputs["pixel_values"].device)
    return mask.bool()


SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
BOS = SPECIAL_TOKENS[0]
CHAT_TEMPLATE = tiny.chat_template(
    "<|image|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", bos=BOS
)


def tiny_processor() -> CustomMllamaProcessor:
    """Return a processor for 28 px tiles, with a tokenizer trained on the spot whose last token is <|image|>."""
    named = {"image_token": "<|image|>"}
    tokenizer = tiny.train_tokenizer(
        SPECIAL_TOKENS, bos=BOS, eos="<|eot_id|>", pad="<|finetune_right_pad_id|>", named=named, adds_bos=True
    )
    return CustomMllamaProcessor(
        tiny.image_processor("MllamaImageProcessor")(size={"height": 28, "width": 28}, max_image_tiles=TILE_SLOTS),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomMllamaConfig:
    """Return a config of the real architecture small enough for a test: 2 + 1 + 3 layers, one of them cross-attention."""
    processor = tiny_processor()
    text = tiny.text_config(processor.tokenizer)
    return CustomMllamaConfig(
        vision_config={
            **tiny.VISION,
            "num_global_layers": 1,
            "image_size": 28,
            "patch_size": 7,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
        text_config={
            **text,
            "vocab_size": processor.image_token_id,  # the head has no row for <|image|>
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
        },
        image_token_index=processor.image_token_id,
    )


def wake(model: nn.Module) -> None:
    """Open the gates that start at zero, so that images, tiles and their positions have an effect in a random model."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate") and not parameter.any():
            nn.init.constant_(parameter, 0.5)


def published_processor() -> CustomMllamaProcessor:
    """Return a processor with the image settings of Llama 3.2 Vision Instruct and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("MllamaImageProcessor")(
        size={"height": 560, "width": 560}, max_image_tiles=4
    )
    return processor


def _mllama(sizes: published.Sizes, cross_attention_layers: list[int]) -> dict[str, Any]:
    vision = {"image_size": 560, "vision_output_dim": 7680}
    text = {**published.decoder("mllama_text_model", sizes, 128256), "cross_attention_layers": cross_attention_layers}
    return {"vision_config": vision, "text_config": text}


CHECKPOINTS = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": _mllama((4096, 14336, 40, 32, 8), [3, 8, 13, 18, 23, 28, 33, 38]),
    "meta-llama/Llama-3.2-90B-Vision-Instruct": _mllama((8192, 28672, 100, 64, 8), list(range(3, 100, 5))),
}


register(CustomMllamaForConditionalGeneration)
