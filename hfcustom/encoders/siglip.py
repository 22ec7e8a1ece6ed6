"""SigLIP (google/siglip-base-patch16-224, google/siglip-so400m-patch14-384, ...): CLIP with a loss of each pair by itself.

ViT -> attention of one learned query; Transformer without a causal mask, its last token -> Linear; a learned scale and bias.
Texts must be padded to 64 tokens (padding="max_length"), as in the training of the checkpoints: the last token is read,
padding or not. Loss: sigmoid of each pair. Paper: https://arxiv.org/abs/2303.15343; stock code: transformers/models/siglip.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip.modeling_siglip import SiglipOutput

from hfcustom.dual_encoder import CustomDualEncoder, CustomEncoderConfig
from hfcustom.families import published, tiny
from hfcustom.registry import register


class CustomSiglipConfig(CustomEncoderConfig, SiglipConfig):
    """SiglipConfig with `loss` and `max_logit_scale`."""

    model_type = "custom_siglip"


class CustomSiglipProcessor(SiglipProcessor):
    """SiglipProcessor under the custom model's name."""


class CustomSiglipModel(CustomDualEncoder, SiglipModel):
    """SigLIP with seams; vision features are the tower's patches, of which a learned query makes the image embedding."""

    config_class = CustomSiglipConfig
    processor_class = CustomSiglipProcessor
    output_class = SiglipOutput
    image_head = "vision_model.head"
    text_head = "text_model.head"
    text_padding = "max_length"
    default_loss = "sigmoid_contrastive"


def tiny_processor() -> CustomSiglipProcessor:
    """Return a processor for images of 28 px, with a tokenizer trained on the spot that ends a text as SigLIP's does."""
    tokenizer = tiny.train_tokenizer(("<pad>", "</s>"), eos="</s>", pad="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.model_max_length = 64
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]  # padding is read too
    image_processor = tiny.image_processor("SiglipImageProcessor")(size={"height": 28, "width": 28})
    return CustomSiglipProcessor(image_processor, tokenizer)


def tiny_config() -> CustomSiglipConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers, embeddings of 32."""
    text: dict[str, Any] = {**tiny.text_config(tiny_processor().tokenizer), "max_position_embeddings": 64}
    text.pop("num_key_value_heads")
    return CustomSiglipConfig(
        text_config={**text, "projection_size": 32},
        vision_config={**tiny.VISION, "image_size": 28, "patch_size": 7},
    )


def published_processor() -> CustomSiglipProcessor:
    """Return a processor with the image settings of SigLIP base/16 of 224 px and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("SiglipImageProcessor")(
        size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return processor


def _siglip(vision: dict[str, Any], width: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    text: dict[str, Any] = {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers}
    text |= {"bos_token_id": None, "eos_token_id": 1}  # transformers' defaults, CLIP's, are beyond this vocabulary
    return {"vision_config": vision, "text_config": {**text, "num_attention_heads": heads, "projection_size": width}}


CHECKPOINTS = {
    "google/siglip-base-patch16-224": _siglip(published.vision(768, 3072, 12, 12, 224, 16), 768, 3072, 12, 12),
    "google/siglip-so400m-patch14-384": _siglip(published.so400m(384), 1152, 4304, 27, 16),
}


register(CustomSiglipModel)
