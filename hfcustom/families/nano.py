"""NanoVLM, the model written out in hfcustom/nano; it loads nanoVLM's checkpoints (lusxvr/nanoVLM-222M, nanoVLM-460M-8k).

SigLIP -> pixel shuffle x4 (222M: x2) + one bias-free Linear -> SmolLM2 (Llama). 64 tokens a 512 px square (222M: 49 a 224 px
square) whose pixels are 0 to 1; nanoVLM cuts larger pictures into such squares. The stock parent is our own plain class.
SigLIP: https://arxiv.org/abs/2502.14786, SmolLM2: https://arxiv.org/abs/2502.02737; nanoVLM: github.com/huggingface/nanoVLM.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.model import NanoVLMForConditionalGeneration
from hfcustom.nano_checkpoints import from_nanovlm, is_nanovlm
from hfcustom.registry import register


class CustomNanoVLMConfig(CustomConfig, NanoVLMConfig):
    """NanoVLMConfig with `connector` and `loss`."""

    model_type = "custom_nano"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json, also nanoVLM's own."""
        values, others = super(CustomConfig, cls).get_config_dict(*args, **kwargs)
        if not is_nanovlm(values):
            return super().get_config_dict(*args, **kwargs)
        return {**from_nanovlm(values, others.get("image_token_id")), "model_type": cls.model_type}, others


class CustomNanoVLMProcessor(ProcessorMixin):
    """Pictures as one square each, and a tokenizer that names its image_token; the chat template writes what stands around it."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, image_seq_len: int = 64, chat_template: str | None = None
    ) -> None:
        self.image_token: str = tokenizer.image_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_seq_len = image_seq_len
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one picture."""
        return self.image_token * self.image_seq_len


class CustomNanoVLMForConditionalGeneration(CustomVLM, NanoVLMForConditionalGeneration):
    """NanoVLM with five seams; vision features are the tower's patches, before the pixel shuffle."""

    config_class = CustomNanoVLMConfig
    processor_class = CustomNanoVLMProcessor
    placeholder_field = "image_seq_len"

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of a picture after the pixel shuffle."""
        config: Any = self.config
        return (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2


NAMED_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
CHAT_TEMPLATE = tiny.chat_template("<|global_image|><|image|>", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomNanoVLMProcessor:
    """Return a processor for 32 px squares of 4 tokens, with a tokenizer trained on the spot."""
    return CustomNanoVLMProcessor(
        tiny.image_processor("SiglipImageProcessor")(size={"height": 32, "width": 32}, do_normalize=False),
        tiny.train_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED_TOKENS),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomNanoVLMConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    return CustomNanoVLMConfig(
        vision_config={**tiny.VISION, "image_size": 32, "patch_size": 8},
        text_config=tiny.text_config(processor.tokenizer),
        scale_factor=2,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )


def published_processor() -> CustomNanoVLMProcessor:
    """Return a processor with the image settings of nanoVLM-222M and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("SiglipImageProcessor")(
        size={"height": 224, "width": 224}, do_normalize=False
    )
    processor.image_seq_len = 49
    return processor


CHECKPOINTS = {
    "lusxvr/nanoVLM-222M": {
        "vision_config": published.vision(768, 3072, 12, 12, 224, 16),
        "text_config": published.decoder("llama", (576, 1536, 30, 9, 3), 49152),
        "scale_factor": 2,
    },
    "lusxvr/nanoVLM-460M-8k": {
        "vision_config": published.vision(768, 3072, 12, 12, 512, 16),
        "text_config": published.decoder("llama", (960, 2560, 32, 15, 5), 49218),
        "scale_factor": 4,
    },
}


AutoConfig.register(NanoVLMConfig.model_type, NanoVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(NanoVLMConfig, NanoVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(NanoVLMConfig, CustomNanoVLMProcessor, exist_ok=True)
register(CustomNanoVLMForConditionalGeneration)
