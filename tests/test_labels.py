"""Labels: which token weighs what, for every family's template and tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from conversations import IMAGE, conversation, end_of_turn, labelled, placeholder_text, turn, with_markers

from hfcustom.data import collate
from hfcustom.data.collate import Collator
from hfcustom.data.labels import expanded_position
from hfcustom.data.messages import RowError
from hfcustom.losses import IGNORE

END = "<end of turn>"  # stands for what the family's template writes
MARKS = "<around the image>"  # likewise, less the placeholder itself
QUESTION = turn("user", IMAGE, "42 or 43?")


def answer(*blocks: Any, **extra: Any) -> dict[str, Any]:
    return {**turn("assistant", *blocks), **extra}


def weighted(words: str, weight: float) -> dict[str, Any]:
    return {"type": "text", "text": words, "weight": weight}


def weight_runs(processor: Any, batch: dict[str, torch.Tensor], row: int = 0) -> list[tuple[float, str]]:
    """Return each run of label tokens of one weight: the weight, the text."""
    runs: list[tuple[float, list[int]]] = []
    for label, weight in zip(batch["labels"][row].tolist(), batch["token_weights"][row].tolist(), strict=True):
        assert (label == IGNORE) == (weight == 0)
        if weight and runs and runs[-1][0] == weight:
            runs[-1][1].append(label)
        elif weight:
            runs.append((weight, [label]))
    return [(weight, processor.tokenizer.decode(ids)) for weight, ids in runs]


CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[float, str]]]] = {
    "no weight": ([QUESTION, answer("It is 42.")], [(1, "It is 42." + END)]),
    "a message as a string": (
        [QUESTION, {"role": "assistant", "content": "It is 42.", "weight": 0.5}],
        [(0.5, "It is 42." + END)],
    ),
    "turns of their own": (
        [QUESTION, answer("It is 42.", weight=0.5), turn("user", "Sure?"), answer("Yes.", weight=2.0)],
        [(0.5, "It is 42." + END), (2, "Yes." + END)],
    ),
    "a turn that is not trained on": (
        [QUESTION, answer("It is 43.", weight=0), turn("user", "Sure?"), answer("No, 42.")],
        [(1, "No, 42." + END)],
    ),
    "a block": ([QUESTION, answer("It is", weighted(" 42", 3.0), ".")], [(1, "It is"), (3, " 42"), (1, "." + END)]),
    "a block times its message": (
        [QUESTION, answer("It is", weighted(" 42", 3.0), ".", weight=0.5)],
        [(0.5, "It is"), (1.5, " 42"), (0.5, "." + END)],
    ),
    "a block that is not trained on": (
        [QUESTION, answer("It is", weighted(" 43, no,", 0.0), " 42.")],
        [(1, "It is 42." + END)],
    ),
    "words that stand in the question and in an earlier block": (
        [QUESTION, answer("Is it 42? Yes:", weighted(" 42", 3.0), weighted(" 42", 2.0))],
        [(1, "Is it 42? Yes:"), (3, " 42"), (2, " 42"), (1, END)],
    ),
    "an image between blocks": (
        [QUESTION, answer(weighted("Here", 2.0), IMAGE, weighted(" done", 0.25), ".")],
        [(2, "Here"), (1, MARKS), (0.25, " done"), (1, "." + END)],
    ),
    "letters of more than one token": (
        [QUESTION, answer("\u4e2d", weighted("\u00fc\U0001f600", 2.0), "!")],
        [(1, "\u4e2d"), (2, "\u00fc\U0001f600"), (1, "!" + END)],
    ),
    "an empty block": ([QUESTION, answer(weighted("", 2.0), "Yes.")], [(1, "Yes." + END)]),
}


@pytest.mark.parametrize("markers", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_label_token_weighs_what_its_message_and_block_say(family: Family, name: str, markers: bool) -> None:
    messages, expected = CASES[name]
    processor = with_markers(family.processor) if markers else family.processor
    row = conversation(*(m for m in messages if not isinstance(m["content"], str)))
    batch = Collator(processor, columns=["token_weights"])([{**row, "messages": messages}, chat_row(2, turns=3)])
    assert batch["token_weights"].shape == batch["labels"].shape
    assert batch["token_weights"].dtype == torch.float32
    found = weight_runs(processor, batch)
    write = {END: end_of_turn(processor), MARKS: placeholder_text(processor)}
    runs = [(weight, write.get(words, words.replace(END, write[END]))) for weight, words in expected]
    assert found == [(weight, words) for weight, words in runs if words]


def test_weights_change_no_other_tensor(family: Family) -> None:
    blocks = conversation(QUESTION, answer("It is", weighted(" 42", 3.0), ".", weight=0.5))
    plain = conversation(QUESTION, answer("It is", " 42", "."))
    batch, same = Collator(family.processor, columns=["token_weights"])([blocks]), Collator(family.processor)([plain])
    assert batch.keys() - same.keys() == {"token_weights"}
    for key, value in same.items():
        assert torch.equal(value, batch[key]), key


def test_a_token_belongs_to_the_block_in_which_it_begins(internvl: Family) -> None:
    tokenizer = internvl.processor.tokenizer
    words = "What is number"  # words of the corpus, so that a token spans several letters
    offsets = tokenizer(words, return_offsets_mapping=True)["offset_mapping"]
    start, end = max(offsets, key=lambda span: span[1] - span[0])
    assert end - start > 2  # a blank and more than one letter
    cut = start + 2
    row = conversation(turn("user", "?"), answer(words[:cut], weighted(words[cut:], 2.0)))
    batch = Collator(internvl.processor, columns=["token_weights"])([row])
    runs = weight_runs(internvl.processor, batch)
    assert runs[0] == (1, words[:end])
    assert "".join(part for weight, part in runs if weight == 2) == words[end:]


# ---- what a weight without an effect is told ------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings as they come; warning_once remembers those of other tests."""
    said: list[str] = []
    monkeypatch.setattr(collate.logger, "warning_once", said.append, raising=False)
    return said


@pytest.mark.parametrize(("weight", "warned"), [(0.5, True), (2, True), (0, False), (1, False), (None, False)])
def test_weights_that_nobody_asked_for_are_warned_about(
    internvl: Family, warnings: list[str], weight: float | None, warned: bool
) -> None:
    row = conversation(QUESTION, answer("No.", weight=weight), turn("user", "Sure?"), answer("Yes."))
    assert "token_weights" not in Collator(internvl.processor)([row])
    assert bool(warnings) == warned
    if warned:
        assert "have no effect with this loss; use weighted_cross_entropy" in warnings[0]
    asked = len(warnings)
    Collator(internvl.processor, columns=["token_weights"])([row])
    assert len(warnings) == asked


def test_the_warning_comes_once(internvl: Family, caplog: pytest.LogCaptureFixture) -> None:
    row = conversation(QUESTION, answer("No.", weight=0.5))
    collate.logger.warning_once.cache_clear()
    for _ in range(3):
        Collator(internvl.processor)([row])
    assert len([record for record in caplog.records if "weighted_cross_entropy" in record.message]) == 1


@pytest.mark.parametrize("markers", [False, True])
def test_a_row_of_weight_zero_teaches_nothing(family: Family, markers: bool) -> None:
    processor = with_markers(family.processor) if markers else family.processor
    row = conversation(QUESTION, answer("No.", weight=0), turn("user", "Sure?"), answer("Yes.", weight=0.0))
    with pytest.raises(RowError, match=r"row 1: every assistant turn has weight 0, so there is nothing to learn"):
        Collator(processor)([chat_row(0), row])


@pytest.mark.parametrize(
    ("blocks", "place", "words"),
    [
        ([weighted(" 42 ", 2.0)], "block 0", "' 42 '"),
        (["it is", weighted(" 42", 2.0)], "block 1", "' 42'"),
        (["It IS", weighted("42", 2.0)], "block 0", "'It IS'"),  # lowered, so where 42 lies is not known
    ],
    ids=str,
)
def test_a_block_that_the_template_rewrites_is_named(
    internvl: Family, blocks: list[Any], place: str, words: str
) -> None:
    processor = copy.copy(internvl.processor)
    said = "{% for block in message['content'] %}{{ block['text'] | trim | lower }}{% endfor %}"
    processor.chat_template = "{% for message in messages %}" + said + "{% endfor %}"
    row = conversation(turn("user", "?"), answer(*blocks))
    message = rf"row 0, message 1, {place}: the text {words} is not in what the chat template writes .* whole message"
    with pytest.raises(RowError, match=message):
        Collator(processor)([row])


def test_an_unweighted_block_may_be_trimmed(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    said = "{% for block in message['content'] %}{{ block['text'] | trim }}{% endfor %}"
    processor.chat_template = "{% for message in messages %}" + said + "|{% endfor %}"
    row = conversation(turn("user", "?"), answer(" It is: ", weighted("42", 2.0)))
    batch = Collator(processor, columns=["token_weights"])([row])
    assert weight_runs(processor, batch) == [(1, "It is:"), (2, "42"), (1, "|")]


SPLIT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}A:{% endgeneration %}"
    "{% generation %}{{ message['content'][0]['text'] }}{% endgeneration %}{% else %}?{% endif %}{% endfor %}"
)


def test_markers_that_do_not_match_turns_are_an_error_only_with_weights(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    processor.chat_template = SPLIT
    labels = Collator(processor)([chat_row(0, turns=2)])["labels"][0]
    assert "".join(labelled(processor, labels)) == "A:It is 0 of 0.A:It is 0 of 1."
    message = (
        r"row 0: the chat template marks 4 spans with {% generation %} for 2 assistant turns.* mark each turn once"
    )
    row = conversation(turn("user", "?"), answer("a", weight=0), turn("user", "?"), answer("b"))
    with pytest.raises(RowError, match=message):
        Collator(processor)([row])


def test_a_turn_of_weight_zero_may_be_rewritten_by_the_template(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    words = "{% if message['role'] == 'user' or loop.last %}{{ message['content'][0]['text'] }}{% endif %}"
    processor.chat_template = "{% for message in messages %}" + words + "{% endfor %}"
    row = conversation(turn("user", "?"), answer("a"), turn("user", "!"), answer("b"))
    with pytest.raises(RowError, match="row 0: the chat template renders message 1 differently"):
        Collator(processor)([row])
    row["messages"][1]["weight"] = 0
    assert labelled(processor, Collator(processor)([row])["labels"][0]) == ["b"]


# ---- the map from rendered to expanded text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("char", "position"), [(0, 0), (4, 4), (5, 5), (8, 25), (9, 26), (12, 29), (15, 40), (16, 41)]
)
def test_characters_after_a_placeholder_move_by_its_growth(char: int, position: int) -> None:
    replaced = [{"span": (5, 8), "new_span": (5, 25)}, {"span": (12, 15), "new_span": (29, 40)}]
    assert expanded_position(char, replaced) == position
