"""Labels: where assistant turns begin and end, and what each of their tokens weighs in the loss.

Example -> rendered text and weighted character spans; with the tokenizer's offsets -> weights (T,), 0 where nothing is
trained on. A turn is found in the rendered text: from the template's {% generation %} markers where it has them, else by
rendering up to each turn and taking the difference; the processor's record of expanded placeholders then maps characters to
tokens. Image placeholders weigh nothing, whatever the template does. check_labels decodes what is labelled and compares it
with the answers.
Letters: T text tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from hfcustom.data.control import spell_out, text_blocks
from hfcustom.data.messages import Example, RowError
from hfcustom.data.turns import Message, check_trained, turn_weights, without_weights

Span = tuple[int, int]
WeightedSpan = tuple[int, int, float]  # later ones in a list override earlier ones

TrainOn = Literal["assistant", "last", "all"]
TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last", "all")

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(processor: Any, example: Example, train_on: TrainOn = "assistant") -> tuple[str, list[WeightedSpan]]:
    """Return a row's text and the weighted character spans that are trained on, before placeholders expand.

    Those are the assistant's turns, the last of them only, or all: then the rest of the text weighs 1.
    """
    try:
        return _render(processor, example, train_on)
    except TemplateError as error:
        raise RowError(f"{example.name}: the chat template refuses the row: {error}", "template") from error


def _render(processor: Any, example: Example, train_on: TrainOn) -> tuple[str, list[WeightedSpan]]:
    plain = without_weights(example.messages)
    turns = [at for at, message in enumerate(plain) if message["role"] == "assistant"]
    check_trained(example.messages, example.name, train_on)
    weights = turn_weights(example.messages, train_on)
    spans: list[tuple[int, int, int]]  # (message, start, end)
    if GENERATION_MARKER.search(processor.chat_template):
        text, spans = _marked_spans(processor, example, plain, turns)
    else:
        text = processor.apply_chat_template(plain)
        needed = [at for at in turns if weights[at] > 0 or train_on == "all"]
        spans = [(at, *_turn_span(processor, example.name, plain, at, text)) for at in needed]
    weighted: list[WeightedSpan] = []
    for at, start, end in spans:
        weighted.append((start, end, weights[at]))
        if weights[at]:
            weighted += _block_spans(text, start, end, example.messages[at], f"{example.name}, message {at}")
    if not any(end > start and weight > 0 for start, end, weight in weighted):
        raise RowError(
            f"{example.name}: the chat template leaves the assistant's turns out, so there is nothing to learn from it; mend "
            "the template.",
            "no_labels",
        )
    return text, [(0, len(text), 1.0), *weighted] if train_on == "all" else weighted


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
    offsets: torch.Tensor, text: str, spans: Sequence[WeightedSpan], replacements: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Return what each token weighs, 0 outside of the spans and in all that was written for an image: (T, 2) -> (T,).

    `text` is the rendered one. A replacement of type "text" is of the words themselves, which a processor has changed.
    """
    borders = [tuple(expanded_position(char, replacements) for char in span[:2]) for span in spans]
    offsets = _without_blanks(offsets, expanded_text(text, replacements), borders)
    weights = torch.zeros(len(offsets))  # (T,)
    for (start, end), (_, _, weight) in zip(borders, spans, strict=True):
        weights[tokens_inside(offsets, start, end)] = weight
    for placeholder in replacements:  # marks of rows included
        if placeholder["type"] != "text":
            weights[tokens_inside(offsets, *placeholder["new_span"])] = 0.0
    return weights


def _without_blanks(offsets: torch.Tensor, text: str, spans: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Let a token whose blank lies before a border begin at it: (T, 2) -> (T, 2).

    " Hi" is the answer's word where the template writes the blank, as in "ASSISTANT: ".
    """
    offsets = offsets.clone()
    for border in {char for span in spans for char in span}:
        across = (offsets[:, 0] < border) & (border < offsets[:, 1])  # (T,)
        for at in across.nonzero()[:, 0].tolist():
            if text[offsets[at, 0] : border].isspace():
                offsets[at, 0] = border
    return offsets


def expanded_text(text: str, replacements: Sequence[Mapping[str, Any]]) -> str:
    """Return what a processor makes of a rendered text, by its record of what it replaced."""
    pieces, last = [], 0
    for found in replacements:
        start, end = found["span"]
        begin, stop = found["new_span"]
        written = found.get("replacement", found.get("text", "")) or "\0" * (stop - begin)
        pieces += [text[last:start], written.ljust(stop - begin, "\0")[: stop - begin]]
        last = end
    return "".join([*pieces, text[last:]])


def expanded_position(char: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Return where a character of the rendered text lies once placeholders before it have been expanded."""
    ends = [replacement["span"][1] for replacement in replacements]
    at = bisect_right(ends, char)
    return char if at == 0 else char + replacements[at - 1]["new_span"][1] - ends[at - 1]


def tokens_inside(offsets: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return which tokens begin in a span of characters: (T, 2) -> (T,)."""
    return (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])


# ---- verified by decoding -------------------------------------------------------------------------------------------


def check_labels(
    processor: Any,
    example: Example,
    text: str,
    spans: Sequence[WeightedSpan],
    replacements: Sequence[Mapping[str, Any]],
    labels: torch.Tensor,
) -> None:
    """Decode the label tokens (M,) of a row and compare them with the text of its spans, and that with the last answer.

    Raises RowError that names the row and the processor. Rows with weights of blocks are left out, since a token may lie
    across two of them, and labels with an unknown token.
    """
    tokenizer = processor.tokenizer
    weighted = any("weight" in block for message in example.messages for block in message["content"])
    if weighted or (tokenizer.unk_token_id is not None and (labels == tokenizer.unk_token_id).any()):
        return
    last_words = [block["text"] for block in text_blocks(_last_trained(example))]
    trained = "".join(text[start:end] for start, end, weight in spans if weight > 0)
    if not _holds(trained, last_words):
        words = spell_out(processor, "".join(last_words))
        _mismatch(processor, example, spell_out(processor, trained), words)
    expected = spell_out(processor, _labelled_text(text, spans, replacements))
    decoded = tokenizer.decode(labels.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != expected and _canonical(tokenizer, decoded) != _canonical(tokenizer, expected):
        _mismatch(processor, example, decoded, expected)


def _mismatch(processor: Any, example: Example, labelled: str, answers: str) -> None:
    raise RowError(
        f"{example.name}: with {type(processor).__name__}, the labels are on {labelled!r:.200}, but the answers are "
        f"{answers!r:.200}; the chat template or the tokenizer rewrites them. Put {{% generation %}} markers around exactly what "
        "the assistant says and the end of its turn.",
        "labels",
    )


def _last_trained(example: Example) -> Message:
    """Return the last assistant turn that is trained on; a template may cut thoughts from those before."""
    turns = [message for message in example.messages if message["role"] == "assistant"]
    return next(turn for turn in reversed(turns) if turn.get("weight", 1.0) > 0)


def _holds(text: str, pieces: Sequence[str]) -> bool:
    """Whether the pieces stand in a text one after the other, blanks aside."""
    text, at = "".join(text.split()), 0
    pieces = ["".join(piece.split()) for piece in pieces]
    for piece in pieces:
        at = text.find(piece, at) + len(piece)
        if at < len(piece):
            return False
    return True


def _labelled_text(text: str, spans: Sequence[WeightedSpan], replacements: Sequence[Mapping[str, Any]]) -> str:
    """Return the characters of the expanded text that are trained on."""
    expanded = expanded_text(text, replacements)
    chosen = bytearray(len(expanded))
    for start, end, weight in spans:
        begin, stop = (expanded_position(char, replacements) for char in (start, end))
        chosen[begin:stop] = bytes([weight > 0]) * (stop - begin)
    for placeholder in replacements:
        begin, stop = placeholder["new_span"]
        if placeholder["type"] != "text":
            chosen[begin:stop] = bytes(stop - begin)
    return "".join(char for char, taken in zip(expanded, chosen, strict=True) if taken)


def _canonical(tokenizer: Any, text: str) -> str:
    """Return what a tokenizer takes a text for: its spelling of letters, no blank at the borders."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    text = normalizer.normalize_str(text) if normalizer is not None else text
    return text.replace("\u2581", " ").strip()  # SentencePiece's blank
