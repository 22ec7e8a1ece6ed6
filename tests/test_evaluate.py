"""Evaluation by generation: scores by hand, and answers that do not depend on how rows are batched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from source_files import numbered, write_jsonl

from hfcustom.data.messages import Example, RowError
from hfcustom.data.sources import load_rows
from hfcustom.evaluate import (
    Answer,
    character_accuracy,
    exact_match,
    first_rows,
    generate_answers,
    match_by_source,
)

ROWS = [chat_row(1, seed=0), chat_row(0, seed=1), chat_row(2, seed=2, turns=2)]


def answers(*pairs: tuple[str, str]) -> list[Answer]:
    """Return answers from (said, truth) pairs."""
    return [Answer(Example([], [], "row"), "", said, truth) for said, truth in pairs]


SCORES = {  # (said, truth) pairs: exact match, character accuracy
    "right": ([("1234", "1234")], 1.0, 1.0),
    "wrong": ([("9876", "1234")], 0.0, 0.0),
    "one off": ([("1235", "1234")], 0.0, 0.75),
    "one row of two": ([("1234", "1234"), ("", "12")], 0.5, 4 / 6),
    "long truths weigh more": ([("1", "1"), ("00000000", "12345678")], 0.5, 1 / 9),
    "blanks are no characters": ([("12 34", "1234"), ("5678", "56 78")], 0.0, 1.0),
    "too long": ([("12345", "1234")], 0.0, 1.0),
    "too short": ([("12", "1234")], 0.0, 0.5),
    "shifted": ([("0123", "1234")], 0.0, 0.0),
    "no rows": ([], 0.0, 0.0),
    "an empty truth": ([("", "")], 1.0, 0.0),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_the_hand_computed_ones(name: str) -> None:
    pairs, exact, characters = SCORES[name]
    assert exact_match(answers(*pairs)) == pytest.approx(exact)
    assert character_accuracy(answers(*pairs)) == pytest.approx(characters)


def test_the_first_rows_of_a_mixture_are_those_that_its_weights_draw(tmp_path: Path) -> None:
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", *map(numbered, range(20))) for name in "ab"}
    mixed = load_rows({files["a"]: 0.75, files["b"]: 0.25})
    found = first_rows(mixed, 16)
    assert [row.source for row in found].count("a.jsonl") == 12
    assert len({row.name for row in found}) == len(found) == 16
    assert [row.name for row in first_rows(mixed, 16)] == [row.name for row in found]
    short = load_rows({files["a"]: 0.1, write_jsonl(tmp_path / "c.jsonl", numbered(0)): 0.9})
    assert [row.source for row in first_rows(short, 20)].count("c.jsonl") == 1  # no row twice
    alone = first_rows(load_rows(files["a"]), 3)
    assert [row.name for row in alone] == [f"a.jsonl, line {at}" for at in (1, 2, 3)]
    assert len(first_rows(load_rows(files["a"]), 100)) == 20


def test_rows_without_an_answer_are_refused_before_they_are_asked(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", numbered(0), {"messages": [*numbered(1)["messages"], *numbered(2)["messages"][:1]]}
    )
    assert len(first_rows(load_rows(path), 1)) == 1
    with pytest.raises(RowError, match="line 2: the last turn is not the assistant's"):
        first_rows(load_rows(path), 2)


def test_each_source_has_its_own_score() -> None:
    given = answers(("1", "1"), ("2", "3"), ("4", "4"))
    assert match_by_source(given) == {"exact_match": pytest.approx(2 / 3)}
    mixed = [
        replace(item, example=replace(item.example, source=name)) for item, name in zip(given, "abb", strict=True)
    ]
    assert match_by_source(mixed) == {
        "exact_match": pytest.approx(2 / 3),
        "exact_match/a": 1.0,
        "exact_match/b": 0.5,
    }


def said(family: Family, rows: list[Any] = ROWS, model: Any = None, **options: Any) -> list[str]:
    found = generate_answers(model or family.model(), family.processor, rows, max_new_tokens=3, **options)
    return [answer.answer for answer in found]


def test_the_batch_size_changes_no_answer(family: Family) -> None:
    untied = {"tie_word_embeddings": False} if hasattr(family.module.tiny_config(), "tie_word_embeddings") else {}
    model = family.corrected(**untied)  # tied, a random model repeats the prompt's last token, a blank
    alone = said(family, model=model, batch_size=1)
    assert any(alone)
    assert said(family, model=model, batch_size=2) == alone  # a full batch of two lengths, and a rest


def test_answers_are_the_greedy_continuation_of_the_prompt(internvl: Family) -> None:
    model, processor, row = internvl.model(), internvl.processor, chat_row(1)
    ids = processor(
        text=[processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)],
        images=[row["images"]],
        return_tensors="pt",
    )
    tokens = ids["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            logits = model(input_ids=tokens, pixel_values=ids["pixel_values"]).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    expected = processor.tokenizer.decode(tokens[0, -3:], skip_special_tokens=True).strip()
    assert said(internvl, [row], model=model) == [expected]


def test_an_answer_holds_the_question_the_truth_and_the_row(internvl: Family) -> None:
    (answer,) = generate_answers(internvl.model(), internvl.processor, ROWS[2:], max_new_tokens=1)
    assert answer.truth == "It is 2 of 1."
    assert answer.question == "picture 0: [image] picture 1: [image] What is number 2?\nIt is 2 of 0.\nand 1?"
    assert (len(answer.example.images), answer.example.name) == (2, "row 0")


def test_borders_of_the_truth_do_not_make_it_wrong(internvl: Family) -> None:
    row = chat_row(0)
    row["messages"][-1]["content"] = "\n yes \n"
    (answer,) = generate_answers(internvl.model(), internvl.processor, [row], max_new_tokens=1)
    assert answer.truth == "yes"


def test_an_image_of_the_answer_itself_is_not_shown(family: Family) -> None:
    plain = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [picture(1)]}
    drawn = [{"type": "text", "text": "This: "}, {"type": "image"}]
    rows = [
        {"messages": [*plain["messages"], {"role": "assistant", "content": content}], "images": images}
        for content, images in (("This: ", [picture(1)]), (drawn, [picture(1), picture(2)]))
    ]
    without, with_image = generate_answers(family.model(), family.processor, rows, max_new_tokens=3)
    assert without.answer == with_image.answer
    assert without.truth == with_image.truth == "This:"


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_eval_meanwhile_and_restored_after(internvl: Family, training: bool) -> None:
    model = internvl.model().train(training)
    modes: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: modes.append(model.training))
    said(internvl, ROWS[:1], model=model)
    assert modes and not any(modes)
    assert model.training == model.lm_head.training == training


def test_no_gradient_is_kept_and_no_random_number_drawn(internvl: Family) -> None:
    model = internvl.model()
    before = torch.get_rng_state()
    said(internvl, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_row_that_ends_without_an_answer_is_named(internvl: Family) -> None:
    rows = [chat_row(0), {"messages": chat_row(0)["messages"][:1], "images": []}]
    with pytest.raises(RowError, match=r"row 1: the last turn is not the assistant's, so there is no answer"):
        said(internvl, rows)


def test_a_pair_is_asked_like_its_chosen_conversation(family: Family) -> None:
    row, model = chat_row(2, turns=2), family.model()
    other = {"role": "assistant", "content": "Something else, at length."}
    pair = {"chosen": row["messages"], "rejected": [*row["messages"][:-1], other], "images": row["images"]}
    plain, chosen = generate_answers(model, family.processor, [row, pair], max_new_tokens=3)
    assert chosen.answer == plain.answer
    assert chosen.question == plain.question
    assert chosen.truth == plain.truth == "It is 0 of 1."


def test_an_answer_marked_as_not_preferred_is_named(internvl: Family) -> None:
    rows = [{**chat_row(0), "label": True}, {**chat_row(0), "label": False}]
    assert len(said(internvl, rows[:1])) == 1
    with pytest.raises(RowError, match=r"row 1: label is False, so its answer is not the right one"):
        said(internvl, rows)


def test_no_rows_no_answers(internvl: Family) -> None:
    assert said(internvl, []) == []
