"""Rows -> batch: the family's own processor makes the tensors, this adds labels on assistant turns only.

[Example, ...] -> {"input_ids": (B, T), "attention_mask": (B, T), "labels": (B, T), "pixel_values": ..., ...}. A pair of
answers is two rows of the batch, chosen then rejected; "preference" (B,) is 1 for an answer that is preferred, -1 for one
that is not. What a token weighs and where it lies is found in hfcustom/data/labels.py; columns of the rows that a loss
asks for become tensors in hfcustom/data/columns.py.
Letters: B rows, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from hfcustom.data.columns import TOKEN_WEIGHTS, check_columns, column_tensor
from hfcustom.data.labels import render, token_weights
from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.losses import IGNORE
from hfcustom.processors import PrefixProcessor

logger = logging.get_logger("hfcustom")


class Batch(dict[str, torch.Tensor]):
    """Tensors for forward(), and how many images they hold."""

    images: int = 0
    blank: bool = False  # run only so that ranks stay together; counts for nothing

    def blank_copy(self) -> Batch:
        """Return the batch as one that counts for nothing."""
        copied = Batch(self)
        copied.blank = True
        return copied


class Collator:
    """Turn rows (mappings, or Examples) into a training batch with a processor.

    `columns` names what else of the rows becomes a tensor: "token_weights" for the loss weights of messages and blocks,
    others are the rows' own, those of `token_columns` with an entry for each label token. Raises RowError for a row that cannot be used, is longer than `max_length`, or has no
    assistant turn.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        columns: Sequence[str] = (),
        token_columns: Sequence[str] = (),
    ) -> None:
        if not isinstance(processor.chat_template, str) or not processor.chat_template:
            raise ValueError(
                f"The processor's chat_template is {processor.chat_template!r:.60}; it must be one template, so that "
                "messages can become text. Set it and save the processor."
            )
        self.processor = processor
        self.max_length = max_length
        self.columns = (*check_columns(columns, processor), *check_columns(token_columns, processor))
        self.token_columns = frozenset(token_columns)
        ids = {getattr(processor, name, None) for name in ("image_token_id", "video_token_id")}
        self.placeholder_ids = torch.tensor(sorted({*ids, *processor.image_token_ids} - {None}))

    def __call__(self, rows: Sequence[Mapping[str, Any] | Example]) -> Batch:
        examples = [row if isinstance(row, Example) else read_row(row, f"row {at}") for at, row in enumerate(rows)]
        _check_same_kind(examples)
        answers = [answer for example in examples for answer in _answers(example)]  # B of them
        texts, spans = zip(*(render(self.processor, answer) for answer in answers), strict=True)
        features = process(self.processor, texts, answers, padding_side="right", with_offsets=True)
        offsets = features.pop("offset_mapping")  # (B, T, 2)
        replaced = features.pop("text_replacement_offsets", None) or [[]] * len(answers)
        self._check_processor(features, texts, offsets, replaced)
        for answer, mask in zip(answers, features["attention_mask"], strict=True):
            self._check_length(mask, answer)
        ids = features["input_ids"]
        weights = torch.stack([token_weights(*row) for row in zip(offsets, spans, replaced, strict=True)])  # (B, T)
        weights[torch.isin(ids, self.placeholder_ids)] = 0.0
        batch = Batch(features, labels=ids.masked_fill(weights == 0, IGNORE))
        if isinstance(self.processor, PrefixProcessor):
            batch["token_type_ids"] = self.processor.mark_answers(batch, weights != 0)
        batch.images = sum(len(answer.images) for answer in answers)
        if answers[0].preferred is not None:
            batch["preference"] = torch.tensor([1.0 if answer.preferred else -1.0 for answer in answers])  # (B,)
        self._add_columns(batch, examples, weights)
        return batch

    def _add_columns(self, batch: Batch, examples: Sequence[Example], weights: torch.Tensor) -> None:
        if TOKEN_WEIGHTS not in self.columns and ((weights != 0) & (weights != 1)).any():
            logger.warning_once(
                "Rows have weights other than 0 and 1, which have no effect with this loss; use weighted_cross_entropy, or "
                "another that takes the column token_weights."
            )
        for name in self.columns:
            batch[name] = (
                weights
                if name == TOKEN_WEIGHTS
                else column_tensor(name, examples, batch["labels"], name in self.token_columns)
            )

    def _check_processor(
        self, features: Mapping[str, Any], texts: Sequence[str], offsets: torch.Tensor, replaced: Sequence[Any]
    ) -> None:
        """A processor that makes labels, or expands a text without a record, would put labels on other words."""
        grown = any(
            not records and int(row.max()) > len(text)
            for text, row, records in zip(texts, offsets, replaced, strict=True)
        )
        if grown or "labels" in features:
            does = "expands images without saying where" if grown else "makes labels of its own"
            raise ValueError(
                f"{type(self.processor).__name__} {does}, so labels would be on other words; load the processor of the "
                "family's custom class: model.processor_class.from_pretrained(...)."
            )

    def _check_length(self, attention_mask: torch.Tensor, example: Example) -> None:
        length = int(attention_mask.sum())
        if self.max_length is not None and length > self.max_length:
            raise RowError(
                f"{example.name}: {length} tokens, more than max_length={self.max_length}. Rows are never cut, since a cut "
                "through image placeholders cannot be used: raise max_length, or use fewer crops an image."
            )


def _answers(example: Example) -> list[Example]:
    """Return the rows of the batch that an example becomes: two for a pair, the chosen answer first."""
    if example.rejected is None:
        return [example]
    chosen = replace(example, name=f"{example.name}, chosen", rejected=None, preferred=True)
    return [chosen, replace(chosen, messages=example.rejected, name=f"{example.name}, rejected", preferred=False)]


def _check_same_kind(examples: Sequence[Example]) -> None:
    """A loss of pairs takes rows two by two, and one of ordinary rows has no use for a rejected answer."""
    for example in examples:
        if _kind(example) != _kind(examples[0]):
            raise RowError(
                f"{example.name} is {_kind(example)}, but {examples[0].name} of the same batch is {_kind(examples[0])}; "
                "train on rows of one kind."
            )


def _kind(example: Example) -> str:
    if example.rejected is not None:
        return "a pair (chosen, rejected)"
    return "an ordinary row (messages)" if example.preferred is None else "an answer with a label (true or false)"


def process(
    processor: Any, texts: Sequence[str], examples: Sequence[Example], padding_side: str, with_offsets: bool = False
) -> dict[str, Any]:
    """Run the processor over rendered texts and their images (nested by row, as every family accepts them)."""
    for example in examples:
        _refuse_placeholders(processor, example)
    options: dict[str, Any] = {"padding": True, "padding_side": padding_side}
    bos = processor.tokenizer.bos_token
    if bos is not None and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template wrote it already
    if any(example.images for example in examples):
        options["images"] = [example.images for example in examples]
    if with_offsets:
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    features = processor(text=list(texts), **options)
    replaced = features.pop("text_replacement_offsets", None)
    batch = dict(features.convert_to_tensors("pt"))
    return batch | ({"text_replacement_offsets": replaced} if with_offsets else {})


def _refuse_placeholders(processor: Any, example: Example) -> None:
    """A placeholder written out in a text would be taken for an image."""
    texts = [block["text"] for message in example.messages for block in message["content"] if block["type"] == "text"]
    for mark in {processor.image_token, *processor.tokenizer.convert_ids_to_tokens(processor.image_token_ids)}:
        if any(mark in text for text in texts):
            raise RowError(
                f"{example.name}: a text holds {mark!r}, this processor's mark of an image; write images as "
                "{'type': 'image'} blocks, and the mark itself in other words."
            )
