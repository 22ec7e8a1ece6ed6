"""Idefics2: the record of what its processor wrote, which stock does not keep, and images in four quarters and whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from conversations import IMAGE, conversation, labelled, turn, with_markers
from transformers import Idefics2Processor

from hfcustom.data.collate import Collator
from hfcustom.data.labels import expanded_position
from hfcustom.losses import IGNORE

FAKE = "<fake_token_around_image>"
TEXTS = [
    "no image",
    "<image>",
    "<image>word",
    "<image> word",
    "<image>\nline",
    "one <image> two <image>three",
    "<image><image><image>three",
    "a<image><image>b<image>c",
    "<image><end_of_utterance>",
    f"{FAKE}<image>x",
    f"<image>{FAKE}{FAKE}x",
    f"{FAKE}x",
    f"{FAKE}{FAKE}{FAKE}x<image>y",
    "<image>\u00fc\U0001f600",
]


@pytest.fixture
def family(families: dict[str, Family]) -> Family:
    return families["idefics2"]


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def processor(request: pytest.FixtureRequest, family: Family) -> Any:
    processor = family.module.tiny_processor()
    processor.image_processor.do_image_splitting = request.param
    return processor


@pytest.mark.parametrize("text", TEXTS)
def test_the_expanded_text_is_stocks(processor: Any, text: str) -> None:
    images = [[picture(at) for at in range(text.count("<image>"))]]
    ids = processor(text=[text], images=images if images[0] else None)["input_ids"][0]
    expanded, records = processor.expand(text)
    assert processor.tokenizer(expanded)["input_ids"] == ids
    for record in records:
        assert expanded[slice(*record["new_span"])] == record["replacement"]
    for at, letter in enumerate(text):
        if not any(start <= at < end for record in records for start, end in [record["span"]]):
            assert expanded[expanded_position(at, records)] == letter
        elif any(record["span"] == (at, at + 1) and record["type"] == "text" for record in records):
            assert expanded[expanded_position(at, records) :].lstrip(" ")[0] == letter


def test_labels_are_the_answers_whole_or_split(processor: Any, family: Family) -> None:
    row = conversation(
        turn("user", IMAGE, IMAGE, "Which?"),
        turn("assistant", IMAGE, "this"),
        turn("user", "Sure?", IMAGE),
        turn("assistant", "Yes."),
    )
    batch = Collator(processor)([row, chat_row(1)])
    end = "<end_of_utterance>\n"
    assert labelled(processor, batch["labels"][0]) == [f" this{end}", f"Yes.{end}"]
    assert labelled(processor, batch["labels"][1]) == [f"It is 0 of 0.{end}"]
    crops = 5 if processor.image_processor.do_image_splitting else 1
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4 * 4 * crops, 4 * crops]
    model = family.model().train()
    assert torch.isfinite(model(**batch).loss)
    reduced = family.model(connector="average_pool").train()
    again = Collator(reduced.match_processor(copy.deepcopy(processor)))([row, chat_row(1)])
    assert (again["input_ids"] == processor.image_token_id).sum(1).tolist() == [4 * crops, crops]
    assert torch.isfinite(reduced(**again).loss)


def test_the_assistant_mask_is_on_the_answer(family: Family) -> None:
    """Stock's lies on the image (return_assistant_tokens_mask, transformers 5.23.0)."""
    row = chat_row(1)
    row["messages"][0]["content"][1] = {"type": "image", "image": row["images"][0]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    ours = with_markers(family.processor).apply_chat_template(row["messages"], **options)
    labels = Collator(family.processor)([chat_row(1)])["labels"]
    assert torch.equal(torch.as_tensor(ours["assistant_masks"]) == 1, labels != IGNORE)


@pytest.mark.parametrize("nested", [False, True])
def test_splitting_in_the_call_alone_is_refused(family: Family, nested: bool) -> None:
    option: dict[str, Any] = {"do_image_splitting": True}
    with pytest.raises(ValueError, match=r"do_image_splitting=True in the call .* set processor.image_processor"):
        family.processor(text=["<image>x"], images=[[picture()]], **({"images_kwargs": option} if nested else option))


def test_the_stock_processor_is_refused(family: Family) -> None:
    ours = family.module.tiny_processor()
    stock = Idefics2Processor(ours.image_processor, ours.tokenizer, image_seq_len=4, chat_template=ours.chat_template)
    with pytest.raises(
        ValueError, match=r"Idefics2Processor expands images without saying where.*model.processor_class"
    ):
        Collator(stock)([chat_row(1)])
