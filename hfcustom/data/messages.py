"""Row -> messages: one row of a data set, checked and brought into the one form that the collator reads.

A row is {"messages": [{"role", "content"}, ...], "images": [...]}: content is a string or a list of blocks
{"type": "text", "text": ...} and {"type": "image"}, whose images come in order from "images", or inline as
{"type": "image", "image": ...}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.data.images import load_image
from hfcustom.naming import unknown

ROLES = ("assistant", "system", "user")
FORM = "{'messages': [...], 'images': [...]}"


class RowError(ValueError):
    """A row that cannot be used; the message names the row, the field and the cure."""


@dataclass(frozen=True)
class Example:
    """A checked row: messages whose content is a list of blocks, and their images in order of appearance."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    name: str  # where the row comes from, for every message about it


def read_row(row: Mapping[str, Any], name: str, root: Path | None = None) -> Example:
    """Check one row and load its images; RowError names the row, the field, the value and the cure."""
    if not isinstance(row, Mapping):
        raise RowError(f"{name}: {type(row).__name__}, no mapping; a row is {FORM}.")
    if not isinstance(row.get("messages"), list) or not row["messages"]:
        found = ", ".join(row) or "nothing"
        raise RowError(f"{name}: no list of messages (columns: {found}); a row is {FORM}.")
    if isinstance(row["messages"][0], Mapping) and row["messages"][0].get("role") == "assistant":
        raise RowError(f"{name}, message 0: a conversation starts with a user or system turn, not the assistant's.")
    images = row.get("images") or []
    if not isinstance(images, list | tuple):
        raise RowError(f"{name}: images is {type(images).__name__}; it must be a list, also of one image.")
    pending = list(images)
    given = len(pending)
    messages, sources = [], []
    for turn, message in enumerate(row["messages"]):
        where = f"{name}, message {turn}"
        blocks = []
        for block in _blocks(message, where):
            if block["type"] == "image":
                sources.append(_source(block, pending, given, where))
                blocks.append({"type": "image"})
            else:
                blocks.append(block)
        messages.append({"role": message["role"], "content": blocks})
    if pending:
        raise RowError(
            f"{name}: {given} images, but only {given - len(pending)} {{'type': 'image'}} blocks use them; "
            "put a block where each image belongs."
        )
    return Example(messages, [_load(source, at, name, root) for at, source in enumerate(sources)], name)


def _blocks(message: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise RowError(f"{where}: {unknown('role', role, ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RowError(f"{where}: content is {type(content).__name__}; it must be a string or a list of blocks.")
    return [_block(block, where) for block in content]


def _block(block: Any, where: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else block
    if kind not in ("image", "text"):
        raise RowError(f"{where}: {unknown('block type', kind, ('image', 'text'))}")
    if kind == "text" and not isinstance(block.get("text"), str):
        raise RowError(f"{where}: a text block's 'text' is {type(block.get('text')).__name__}; it must be a string.")
    return {key: value for key, value in block.items() if value is not None}  # Arrow fills missing keys with None


def _source(block: dict[str, Any], pending: list[Any], given: int, where: str) -> Any:
    inline = [block[key] for key in ("image", "path") if key in block]
    if inline:
        return inline[0]
    if not pending:
        raise RowError(f"{where}: more {{'type': 'image'}} blocks than the row's {given} images; list every image.")
    return pending.pop(0)


def _load(source: Any, at: int, name: str, root: Path | None) -> Image.Image:
    try:
        return load_image(source, root)
    except (ValueError, OSError) as error:
        raise RowError(f"{name}, image {at}: {error}") from error


def split_answer(example: Example) -> tuple[list[dict[str, Any]], str]:
    """Return the messages before the last assistant turn, and that turn's text; RowError when there is none."""
    if example.messages[-1]["role"] != "assistant":
        raise RowError(f"{example.name}: the last turn is not the assistant's, so there is no answer to compare with.")
    answer = "".join(block["text"] for block in example.messages[-1]["content"] if block["type"] == "text")
    return example.messages[:-1], answer
