"""The forms in which rows come, FORMS at the bottom: each takes its own keys out of a row and returns checked turns.

A row's own keys tell its form. `messages` is the chat form of Hugging Face; `conversations` that of LLaVA and ShareGPT, with
turns {"from": "human", "value": ...} and tags <image> in their texts; `chosen` and `rejected` are whole conversations or
answers to a `prompt` (trl); `completion` answers a `prompt`, perhaps with a `label` that judges it; `caption` or `text` says
what images or videos show. A row of two forms is refused: only its owner knows which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from PIL import Image

from hfcustom.data.turns import RowError, Turn, as_prompt, check_turns, without_weights

SIDES = ("chosen", "rejected")
MEDIA = {"image": "images", "video": "videos"}  # block type -> the row's list of them
SPEAKERS = {"gpt": "assistant", "human": "user"}  # ShareGPT's names; others are roles
TAG = re.compile(r"\n?<(image|video)>\n?")


@dataclass(frozen=True)
class Form:
    """One form of a row: the keys that tell it, what messages call such a row, and its conversion."""

    keys: tuple[str, ...]
    kind: str
    take: Callable[[dict[str, Any], str, Mapping[str, int]], Parsed]  # (row, its name, how many of each medium)
    needs_media: bool = False  # its keys are those of many other columns too, so alone they tell nothing


@dataclass(frozen=True)
class Parsed:
    """A row's turns; of a pair `rejected` beside them, of a judged answer whether it is `preferred`."""

    turns: list[Turn]
    rejected: list[Turn] | None = None
    preferred: bool | None = None


def find_form(row: Mapping[str, Any], name: str, media: Mapping[str, int], columns: Sequence[str]) -> Form:
    """Return the form of a row that has `media` images and videos; RowError for a row of none, or of two.

    `columns` are all its keys, of which `row` may lack those that were taken already.
    """
    found = [form for form in FORMS.values() if not form.needs_media and any(key in row for key in form.keys)]
    if not found and any(media.values()):
        found = [form for form in FORMS.values() if form.needs_media and any(key in row for key in form.keys)]
    if len(found) > 1:
        found.sort(key=lambda form: form is not FORMS["messages"])
        first, second = ([key for key in form.keys if key in row][0] for form in found[:2])
        raise RowError(
            f"{name}: both {first!r} and {second!r}, so it could be read as {found[0].kind} or as {found[1].kind}; drop the "
            "column that is not meant."
        )
    if not found:
        known = [key for form in FORMS.values() for key in form.keys]
        near = [(key, *close) for key in columns if (close := get_close_matches(key, known, n=1, cutoff=0.8))]
        hint = "".join(f" Did you mean {right!r} by {wrong!r}?" for wrong, right in near if wrong != right)
        raise RowError(
            f"{name}: no list of messages (columns: {', '.join(columns) or 'nothing'}); a row is {FORM}.{hint}"
        )
    return found[0]


def take_media(row: dict[str, Any], name: str) -> dict[str, list[Any]]:
    """Take a row's images and videos out of it, by block type; a single one may stand under `image` or `video`."""
    media: dict[str, list[Any]] = {}
    for single, several in MEDIA.items():
        alone = row.get(single)
        if several in row and _is_medium(alone):
            raise RowError(f"{name}: both {single!r} and {several!r}; drop the column that is not meant.")
        if several not in row and _is_medium(alone):
            del row[single]
            row[several] = list(alone) if single == "image" and isinstance(alone, list | tuple) else [alone]
        values = row.pop(several, None) or []
        if not isinstance(values, list | tuple):
            raise RowError(
                f"{name}: {several} is {type(values).__name__}; it must be a list, also of one {single}, which may stand "
                f"alone under {single!r}."
            )
        media[single] = list(values)
    return media


def _is_medium(value: Any) -> bool:
    """Whether a column called `image` or `video` holds some, rather than a number or whatever else has that name."""
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_medium(item) for item in value)
    return isinstance(value, str | bytes | Mapping | Image.Image)


# ---- the forms: each takes its own keys out of `row`, what is left are columns --------------------------------------


def _take_messages(row: dict[str, Any], name: str, media: Mapping[str, int]) -> Parsed:
    messages = row.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{name}: messages is {messages!r:.40}, no list of messages; a row is {FORM}.")
    preferred = row.pop("label") if isinstance(row.get("label"), bool) else None
    return Parsed(_conversation(messages, f"{name}, message"), preferred=preferred)


def _take_conversations(row: dict[str, Any], name: str, media: Mapping[str, int]) -> Parsed:
    turns = _nonempty(row.pop("conversations"), name, "conversations")
    messages = [_from_sharegpt(turn) for turn in turns]
    if isinstance(row.get("system"), str):
        messages.insert(0, {"role": "system", "content": row.pop("system")})
    return Parsed(_conversation(messages, f"{name}, turn"))


def _from_sharegpt(turn: Any) -> Any:
    """Return {"from", "value"} as {"role", "content"} with the tags as blocks; whatever else it has is kept."""
    if not isinstance(turn, Mapping):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}  # Arrow fills missing keys with None
    speaker = turn.pop("from", None) or turn.pop("role", None)
    words = turn.pop("value") if "value" in turn else turn.pop("content", None)
    content = _tagged_blocks(words) if isinstance(words, str) else words
    return {
        **turn,
        "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
        "content": content,
    }


def _tagged_blocks(text: str) -> str | list[dict[str, Any]]:
    """Return a text with <image> and <video> in it as blocks; a line break beside a tag belongs to the tag."""
    pieces = TAG.split(text)  # text, tag, text, tag, ..., text
    if len(pieces) == 1:
        return text
    blocks: list[dict[str, Any]] = []
    for at, piece in enumerate(pieces):
        if at % 2:
            blocks.append({"type": piece})
        elif piece:
            blocks.append({"type": "text", "text": piece})
    return blocks


def _take_pair(row: dict[str, Any], name: str, media: Mapping[str, int]) -> Parsed:
    for side, other in (SIDES, SIDES[::-1]):
        if side not in row:
            raise RowError(f"{name}: {other!r} without {side!r}; a pair has both. A row is {FORM}.")
    answers = {side: row.pop(side) for side in SIDES}
    if "prompt" in row:
        prompt = as_prompt(_prompt(row.pop("prompt"), name, media))
        chosen, rejected = (prompt + _answer(answers[side], name, side) for side in SIDES)
        _common(chosen, rejected, name)
        return Parsed(chosen, rejected)
    chosen, rejected = (_whole(answers[side], name, side) for side in SIDES)
    same = _common(chosen, rejected, name)
    for side, turns in zip(SIDES, (chosen, rejected), strict=True):
        if not any(message["role"] == "assistant" for _, message in turns[same:]):
            raise RowError(
                f"{name}: {side} has no assistant turn after the {same} messages that both conversations begin with, so "
                "there is no answer to compare; add it, or drop the row."
            )
    return Parsed(as_prompt(chosen[:same]) + chosen[same:], as_prompt(rejected[:same]) + rejected[same:])


def _take_completion(row: dict[str, Any], name: str, media: Mapping[str, int]) -> Parsed:
    """Read an answer to a prompt: an ordinary row of which the completion is trained on, or with a label a judged one."""
    completion, judged = row.pop("completion"), "label" in row
    label = row.pop("label", None)
    if judged and not isinstance(label, bool):
        raise RowError(
            f"{name}: label is {label!r}; beside 'completion' it must be true (preferred) or false. For ordinary training drop "
            "the column 'label'."
        )
    if "prompt" not in row:
        raise RowError(f"{name}: 'completion' without 'prompt', so there is no question it answers; add the prompt.")
    prompt = as_prompt(_prompt(row.pop("prompt"), name, media))
    return Parsed(prompt + _answer(completion, name, "completion"), preferred=label)


def _take_caption(row: dict[str, Any], name: str, media: Mapping[str, int]) -> Parsed:
    """Read a text as the answer to what it describes; contrastive encoders take the two as a pair."""
    keys = [key for key in ("text", "caption") if key in row]
    if len(keys) > 1:
        raise RowError(f"{name}: both 'text' and 'caption'; drop the column that does not say what is to be seen.")
    blocks = [{"type": kind} for kind in MEDIA for _ in range(media[kind])]
    words = row.pop(keys[0])
    if not isinstance(words, str):
        raise RowError(f"{name}: {keys[0]} is {type(words).__name__}; it must be a string. Write a row for each text.")
    if not words.strip():
        reason = f"{name}: its {keys[0]} is empty ({words!r}), so it says nothing of its image; drop the row."
        raise RowError(reason, "empty_answer")
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": words}]
    return Parsed(check_turns(messages, f"{name}, message"))


# ---- parts of them --------------------------------------------------------------------------------------------------


def _conversation(messages: list[Any], where: str) -> list[Turn]:
    messages = [
        _from_sharegpt(turn) if isinstance(turn, Mapping) and turn.get("from") is not None else turn
        for turn in messages
    ]
    if isinstance(messages[0], Mapping) and messages[0].get("role") == "assistant":
        raise RowError(f"{where} 0: a conversation starts with a user or system turn, not the assistant's.")
    return check_turns(messages, where)


def _prompt(prompt: Any, name: str, media: Mapping[str, int]) -> list[Turn]:
    """Return the turns before an answer; a string is one user turn, whose images come before the text or at its tags."""
    if isinstance(prompt, str):
        content = _tagged_blocks(prompt) if any(media.values()) else prompt
        if isinstance(content, str):
            content = [{"type": kind} for kind in MEDIA for _ in range(media[kind])]
            content.append({"type": "text", "text": prompt})
        prompt = [{"role": "user", "content": content}]
    turns = _conversation(_nonempty(prompt, name, "prompt"), f"{name}, prompt message")
    if turns[-1][1]["role"] == "assistant":
        raise RowError(
            f"{turns[-1][0]}: the prompt ends with an assistant turn, so there is nothing to answer; move the turn to the "
            "front of each answer, or end with a user turn."
        )
    return turns


def _answer(answer: Any, name: str, key: str) -> list[Turn]:
    """Return the turns that answer a prompt; a string is one assistant turn."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    turns = check_turns(_nonempty(answer, name, key), f"{name}, {key} message")
    if turns[0][1]["role"] != "assistant":
        raise RowError(
            f"{turns[0][0]}: role {turns[0][1]['role']!r}; beside a 'prompt', {key} starts with the assistant's answer. Cut "
            "the prompt from it, or drop the column 'prompt' where chosen and rejected are whole conversations."
        )
    return turns


def _whole(messages: Any, name: str, side: str) -> list[Turn]:
    if isinstance(messages, str):
        raise RowError(
            f"{name}: {side} is a string and there is no 'prompt', so there is no question; add the prompt."
        )
    return _conversation(_nonempty(messages, name, side), f"{name}, {side} message")


def _nonempty(messages: Any, name: str, key: str) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else type(messages).__name__
        raise RowError(f"{name}: {key} is {found}; it must be a list of messages, or a string.")
    return messages


def _common(chosen: list[Turn], rejected: list[Turn], name: str) -> int:
    """Return how many leading messages are the same; weights do not make a difference."""
    first, second = (without_weights([message for _, message in turns]) for turns in (chosen, rejected))
    if first == second:
        raise RowError(f"{name}: chosen and rejected are the same, so there is nothing to prefer; drop the row.")
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


FORMS = {
    "captions": Form(("text", "caption"), "a caption", _take_caption, needs_media=True),
    "completions": Form(("completion",), "an answer to a prompt", _take_completion),
    "conversations": Form(("conversations",), "a LLaVA or ShareGPT row", _take_conversations),
    "messages": Form(("messages",), "an ordinary row", _take_messages),
    "pairs": Form(SIDES, "a preference row", _take_pair),
}
FORM = (
    "{'messages': [...], 'images': [...]}, {'conversations': [...], 'image': ...}, {'prompt': ..., 'completion': ...}, "
    "{'image': ..., 'text': ...}, or for preferences {'prompt': ..., 'chosen': ..., 'rejected': ...} or "
    "{'prompt': ..., 'completion': ..., 'label': true}"
)
