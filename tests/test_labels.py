"""Labels: which token weighs what, for every family's template and tokenizer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from conversations import IMAGE, conversation, end_of_turn, labelled, placeholder_text, turn, with_markers

from hfcustom.data import collate
from hfcustom.data.collate import Collator
from hfcustom.data.control import image_marks
from hfcustom.data.labels import expanded_position
from hfcustom.data.messages import RowError, read_row
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


# ---- what is trained on ---------------------------------------------------------------------------------------------


def text_tokens(processor: Any, batch: dict[str, torch.Tensor]) -> str:
    """Return the labels as text."""
    return "".join(labelled(processor, batch["labels"][0]))


def test_training_on_all_text_leaves_out_images_and_padding_only(family: Family) -> None:
    processor, row = family.processor, chat_row(2, turns=2)
    batch = Collator(processor, train_on="all")([row, chat_row(0)])
    model, ids, labels = family.model(), batch["input_ids"], batch["labels"]
    assert (labels[ids == model.placeholder_token_id] == IGNORE).all()
    assert (labels[batch["attention_mask"] == 0] == IGNORE).all()
    said = text_tokens(processor, batch)
    rendered = processor.apply_chat_template(row["messages"])
    for mark in image_marks(processor):
        rendered = rendered.replace(mark, "")
    assert "".join(said.split()) == "".join(rendered.split())
    usual = Collator(processor)([row, chat_row(0)])["labels"]
    assert torch.equal(usual[usual != IGNORE], labels[usual != IGNORE])
    assert torch.isfinite(family.model()(**batch).loss)


def test_training_on_all_keeps_what_weights_say_of_answers(internvl: Family) -> None:
    row = conversation(QUESTION, answer("No.", weight=0), turn("user", "Sure?"), answer("Yes", weighted("!", 3.0)))
    batch = Collator(internvl.processor, columns=["token_weights"], train_on="all")([row])
    runs = weight_runs(internvl.processor, batch)
    assert runs[-2:] == [(3, "!"), (1, "<|im_end|>\n")]
    assert "".join(words for _, words in runs).count("No.") == 0
    assert "Sure?" in runs[0][1]


@pytest.mark.parametrize("markers", [False, True])
def test_training_on_the_last_answer_is_a_weight_of_zero_on_the_others(family: Family, markers: bool) -> None:
    processor = with_markers(family.processor) if markers else family.processor
    row = chat_row(1, turns=3)
    batch = Collator(processor, train_on="last")([row])
    weighed = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in row["messages"][:-1]]
    other = Collator(processor)([{**row, "messages": [*weighed, row["messages"][-1]]}])
    assert batch.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in batch.items())
    assert labelled(processor, batch["labels"][0]) == [f"It is 0 of 2.{end_of_turn(processor)}"]


def test_training_on_something_else_is_named(internvl: Family) -> None:
    with pytest.raises(ValueError, match="Unknown train_on 'prompt'. .*Allowed: all, assistant, last"):
        Collator(internvl.processor, train_on="prompt")  # type: ignore[arg-type]
    with pytest.raises(RowError, match="row 0 is a pair .* train_on='all' is for ordinary rows"):
        Collator(internvl.processor, train_on="all")([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_ids_that_the_head_cannot_say_carry_no_label(family: Family) -> None:
    processor, size = family.processor, family.model().head_size()
    row = conversation(turn("user", IMAGE, "Draw."), turn("assistant", IMAGE, "or", IMAGE, "this"))
    labels = Collator(processor, train_on="all")([row])["labels"]
    assert (labels < size).all()  # marks of images are left out whatever the head
    most = int(labels[labels != IGNORE].max())
    cut = Collator(processor, train_on="all", head_size=most)([row])["labels"]
    assert torch.equal(cut, labels.masked_fill(labels >= most, IGNORE))


# ---- verified by decoding -------------------------------------------------------------------------------------------


def test_labels_on_other_words_are_named_with_row_and_processor(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = read_row(chat_row(1, turns=2), "rows.jsonl, line 5")
    original = collate.token_weights
    monkeypatch.setattr(collate, "token_weights", lambda *args: original(*args).roll(1))
    with pytest.raises(
        RowError, match=rf"rows.jsonl, line 5: with {type(family.processor).__name__}, the labels are on"
    ):
        Collator(family.processor)([row])


def test_markers_around_other_words_are_named(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    words = "{{ message['content'][-1]['text'] }}"
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{% generation %}"
        + words
        + "{% endgeneration %}"
        "{% else %}" + words + "{% endif %}{% endfor %}"
    )
    with pytest.raises(
        RowError, match=r"row 0: .* labels are on 'What is number 0\?', but the answers are 'It is 0 of 0.'"
    ):
        Collator(processor)([chat_row(0)])


def test_the_first_rows_are_verified_and_no_more(internvl: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(collate, "check_labels", lambda processor, row, *rest: seen.append(row.name))
    monkeypatch.setattr(Collator, "verified_rows", 3)
    collator = Collator(internvl.processor)
    for _ in range(3):
        collator([chat_row(0), chat_row(0)])
    assert seen == ["row 0", "row 1", "row 0"]


def test_a_blank_that_the_template_writes_before_an_answer_costs_it_no_token(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'][0]['text'] }} "
        "ASSISTANT: {% else %}{% generation %}{{ message['content'][0]['text'] }}<|im_end|>{% endgeneration %}{% endif %}"
        "{% endfor %}"
    )
    batch = Collator(processor)([conversation(turn("user", "?"), turn("assistant", "is it"))])
    assert labelled(processor, batch["labels"][0])[0].strip() == "is it<|im_end|>"


# ---- what is impossible by construction -----------------------------------------------------------------------------


def test_a_row_has_one_beginning_and_its_token_types_in_any_batch(family: Family) -> None:
    processor, bos = family.processor, family.processor.tokenizer.bos_token_id
    for rows in ([chat_row(0)], [chat_row(2)], [chat_row(1), chat_row(0, turns=2)]):
        batch = Collator(processor)(rows)
        counts = (batch["input_ids"] == bos).sum(1) if bos is not None else torch.zeros(1)
        assert counts.max() <= 1 or bos == processor.tokenizer.eos_token_id
        for name in {"mm_token_type_ids", "token_type_ids"} & {*processor.model_input_names}:
            assert batch[name].shape == batch["input_ids"].shape
            assert batch[name].any() == any(row["images"] for row in rows) or name == "token_type_ids"
        assert batch.rows == [f"row {at}" for at in range(len(rows))]


def test_a_processor_that_leaves_out_token_types_is_named(families: dict[str, Family], monkeypatch: Any) -> None:
    processor = families["qwen2_vl"].processor
    call = type(processor).__call__

    def without_types(self: Any, *args: Any, **kwargs: Any) -> Any:
        features = call(self, *args, **kwargs)
        features.pop("mm_token_type_ids", None)
        return features

    monkeypatch.setattr(type(processor), "__call__", without_types)
    with pytest.raises(ValueError, match="CustomQwen2VLProcessor made no mm_token_type_ids, which its model needs"):
        Collator(processor)([chat_row(1)])


def test_a_second_beginning_is_named(families: dict[str, Family]) -> None:
    processor = copy.deepcopy(families["mllama"].processor)
    processor.chat_template = "\n" + processor.chat_template  # the template's is no longer the first token
    call = type(processor).__call__
    kind = type("Again", (type(processor),), {})
    kind.__call__ = lambda self, **kwargs: call(self, **{**kwargs, "add_special_tokens": True})  # type: ignore[method-assign]
    processor.__class__ = kind
    with pytest.raises(RowError, match=r"row 0: Again wrote 2 <\|begin_of_text\|> into a text that needs one"):
        Collator(processor)([chat_row(1)])


def test_a_limit_of_the_tokenizer_cuts_no_row(family: Family) -> None:
    processor = copy.deepcopy(family.processor)
    processor.tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    processor.tokenizer.model_max_length = 4
    batch, whole = Collator(processor)([chat_row(2)]), Collator(family.processor)([chat_row(2)])
    assert torch.equal(batch["input_ids"], whole["input_ids"])


def test_every_limit_below_a_rows_length_refuses_it_and_none_cuts_it(internvl: Family) -> None:
    row = chat_row(2)
    length = Collator(internvl.processor)([row])["input_ids"].shape[1]
    for limit in range(1, length):
        with pytest.raises(RowError, match=f"row 0: {length} tokens, more than max_length={limit}"):
            Collator(internvl.processor, max_length=limit)([row])


def test_what_a_processor_refuses_is_named_with_its_row(families: dict[str, Family]) -> None:
    processor = families["qwen2_vl"].processor
    thin = replace(read_row(chat_row(1), "row 1"), images=[picture(size=(900, 4))])  # the image loader refuses it
    with pytest.raises(RowError, match=r"row 1: CustomQwen2VLProcessor cannot read the row: .*aspect ratio"):
        Collator(processor)([chat_row(1), thin])


def test_what_a_template_refuses_is_named_with_its_row(internvl: Family) -> None:
    processor = copy.copy(internvl.processor)
    processor.chat_template += "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    with pytest.raises(RowError, match="row 1: the chat template refuses the row: too many turns"):
        Collator(processor)([chat_row(0), chat_row(0, turns=2)])
