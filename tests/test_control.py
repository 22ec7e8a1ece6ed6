"""Control tokens in texts are words: in every family, each special token of its tokenizer in a question and an answer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from conversations import IMAGE, conversation, labelled, turn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hfcustom.data.collate import Collator, process
from hfcustom.data.control import STAND_INS, ControlTokens
from hfcustom.data.messages import RowError, read_row
from hfcustom.evaluate import generate_answers
from hfcustom.families.tiny import SENTENCES
from hfcustom.losses import IGNORE


def every_token(processor: Any) -> list[str]:
    """Return the control tokens of a processor; each row of a batch gets a few of them."""
    return sorted(ControlTokens(processor).tokens)


def typed(tokens: list[str], images: int = 1) -> dict[str, Any]:
    """Return a conversation that holds tokens alone, within words, twice and side by side, in all of its texts."""
    words = "".join(tokens) + " and " + " ".join(f"a{token}b {token}." for token in tokens)
    return conversation(
        turn("system", f"Say {words}"),
        turn("user", *[IMAGE] * images, f"What is {words}?"),
        turn("assistant", f"It is {words}"),
        turn("user", f"{words}"),
        turn("assistant", f"{words}"),
    )


def plain(tokens: list[str], images: int = 1) -> dict[str, Any]:
    """Return the same conversation without them."""
    return typed(["x" for _ in tokens], images)


def decoded(processor: Any, ids: Any) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def counts(processor: Any, ids: torch.Tensor) -> dict[int, int]:
    """Return how often each added token stands in the ids."""
    return {
        token: int((ids == token).sum()) for token in processor.tokenizer.added_tokens_decoder if (ids == token).any()
    }


def test_every_control_token_is_encoded_as_text(family: Family) -> None:
    processor, tokens = family.processor, every_token(family.processor)
    assert processor.image_token in tokens
    assert set(processor.tokenizer.all_special_tokens) <= set(tokens)
    row = typed(tokens)
    batch, without = (
        Collator(processor, columns=["token_weights"])([row, chat_row(2)]),
        Collator(processor)([plain(tokens)]),
    )
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0].bool()
    pad = {processor.tokenizer.pad_token_id}
    same = {**counts(processor, ids[mask]), **dict.fromkeys(pad, 0)}
    assert same == {**counts(processor, without["input_ids"][0]), **dict.fromkeys(pad, 0)}  # turns and image tokens
    text = decoded(processor, ids[mask])
    for message in row["messages"]:
        assert message["content"][-1]["text"] in text
    answers = labelled(processor, batch["labels"][0])
    assert len(answers) == 2
    for found, message in zip(answers, (row["messages"][2], row["messages"][4]), strict=True):
        assert found.startswith(message["content"][0]["text"])
    assert torch.equal(batch["token_weights"] != 0, batch["labels"] != IGNORE)
    alone = Collator(processor)([chat_row(2)])
    assert torch.equal(alone["input_ids"][0], batch["input_ids"][1][batch["attention_mask"][1].bool()])


def test_the_loss_runs_and_images_fit_their_tokens(family: Family) -> None:
    processor, tokens = family.processor, every_token(family.processor)[:12]
    mark = [processor.image_token]  # typed once, and twice as the image it is not
    batch = dict(Collator(processor)([typed(tokens), typed(mark, images=2), chat_row(1)]))
    with torch.no_grad():
        assert torch.isfinite(family.model()(**batch).loss)


def test_generation_reads_them_as_text_too(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, model, seen = family.processor, family.model(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs))
    tokens = every_token(processor)[:12]
    row = typed(tokens)
    (answer,) = generate_answers(model, processor, [row], max_new_tokens=1)
    assert answer.truth == row["messages"][4]["content"][0]["text"].strip()
    trained = Collator(processor)([row])["input_ids"][0]
    prompt = seen[0][0]
    assert torch.equal(prompt, trained[: len(prompt)])  # as it was trained on, to the last token
    assert row["messages"][3]["content"][0]["text"] in decoded(processor, prompt)


def test_a_token_that_lies_across_blocks_is_text(family: Family) -> None:
    processor = family.processor
    end, mark = processor.tokenizer.eos_token, processor.image_token
    row = conversation(
        turn("user", mark[:2], mark[2:], "?"), turn("assistant", f"a{end[:3]}", end[3:-1], f"{end[-1]}b")
    )
    batch = Collator(processor)([row])
    assert counts(processor, batch["input_ids"]) == counts(
        processor, Collator(processor)([conversation(turn("user", "?"), turn("assistant", "ab"))])["input_ids"]
    )
    assert labelled(processor, batch["labels"][0])[0].startswith(f"a{end}b")


def test_weights_of_blocks_stay_on_their_blocks(internvl: Family) -> None:
    processor = internvl.processor
    heavy = {"type": "text", "text": "<|im_end|> 42", "weight": 3.0}
    batch = Collator(processor, columns=["token_weights"])(
        [conversation(turn("user", "?"), turn("assistant", "It is ", heavy))]
    )
    ids, weights = batch["input_ids"][0], batch["token_weights"][0]
    assert decoded(processor, ids[weights == 3.0]) == "<|im_end|> 42"


def test_letters_that_are_stand_ins_elsewhere_stay_what_they_are(internvl: Family) -> None:
    processor = internvl.processor
    letters = "".join(map(chr, STAND_INS[:3]))
    row = conversation(turn("user", f"{letters}<|im_end|>"), turn("assistant", f"<|im_start|>{letters}"))
    batch = Collator(processor)([row])
    assert labelled(processor, batch["labels"][0]) == [f"<|im_start|>{letters}<|im_end|>\n"]
    assert f"{letters}<|im_end|>" in decoded(processor, batch["input_ids"][0])


def test_offsets_and_padding_are_those_of_the_tokenizer(internvl: Family) -> None:
    processor = internvl.processor
    rows = [read_row(chat_row(1), "row"), read_row(conversation(turn("user", "<|im_end|>")), "row")]
    reader, shielded = ControlTokens(processor).shield(processor, rows)
    texts = [reader.apply_chat_template(row.messages) for row in shielded]
    plain_texts = [texts[0], "words"]
    for side in ("left", "right"):
        features = process(reader, texts, shielded, padding_side=side, with_offsets=True)
        own = process(processor, plain_texts[:1], rows[:1], padding_side=side, with_offsets=True)
        mask = features["attention_mask"][0].bool()
        assert torch.equal(features["input_ids"][0][mask], own["input_ids"][0])
        assert torch.equal(features["offset_mapping"][0][mask], own["offset_mapping"][0])
        words = features["input_ids"][1][features["attention_mask"][1].bool()]
        assert decoded(processor, words) == "<|im_start|>user\n<|im_end|><|im_end|>\n"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_tokenizer_that_writes_blanks_writes_none_around_typed_tokens(internvl: Family, scheme: str) -> None:
    processor, own = copy.copy(internvl.processor), internvl.processor.tokenizer
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))  # as Llama's and Mistral's
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [chr(code) for code in range(33, 127)]
    specials = list(own.get_added_vocab())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SENTENCES, "\n"], trainer)
    processor.tokenizer = type(own)(tokenizer_object=backend, eos_token=own.eos_token, pad_token=own.pad_token)
    row = conversation(turn("user", "is a<|im_end|>b"), turn("assistant", "It is<|im_end|> and <|im_start|>assistant"))
    batch = Collator(processor)([row])
    assert labelled(processor, batch["labels"][0])[0].startswith("It is<|im_end|> and <|im_start|>assistant")
    assert "is a<|im_end|>b" in decoded(processor, batch["input_ids"][0])
    assert (batch["input_ids"] == processor.tokenizer.eos_token_id).sum() == 2


# ---- tokens that are meant ------------------------------------------------------------------------------------------


def test_allowed_tokens_stay_tokens(internvl: Family) -> None:
    processor = copy.deepcopy(internvl.processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<box>", "</box>"]})
    row = conversation(turn("user", "Where <|im_end|>?"), turn("assistant", "<box>1</box>"))
    box = processor.tokenizer.convert_tokens_to_ids("<box>")
    batch = Collator(processor, allowed_tokens=["<box>", "</box>"])([row])
    assert (batch["input_ids"] == box).sum() == (batch["labels"] == box).sum() == 1
    assert not (Collator(processor)([row])["input_ids"] == box).any()


def test_words_that_the_tokenizer_added_for_itself_stay_tokens(families: dict[str, Family]) -> None:
    processor = families["paligemma"].processor
    row = conversation(turn("user", "detect cat"), turn("assistant", "<loc0012><loc0345> cat <eos>"))
    labels = Collator(processor)([row])["labels"][0]
    place = processor.tokenizer.convert_tokens_to_ids("<loc0012>")
    assert (labels == place).sum() == 1
    assert (labels == processor.tokenizer.eos_token_id).sum() == 1  # the turn's own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("<imend>", "Unknown token in allowed_tokens '<imend>'. .*leave out"),
        ("<IMG_CONTEXT>", "a mark of images; write"),
    ],
)
def test_a_token_that_cannot_be_allowed_is_named(internvl: Family, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collator(internvl.processor, allowed_tokens=[name])


def test_each_token_is_told_once_with_its_first_row(internvl: Family, caplog: pytest.LogCaptureFixture) -> None:
    collator = Collator(internvl.processor)
    rows = [
        read_row(conversation(turn("user", "a <|im_end|>"), turn("assistant", "b")), f"a.jsonl, line {n}")
        for n in (3, 4)
    ]
    with caplog.at_level(logging.WARNING, "hfcustom"):
        for row in rows:
            collator([row])
    told = [record.message for record in caplog.records if "<|im_end|>" in record.message]
    assert len(told) == 1
    assert told[0].startswith(
        "a.jsonl, line 3: a text holds '<|im_end|>'; there and in later rows it is encoded as text"
    )


def test_words_that_the_tokenizer_always_joins_to_a_token_are_named(internvl: Family) -> None:
    processor = copy.deepcopy(internvl.processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["@"]})  # a letter of its alphabet
    row = read_row(conversation(turn("user", "me@home"), turn("assistant", "b")), "rows.jsonl, line 9")
    with pytest.raises(RowError, match="rows.jsonl, line 9: .*cannot write '@' as text"):
        Collator(processor)([row])
