"""Rows of an image and its text: every form is read, every mistake names the row, and long texts are cut or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from encoder_cases import Encoder, encoders
from test_sources import write_jsonl

import hfcustom
from hfcustom.data.captions import CaptionCollator
from hfcustom.data.messages import RowError

FORMS: dict[str, dict[str, Any]] = {
    "image and text": {"image": picture(3), "text": "two dogs"},
    "images and caption": {"images": [picture(3)], "caption": "two dogs", "id": 7},
    "one user turn": {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two dogs"}]}],
        "images": [picture(3)],
    },
    "an answer": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": picture(3)}]},
            {"role": "assistant", "content": "two dogs"},
        ]
    },
}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "two images": (
        {"images": [picture(), picture()], "text": "a"},
        "row 0: 2 images and 1 texts; .* one image with one text",
    ),
    "no list": ({"images": picture(), "text": "a"}, "row 0: images is Image; .* under 'image'"),
    "both images": ({"image": picture(), "images": [picture()], "text": "a"}, "row 0: both 'image' and 'images'"),
    "both texts": ({"image": picture(), "text": "a", "caption": "b"}, "row 0: both 'text' and 'caption'"),
    "texts": ({"image": picture(), "text": ["a", "b"]}, "row 0: text is list; .*Write a row for each text"),
    "a path": ({"image": "cat.png", "text": "a"}, "row 0, image 0: Image 'cat.png' is a path"),
    "empty": ({"image": picture(), "text": " "}, r"row 0: its text is empty \(' '\).*drop the row"),
    "no image": ({"text": "a"}, r"row 0: no list of messages \(columns: text\).*{'image': ..., 'text': ...}"),
    "a question": (
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]},
        "row 0: 0 images and 2 texts; a contrastive encoder compares one image with one text",
    ),
    "a pair": (
        {"prompt": "What?", "chosen": "a", "rejected": "b", "images": [picture()]},
        "row 0: a preference row, which a contrastive encoder has no use for",
    ),
}


@pytest.fixture(scope="module")
def clip() -> Encoder:
    return encoders()["clip"]


@pytest.fixture(params=sorted(encoders()))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return encoders()[request.param]


def test_every_form_is_the_same_batch_as_the_processor_makes(encoder: Encoder) -> None:
    collate = encoder.model().make_collator(encoder.processor)
    options: dict[str, Any] = {"padding": encoder.model_class.text_padding, "max_length": 64}
    expected = encoder.processor(text=["two dogs"], images=[picture(3)], return_tensors="pt", **options)
    for form in FORMS.values():
        batch = collate([form])
        assert batch.keys() == expected.keys() and batch.images == 1
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_row_and_the_cure(clip: Encoder, mistake: str) -> None:
    row, message = MISTAKES[mistake]
    with pytest.raises(RowError, match=message):
        clip.model().make_collator(clip.processor)([row])


def test_a_vision_language_model_learns_to_say_the_text(families: Any) -> None:
    processor = families["internvl"].processor
    batch = hfcustom.Collator(processor)([FORMS["image and text"]])
    said = processor.tokenizer.decode(batch["input_ids"][batch["labels"] != -100])
    assert said.startswith("two dogs") and batch.images == 1


def test_a_file_of_such_rows_is_read(tmp_path: Path) -> None:
    picture(3).save(tmp_path / "dogs.png")
    rows = hfcustom.load_rows(write_jsonl(tmp_path / "rows.jsonl", {"image": "dogs.png", "text": "two dogs"}))
    assert rows[0].images[0] == picture(3) and rows[0].columns == {}


def test_a_long_text_is_cut_as_in_the_training_of_the_checkpoints_and_the_first_is_named(
    clip: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": picture(), "text": "7" * count} for count in (5, 90)]
    batch = CaptionCollator(clip.processor, 12)(rows)
    assert batch["input_ids"].shape == (2, 12)
    assert (
        int(batch["input_ids"][1, -1]) == clip.processor.tokenizer.eos_token_id
    )  # which CLIP's text vector is read at
    with pytest.raises(RowError, match=r"row 1: its text has 92 tokens, more than max_length=9. Shorten it"):
        CaptionCollator(clip.processor, 12, 9)(rows)
    with pytest.raises(ValueError, match="max_length=100, but the text tower reads 77 tokens"):
        clip.model().make_collator(clip.processor, 100)
