"""Idefics2 (HuggingFaceM4/idefics2-8b, its base and chatty versions).

SigLIP at the image's own aspect ratio -> gated MLP + perceiver resampler of 64 learned queries -> Mistral. 64 tokens an
image, 5 x 64 when images are split. Paper: https://arxiv.org/abs/2405.02246; stock code: transformers/models/idefics2.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import Grid, Told, look_at
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomIdefics2Config(CustomConfig, Idefics2Config):
    """Idefics2Config with `connector` and `loss`."""

    model_type = "custom_idefics2"


class CustomIdefics2Processor(Idefics2Processor):
    """Idefics2Processor that reports where it expanded placeholders, without which labels land on other words."""

    def __call__(
        self, images: Any = None, text: Any = None, return_text_replacement_offsets: bool = False, **kwargs: Any
    ) -> Any:
        """Process as stock does; ValueError where images would be split and their placeholders not, or the reverse."""
        splits = self.image_processor.do_image_splitting
        asked = {**kwargs.get("images_kwargs", {}), **kwargs}.get("do_image_splitting", splits)
        if bool(asked) != bool(splits):
            raise ValueError(
                f"do_image_splitting={asked} in the call changes the images only, the text follows the image processor's own "
                f"({splits}); set processor.image_processor.do_image_splitting instead."
            )
        features = super().__call__(images=images, text=text, **kwargs)
        if return_text_replacement_offsets and text is not None:
            texts = [text] if isinstance(text, str) else text
            features["text_replacement_offsets"] = [self.expand(sample)[1] for sample in texts]
        return features

    def expand(self, sample: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the text that stock makes of a sample, and records of what it replaced.

        A run of images is a replacement, and so is the letter behind it, which gets a blank before it. Stock goes over the
        whole text in three rounds (processing_idefics2.py, 5.23.0); none reaches across the borders of a run.
        """
        fake, image = self.fake_image_token, self.image_token
        group = f"{fake}{image * self.image_seq_len}{fake}"
        group *= 5 if self.image_processor.do_image_splitting else 1
        expanded, done, records = "", 0, []
        for run in re.finditer(f"((?:{re.escape(fake)}|{re.escape(image)})+)([^\\s<]?)", sample):
            expanded += sample[done : run.start()]
            images = run[1].replace(image, group).replace(fake + fake, fake)
            letter = f" {run[2]}" if run[2] and images.endswith(fake) else run[2]
            for kind, part, text in (("image", 1, images), ("text", 2, letter)):
                new_span = (len(expanded), len(expanded) + len(text))
                records.append({"type": kind, "span": run.span(part), "new_span": new_span, "replacement": text})
                expanded += text
            done = run.end()
        return expanded + sample[done:], records


class CustomIdefics2ForConditionalGeneration(CustomVLM, Idefics2ForConditionalGeneration):
    """Idefics2 with five seams; vision features are the tower's patches, those of padding included."""

    config_class = CustomIdefics2Config
    processor_class = CustomIdefics2Processor
    crop_dims = {"pixel_values": 1, "pixel_attention_mask": 1}  # tiles of a row
    placeholder_field = "image_seq_len"
    no_tower_cache = "images are padded to the size of the largest of a batch before the tower sees them"
    _patches: torch.Tensor | None = None  # (P, rows, columns), True where the tower is given a patch of the image

    def stock_tokens_per_crop(self) -> int:
        """Return the resampler's queries."""
        config: Any = self.config
        return int(config.perceiver_config.resampler_n_latents)

    def _at_vision_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._at_vision_input(module, args, kwargs)
        self._patches = kwargs["patch_attention_mask"]

    def _unpadded(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], list[Grid]]:
        """Return each picture without its padding, (1, 3, H, W), and its rows and columns of patches."""
        assert self._patches is not None, "pictures come with it"
        vision: Any = self.config.vision_config
        side = vision.patch_size
        sides = zip(self._patches.any(2).sum(1).tolist(), self._patches.any(1).sum(1).tolist(), strict=True)
        grids = [(rows, columns) for rows, columns in sides]
        kept = zip(pictures, grids, strict=True)
        return [picture[None, :, : rows * side, : columns * side] for picture, (rows, columns) in kept], grids

    def _look_again(self, features: torch.Tensor) -> torch.Tensor:
        """Let a connector see each image's own patches, and leave those of padding as they are."""
        pictures, grids = self._unpadded(self._pictures_of(features))
        assert self._patches is not None, "pictures come with it"
        own = self._patches.flatten(1).to(features.device)  # (P, patches)
        images = features[own].split([rows * columns for rows, columns in grids])  # (rows * columns, D_vision) each
        looked = look_at(
            self.custom_connector, [image[None] for image in images], pictures, grids, self.config.connector
        )
        return features.masked_scatter(own[..., None], torch.cat(looked, 1))  # (P, patches, D_vision)

    def _reduced(self, features: torch.Tensor, told: Told) -> torch.Tensor:
        """Show a connector of pictures each without its padding; one that asks for the question too sees them padded."""
        if told or not self.looks_behind_projector:
            return super()._reduced(features, told)
        pictures, grids = self._unpadded(self._pictures_of(features))
        images = list(features.split(1))  # (1, N, D), the queries of a resampler, which lie in no grid
        return torch.cat(
            look_at(self.custom_connector, images, pictures, [None] * len(grids), self.config.connector)
        )  # (P, M, D)


def tiny_processor() -> CustomIdefics2Processor:
    """Return a processor for images of up to 56 px and 4 tokens, with a tokenizer trained on the spot."""
    specials = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    return CustomIdefics2Processor(
        tiny.image_processor("Idefics2ImageProcessor")(size={"longest_edge": 56, "shortest_edge": 28}),
        tiny.train_tokenizer(specials, bos="<s>", eos="<end_of_utterance>", pad="<unk>"),
        image_seq_len=4,
        chat_template=tiny.chat_template("<image>", "{role}:", "<end_of_utterance>\n"),
    )


def tiny_config() -> CustomIdefics2Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, a window of 16 tokens."""
    processor = tiny_processor()
    text = {**tiny.text_config(processor.tokenizer), "sliding_window": 16}
    perceiver = {
        "hidden_size": tiny.TEXT["hidden_size"],
        "resampler_n_latents": 4,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "initializer_range": 0.2,
        "num_key_value_heads": 2,
    }
    return CustomIdefics2Config(
        vision_config={**tiny.VISION, "image_size": 56, "patch_size": 7},
        perceiver_config=perceiver,
        text_config=AutoConfig.for_model("mistral", **text),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomIdefics2Processor:
    """Return a processor with the image settings of Idefics2-8B and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Idefics2ImageProcessor")(
        size={"longest_edge": 980, "shortest_edge": 378}, do_image_splitting=True
    )
    processor.image_seq_len = 64
    return processor


CHECKPOINTS = {
    "HuggingFaceM4/idefics2-8b": {
        "vision_config": published.so400m(980),
        "text_config": published.decoder("mistral", (4096, 14336, 32, 32, 8), 32003),
        "perceiver_config": {
            "hidden_size": 4096,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        "tie_word_embeddings": False,
    },
}


register(CustomIdefics2ForConditionalGeneration)
