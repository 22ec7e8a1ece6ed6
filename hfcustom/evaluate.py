"""Evaluation by generation: what the model says on held-out rows, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hfcustom.data.collate import process
from hfcustom.data.control import ControlTokens
from hfcustom.data.messages import Example, split_answer
from hfcustom.data.mixtures import Mixture
from hfcustom.data.sources import Examples
from hfcustom.distributed.sharding import gathered, is_sharded
from hfcustom.distributed.shared_work import over_ranks


@dataclass(frozen=True)
class Answer:
    """One held-out row: what was asked, what the model said, what was right."""

    example: Example
    question: str
    answer: str
    truth: str


def generate_answers(
    model: Any,
    processor: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    title: str = "",
    allowed_tokens: Sequence[str] = (),
    share: bool | None = None,
) -> list[Answer]:
    """Let the model answer the last turn of each row, greedily; RowError for a row that ends with no assistant turn.

    `allowed_tokens` are control tokens that texts may hold as such, as in training. In the `evaluate` of fit() the processes
    share the batches, and each gets all answers, those that one process would give; `share` says so elsewhere, or not to.
    """
    examples, control = Examples(rows), ControlTokens(processor, allowed_tokens)
    read = cache(examples.__getitem__)
    chunks = [range(start, min(start + batch_size, len(examples))) for start in range(0, len(examples), batch_size)]
    sharded = is_sharded(model)
    kinds = [_kind([read(at) for at in chunk]) for chunk in chunks] if sharded else None
    options = {"max_new_tokens": max_new_tokens, **({"synced_gpus": True} if sharded else {})}

    def answer(chunk: range) -> list[tuple[str, str, str]]:
        return _answer_batch(model, processor, control, [read(at) for at in chunk], options)

    was_training = model.training
    model.eval()
    with gathered(model):
        found = over_ranks(answer, chunks, kinds=kinds, share=share, title=title or "answering")
    model.train(was_training)
    said = [texts for chunk in found for texts in chunk]
    return [Answer(read(at), *texts) for at, texts in enumerate(said)]


def _kind(examples: list[Example]) -> tuple[bool, bool]:
    """Return what the prompts of a batch show, which decides what of a model runs."""
    asked = [_without_answer(example, split_answer(example)[0]) for example in examples]
    return any(row.images for row in asked), any(row.videos for row in asked)


@torch.no_grad()
def _answer_batch(
    model: Any, processor: Any, control: ControlTokens, examples: list[Example], options: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Return question, answer and truth of each row."""
    prompts, truths = zip(*(split_answer(example) for example in examples), strict=True)
    asked = [_without_answer(example, prompt) for example, prompt in zip(examples, prompts, strict=True)]
    reader, asked = control.shield(processor, asked)
    texts = [reader.apply_chat_template(row.messages, add_generation_prompt=True) for row in asked]
    batch = process(reader, texts, asked, padding_side="left")
    batch = {name: value.to(model.device) for name, value in batch.items()}
    generated = model.generate(**batch, **options, do_sample=False)  # (B, T + new)
    said = processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    questions = [_words(prompt) for prompt in prompts]
    return [
        (question, text.strip(), truth.strip()) for question, text, truth in zip(questions, said, truths, strict=True)
    ]


def _without_answer(example: Example, prompt: list[dict[str, Any]]) -> Example:
    """Return what is asked, less the images of the answer itself."""
    shown = sum(block["type"] == "image" for message in prompt for block in message["content"])
    films = sum(block["type"] == "video" for message in prompt for block in message["content"])
    return Example(prompt, example.images[:shown], example.name, videos=example.videos[:films])


def _words(messages: list[dict[str, Any]]) -> str:
    turns = (
        "".join(block["text"] if block["type"] == "text" else f"[{block['type']}] " for block in message["content"])
        for message in messages
    )
    return "\n".join(turn.strip() for turn in turns)


def first_rows(rows: Examples, count: int) -> list[Example]:
    """Return the first rows of a set to answer, all at most; of a mixture as its weights draw them, each row once.

    RowError for one that cannot be used, or that no answer can be compared with.
    """
    count = min(count, len(rows))
    places = rows.step_rows(0, count, 0) if isinstance(rows, Mixture) else range(count)
    found: list[Example] = [rows[at] for at in dict.fromkeys(places)]
    for example in found:
        split_answer(example)
    return found


def match_by_source(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the exact match of all answers and, of a mixture, of each source's: {"exact_match": ..., "exact_match/a.jsonl": ...}."""
    sources = dict.fromkeys(item.example.source for item in answers if item.example.source)
    parts = {source: [item for item in answers if item.example.source == source] for source in sources}
    return {"exact_match": exact_match(answers)} | {
        f"exact_match/{source}": exact_match(part) for source, part in parts.items()
    }


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of rows whose whole answer is right."""
    return sum(item.answer == item.truth for item in answers) / max(len(answers), 1)


def character_accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of the truth's characters, blanks aside, that the answer has at the same place."""
    right = total = 0
    for item in answers:
        truth, said = item.truth.replace(" ", ""), item.answer.replace(" ", "")
        total += len(truth)
        right += sum(a == b for a, b in zip(truth, said, strict=False))
    return right / max(total, 1)
