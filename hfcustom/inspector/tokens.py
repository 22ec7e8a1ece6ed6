"""The tokens that an image takes in the text: how many, in which runs, and the text that the processor writes, folded.

`<image>` 64 times is written `<image>*64`, a group that repeats `(...) * 3`, and numbers that count through it `col_1..3`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

LONGEST_GROUP = 12  # elements of a group that is folded


def image_text(processor: Any, features: dict[str, Any]) -> list[str]:
    """Return what the processor wrote for one image, token by token, without what it writes around any text."""
    tokenizer = processor.tokenizer
    ids = features["input_ids"][0].tolist()
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    while len(ids) > 1 and ids[0] in around:
        ids = ids[1:]
    while len(ids) > 1 and ids[-1] in around:
        ids = ids[:-1]
    return [tokenizer.decode([token]) for token in ids]


def placeholder_runs(features: dict[str, Any], placeholder: int) -> list[int]:
    """Return the lengths of the runs of image tokens in the text of one image."""
    ids = features["input_ids"][0].tolist()
    return [len(list(run)) for is_image, run in groupby(ids, lambda token: token == placeholder) if is_image]


# ---- folding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A token, some number of times in a row; `texts` are its spellings in the copies of a group, which differ in numbers."""

    texts: tuple[str, ...]
    times: int

    def key(self) -> Any:
        """Return what copies have in common."""
        return re.sub(r"\d+", "#", self.texts[0]), self.times

    def merge(self, others: Sequence[Any]) -> Leaf:
        """Return one leaf for all copies."""
        return Leaf(tuple(text for leaf in (self, *others) for text in leaf.texts), self.times)

    def show(self) -> str:
        """Return the token with what its numbers count from and to."""
        numbers = [re.findall(r"\d+", text) for text in self.texts]
        ends = iter([(min(map(int, column)), max(map(int, column))) for column in zip(*numbers, strict=True)])
        text = re.sub(r"\d+", lambda _: _range(*next(ends)), self.texts[0]).replace("\n", "\\n")
        text = text if text.strip() else text.replace(" ", "_")
        return text if self.times == 1 else f"{text}*{self.times}"


@dataclass(frozen=True)
class Group:
    """Elements that repeat."""

    elements: tuple[Any, ...]
    times: int

    def key(self) -> Any:
        """Return what copies have in common."""
        return tuple(element.key() for element in self.elements), self.times

    def merge(self, others: Sequence[Any]) -> Group:
        """Return one group for all copies."""
        columns = zip(*(other.elements for other in others), strict=True)
        merged = (element.merge(column) for element, column in zip(self.elements, columns, strict=True))
        return Group(tuple(merged), self.times)

    def show(self) -> str:
        """Return the elements in brackets and how often they come."""
        return f"({' '.join(element.show() for element in self.elements)}) * {self.times}"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"


def fold(tokens: Sequence[str]) -> str:
    """Return a text of tokens with what repeats written once; spaces stand between the pieces only."""
    runs = [(text, len(list(run))) for text, run in groupby(tokens)]
    elements: list[Any] = []
    for text, times in runs:  # line ends belong to different lines
        elements += [Leaf((text,), 1)] * times if text.isspace() else [Leaf((text,), times)]
    before = -1
    while len(elements) != before:
        before = len(elements)
        elements = _fold_once(elements)
    return " ".join(element.show() for element in elements)


def _fold_once(elements: list[Any]) -> list[Any]:
    """Fold the shortest group that repeats, everywhere."""
    keys = [element.key() for element in elements]
    for length in range(1, min(LONGEST_GROUP, len(elements) // 2) + 1):
        folded, at = [], 0
        while at < len(elements):
            times = 1
            blank = length == 1 and isinstance(elements[at], Leaf) and elements[at].texts[0].isspace()
            while not blank and at + (times + 1) * length <= len(elements):
                if keys[at : at + length] != keys[at + times * length : at + (times + 1) * length]:
                    break
                times += 1
            if times > 1:
                copies = [elements[at + copy * length : at + (copy + 1) * length] for copy in range(times)]
                merged = [element.merge(rest) for element, *rest in zip(*copies, strict=True)]
                folded.append(Group(tuple(merged), times))
                at += times * length
            else:
                folded.append(elements[at])
                at += 1
        if len(folded) < len(elements):
            return folded
    return elements
