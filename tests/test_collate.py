"""The collator: labels on the assistant's own words and nowhere else, whatever surrounds them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from conversations import (
    IMAGE,
    conversation,
    end_of_turn,
    glued_blank,
    labelled,
    placeholder_text,
    text,
    turn,
    with_markers,
)
from tokenizers.processors import TemplateProcessing

from hfcustom.data.collate import Collator
from hfcustom.data.messages import RowError, read_row
from hfcustom.losses import IGNORE

ROWS = {
    "one turn": chat_row(1),
    "text only": chat_row(0),
    "three turns": chat_row(1, turns=3),
    "interleaved": chat_row(3, turns=2),
    "system and later images": conversation(
        turn("system", "Be brief."),
        turn("user", "One: ", IMAGE, " two: ", IMAGE),
        turn("assistant", "Both."),
        turn("user", IMAGE, "And this?"),
        turn("assistant", "Too."),
    ),
    "an answer that repeats the question": conversation(
        turn("user", IMAGE, "assistant user yes"), turn("assistant", "assistant user yes")
    ),
    "an answer with an image": conversation(
        turn("user", IMAGE, "Crop it."),
        turn("assistant", "Here: ", IMAGE, " done."),
        turn("user", "Thanks"),
        turn("assistant", "Bye."),
    ),
    "an answer that begins and ends with an image": conversation(
        turn("user", "Draw."), turn("assistant", IMAGE, "or", IMAGE)
    ),
    "an empty question": conversation(turn("user", ""), turn("assistant", "Well?")),
    "letters of more than one token": conversation(
        turn("user", "\u4e2d\u00fc?"), turn("assistant", "\u00fc\U0001f600")
    ),
    "blanks at the borders": conversation(
        turn("user", "Hi \n"), turn("assistant", "  ho \n\n"), turn("user", " "), turn("assistant", " x\n")
    ),
}


def answers(row: dict[str, Any], processor: Any) -> str:
    """Return what the model is to learn: each answer, and the marker that ends its turn."""
    learned, blank = "", glued_blank(processor)
    for message in row["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            blocks = [text(content)] if isinstance(content, str) else content
            for block, before in zip(blocks, [None, *blocks], strict=False):
                glue = blank if before == IMAGE and block["type"] == "text" and not block["text"][0].isspace() else ""
                learned += placeholder_text(processor) if block == IMAGE else glue + block["text"]
            learned += end_of_turn(processor)
    return learned


# ---- where labels are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_the_answers_and_their_end_markers_are_labelled_and_nothing_else(family: Family, name: str) -> None:
    batch = Collator(family.processor)([ROWS[name]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert "".join(labelled(family.processor, labels)) == answers(ROWS[name], family.processor)
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])


@pytest.mark.parametrize("name", ROWS)
def test_generation_markers_in_the_template_give_the_same_batch(family: Family, name: str) -> None:
    batch = Collator(family.processor)([ROWS[name]])
    marked = Collator(with_markers(family.processor))([ROWS[name]])
    assert batch.keys() == marked.keys()
    for key, value in batch.items():
        assert torch.equal(value, marked[key]), key


def test_each_turn_is_a_run_of_its_own_that_ends_with_the_end_of_text(family: Family) -> None:
    batch = Collator(family.processor)([chat_row(2, seed=4, turns=3)])
    end = end_of_turn(family.processor)
    assert family.processor.tokenizer.eos_token in end
    runs = labelled(family.processor, batch["labels"][0])
    assert runs == [f"It is 4 of {number}.{end}" for number in range(3)]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["images"]])
def test_no_token_of_an_image_is_labelled(family: Family, name: str) -> None:
    batch = Collator(family.processor)([ROWS[name]])
    model = family.model()
    is_image = batch["input_ids"] == model.placeholder_token_id
    assert is_image.sum() >= (1 if "placeholders" in model.lacks else 4) * len(ROWS[name]["images"])
    assert (batch["labels"][is_image] == IGNORE).all()


# ---- batches --------------------------------------------------------------------------------------------------------


def test_padding_changes_no_label(family: Family) -> None:
    rows, collator = list(ROWS.values()), Collator(family.processor)
    together = collator(rows)
    assert together["input_ids"].shape == together["labels"].shape == together["attention_mask"].shape
    for at, row in enumerate(rows):
        alone = collator([row])
        length = alone["labels"].shape[1]
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(together[key][at, :length], alone[key][0]), key
        assert (together["labels"][at, length:] == IGNORE).all()
        assert not together["attention_mask"][at, length:].any()


@pytest.mark.parametrize("images", [[0, 0], [1], [2, 0, 1]])
def test_the_batch_knows_its_images(family: Family, images: list[int]) -> None:
    batch = Collator(family.processor)([chat_row(count, seed) for seed, count in enumerate(images)])
    assert batch.images == sum(images)
    assert ("pixel_values" in batch) == bool(sum(images))
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_mappings_and_examples_give_the_same_batch(internvl: Family) -> None:
    collator = Collator(internvl.processor)
    first, second = collator([chat_row(1)]), collator([read_row(chat_row(1), "row")])
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# ---- preferences ----------------------------------------------------------------------------------------------------


def as_pair(row: dict[str, Any], other: str = "Something else.") -> dict[str, Any]:
    """Return a row as a pair, its own last answer chosen."""
    prompt, last = row["messages"][:-1], row["messages"][-1]
    return {"prompt": prompt, "chosen": [last], "rejected": other, "images": row["images"]}


def as_ordinary(row: dict[str, Any], answer: Any) -> dict[str, Any]:
    """Return what a side of a pair must be like: earlier answers are not trained on."""
    prompt = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in row["messages"][:-1]]
    return {"messages": [*prompt, {"role": "assistant", "content": answer}], "images": row["images"]}


@pytest.mark.parametrize("whole", [False, True])
def test_a_pair_is_two_rows_of_the_batch_chosen_first(family: Family, whole: bool) -> None:
    rows = [chat_row(1, seed=1), chat_row(2, seed=2, turns=3), chat_row(0, seed=3)]
    pairs = [as_pair(row) for row in rows]
    if whole:
        for row, pair in zip(rows, pairs, strict=True):
            pair["chosen"] = row["messages"]
            pair["rejected"] = [*pair.pop("prompt"), {"role": "assistant", "content": pair["rejected"]}]
    sides = [
        as_ordinary(row, answer) for row in rows for answer in (row["messages"][-1]["content"], "Something else.")
    ]
    batch, expected = Collator(family.processor)(pairs), Collator(family.processor)(sides)
    preference = batch.pop("preference")
    assert (preference.dtype, preference.tolist()) == (torch.float32, [1, -1, 1, -1, 1, -1])
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value, batch[key]), key
    assert batch.images == expected.images == 6
    end = end_of_turn(family.processor)
    for at, answer in enumerate(["It is 1 of 0.", "Something else.", "It is 2 of 2.", "Something else."]):
        assert labelled(family.processor, batch["labels"][at]) == [answer + end]


def test_answers_with_a_label_are_preferred_or_not(family: Family) -> None:
    prompt = [*chat_row(1, turns=1)["messages"], turn("user", "Sure?")]
    rows = [
        {"prompt": prompt, "completion": answer, "label": label, "images": chat_row(1)["images"]}
        for answer, label in (("Yes.", True), ("No.", False), ("Oh.", False))
    ]
    rows.append({**chat_row(0), "label": True})
    batch = Collator(family.processor)(rows)
    assert batch["preference"].tolist() == [1, -1, -1, 1]
    end = end_of_turn(family.processor)
    said = ["".join(labelled(family.processor, labels)) for labels in batch["labels"]]
    assert said == [f"{answer}{end}" for answer in ("Yes.", "No.", "Oh.", "It is 0 of 0.")]
    assert batch.images == 3


@pytest.mark.parametrize("row", [chat_row(1), {**chat_row(1), "label": 1}], ids=["plain", "label 1"])
def test_ordinary_rows_have_no_preference(internvl: Family, row: dict[str, Any]) -> None:
    assert "preference" not in Collator(internvl.processor)([row])


PAIR, JUDGED = as_pair(chat_row(1)), {**chat_row(1), "label": False}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (chat_row(1), PAIR, r"row 1 is a pair \(chosen, rejected\), but row 0 .* is an ordinary row \(messages\)"),
        (PAIR, chat_row(1), r"row 1 is an ordinary row \(messages\), but row 0 .* is a pair"),
        (chat_row(0), JUDGED, r"row 1 is an answer with a label \(true or false\), but row 0 .* an ordinary row"),
        (JUDGED, PAIR, r"row 1 is a pair .* but row 0 of the same batch is an answer with a label"),
    ],
    ids=["pair after ordinary", "ordinary after pair", "label after ordinary", "pair after label"],
)
def test_rows_of_two_kinds_in_one_batch_are_named(internvl: Family, first: Any, second: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"{message}.*; train on rows of one kind"):
        Collator(internvl.processor)([first, second])


def test_a_side_that_is_too_long_is_named(internvl: Family) -> None:
    pair = as_pair(chat_row(0), other="What is number? " * 9)
    length = Collator(internvl.processor)([pair])["attention_mask"].sum(1).tolist()
    assert length[1] > length[0]
    with pytest.raises(RowError, match=rf"row 0, rejected: {length[1]} tokens, more than max_length={length[0]}"):
        Collator(internvl.processor, max_length=length[0])([pair])


# ---- a tokenizer's own beginning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "in_template"), [("aria", False), ("idefics3", True), ("smolvlm", True)])
def test_a_tokenizer_that_adds_its_beginning_adds_it_once(
    families: dict[str, Family], name: str, in_template: bool
) -> None:
    processor = copy.deepcopy(families[name].processor)
    bos, bos_id = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bos_id)])
    assert processor.tokenizer("hello")["input_ids"].count(bos_id) == 1
    assert processor.apply_chat_template(chat_row(0)["messages"]).startswith(bos) == in_template
    batch = Collator(processor)([chat_row(1), chat_row(0)])
    assert batch["input_ids"][:, 0].tolist() == [bos_id] * 2
    assert (batch["input_ids"] == bos_id).sum(1).tolist() == [1, 1]
    assert "".join(labelled(processor, batch["labels"][0])) == answers(chat_row(1), processor)


# ---- what a wrong row or processor is told --------------------------------------------------------------------------


def test_a_row_longer_than_max_length_is_named_never_cut(family: Family) -> None:
    row = read_row(chat_row(2), "rows.jsonl, line 4")
    length = Collator(family.processor)([row])["input_ids"].shape[1]
    batch = Collator(family.processor, max_length=length)([chat_row(0), row])
    assert batch["input_ids"].shape[1] == length
    message = (
        rf"rows.jsonl, line 4: {length} tokens, more than max_length={length - 1}. .*raise max_length, or use fewer"
    )
    with pytest.raises(RowError, match=message):
        Collator(family.processor, max_length=length - 1)([chat_row(0), row])


@pytest.mark.parametrize("markers", [False, True])
def test_a_row_without_an_assistant_turn_is_named(family: Family, markers: bool) -> None:
    processor = with_markers(family.processor) if markers else family.processor
    row = conversation(turn("system", "Be brief."), turn("user", "Hello?"))
    with pytest.raises(RowError, match=r"row 1: no assistant turn, so there is nothing to learn from it"):
        Collator(processor)([chat_row(1), row])


@pytest.mark.parametrize("template", [None, "", {"default": "{{ messages }}"}])
def test_a_processor_without_a_template_is_told_so(internvl: Family, template: Any) -> None:
    processor = copy.copy(internvl.processor)
    processor.chat_template = template
    with pytest.raises(
        ValueError, match=r"chat_template is .*; it must be one template.*Set it and save the processor"
    ):
        Collator(processor)


FORGETFUL = {  # templates that drop or change an answer once later turns follow, as those of thinking models do
    "drops the thought": "{% if not loop.last %}...{% else %}{{ message['content'][0]['text'] }}{% endif %}",
    "drops the answer": "{% if message['role'] == 'user' or loop.last %}{{ message['content'] }}{% endif %}",
    "marks the last turn": "{{ message['content'][0]['text'] }}{% if loop.last %}<last>{% endif %}",
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_template_that_rewrites_earlier_turns_is_an_error_with_a_cure(internvl: Family, name: str) -> None:
    processor = copy.copy(internvl.processor)
    body = "{{ message['role'] }}:" + FORGETFUL[name] + "\n"
    processor.chat_template = "{% for message in messages %}" + body + "{% endfor %}"
    message = r"row 0: the chat template renders message 1 differently .* add {% generation %} markers"
    with pytest.raises(RowError, match=message):
        Collator(processor)([chat_row(0, turns=2)])


def test_markers_are_trusted_where_rendering_turn_by_turn_would_fail(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    words = "{{ message['content'][0]['text'] }}{% if loop.last %}<last>{% endif %}"
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        + words
        + "{% endgeneration %}{% else %}"
        + words
        + "{% endif %}{% endfor %}"
    )
    labels = Collator(processor)([chat_row(0, seed=3, turns=2)])["labels"][0]
    assert labelled(processor, labels) == ["It is 3 of 0.", "It is 3 of 1.<last>"]


def test_a_conversation_that_starts_with_the_assistant_is_named(family: Family) -> None:
    row = {"messages": [turn("assistant", "Hi."), turn("user", "Hello?")]}
    with pytest.raises(RowError, match="row 0, message 0: a conversation starts with a user or system turn"):
        Collator(family.processor)([row])
