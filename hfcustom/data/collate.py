"""Rows -> batch: the family's own processor makes the tensors, this adds labels on assistant turns only.

[Example, ...] -> {"input_ids": (B, T), "attention_mask": (B, T), "labels": (B, T), "pixel_values": ..., ...}. A pair of
answers is two rows of the batch, chosen then rejected; "preference" (B,) is 1 for an answer that is preferred, -1 for one
that is not. What a token weighs and where it lies is found in hfcustom/data/labels.py; columns of the rows that a loss
asks for become tensors in hfcustom/data/columns.py.
Letters: B rows, T text tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.utils import logging

from hfcustom.data.checks import MIN_PIXELS, check_pixels, kind_of
from hfcustom.data.columns import TOKEN_WEIGHTS, check_columns, column_tensor
from hfcustom.data.control import ControlTokens
from hfcustom.data.labels import TRAIN_ON, TrainOn, check_labels, render, token_weights
from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.data.videos import video_options
from hfcustom.losses import IGNORE
from hfcustom.naming import unknown
from hfcustom.processors import PrefixProcessor

if TYPE_CHECKING:
    from hfcustom.cache.features import Picture
    from hfcustom.cache.run import Caches

logger = logging.get_logger("hfcustom")


class Batch(dict[str, torch.Tensor]):
    """Tensors for forward(), how many images they hold, and where each row comes from."""

    images: int = 0
    source_tokens: Mapping[str, int] = {}  # tokens by source, of rows of a mixture
    rows: Sequence[str] = ()  # B names, as in errors: "train.jsonl, line 7"
    pictures: Sequence[Picture] = ()  # its images in the order of their placeholders, where features are cached
    levels: torch.Tensor | None = None  # (3, 256), values of pixels that are bytes until they are on the device
    places: Sequence[int] = ()  # of its rows among those that the rank has in the step, pairs counted once
    blank: bool = False  # run only so that ranks stay together; counts for nothing
    idle: bool = False  # no rank waits for its gradient, which it may not have

    def blank_copy(self) -> Batch:
        """Return the batch as one that counts for nothing."""
        copied = copy.copy(self)
        copied.blank = True
        return copied

    def as_floats(self) -> Batch:
        """Return the batch with pixels as the processor made them."""
        from hfcustom.cache.levels import PIXELS, look_up

        copied = copy.copy(self)
        if self.levels is not None:
            copied[PIXELS], copied.levels = look_up(self[PIXELS], self.levels), None
        return copied


class Collator:
    """Turn rows (mappings, or Examples) into a training batch with a processor.

    `columns` names what else of the rows becomes a tensor: "token_weights" for the loss weights of messages and blocks,
    others are the rows' own, those of `token_columns` with an entry for each label token. `train_on` the "assistant"'s turns,
    the "last" of them, or "all" text. `allowed_tokens` are control tokens that texts may hold as such
    (hfcustom/data/control.py); `head_size` is the number of tokens that the model's head can say, others carry no label.
    Raises RowError for a row that cannot be used, is longer than `max_length`, has no assistant turn, or an image of fewer
    than `min_pixels`.
    """

    verified_rows: ClassVar[float] = 16  # whose labels are decoded and compared with the answers

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        columns: Sequence[str] = (),
        token_columns: Sequence[str] = (),
        *,
        train_on: TrainOn = "assistant",
        allowed_tokens: Sequence[str] = (),
        head_size: int | None = None,
        caches: Caches | None = None,
        min_pixels: int = MIN_PIXELS,
    ) -> None:
        if not isinstance(processor.chat_template, str) or not processor.chat_template:
            raise ValueError(
                f"The processor's chat_template is {processor.chat_template!r:.60}; it must be one template, so that "
                "messages can become text. Set it and save the processor."
            )
        if train_on not in TRAIN_ON:
            raise ValueError(unknown("train_on", train_on, TRAIN_ON))
        self.processor = processor
        self.max_length = max_length
        self.columns = (*check_columns(columns, processor), *check_columns(token_columns, processor))
        self.token_columns = frozenset(token_columns)
        self.train_on = train_on
        self.head_size = head_size
        self.caches = caches
        self.min_pixels = min_pixels
        self.control = ControlTokens(processor, allowed_tokens)
        vocabulary = processor.tokenizer.get_vocab()
        self.mark_ids = torch.tensor(sorted(vocabulary[mark] for mark in self.control.marks if mark in vocabulary))
        self.num_verified = 0

    def __call__(self, rows: Sequence[Mapping[str, Any] | Example]) -> Batch:
        examples = [row if isinstance(row, Example) else read_row(row, f"row {at}") for at, row in enumerate(rows)]
        _check_same_kind(examples, self.train_on)
        for example in examples:
            check_pixels(example, self.min_pixels)
        answers = [answer for example in examples for answer in split_pair(example)]  # B of them
        processor, shielded = self.control.shield(self.processor, answers)
        texts, spans = zip(*(render(processor, answer, self.train_on) for answer in shielded), strict=True)
        features = self._process(processor, texts, shielded)
        offsets = features.pop("offset_mapping")  # (B, T, 2)
        replaced = features.pop("text_replacement_offsets", None) or [[]] * len(answers)
        self._check_processor(texts, offsets, replaced)
        for answer, mask in zip(answers, features["attention_mask"], strict=True):
            check_length(mask, answer.name, self.max_length)
        ids = features["input_ids"]
        weights = torch.stack(
            [token_weights(*row) for row in zip(offsets, texts, spans, replaced, strict=True)]
        )  # (B, T)
        for at, row in enumerate(shielded):
            if processor is not self.processor or self.num_verified < self.verified_rows:
                check_labels(processor, row, texts[at], spans[at], replaced[at], ids[at][weights[at] != 0])
                self.num_verified += 1
        weights[self._unsayable(ids)] = 0.0
        _check_labelled(weights, answers)
        batch = Batch(features, labels=ids.masked_fill(weights == 0, IGNORE))
        if isinstance(self.processor, PrefixProcessor):
            batch["token_type_ids"] = self.processor.mark_answers(batch, weights != 0)
        batch.images = sum(len(answer.images) + sum(map(len, answer.videos)) for answer in answers)
        batch.rows = [answer.name for answer in answers]
        if self.caches is not None:
            batch.pictures = self.caches.pictures(ids, offsets, replaced, answers)
            batch.levels = self.caches.levels
        batch.source_tokens = count_by_source(answers, features["attention_mask"])
        if answers[0].preferred is not None:
            batch["preference"] = torch.tensor([1.0 if answer.preferred else -1.0 for answer in answers])  # (B,)
        self._add_columns(batch, examples, weights)
        return batch

    def _process(self, processor: Any, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
        """Run the processor, its images from the caches where they know them."""
        with nullcontext() if self.caches is None else self.caches.serving(processor, examples):
            features = process(processor, texts, examples, padding_side="right", with_offsets=True)
        if self.caches is not None and self.caches.lost_levels(features):
            return self._process(processor, texts, examples)
        return features

    def _unsayable(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which tokens never carry a label: marks of images, and what the head has no row for. (B, T) -> (B, T)."""
        marks = torch.isin(ids, self.mark_ids)
        return marks if self.head_size is None else marks | (ids >= self.head_size)

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

    def _check_processor(self, texts: Sequence[str], offsets: torch.Tensor, replaced: Sequence[Any]) -> None:
        """A processor that expands a text without a record would put labels on other words."""
        for text, row, records in zip(texts, offsets, replaced, strict=True):
            if not records and int(row.max()) > len(text):
                raise _wrong_processor(self.processor, "expands images without saying where")


def check_length(attention_mask: torch.Tensor, name: str, max_length: int | None) -> None:
    """Refuse a row of more tokens: (T,), 1 at its tokens."""
    length = int(attention_mask.sum())
    if max_length is not None and length > max_length:
        raise RowError(
            f"{name}: {length} tokens, more than max_length={max_length}. Rows are never cut, since a cut through image "
            "placeholders cannot be used: raise max_length, or use fewer crops an image.",
            "too_long",
        )


def count_by_source(answers: Sequence[Example], attention_mask: torch.Tensor) -> dict[str, int]:
    """Return the tokens of each source of a mixture, (B, T) -> {source: tokens}."""
    counts: dict[str, int] = {}
    for answer, length in zip(answers, attention_mask.sum(1).tolist(), strict=True):
        if answer.source:
            counts[answer.source] = counts.get(answer.source, 0) + length
    return counts


def split_pair(example: Example) -> list[Example]:
    """Return the rows of the batch that an example becomes: two for a pair, the chosen answer first."""
    if example.rejected is None:
        return [example]
    chosen = replace(example, name=f"{example.name}, chosen", rejected=None, preferred=True)
    return [chosen, replace(chosen, messages=example.rejected, name=f"{example.name}, rejected", preferred=False)]


def _check_labelled(weights: torch.Tensor, answers: Sequence[Example]) -> None:
    for answer, empty in zip(answers, (weights == 0).all(1).tolist(), strict=True):
        if empty:
            raise RowError(
                f"{answer.name}: no token carries a label, so there is nothing to learn from it; drop the row.",
                "no_labels",
            )


def _check_same_kind(examples: Sequence[Example], train_on: TrainOn) -> None:
    """A loss of pairs takes rows two by two, and one of ordinary rows has no use for a rejected answer."""
    for example in examples:
        if kind_of(example) != kind_of(examples[0]):
            raise RowError(
                f"{example.name} is {kind_of(example)}, but {examples[0].name} of the same batch is {kind_of(examples[0])}; "
                "train on rows of one kind.",
                "kind",
            )
    if train_on == "all" and (examples[0].rejected is not None or examples[0].preferred is not None):
        raise RowError(
            f"{examples[0].name} is {kind_of(examples[0])}, but train_on='all' is for ordinary rows: preferences are about "
            "answers. Leave train_on out."
        )


def process(
    processor: Any, texts: Sequence[str], examples: Sequence[Example], padding_side: str, with_offsets: bool = False
) -> dict[str, Any]:
    """Run the processor over rendered texts and their images (nested by row, as every family accepts them).

    Raises RowError that names the row where the processor refuses one.
    """
    options: dict[str, Any] = {"padding": True, "padding_side": padding_side, "truncation": False}
    bos = processor.tokenizer.bos_token
    if bos is not None and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template wrote it already
    if any(example.images for example in examples):
        options["images"] = [example.images for example in examples]
    options |= video_options(processor, texts, examples)
    if with_offsets:
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    try:
        features = processor(text=list(texts), **options)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if len(texts) == 1:
            raise RowError(
                f"{examples[0].name}: {type(processor).__name__} cannot read the row: {error}", "processor"
            ) from error
        for text, example in zip(texts, examples, strict=True):
            process(processor, [text], [example], padding_side, with_offsets)
        raise  # each row alone is fine
    replaced = features.pop("text_replacement_offsets", None)
    batch = dict(features.convert_to_tensors("pt"))
    if "labels" in batch:
        raise _wrong_processor(processor, "makes labels of its own")
    _check_complete(processor, batch)
    _check_single_bos(processor, texts, examples, batch["input_ids"])
    return batch | ({"text_replacement_offsets": replaced} if with_offsets else {})


def _wrong_processor(processor: Any, does: str) -> ValueError:
    return ValueError(
        f"{type(processor).__name__} {does}, so labels would be on other words; load the processor of the family's custom "
        "class: model.processor_class.from_pretrained(...)."
    )


def _check_complete(processor: Any, batch: Mapping[str, Any]) -> None:
    """Without its token types a model attends and counts positions in another way than it was trained to, silently."""
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in processor.model_input_names and name not in batch:
            raise ValueError(
                f"{type(processor).__name__} made no {name}, which its model needs; load the processor of the family's custom "
                f"class, and let no setting turn {name} off."
            )


def _check_single_bos(processor: Any, texts: Sequence[str], examples: Sequence[Example], ids: torch.Tensor) -> None:
    """Refuse a second BOS: more of them than the template wrote, or one where it wrote none."""
    tokenizer = processor.tokenizer
    if tokenizer.bos_token is None or tokenizer.bos_token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    counts = (ids == tokenizer.bos_token_id).sum(1).tolist()
    for text, example, count in zip(texts, examples, counts, strict=True):
        if count > max(1, text.count(tokenizer.bos_token)):
            raise RowError(
                f"{example.name}: {type(processor).__name__} wrote {count} {tokenizer.bos_token} into a text that needs one; the "
                "chat template writes it behind other text, and the tokenizer again in front. Let one of the two write it.",
                "two_bos",
            )
