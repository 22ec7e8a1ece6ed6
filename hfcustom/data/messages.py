"""Row -> messages: one row of a data set, checked and brought into the one form that the collator reads.

An ordinary row is {"messages": [{"role", "content"}, ...], "images": [...]}: content is a string or a list of blocks
{"type": "text", "text": ...} and {"type": "image"}, whose images come in order from "images", or inline as
{"type": "image", "image": ...}. A preference row has trl's columns: "chosen" and "rejected", each a whole conversation, or
the answer to a "prompt"; or "prompt", "completion" and a true or false "label". Both answers see the same images. A row of
a contrastive encoder is an image and its text: {"image": ..., "text": ...}, the text perhaps called "caption". All other
columns of a row are kept as they are (hfcustom/data/columns.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.data.images import load_image
from hfcustom.data.turns import (
    Message,
    RowError,
    Turn,
    as_prompt,
    check_answers,
    check_turns,
    place_images,
    without_weights,
)

FORM = (
    "{'messages': [...], 'images': [...]}, or for preferences {'prompt': ..., 'chosen': ..., 'rejected': ...} or "
    "{'prompt': ..., 'completion': ..., 'label': true}, or for contrastive encoders {'image': ..., 'text': ...}"
)
CAPTIONS = ("text", "caption")  # what the text of an image is called
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Example:
    """A checked row: messages whose content is a list of blocks, and their images in order of appearance."""

    messages: list[Message]  # of a pair, the chosen conversation
    images: list[Image.Image]
    name: str  # where the row comes from, for every message about it
    rejected: list[Message] | None = None  # of a pair, the other conversation, with the same images
    preferred: bool | None = None  # of an answer judged alone
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other keys


def read_row(row: Mapping[str, Any], name: str, root: Path | None = None) -> Example:
    """Check one row and load its images; RowError names the row, the field, the value and the cure."""
    if not isinstance(row, Mapping):
        raise RowError(f"{name}: {type(row).__name__}, no mapping; a row is {FORM}.")
    given = {key: value for key, value in row.items() if value is not None}  # Arrow fills missing keys with None
    if "messages" not in given and any(key in given for key in CAPTIONS) and ("image" in given or "images" in given):
        return _take_caption(given, name, root)
    images = given.pop("images", None) or []
    if not isinstance(images, list | tuple):
        raise RowError(f"{name}: images is {type(images).__name__}; it must be a list, also of one image.")
    if "messages" not in given and ("chosen" in given or "rejected" in given):
        chosen, rejected, loaded = _place_pair(_take_pair(given, name, len(images)), images, name, root)
        for side, messages in zip(SIDES, (chosen, rejected), strict=True):
            check_answers(messages, f"{name}, {side}: message")
        return Example(chosen, loaded, name, rejected=rejected, columns=given)
    if "messages" not in given and "completion" in given:
        turns = _take_completion(given, name, len(images))
    else:
        turns = _take_messages(given, row, name)
    preferred = given.pop("label") if isinstance(given.get("label"), bool) else None
    messages, sources = place_images(turns, images, name)
    check_answers(messages, f"{name}, message")
    return Example(messages, _load_images(sources, name, root), name, preferred=preferred, columns=given)


# ---- the forms of a row: each takes its own keys out of `row`, what is left are columns ------------------------------


def _take_caption(row: dict[str, Any], name: str, root: Path | None) -> Example:
    """Return an image and its text as one user turn."""
    for keys in (CAPTIONS, ("image", "images")):
        if all(key in row for key in keys):
            raise RowError(f"{name}: both {keys[0]!r} and {keys[1]!r}; drop the column that is not meant.")
    images = [row.pop("image")] if "image" in row else row.pop("images")
    if not isinstance(images, list | tuple) or len(images) != 1:
        found = f"{len(images)} of them" if isinstance(images, list | tuple) else type(images).__name__
        raise RowError(
            f"{name}: images is {found}; a row with a text holds one image, a list of one or under 'image'."
        )
    key = next(key for key in CAPTIONS if key in row)
    text = row.pop(key)
    if not isinstance(text, str):
        raise RowError(f"{name}: {key} is {type(text).__name__}; it must be a string. Write a row for each text.")
    blocks = [{"type": "image"}, {"type": "text", "text": text}]
    return Example([{"role": "user", "content": blocks}], _load_images(images, name, root), name, columns=row)


def _take_messages(row: dict[str, Any], full_row: Mapping[str, Any], name: str) -> list[Turn]:
    messages = row.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        found = ", ".join(full_row) or "nothing"
        raise RowError(f"{name}: no list of messages (columns: {found}); a row is {FORM}.")
    if both := [key for key in (*SIDES, "completion") if key in row]:
        raise RowError(
            f"{name}: both 'messages' and {both[0]!r}, so it could be read as an ordinary row or as a preference row; drop "
            "the column that is not meant."
        )
    return _conversation(messages, f"{name}, message")


def _take_pair(row: dict[str, Any], name: str, num_images: int) -> tuple[list[Turn], list[Turn]]:
    for side, other in (SIDES, SIDES[::-1]):
        if side not in row:
            raise RowError(f"{name}: {other!r} without {side!r}; a pair has both. A row is {FORM}.")
    answers = {side: row.pop(side) for side in SIDES}
    if "prompt" in row:
        prompt = _prompt(row.pop("prompt"), name, num_images)
        chosen, rejected = (prompt + _answer(answers[side], name, side) for side in SIDES)
        _common(chosen, rejected, name)
        return chosen, rejected
    chosen, rejected = (_whole(answers[side], name, side) for side in SIDES)
    same = _common(chosen, rejected, name)
    for side, turns in zip(SIDES, (chosen, rejected), strict=True):
        if not any(message["role"] == "assistant" for _, message in turns[same:]):
            raise RowError(
                f"{name}: {side} has no assistant turn after the {same} messages that both conversations begin with, so "
                "there is no answer to compare; add it, or drop the row."
            )
    return as_prompt(chosen[:same]) + chosen[same:], as_prompt(rejected[:same]) + rejected[same:]


def _take_completion(row: dict[str, Any], name: str, num_images: int) -> list[Turn]:
    completion = row.pop("completion")
    if not isinstance(row.get("label"), bool):
        raise RowError(
            f"{name}: label is {row.get('label')!r}; beside 'completion' it must be true (preferred) or false. For ordinary "
            "training write the row as {'messages': [...]}."
        )
    if "prompt" not in row:
        raise RowError(f"{name}: 'completion' without 'prompt', so there is no question it answers; add the prompt.")
    return _prompt(row.pop("prompt"), name, num_images) + _answer(completion, name, "completion")


def _conversation(messages: list[Any], where: str) -> list[Turn]:
    if isinstance(messages[0], Mapping) and messages[0].get("role") == "assistant":
        raise RowError(f"{where} 0: a conversation starts with a user or system turn, not the assistant's.")
    return check_turns(messages, where)


def _prompt(prompt: Any, name: str, num_images: int) -> list[Turn]:
    """Return the turns before an answer; a string is one user turn, whose images come before the text."""
    if isinstance(prompt, str):
        blocks = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": blocks}]
    turns = _conversation(_nonempty(prompt, name, "prompt"), f"{name}, prompt message")
    if turns[-1][1]["role"] == "assistant":
        raise RowError(
            f"{turns[-1][0]}: the prompt ends with an assistant turn, so there is nothing to answer; move the turn to the "
            "front of each answer, or end with a user turn."
        )
    return as_prompt(turns)


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


# ---- images ---------------------------------------------------------------------------------------------------------


def _place_pair(
    turns: tuple[list[Turn], list[Turn]], given: Sequence[Any], name: str, root: Path | None
) -> tuple[list[Message], list[Message], list[Image.Image]]:
    """Return both conversations and the images, which must be the same for both."""
    counts = [sum(block["type"] == "image" for _, turn in side for block in turn["content"]) for side in turns]
    if counts[0] != counts[1]:
        raise RowError(
            f"{name}: chosen has {counts[0]} {{'type': 'image'}} blocks and rejected {counts[1]}; both answers are about the "
            "same images, so write the same blocks in both."
        )
    chosen, sources = place_images(turns[0], given, name)
    rejected, others = place_images(turns[1], given, name)
    images = _load_images(sources, name, root)
    for at, (source, other) in enumerate(zip(sources, others, strict=True)):
        if other is not source and _load(other, at, f"{name}, rejected", root) != images[at]:
            raise RowError(
                f"{name}, image {at}: chosen shows another image than rejected; both answers must be about the same images."
            )
    return chosen, rejected, images


def _load_images(sources: Sequence[Any], name: str, root: Path | None) -> list[Image.Image]:
    return [_load(source, at, name, root) for at, source in enumerate(sources)]


def _load(source: Any, at: int, name: str, root: Path | None) -> Image.Image:
    try:
        return load_image(source, root)
    except (ValueError, OSError) as error:
        raise RowError(f"{name}, image {at}: {error}") from error


# ---- splitting off the answer ---------------------------------------------------------------------------------------


def split_answer(example: Example) -> tuple[list[Message], str]:
    """Return the messages before the last assistant turn, and that turn's text; of a pair, the chosen answer's.

    Raises RowError when there is none, and for an answer that is marked as not preferred.
    """
    if example.messages[-1]["role"] != "assistant":
        raise RowError(f"{example.name}: the last turn is not the assistant's, so there is no answer to compare with.")
    if example.preferred is False:
        raise RowError(
            f"{example.name}: label is False, so its answer is not the right one to compare with; evaluate on rows whose "
            "label is true."
        )
    answer = "".join(block["text"] for block in example.messages[-1]["content"] if block["type"] == "text")
    return without_weights(example.messages[:-1]), answer
