"""Rows of an image and its text -> batch for a contrastive encoder, by its own processor.

[Example, ...] -> {"input_ids": (n, T), "pixel_values": (n, 3, H, W), "attention_mask": (n, T) where the encoder has one}.
Letters: n pairs, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers.utils import logging

from hfcustom.data.checks import MIN_PIXELS, check_pixels
from hfcustom.data.collate import Batch, count_by_source
from hfcustom.data.messages import Example, RowError, read_row

logger = logging.get_logger("hfcustom")


class CaptionCollator:
    """Turn rows (mappings, or Examples) of one image and one text each into a batch of pairs.

    A row is {"image": ..., "text": ...}, or messages with one image and one text. A text of more than `max_length` tokens
    is a RowError; without that, one of more than the encoder reads (`text_length`) is cut, as it was when the published
    checkpoints were trained, and the first such text is named in a warning. An image of fewer than `min_pixels` is a RowError
    too. Raises ValueError for a `max_length` that the encoder cannot read.
    """

    def __init__(
        self,
        processor: Any,
        text_length: int,
        max_length: int | None = None,
        *,
        padding: Literal["longest", "max_length"] = "longest",
        min_pixels: int = MIN_PIXELS,
    ) -> None:
        if max_length is not None and max_length > text_length:
            raise ValueError(
                f"max_length={max_length}, but the text tower reads {text_length} tokens; give at most that many, or leave it "
                "out to have longer texts cut."
            )
        self.processor = processor
        self.text_length = text_length
        self.max_length = max_length
        self.padding = padding
        self.min_pixels = min_pixels

    def __call__(self, rows: Sequence[Mapping[str, Any] | Example]) -> Batch:
        examples = [row if isinstance(row, Example) else read_row(row, f"row {at}") for at, row in enumerate(rows)]
        texts = [check_caption(example, self.min_pixels) for example in examples]
        self._check_lengths(texts, examples)
        features = self.processor(
            text=texts,
            images=[example.images[0] for example in examples],
            padding=self.padding,
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        )
        batch = Batch(features)
        batch.images, batch.rows = len(examples), [example.name for example in examples]
        mask = features.get("attention_mask", torch.ones_like(features["input_ids"]))  # (n, T)
        batch.source_tokens = count_by_source(examples, mask)
        return batch

    def _check_lengths(self, texts: Sequence[str], examples: Sequence[Example]) -> None:
        tokens = self.processor.tokenizer(list(texts), verbose=False)["input_ids"]  # special tokens included
        for ids, example in zip(tokens, examples, strict=True):
            if self.max_length is not None and len(ids) > self.max_length:
                raise RowError(
                    f"{example.name}: its text has {len(ids)} tokens, more than max_length={self.max_length}. Shorten it, or "
                    f"leave max_length out to have texts cut after the {self.text_length} tokens that the text tower reads.",
                    "too_long",
                )
            if len(ids) > self.text_length:
                logger.warning_once(
                    f"Texts of more than the {self.text_length} tokens that the text tower reads are cut; the first is that of "
                    f"{example.name}, {len(ids)} tokens."
                )


def check_caption(example: Example, min_pixels: int = MIN_PIXELS) -> str:
    """Return a row's text; RowError for a row that is not one image, large enough, with one text."""
    check_pixels(example, min_pixels)
    return caption(example)


def caption(example: Example) -> str:
    """Return a row's text; RowError for a row that is not one image with one text."""
    blocks = [block for message in example.messages for block in message["content"]]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    if example.rejected is not None or example.preferred is not None:
        raise RowError(f"{example.name}: a preference row, which a contrastive encoder has no use for. {CURE}", "kind")
    if len(example.images) != 1 or len(texts) != 1:
        raise RowError(
            f"{example.name}: {len(example.images)} images and {len(texts)} texts; a contrastive encoder compares one image "
            f"with one text. {CURE}",
            "image_count",
        )
    if not texts[0].strip():
        raise RowError(
            f"{example.name}: its text is empty ({texts[0]!r}), so it says nothing of its image; drop the row.",
            "empty_answer",
        )
    return texts[0]


CURE = "Write each pair as {'image': ..., 'text': ...}."
