"""The collator: labels on the assistant's own words and nowhere else, whatever surrounds them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from tokenizers.processors import TemplateProcessing

from hfcustom.data.collate import Collator, expanded_position
from hfcustom.data.messages import RowError, read_row
from hfcustom.losses import IGNORE

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(block) if isinstance(block, str) else block for block in blocks]}


def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
    images = sum(block == IMAGE for message in turns for block in message["content"])
    return {"messages": list(turns), "images": [picture(seed, (50 + 9 * seed, 30)) for seed in range(images)]}


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
    "an empty answer": conversation(turn("user", IMAGE, "Nothing?"), turn("assistant", "")),
    "letters of more than one token": conversation(
        turn("user", "\u4e2d\u00fc?"), turn("assistant", "\u00fc\U0001f600")
    ),
    "blanks at the borders": conversation(
        turn("user", "Hi \n"), turn("assistant", "  ho \n\n"), turn("user", " "), turn("assistant", "\n")
    ),
}


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
    """Return what the template writes for an image, less the placeholder that the processor expands."""
    messages = [{"role": "user", "content": [text("BEFORE"), IMAGE, text("AFTER")]}]
    rendered = processor.apply_chat_template(messages).split("BEFORE")[1].split("AFTER")[0]
    return rendered.replace(processor.image_token, "")


def answers(row: dict[str, Any], processor: Any) -> str:
    """Return what the model is to learn: each answer, and the marker that ends its turn."""
    words = {"image": placeholder_text(processor)}
    learned = ""
    for message in row["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            blocks = [text(content)] if isinstance(content, str) else content
            learned += "".join(words.get(block["type"], block.get("text")) for block in blocks)
            learned += end_of_turn(processor)
    return learned


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
    is_image = batch["input_ids"] == family.processor.image_token_id
    assert is_image.sum() >= 4 * len(ROWS[name]["images"])
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


# ---- the map from rendered to expanded text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("char", "position"), [(0, 0), (4, 4), (5, 5), (8, 25), (9, 26), (12, 29), (15, 40), (16, 41)]
)
def test_characters_after_a_placeholder_move_by_its_growth(char: int, position: int) -> None:
    replaced = [{"span": (5, 8), "new_span": (5, 25)}, {"span": (12, 15), "new_span": (29, 40)}]
    assert expanded_position(char, replaced) == position


def test_a_placeholder_written_out_in_a_text_is_named(family: Family) -> None:
    row = chat_row(1)
    row["messages"][0]["content"].append({"type": "text", "text": f"What is {family.processor.image_token}?"})
    with pytest.raises(RowError, match=r"row 1: a text holds '.*', this processor's mark of an image.*blocks"):
        Collator(family.processor)([chat_row(0), row])


def test_a_conversation_that_starts_with_the_assistant_is_named(family: Family) -> None:
    row = {"messages": [turn("assistant", "Hi."), turn("user", "Hello?")]}
    with pytest.raises(RowError, match="row 0, message 0: a conversation starts with a user or system turn"):
        Collator(family.processor)([row])
