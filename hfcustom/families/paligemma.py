"""PaliGemma (google/paligemma-3b-pt-224, -448, -896, the mixes) and PaliGemma 2 (google/paligemma2-3b-pt-224, 10b, 28b).

SigLIP -> one Linear -> Gemma or Gemma 2 as a prefix-LM: image and prompt see each other both ways, the answer is causal.
256, 1024 or 4096 tokens an image. Papers: https://arxiv.org/abs/2407.07726 and https://arxiv.org/abs/2412.03555;
stock code: transformers/models/paligemma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, ProcessorMixin
from transformers.utils import logging

from hfcustom import losses
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.families import published, tiny
from hfcustom.processors import PrefixProcessor
from hfcustom.registry import register

logger = logging.get_logger("hfcustom")
Record = dict[str, Any]

# The checkpoints have no template. This one writes what stock makes of a prompt and a suffix: the images of the first
# message, <bos>, the prompt, a line break, the answer, <eos>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set opens = loop.first %}"
    "{% if opens %}{% if message['content'] is not string %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}<bos>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif not opens %}<image>{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{% endif %}"
)


class CustomPaliGemmaConfig(CustomConfig, PaliGemmaConfig):
    """PaliGemmaConfig with `connector` and `loss`.

    `causal_without_types` lets a batch without token_type_ids attend causally (processor and collator always make them).
    Stock does so too when it is padded or attention is eager, but with sdpa every token of an unpadded row sees the whole
    row there, the answer included.
    """

    model_type = "custom_paligemma"
    causal_without_types: bool = False


class CustomPaliGemmaProcessor(PrefixProcessor, PaliGemmaProcessor):
    """PaliGemmaProcessor that takes rows without images and text that a chat template wrote.

    Stock writes <bos> behind a row's last image and a line break at its end; here that is reported with the expanded
    placeholders, and a row in which <bos> stands already is left as it is.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, suffix: Any = None, **kwargs: Any) -> Any:
        """Process as stock does, but make labels with a suffix only: without one stock's are all -100."""
        if suffix is None:
            kwargs["return_token_type_ids"] = True
            return ProcessorMixin.__call__(self, images=images, text=text, **kwargs)
        return super().__call__(images=images, text=text, suffix=suffix, **kwargs)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Leave rows as they are until placeholders are expanded; stock guesses where there are none for the images."""
        rows = [text] if isinstance(text, str) else text or []
        if images is not None and not any(self.image_token in row for row in rows):
            return super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return ProcessorMixin.prepare_inputs_layout(self, images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Check inputs as every processor does; stock refuses a batch without images."""
        ProcessorMixin.validate_inputs(self, images=images, text=text, **kwargs)

    def get_text_with_replacements(self, text: list[str], *args: Any, **kwargs: Any) -> Any:
        """Expand placeholders, begin and end rows as stock does: texts, and what was replaced in each."""
        begun = [self.tokenizer.bos_token in row for row in text]
        lengths = [len(row) for row in text]
        result: Any = super().get_text_with_replacements(text, *args, **kwargs)
        texts, records = result
        for at, length in enumerate(lengths):
            if not begun[at]:
                texts[at], records[at] = self._begin(texts[at], records[at], length)
        return texts, records

    def _begin(self, row: str, records: list[Record], length: int) -> tuple[str, list[Record]]:
        """Write <bos> behind the last image, or first, and a line break at the end of a row that had `length` letters."""
        *others, last = records or [_record((0, 0), 0, "")]
        at, bos = last["new_span"][1], self.tokenizer.bos_token
        row = f"{row[:at]}{bos}{row[at:]}\n"
        begin = _record(last["span"], last["new_span"][0], last["replacement"] + bos)
        return row, [*others, begin, _record((length, length), len(row) - 1, "\n")]


def _record(span: tuple[int, int], start: int, replacement: str) -> Record:
    """Return what ProcessorMixin.get_text_with_replacements keeps of a replacement."""
    return {"type": "image", "span": span, "new_span": (start, start + len(replacement)), "replacement": replacement}


class CustomPaliGemmaForConditionalGeneration(CustomVLM, PaliGemmaForConditionalGeneration):
    """PaliGemma with five seams; vision features are the tower's patches, before the projector."""

    config_class = CustomPaliGemmaConfig
    processor_class = CustomPaliGemmaProcessor
    placeholder_field = "image_seq_length"

    def stock_tokens_per_crop(self) -> int:
        """Return the patches of an image."""
        vision: Any = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def match_processor(self, processor: Any) -> Any:
        """Set the number of placeholders where it is saved too, on the image processor."""
        super().match_processor(processor).image_processor.image_seq_length = self.tokens_per_crop()
        return processor

    def stock_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the stock forward takes; with `config.causal_without_types`, token_type_ids where there are none."""
        call = super().stock_inputs(inputs)
        config: Any = self.config
        untyped = call.get("token_type_ids") is None
        if untyped and config.causal_without_types:
            shown = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]  # (B, T, ...)
            call["token_type_ids"] = torch.ones(shown.shape[:2], dtype=torch.long, device=shown.device)
        elif untyped and self.training:
            logger.warning_once(
                "PaliGemma is trained without token_type_ids: with sdpa, every token of an unpadded row sees the answer. "
                "Take batches from hfcustom's Collator, or set config.causal_without_types=True."
            )
        if losses.is_packed(call):  # as stock counts where it is given no positions
            positions = call["position_ids"]
            call["position_ids"] = positions + (positions[:, :1] == 0)  # (B, T)
        return call

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the head, and Gemma 2's cap where the config has one: (..., D) -> (..., V)."""
        logits = super().compute_logits(hidden_states)
        cap = self._logit_cap()
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def loss_head(self) -> losses.Head:
        """Return the head as losses use it; without a cap it is the plain Linear."""
        own = CustomPaliGemmaForConditionalGeneration.compute_logits
        if self._logit_cap() is None and type(self).compute_logits is own:
            return losses.Head.of(self.get_output_embeddings())
        return super().loss_head()

    def _logit_cap(self) -> float | None:
        return getattr(self.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's config has none


SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")


def tiny_processor() -> CustomPaliGemmaProcessor:
    """Return a processor for 28 px images of 16 tokens, with a tokenizer trained on the spot."""
    image_processor = tiny.image_processor("SiglipImageProcessor")(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 16
    tokenizer = tiny.train_tokenizer(
        SPECIAL_TOKENS, bos="<bos>", eos="<eos>", pad="<pad>", named={"image_token": "<image>"}
    )
    return CustomPaliGemmaProcessor(image_processor, tokenizer)  # adds 1024 <loc> and 128 <seg> tokens


def tiny_config() -> CustomPaliGemmaConfig:
    """Return a config of the real architecture small enough for a test: 2 + 2 layers."""
    processor = tiny_processor()
    hidden = tiny.TEXT["hidden_size"]
    return CustomPaliGemmaConfig(
        vision_config={
            **tiny.VISION,
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
        },
        text_config={**tiny.text_config(processor.tokenizer), "model_type": "gemma", "head_dim": 16},
        image_token_index=processor.image_token_id,
        vocab_size=len(processor.tokenizer),
        projection_dim=hidden,
        hidden_size=hidden,
    )


def published_processor() -> CustomPaliGemmaProcessor:
    """Return a processor with the image settings of PaliGemma at 224 px and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("SiglipImageProcessor")(size={"height": 224, "width": 224})
    processor.image_processor.image_seq_length = processor.image_seq_length = 256
    return processor


def _paligemma(image_size: int) -> dict[str, Any]:
    return {
        "vision_config": published.so400m(image_size, model_type="siglip_vision_model", vision_use_head=False),
        "text_config": {**published.decoder("gemma", (2048, 16384, 18, 8, 1), 257216), "head_dim": 256},
        "projection_dim": 2048,
    }


CHECKPOINTS = {f"google/paligemma-3b-pt-{size}": _paligemma(size) for size in (224, 448, 896)}


register(CustomPaliGemmaForConditionalGeneration)
