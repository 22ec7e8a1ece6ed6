"""Turns: a conversation checked message by message, its loss weights included, and its blocks given their images and videos.

A checked message is {"role": ..., "content": [blocks]}, on assistant turns perhaps with "weight", the factor of its
tokens in the loss; a text block of an assistant turn may have one too, which multiplies the turn's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfcustom.exits import EXIT_DATA, RunError
from hfcustom.naming import printable, unknown

ROLES = ("assistant", "system", "user")
BLOCKS = ("image", "text", "video")
MAX_WEIGHT = 3e38  # float32 holds no more

Message = dict[str, Any]
Turn = tuple[str, Message]  # where it stands, for every message about it, and the checked message


class RowError(RunError, ValueError):
    """A row that cannot be used; the message names the row, the field and the cure, `code` the reason in one word."""

    exit_code = EXIT_DATA

    def __init__(self, message: str, code: str = "form") -> None:
        super().__init__(printable(message))
        self.code = code


def check_turns(messages: Sequence[Any], where: str) -> list[Turn]:
    """Check messages; `where` becomes "row 3, message 0" and so on. RowError names the value, what is allowed, the cure."""
    return [(f"{where} {at}", _check_turn(message, f"{where} {at}")) for at, message in enumerate(messages)]


def _check_turn(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise RowError(f"{where}: {unknown('role', role, ROLES)}", "role")
    turn = {"role": message["role"], "content": _blocks(message, where)}
    if message.get("weight") is not None:  # Arrow fills missing keys with None
        turn["weight"] = _check_weight(message["weight"], turn["role"], where)
    for at, block in enumerate(turn["content"]):
        if "weight" not in block:
            continue
        block["weight"] = _check_weight(block["weight"], turn["role"], f"{where}, block {at}")
        if block["type"] != "text":
            raise RowError(
                f"{where}, block {at}: {_shown_block(block['type'])} is never trained on, so its weight has no effect; leave it out."
            )
    return turn


def _blocks(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str) or _is_integer(content):
        return [{"type": "text", "text": _text(content, f"{where}: content")}]
    if not isinstance(content, list | tuple):
        raise RowError(f"{where}: content is {_shown(content)}; it must be a string or a list of blocks.", "content")
    return [_block(block, f"{where}, block {at}") for at, block in enumerate(content)]


def _block(block: Any, where: str) -> dict[str, Any]:
    if isinstance(block, str):
        return {"type": "text", "text": _text(block, where)}
    if isinstance(block, Mapping):
        block = {key: value for key, value in block.items() if value is not None}  # Arrow fills missing keys with None
        if "type" not in block and "text" in block:
            block["type"] = "text"
    kind = block.get("type") if isinstance(block, Mapping) else block
    if kind not in BLOCKS:
        raise RowError(f"{where}: {unknown('block type', kind, BLOCKS)}", "block")
    if kind == "text":
        block["text"] = _text(block.get("text"), f"{where}: a text block's 'text'")
    return dict(block)


def _text(value: Any, where: str) -> str:
    """Return words as a string; of numbers only whole ones have one spelling."""
    if not isinstance(value, str) and not _is_integer(value):
        raise RowError(f"{where} is {_shown(value)}; it must be a string.", "content")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds {text[error.start]!a} at character {error.start}, half of a letter (a lone surrogate), which no "
            "tokenizer can read; repair the text, or drop the row.",
            "surrogate",
        ) from None
    return text


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    number = isinstance(value, float | bool | np.generic)
    return f"{value!r:.40} ({type(value).__name__})" if number else type(value).__name__


def check_answers(messages: Sequence[Message], where: str) -> None:
    """Refuse an answer without words: training on it teaches to say nothing. Answers of weight 0 are not trained on."""
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if not any(block["type"] == "text" and block["text"].strip() for block in message["content"]):
            raise RowError(
                f"{where} {at}: the assistant's answer is {_wordless(message)}, so there is nothing to learn from it; fill it "
                "in, give the message weight 0 so that it is not trained on, or drop the row.",
                "empty_answer",
            )


def turn_weights(messages: Sequence[Message], train_on: str) -> list[float]:
    """Return the weight of each message; of "last", the assistant's turns before the last weigh nothing."""
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    weights = [message.get("weight", 1.0) for message in messages]
    if train_on == "last":
        weights = [weight if at == turns[-1] else 0.0 for at, weight in enumerate(weights)] if turns else []
    return weights


def check_trained(messages: Sequence[Message], name: str, train_on: str = "assistant") -> None:
    """Refuse a row of which no turn is trained on."""
    weights = turn_weights(messages, train_on)
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(weights[at] > 0 for at in turns):
        found = "every assistant turn has weight 0" if turns else "no assistant turn"
        raise RowError(f"{name}: {found}, so there is nothing to learn from it.", "no_labels")


def _wordless(message: Message) -> str:
    if shown := [block["type"] for block in message["content"] if block["type"] != "text"]:
        return f"{_shown_block(shown[0])} without words"
    return "blank" if any(block.get("text") for block in message["content"]) else "empty"


def _shown_block(kind: str) -> str:
    return "an image" if kind == "image" else f"a {kind}"


def _check_weight(weight: Any, role: str, where: str) -> float:
    number = isinstance(weight, int | float | np.integer | np.floating) and not isinstance(weight, bool)
    if not number or not 0 <= weight <= MAX_WEIGHT:
        raise RowError(
            f"{where}: weight is {weight!r:.40}; it must be a finite number of at least 0 (0: not trained on, 1: as without "
            "it). Write such a number, or leave it out."
        )
    if role != "assistant":
        raise RowError(
            f"{where}: weight {weight!r} on a turn of the {role} has no effect, since only the assistant's are trained on; "
            "leave it out."
        )
    return float(weight)


def without_weights(messages: Sequence[Message]) -> list[Message]:
    """Return the messages as a chat template may see them: no weight can change a text."""
    return [
        {
            "role": message["role"],
            "content": [
                {key: value for key, value in block.items() if key != "weight"} for block in message["content"]
            ],
        }
        for message in messages
    ]


def as_prompt(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with weight 0 on the assistant's: only what answers a prompt is trained on."""
    for where, message in turns:
        if message.get("weight", 0) != 0 or any("weight" in block for block in message["content"]):
            raise RowError(
                f"{where}: a weight in the prompt of an answer has no effect, since only answers to it are trained on; leave it "
                "out."
            )
    return [
        (where, {**message, "weight": 0.0} if message["role"] == "assistant" else message) for where, message in turns
    ]


def place_media(
    turns: Sequence[Turn], media: Mapping[str, Sequence[Any]], name: str
) -> tuple[list[Message], dict[str, list[Any]]]:
    """Return the messages with bare image and video blocks, and the source of each, by type: its own, else the next listed.

    `media` holds the row's lists by block type, {"image": [...], "video": [...]}.
    """
    pending = {kind: list(listed) for kind, listed in media.items()}
    sources: dict[str, list[Any]] = {kind: [] for kind in media}
    messages = []
    for where, message in turns:
        blocks = []
        for block in message["content"]:
            kind = block["type"]
            if kind != "text":
                sources[kind].append(_source(block, pending[kind], len(media[kind]), where))
                block = {"type": kind}
            blocks.append(block)
        messages.append({**message, "content": blocks})
    for kind, left in pending.items():
        if left:
            raise RowError(
                f"{name}: {len(media[kind])} {kind}s, but only {len(media[kind]) - len(left)} {{'type': '{kind}'}} blocks use "
                f"them; put a block where each {kind} belongs.",
                "image_count",
            )
    return messages, sources


def _source(block: dict[str, Any], pending: list[Any], given: int, where: str) -> Any:
    kind = block["type"]
    inline = [block[key] for key in (kind, "path", "url") if key in block]
    if inline:
        return inline[0]
    if not pending:
        raise RowError(
            f"{where}: more {{'type': '{kind}'}} blocks than the row's {given} {kind}s; list every {kind}.",
            "image_count",
        )
    return pending.pop(0)
