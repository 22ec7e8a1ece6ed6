"""What the data tests share: conversations, the runs of labelled tokens, a template with {% generation %} markers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from conftest import picture

from hfcustom.data.collate import Collator
from hfcustom.data.control import image_marks
from hfcustom.losses import IGNORE

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(block) if isinstance(block, str) else block for block in blocks]}


def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
    images = sum(block == IMAGE for message in turns for block in message["content"])
    return {"messages": list(turns), "images": [picture(seed, (50 + 9 * seed, 30)) for seed in range(images)]}


def labelled(processor: Any, labels: torch.Tensor) -> list[str]:
    """Return the text of each run of labelled tokens."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [processor.tokenizer.decode(run) for run in runs if run]


def end_of_turn(processor: Any) -> str:
    """Return what the template writes after an answer."""
    row = {"messages": [{"role": "user", "content": [text("q")]}, {"role": "assistant", "content": [text("ANSWER")]}]}
    return processor.apply_chat_template(row["messages"]).split("ANSWER")[1]


def placeholder_text(processor: Any) -> str:
    """Return what the template writes for an image, less the tokens, which are never trained on."""
    messages = [{"role": "user", "content": [text("BEFORE"), IMAGE, text("AFTER")]}]
    rendered = processor.apply_chat_template(messages).split("BEFORE")[1].split("AFTER")[0]
    for mark in image_marks(processor):
        rendered = rendered.replace(mark, "")
    return rendered


def glued_blank(processor: Any) -> str:
    """Return the blank that the processor itself writes between an image and a word, as part of the word's token."""
    row = conversation(turn("user", "Draw."), turn("assistant", IMAGE, "AFTER"))
    written = processor.tokenizer.decode(Collator(processor)([row])["input_ids"][0])
    return " " if " AFTER" in written and " AFTER" not in processor.apply_chat_template(row["messages"]) else ""


def with_markers(processor: Any) -> Any:
    """Return a copy whose template marks the assistant's part, as training templates on the hub do."""
    template = processor.chat_template
    begin = template.index("{% if message['content'] is string %}")
    end = template.index("{% endfor %}{% if add_generation_prompt %}")
    body = template[begin:end]
    marked = "{% if message['role'] == 'assistant' %}{%- generation -%}" + body + "{% endgeneration %}{% else %}"
    processor = copy.copy(processor)
    processor.chat_template = template[:begin] + marked + body + "{% endif %}" + template[end:]
    return processor
