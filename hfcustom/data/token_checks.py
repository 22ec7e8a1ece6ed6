"""What preflight checks with a processor: the collator's own refusals, and the numbers of tokens, labels and tiles of a row."""

from __future__ import annotations

import math
import multiprocessing
from typing import Any

import torch

from hfcustom.data.captions import CaptionCollator, caption
from hfcustom.data.collate import Collator, check_length
from hfcustom.data.findings import Finding
from hfcustom.data.messages import Example
from hfcustom.data.scan import RowFacts, ScanOptions
from hfcustom.encoders import class_of as encoder_class_of
from hfcustom.families import class_of, load_family
from hfcustom.losses import IGNORE

GRIDS = ("image_grid_thw", "target_sizes")  # a line an image or tile, where their patches are in one row


class TokenReader:
    """Collate one row at a time as training would, and note what it becomes."""

    def __init__(self, options: ScanOptions) -> None:
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # each process has rows of its own to do
        processor, head_size = load_processor(options.model, options.family)
        self.max_length = options.max_length
        self.collate = Collator(
            processor,
            train_on=options.train_on,  # type: ignore[arg-type]
            allowed_tokens=options.allowed_tokens,
            head_size=head_size,
            min_pixels=options.min_pixels,
        )

    def __call__(self, example: Example, facts: RowFacts) -> None:
        """Write a row's numbers and warnings into its facts; RowError where training would refuse it."""
        facts.findings += self._control_tokens(example)
        batch = self.collate([example])
        facts.tokens = int(batch["attention_mask"].sum())
        facts.labels = int((batch["labels"] != IGNORE).sum())
        facts.tiles = count_tiles(batch)
        for name, mask in zip(
            batch.rows, batch["attention_mask"], strict=True
        ):  # last: lengths of long rows count too
            check_length(mask, name, self.max_length)

    def _control_tokens(self, example: Example) -> list[Finding]:
        found = []
        for at, message in enumerate([*example.messages, *(example.rejected or [])]):
            if words := sorted({words for _, _, words in self.collate.control.cuts(message)}):
                reason = (
                    f"{example.name}, message {at}: the text holds the control tokens {', '.join(map(repr, words))}, which are "
                    "encoded as text; name those that are meant in allowed_tokens."
                )
                found.append(Finding(example.name, reason, "control_token", "warning", f"message {at}"))
        return found


class CaptionReader:
    """Likewise for rows of an image and its text, as a contrastive encoder reads them."""

    def __init__(self, options: ScanOptions) -> None:
        assert options.model is not None
        model_class: Any = encoder_class_of(options.model)
        self.length = model_class.config_class.from_pretrained(options.model).text_config.max_position_embeddings
        processor = model_class.processor_class.from_pretrained(options.model)
        self.tokenizer = processor.tokenizer
        self.collate = CaptionCollator(
            processor,
            self.length,
            options.max_length,
            padding=model_class.text_padding,
            min_pixels=options.min_pixels,
        )

    def __call__(self, example: Example, facts: RowFacts) -> None:
        """Write a row's numbers and warnings into its facts; RowError where training would refuse it."""
        facts.tokens, facts.tiles = len(self.tokenizer(caption(example), verbose=False)["input_ids"]), 1
        if facts.tokens > self.length and self.collate.max_length is None:
            reason = (
                f"{example.name}: its text has {facts.tokens} tokens and is cut after the {self.length} that are read."
            )
            facts.findings.append(Finding(example.name, reason, "cut_text", "warning"))
        self.collate([example])


def load_processor(model: str | None, family: str | None) -> tuple[Any, int | None]:
    """Return the processor of a model, or a family's with published image settings and a small tokenizer; the head's width."""
    if family is not None:
        module = load_family(family)
        processor = module.published_processor()
        if processor.chat_template is None:
            processor.chat_template = module.tiny_processor().chat_template
        return processor, None
    assert model is not None
    model_class: Any = class_of(model)
    config = model_class.config_class.from_pretrained(model)
    return model_class.processor_class.from_pretrained(model), config.get_text_config().vocab_size


def count_tiles(batch: dict[str, torch.Tensor]) -> int:
    """Return the pictures that the vision tower sees of a row: crops, or whole images where those are flat patches."""
    pixels = batch.get("pixel_values")
    if pixels is None:
        return 0
    for name in GRIDS:
        if name in batch:
            return len(batch[name])
    if pixels.ndim < 4:
        return len(pixels)
    tiles = pixels.reshape(math.prod(pixels.shape[:-3]), -1)  # (P, C * H * W)
    return int((tiles != 0).any(1).sum())  # padding is all zero
