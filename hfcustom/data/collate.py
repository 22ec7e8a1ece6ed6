"""Rows -> batch: the family's own processor makes the tensors, this adds labels on assistant turns only.

[Example, ...] -> {"input_ids": (B, T), "attention_mask": (B, T), "labels": (B, T), "pixel_values": ..., ...}. Where an
assistant turn begins and ends is found in the rendered text: from the template's {% generation %} markers where it has
them, else by rendering up to each turn and taking the difference; the processor's record of expanded placeholders then
maps characters to tokens. Image placeholders never carry a label, whatever the template does.
Letters: B rows, T text tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.losses import IGNORE

Span = tuple[int, int]

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Batch(dict[str, torch.Tensor]):
    """Tensors for forward(), and how many images they hold."""

    images: int = 0


class Collator:
    """Turn rows (mappings, or Examples) into a training batch with a processor.

    Raises RowError for a row that cannot be used, is longer than `max_length`, or has no assistant turn.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        if not isinstance(processor.chat_template, str) or not processor.chat_template:
            raise ValueError(
                f"The processor's chat_template is {processor.chat_template!r:.60}; it must be one template, so that "
                "messages can become text. Set it and save the processor."
            )
        self.processor = processor
        self.max_length = max_length
        ids = {getattr(processor, name, None) for name in ("image_token_id", "video_token_id")}
        self.placeholder_ids = torch.tensor(sorted({*ids, *processor.image_token_ids} - {None}))

    def __call__(self, rows: Sequence[Mapping[str, Any] | Example]) -> Batch:
        examples = [row if isinstance(row, Example) else read_row(row, f"row {at}") for at, row in enumerate(rows)]
        rendered = [self.render(example) for example in examples]
        texts = [text for text, _ in rendered]
        batch = process(self.processor, texts, examples, padding_side="right", with_offsets=True)
        offsets, replaced = (
            batch.pop("offset_mapping"),
            batch.pop("text_replacement_offsets", None) or [[]] * len(rows),
        )
        labels = torch.full_like(batch["input_ids"], IGNORE)  # (B, T)
        for at, example in enumerate(examples):
            self._check_length(batch["attention_mask"][at], example)
            for span in rendered[at][1]:
                start, end = (expanded_position(char, replaced[at]) for char in span)
                inside = tokens_inside(offsets[at], start, end)
                labels[at, inside] = batch["input_ids"][at, inside]
            for placeholder in replaced[at]:  # all that the processor wrote for an image, marks of rows included
                labels[at, tokens_inside(offsets[at], *placeholder["new_span"])] = IGNORE
        labels[torch.isin(batch["input_ids"], self.placeholder_ids)] = IGNORE
        batch = Batch(batch, labels=labels)
        batch.images = sum(len(example.images) for example in examples)
        return batch

    def render(self, example: Example) -> tuple[str, list[Span]]:
        """Return a row's text and the character spans of its assistant turns, before placeholders expand."""
        template = self.processor.chat_template
        spans: list[Span]
        if GENERATION_MARKER.search(template):
            rendered: Any = render_jinja_template(
                conversations=[example.messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.processor.tokenizer.special_tokens_map,
            )
            text, spans = rendered[0][0], [(start, end) for start, end in rendered[1][0]]
        else:
            text = self.processor.apply_chat_template(example.messages)
            spans = [
                self._turn_span(example, turn, text)
                for turn, message in enumerate(example.messages)
                if message["role"] == "assistant"
            ]
        if not any(end > start for start, end in spans):
            raise RowError(f"{example.name}: no assistant turn, so there is nothing to learn from it.")
        return text, spans

    def _turn_span(self, example: Example, turn: int, text: str) -> Span:
        before = self.processor.apply_chat_template(example.messages[:turn], add_generation_prompt=True)
        upto = self.processor.apply_chat_template(example.messages[: turn + 1])
        if not upto.startswith(before) or not text.startswith(upto):
            raise RowError(
                f"{example.name}: the chat template renders message {turn} differently once later turns follow, so its "
                "tokens cannot be told apart; add {% generation %} markers around the assistant's text in the template."
            )
        return len(before), len(upto)

    def _check_length(self, attention_mask: torch.Tensor, example: Example) -> None:
        length = int(attention_mask.sum())
        if self.max_length is not None and length > self.max_length:
            raise RowError(
                f"{example.name}: {length} tokens, more than max_length={self.max_length}. Rows are never cut, since a cut "
                "through image placeholders cannot be used: raise max_length, or use fewer crops an image."
            )


def process(
    processor: Any, texts: list[str], examples: Sequence[Example], padding_side: str, with_offsets: bool = False
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
    texts = (block["text"] for message in example.messages for block in message["content"] if block["type"] == "text")
    for text in texts:
        if processor.image_token in text:
            raise RowError(
                f"{example.name}: a text holds {processor.image_token!r}, this processor's mark of an image; write images as "
                "{'type': 'image'} blocks, and the mark itself in other words."
            )


def expanded_position(char: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Return where a character of the rendered text lies once placeholders before it have been expanded."""
    ends = [replacement["span"][1] for replacement in replacements]
    at = bisect_right(ends, char)
    return char if at == 0 else char + replacements[at - 1]["new_span"][1] - ends[at - 1]


def tokens_inside(offsets: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return which tokens begin in a span of characters: (T, 2) -> (T,)."""
    return (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
