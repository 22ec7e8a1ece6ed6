"""Labels: where assistant turns begin and end, and what each of their tokens weighs in the loss.

Example -> rendered text and weighted character spans; with the tokenizer's offsets -> weights (T,), 0 where nothing is
trained on. A turn is found in the rendered text: from the template's {% generation %} markers where it has them, else by
rendering up to each turn and taking the difference; the processor's record of expanded placeholders then maps characters to
tokens. Image placeholders weigh nothing, whatever the template does.
Letters: T text tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from hfcustom.data.messages import Example, RowError
from hfcustom.data.turns import Message, without_weights

Span = tuple[int, int]
WeightedSpan = tuple[int, int, float]  # later ones in a list override earlier ones

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(processor: Any, example: Example) -> tuple[str, list[WeightedSpan]]:
    """Return a row's text and the weighted character spans of its assistant turns, before placeholders expand."""
    plain = without_weights(example.messages)
    turns = [at for at, message in enumerate(plain) if message["role"] == "assistant"]
    weights = [message.get("weight", 1.0) for message in example.messages]
    spans: list[tuple[int, int, int]]  # (message, start, end)
    if GENERATION_MARKER.search(processor.chat_template):
        text, spans = _marked_spans(processor, example, plain, turns)
    else:
        text = processor.apply_chat_template(plain)
        spans = [(at, *_turn_span(processor, example.name, plain, at, text)) for at in turns if weights[at] > 0]
    weighted: list[WeightedSpan] = []
    for at, start, end in spans:
        weighted.append((start, end, weights[at]))
        weighted += _block_spans(text, start, end, example.messages[at], f"{example.name}, message {at}")
    if not any(end > start and weight > 0 for start, end, weight in weighted):
        found = "every assistant turn has weight 0" if any(weights[at] == 0 for at in turns) else "no assistant turn"
        raise RowError(f"{example.name}: {found}, so there is nothing to learn from it.")
    return text, weighted


def _marked_spans(
    processor: Any, example: Example, plain: list[Message], turns: list[int]
) -> tuple[str, list[tuple[int, int, int]]]:
    rendered: Any = render_jinja_template(
        conversations=[plain],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    text, spans = rendered[0][0], rendered[1][0]
    if len(spans) == len(turns):
        return text, [(at, *span) for at, span in zip(turns, spans, strict=True)]
    if any("weight" in part for message in example.messages for part in (message, *message["content"])):
        raise RowError(
            f"{example.name}: the chat template marks {len(spans)} spans with {{% generation %}} for {len(turns)} assistant "
            "turns, so weights cannot be told apart (the prompt of a preference row has weight 0); mark each turn once."
        )
    return text, [((turns or [0])[0], *span) for span in spans]  # all weigh 1, so whose they are does not matter


def _turn_span(processor: Any, name: str, plain: list[Message], turn: int, text: str) -> Span:
    before = processor.apply_chat_template(plain[:turn], add_generation_prompt=True)
    upto = processor.apply_chat_template(plain[: turn + 1])
    if not upto.startswith(before) or not text.startswith(upto):
        raise RowError(
            f"{name}: the chat template renders message {turn} differently once later turns follow, so its "
            "tokens cannot be told apart; add {% generation %} markers around the assistant's text in the template."
        )
    return len(before), len(upto)


def _block_spans(text: str, start: int, end: int, message: Message, where: str) -> list[WeightedSpan]:
    """Return the spans of a turn's weighted blocks; those before them are found too, since they may hold the same words."""
    if not any("weight" in block for block in message["content"]):
        return []
    spans: list[WeightedSpan] = []
    for at, block in enumerate(message["content"]):
        if block["type"] != "text":
            continue
        # of an unweighted block only the place matters, so that a template may trim it
        words = block["text"] if "weight" in block else block["text"].strip()
        found = text.find(words, start, end)
        if found < 0:
            raise RowError(
                f"{where}, block {at}: the text {words!r:.80} is not in what the chat template writes for this turn, so its "
                "weight, or that of a later block, cannot be placed; write it as the template does (without blanks at its "
                "borders), or put the weight on the whole message."
            )
        start = found + len(words)
        if "weight" in block:
            spans.append((found, start, message.get("weight", 1.0) * block["weight"]))
    return spans


def token_weights(
    offsets: torch.Tensor, spans: Sequence[WeightedSpan], replacements: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Return what each token weighs, 0 outside of the spans and in all that was written for an image: (T, 2) -> (T,).

    A replacement of type "text" is of the words themselves, which a processor has changed.
    """
    weights = torch.zeros(len(offsets))  # (T,)
    for start, end, weight in spans:
        expanded = (expanded_position(char, replacements) for char in (start, end))
        weights[tokens_inside(offsets, *expanded)] = weight
    for placeholder in replacements:  # marks of rows included
        if placeholder["type"] != "text":
            weights[tokens_inside(offsets, *placeholder["new_span"])] = 0.0
    return weights


def expanded_position(char: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Return where a character of the rendered text lies once placeholders before it have been expanded."""
    ends = [replacement["span"][1] for replacement in replacements]
    at = bisect_right(ends, char)
    return char if at == 0 else char + replacements[at - 1]["new_span"][1] - ends[at - 1]


def tokens_inside(offsets: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return which tokens begin in a span of characters: (T, 2) -> (T,)."""
    return (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
