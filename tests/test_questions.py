"""The question of each crop's row reaches a connector that asks for it: the same in training, evaluation and generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import KINDS, Family, chat_row
from torch import nn

import hfcustom
from hfcustom.connectors import build_connector
from hfcustom.data.collate import Collator
from hfcustom.questions import before_answers, known_tokens

BY_QUESTION = {"name": "token_pruning", "num_kept": 2, "by": "question"}
IMAGES = [2, 0, 1]
Seen = list[dict[str, torch.Tensor]]


QUESTIONS = ["What is number 0?", "and the picture", "Where is the bright corner of it, left or right?"]


def rows(answer: str | None = None, questions: list[str] = QUESTIONS) -> list[dict[str, Any]]:
    """Return a row for each number of images, with another answer where one is given."""
    made = [chat_row(count, seed) for seed, count in enumerate(IMAGES)]
    for row, question in zip(made, questions, strict=True):
        row["messages"][0]["content"][-1]["text"] = question
        if answer:
            row["messages"][-1]["content"] = answer
    return made


def watch(model: Any) -> Seen:
    """Return a list that fills with what the connector is told and what it makes, a mapping a call."""
    seen: Seen = []

    def note(module: nn.Module, args: Any, told: dict[str, torch.Tensor], made: torch.Tensor) -> None:
        seen.append({**told, "features": args[0], "made": made})

    model.custom_connector.register_forward_hook(note, with_kwargs=True)
    return seen


def words(call: dict[str, torch.Tensor], crop: int) -> torch.Tensor:
    return call["question"][crop][call["question_mask"][crop]]  # (words, D)


def assert_same_choice(mine: Seen, theirs: Seen) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one["made"], other["made"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def asking(family: Family) -> tuple[Any, Any]:
    """A model that prunes by the question, and its processor."""
    if "connector" in family.model_class.lacks:
        pytest.skip(family.model_class.lacks["connector"])
    model = family.corrected(connector=BY_QUESTION)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)  # words that differ in direction
    return model, model.match_processor(copy.deepcopy(family.processor))


def test_the_answer_has_no_say_and_generation_keeps_the_same_tokens(asking: tuple[Any, Any]) -> None:
    model, processor = asking
    seen = watch(model)
    batches = [dict(Collator(processor)(rows(answer))) for answer in (None, "yes", "No, there are fewer numbers.")]
    with torch.no_grad():
        model(**batches[0])
        expected = seen.copy()
        for batch in batches[1:]:
            seen.clear()
            model.loss_context(batch, batch["labels"])
            assert_same_choice(seen, expected)
        for use_cache in (True, False):  # without one, some families look at the images in every step
            seen.clear()
            model.generation_config.use_cache = use_cache
            hfcustom.generate_answers(model, processor, rows(), max_new_tokens=3)
            assert_same_choice(seen[: len(expected)], expected)
            assert_same_choice(seen[-len(expected) :], expected)


def test_each_crop_is_told_what_its_row_says(asking: tuple[Any, Any]) -> None:
    """Its words, whole and in order, no placeholder among them; a batch equals its rows."""
    model, processor = asking
    seen = watch(model)
    with torch.no_grad():
        together = dict(Collator(processor)(rows()))
        logits = model(**together).logits
        told = [words(call, crop) for call in seen for crop in range(len(call["question"]))]
        said = []
        for ids, labels in zip(together["input_ids"], together["labels"], strict=True):
            prompt = ids[: int((labels != -100).nonzero()[0])]
            prompt = prompt[~torch.isin(prompt, torch.tensor(known_tokens(model)))]
            said.append(model.get_input_embeddings()(prompt[None])[0])
        of_rows = [[at for at, row in enumerate(said) if torch.equal(row, one)] for one in told]
        assert all(len(found) == 1 for found in of_rows)
        assert {0, 2} <= {found[0] for found in of_rows}
        assert model.placeholder_token_id in known_tokens(model)
        for at, row in enumerate(rows()):
            alone = dict(Collator(processor)([row]))
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[at, :length], model(**alone).logits[0], rtol=1e-4, atol=2e-6)


def test_another_question_keeps_other_tokens(internvl: Family) -> None:
    model = internvl.model(connector=BY_QUESTION)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    processor = model.match_processor(copy.deepcopy(internvl.processor))
    seen = watch(model)
    with torch.no_grad():
        for questions in (QUESTIONS, QUESTIONS[::-1]):
            model(**Collator(processor)(rows(questions=questions)))
    assert torch.equal(seen[0]["features"], seen[1]["features"]) and not torch.equal(seen[0]["made"], seen[1]["made"])


@pytest.mark.parametrize("name", KINDS)
def test_a_share_of_one_is_no_connector_and_its_weights_learn(families: dict[str, Family], name: str) -> None:
    family = families[name]
    spec = {"name": "token_pruning", "keep_ratio": 1.0, "by": "question"}
    model, batch = family.model(connector=spec), family.batch([2, 1])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, family.model()(**batch).logits)
    model.train()(**batch).loss.backward()
    grads = {name: p.grad for name, p in model.custom_connector.named_parameters()}
    assert grads["match.weight"].abs().sum() > 0 and grads["score.weight"].abs().sum() > 0


def test_packed_rows_have_questions_of_their_own(internvl: Family) -> None:
    model = internvl.model(connector=BY_QUESTION)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    processor = model.match_processor(copy.deepcopy(internvl.processor))
    parts = [dict(Collator(processor)([chat_row(1, seed)])) for seed in (0, 3)]
    packed = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "labels")}
    packed["pixel_values"] = torch.cat([part["pixel_values"] for part in parts])
    packed["position_ids"] = torch.cat([torch.arange(part["input_ids"].shape[1]) for part in parts])[None]
    seen = watch(model)
    with torch.no_grad():
        model.loss_context(packed, packed["labels"])
        (together,) = seen.copy()
        seen.clear()
        for part in parts:
            model(**part)
    torch.testing.assert_close(together["made"], torch.cat([call["made"] for call in seen]))
    assert not torch.equal(words(together, 0), words(together, -1))


def test_what_comes_before_the_first_label_of_a_row_of_data() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6, -100, -100, 7], [-100] * 8])
    of_rows = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [2] * 8])
    expected = [[1, 1, 0, 0, 0, 1, 1, 0], [1] * 8]
    assert before_answers(labels, of_rows).long().tolist() == expected


def test_images_without_a_text_are_refused_and_the_inner_model_and_compiled_ones_know_theirs(internvl: Family) -> None:
    model = internvl.model(connector=BY_QUESTION)
    processor = model.match_processor(copy.deepcopy(internvl.processor))
    batch = internvl.batch([1], processor)
    with pytest.raises(
        ValueError, match=r"'token_pruning', .* images came without a text. Call the model or generate"
    ):
        model.model.get_image_features(batch["pixel_values"])
    with torch.no_grad(), model.asking({"input_ids": batch["input_ids"]}):
        assert model.model.get_image_features(batch["pixel_values"]).pooler_output.shape[1] == 2
        del batch["labels"]
        inner = model.model(**batch).last_hidden_state
    torch.testing.assert_close(model.lm_head(inner), model(**batch).logits)
    assert model._asked is None


def test_an_adapter_around_it_is_told_too(internvl: Family) -> None:
    plain = internvl.model(connector=BY_QUESTION)
    batch = internvl.batch([1, 1], plain.match_processor(copy.deepcopy(internvl.processor)))
    with torch.no_grad():
        expected = plain(**batch).logits
        model = hfcustom.lora(plain, rank=2).eval()
        torch.testing.assert_close(model(**batch).logits, expected)
        prompt = {name: x for name, x in batch.items() if name != "labels"}
        assert model.generate(**prompt, max_new_tokens=2, do_sample=False, num_beams=2).shape[0] == 2


def test_embeddings_ask_as_their_ids_do(internvl: Family) -> None:
    model = internvl.model(connector=BY_QUESTION)
    batch = internvl.batch([1, 0], model.match_processor(copy.deepcopy(internvl.processor)))
    seen = watch(model)
    with torch.no_grad():
        model(**batch)
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        model(**batch, inputs_embeds=embeds)
    assert torch.equal(seen[0]["question"], seen[1]["question"]) and torch.equal(seen[0]["made"], seen[1]["made"])


# ---- the choice itself ----------------------------------------------------------------------------------------------


def test_token_pruning_keeps_what_is_nearest_to_the_words() -> None:
    module = build_connector({"name": "token_pruning", "num_kept": 1, "by": "question"}, 3)
    crop = torch.tensor([[9.0, 0, 0], [0, 1, 0], [0, 0, 1]]).expand(3, -1, -1)  # (3 crops, 3 tokens, 3)
    question = torch.tensor([[[0.0, 2, 0], [0, 0, 9]], [[0, 0, 1], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]]])
    mask = torch.tensor([[True, False], [True, True], [False, False]])  # the second word of the first is padding
    made = module(crop, question, mask)
    assert torch.equal(made[0], crop[0, 1:2])
    assert torch.equal(made[1], crop[1, 0:1])  # as near as the last, and earlier: length does not count
    plain = build_connector({"name": "token_pruning", "num_kept": 1}, 3)
    assert torch.equal(made[2], plain(crop)[2])  # nobody asks
    with pytest.raises(ValueError, match="by='question' was called without a question"):
        module(crop)


def test_half_a_question_is_named() -> None:
    class HalfAsked(nn.Module):
        def forward(self, features: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
            return features

        def num_tokens_out(self, num_tokens: int) -> int:
            return num_tokens

    with pytest.raises(TypeError, match="takes one of question .* must take both"):
        hfcustom.connector(HalfAsked)
