"""Mistral Small 3.1 (mistralai/Mistral-Small-3.1-24B-Instruct-2503) and other checkpoints of model_type mistral3.

Pixtral ViT of any image size -> RMSNorm, 2 x 2 merge and two-layer MLP -> Mistral. One token for 28 x 28 px, rows of tokens
end with [IMG_BREAK], the last one with [IMG_END]. Paper of the tower: https://arxiv.org/abs/2410.07073; stock code:
transformers/models/mistral3.
"""

from __future__ import annotations

from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration, PixtralProcessor

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import SizedProcessor
from hfcustom.ragged import SizedImages
from hfcustom.registry import register

REQUIRES = ("torchvision",)


class CustomMistral3Config(CustomConfig, Mistral3Config):
    """Mistral3Config with `connector` and `loss`."""

    model_type = "custom_mistral3"


class CustomMistral3Processor(SizedProcessor, PixtralProcessor):
    """PixtralProcessor that follows the model's connector, rows included."""


class CustomMistral3ForConditionalGeneration(SizedImages, CustomVLM, Mistral3ForConditionalGeneration):
    """Mistral 3 with five seams; vision features are one image's patches, before norm and merge."""

    config_class = CustomMistral3Config
    processor_class = CustomMistral3Processor

    @property
    def merged_patches(self) -> int:
        """The patches a side that become one token."""
        return int(self.config.spatial_merge_size)


SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT_TEMPLATE = tiny.chat_template("[IMG]", "[INST]{role}[/INST]", "</s>\n", bos="<s>")


def tiny_processor() -> CustomMistral3Processor:
    """Return a processor for tokens of 2 x 2 patches of 7 px, images of at most 56 px, with a tokenizer trained on the spot."""
    return CustomMistral3Processor(
        tiny.image_processor("PixtralImageProcessor")(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "[IMG]"}),
        patch_size=7,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomMistral3Config:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomMistral3Config(
        vision_config={**tiny.VISION, "model_type": "pixtral", "image_size": 56, "patch_size": 7},
        text_config=AutoConfig.for_model("mistral", **tiny.text_config(processor.tokenizer)),
        image_token_index=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomMistral3Processor:
    """Return a processor with the image settings of Mistral Small 3.1 and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("PixtralImageProcessor")(
        size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14}
    )
    processor.patch_size = 14
    return processor


CHECKPOINTS = {
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "vision_config": published.vision(1024, 4096, 24, 16, 1540, 14, model_type="pixtral"),
        "text_config": {**published.decoder("mistral", (5120, 32768, 40, 32, 8), 131072), "head_dim": 128},
        "tie_word_embeddings": False,
    },
}


register(CustomMistral3ForConditionalGeneration)
