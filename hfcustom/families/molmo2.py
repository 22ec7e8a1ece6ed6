"""Molmo 2 (allenai/Molmo2-4B, Molmo2-8B). The Molmo of 2024 (allenai/Molmo-7B-D-0924) is another, remote code.

ViT, two layers' features side by side -> attention of each 2 x 2 patches + MLP -> Qwen3- or OLMo-like decoder, where the
features are added to the placeholders' embeddings and all image tokens attend to each other. 196 tokens for the whole image
at 378 px, then as many rows as its up to 8 overlapping crops have together, all <im_patch>, each row followed by <im_col>.
Paper: https://arxiv.org/abs/2601.10611; stock code: transformers/models/molmo2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Processor

from hfcustom import patches
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import Grid, Told, count_tokens_out, grid_out, of_each, takes_pictures
from hfcustom.families import tiny
from hfcustom.processors import MatchedProcessor, NeedsTorchvision, RaggedVideos, check_one_kind
from hfcustom.ragged import RaggedImages
from hfcustom.registry import register
from hfcustom.videos import VideoFrames

REQUIRES = ("torchvision",)


class CustomMolmo2Config(CustomConfig, Molmo2Config):
    """Molmo2Config with `connector` and `loss`."""

    model_type = "custom_molmo2"


class CustomMolmo2Processor(RaggedVideos, NeedsTorchvision, MatchedProcessor, Molmo2Processor):
    """Molmo2Processor that follows the model's connector, and whose offsets are those in the text it was given."""

    def reduced_inputs(
        self, image_inputs: Mapping[str, Any], image_idx: int, module: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the rows and columns that the connector makes of the whole image and of its crops."""
        sides = [int(side) for side in image_inputs["image_grids"][image_idx]]
        grids = (grid_out(module, rows * columns, (rows, columns)) for rows, columns in (sides[:2], sides[2:]))
        return {"image_grids": [[side for grid in grids for side in grid]]}

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return what stock writes for a video whose frames have the rows and columns that the connector makes."""
        module = self.connector_module()
        if module is not None:
            frames, rows, columns = (int(size) for size in video_inputs["video_grids"][video_idx])
            left = torch.tensor([frames, *grid_out(module, rows * columns, (rows, columns))])
            video_inputs = {**video_inputs, "video_grids": {video_idx: left}}  # stock looks at this one only
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return text

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Process as stock does; stock writes a beginning before the text, which labels must not be shifted by."""
        check_one_kind("Molmo 2", images, videos)
        outputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        beginning = self.tokenizer.bos_token or self.tokenizer.eos_token
        texts = [text] if isinstance(text, str) else text or []
        added = [0 if row.startswith(beginning) else len(beginning) for row in texts]
        if "offset_mapping" in outputs:
            rows = zip(outputs["offset_mapping"], added, strict=True)
            outputs["offset_mapping"] = [[[max(int(at) - n, 0) for at in pair] for pair in row] for row, n in rows]
        for replacements, n in zip(outputs.get("text_replacement_offsets", ()), added, strict=False):
            for replacement in replacements:
                for span in ("span", "new_span"):
                    replacement[span] = tuple(at - n for at in replacement[span])
        return outputs


POOLED = {"pixel_values": "image_token_pooling", "pixel_values_videos": "video_token_pooling"}


class CustomMolmo2ForConditionalGeneration(VideoFrames, RaggedImages, CustomVLM, Molmo2ForConditionalGeneration):
    """Molmo 2 with five seams; vision features are a crop's patches in both layers, before the pooling attention."""

    config_class = CustomMolmo2Config
    processor_class = CustomMolmo2Processor
    no_resizing = "has positions for crops of one size and gets them as patches, which resize_images does not change"

    @property
    def video_token_id(self) -> int:
        """The id of <im_patch>: frames are written as images are, which no call has beside them."""
        return int(self.config.image_token_id)

    @classmethod
    def merge_images(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join the image tensors of rows; where patches are pooled is counted over all that came before."""
        check_one_kind("Molmo 2", *(any(name in row for row in rows) for name in POOLED))
        first = dict.fromkeys(POOLED, 0)  # patches before a row's
        moved = [dict(row) for row in rows]
        for row in moved:
            for pixels in POOLED.keys() & row.keys():
                places = row[POOLED[pixels]]  # (tokens, patches a token), -1 for none
                row[POOLED[pixels]] = torch.where(places < 0, places, places + first[pixels])
                first[pixels] += row[pixels].shape[:2].numel()
        return super().merge_images(moved)

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the projector, which gets all crops in one tensor."""
        vision, projector = (self.stock_parts().paths[part][0] for part in ("vision", "connector"))
        looks: list[tuple[str, str, str, dict[str, bool]]] = [
            (vision, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        return [
            *super().seam_hooks(),
            *(looks if takes_pictures(self.custom_connector) else []),
            (projector, "register_forward_pre_hook", "_at_connector_input", {}),
        ]

    def vision_width(self) -> int:
        """Return the width of the layers' features side by side."""
        config: Any = self.config
        return int(config.vision_config.hidden_size * len(config.adapter_config.vision_feature_layer))

    def _at_vision_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        vision: Any = self.config.vision_config
        rows, columns = (side // vision.patch_size for side in vision.image_size)
        self._pictures = patches.from_pixels(args[0], (rows, columns), vision.patch_size)  # (P, 3, H, W)

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return two entries an image: the picture of the whole, and those of its crops, (K, 3, H, W); or a video's frames."""
        assert self._pictures is not None, "the tower has run"
        pictures, self._pictures = self._pictures, None
        if self.video_inputs is not None:
            return list(pictures.split(self.video_inputs["video_grids"][:, 0].tolist()))
        tokens = inputs["image_grids"].view(-1, 2, 2).prod(-1).sum(-1).tolist()
        places = inputs["image_token_pooling"].split(tokens)  # (tokens, patches a token) each
        ends = [
            int(image.max()) // inputs["pixel_values"].shape[-2] + 1 for image in places
        ]  # crops up to an image's last
        crops = pictures.split([end - start for start, end in zip([0, *ends], ends, strict=False)])
        return [part for image in crops for part in (image[:1], image[1:])]

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return two grids an image: of the whole, and of its crops together."""
        return [(rows, columns) for rows, columns in inputs["image_grids"].view(-1, 2).tolist()]

    def tokens_left(self, features: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[int]:
        """Return how many tokens the connector leaves of each image, the whole and its crops, or of each video."""
        if self.video_inputs is not None:
            return super().tokens_left(features, grids)
        counts = [count_tokens_out(self.custom_connector, rows * columns, (rows, columns)) for rows, columns in grids]
        return [whole + crops for whole, crops in zip(counts[::2], counts[1::2], strict=True)]

    def _connect(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the connector on one video after the other, frame by frame; stock makes a single tall image of each."""
        if self.video_inputs is None:
            return super()._connect(features)
        grids = [(rows, columns) for _, rows, columns in self.video_inputs["video_grids"].tolist()]
        told, reduce_frames = self.question_of(self.tokens_left(features, grids)), super()._reduce
        pictures = self.pictures_of_images(self.video_inputs) if self.looks_behind_projector else None
        parts = enumerate(zip(features, grids, strict=True))
        return [
            reduce_frames([video], [grid], of_each(told, [at]), pictures and [pictures[at]])[0]
            for at, (video, grid) in parts
        ]

    def _reduce(
        self,
        features: Sequence[torch.Tensor],
        grids: Sequence[Grid],
        told: Told | None = None,
        pictures: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Run the connector on the wholes, then on the crops: neighbours that it takes together are of one kind."""
        sizes = [rows * columns for rows, columns in grids[::2]]  # tokens of the whole
        wholes = [image[:size] for image, size in zip(features, sizes, strict=True)]
        crops = [image[size:] for image, size in zip(features, sizes, strict=True)]
        first, others = (pictures and pictures[at::2] for at in (0, 1))
        views = super()._reduce(wholes, grids[::2], told, first), super()._reduce(crops, grids[1::2], told, others)
        return [torch.cat(image) for image in zip(*views, strict=True)]


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKENS = (  # beyond the head's vocabulary: they are read, never said
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
)
CHAT_TEMPLATE = tiny.chat_template("<|image|>", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomMolmo2Processor:
    """Return a processor for crops of 4 x 4 patches of 7 px, up to 4 of them, with a tokenizer trained on the spot."""
    size = {"size": {"height": 28, "width": 28}, "patch_size": 7}
    crops = {"max_crops": 4, "overlap_margins": [1, 1], "pooling_size": [2, 2]}
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    image_processor = tiny.image_processor("Molmo2ImageProcessor")(**size, **crops)
    tokenizer = tiny.train_tokenizer(
        SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", late=IMAGE_TOKENS, named=named
    )
    return CustomMolmo2Processor(
        image_processor,
        tiny.video_processor("Molmo2VideoProcessor", **size),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomMolmo2Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers.

    The adapter starts large: with stock's 0.02 it would add a billionth to an embedding.
    """
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    text = {**tiny.text_config(tokenizer), "head_dim": 16}
    names = {
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    return CustomMolmo2Config(
        vision_config={**tiny.VISION, **heads, "image_size": [28, 28], "patch_size": 7},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": tiny.TEXT["hidden_size"],
            "vision_feature_layer": [1, 0],
            "initializer_range": 0.3,
        },
        text_config={
            **text,
            "vocab_size": len(tokenizer) - len(IMAGE_TOKENS),
            "additional_vocab_size": len(IMAGE_TOKENS),
        },
        **{field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()},
    )


def published_processor() -> CustomMolmo2Processor:
    """Return a processor with the image settings of Molmo2 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("Molmo2ImageProcessor")()
    return processor


def _molmo2(hidden: int, intermediate: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 36}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return {
        "adapter_config": {"intermediate_size": intermediate, "text_hidden_size": hidden},
        "text_config": {**sizes, **heads, "vocab_size": 151936},
    }


CHECKPOINTS = {"allenai/Molmo2-4B": _molmo2(2560, 9728), "allenai/Molmo2-8B": _molmo2(4096, 12288)}


register(CustomMolmo2ForConditionalGeneration)
