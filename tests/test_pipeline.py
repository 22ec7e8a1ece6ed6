"""transformers.pipeline answers with a saved model of any family as its own generate() does; beams see what their row shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, picture
from transformers import pipeline

from hfcustom.data.collate import process
from hfcustom.data.messages import Example

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_a_pipeline_answers_as_generate_does(family: Family, tmp_path: Path, connector: str | None) -> None:
    model = family.model(connector=connector)
    processor = model.match_processor(family.module.tiny_processor())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path))
    assert type(answer.model) is family.model_class and type(answer.processor) is type(processor)

    image, text = picture(3), {"type": "text", "text": "What is in this image?"}
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
    found = answer(text=messages, return_full_text=False, generate_kwargs=OPTIONS)[0]["generated_text"]

    prompt = [{"role": "user", "content": [{"type": "image"}, text]}]
    rendered = processor.apply_chat_template(prompt, add_generation_prompt=True)
    inputs = process(processor, [rendered], [Example(prompt, [image], "row")], padding_side="left")
    tokens = model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    assert tokens.shape == (1, 8)
    said = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    assert found.strip() == said.strip()  # MiniCPM-V's processor strips what it decodes; PaliGemma's repeats a blank


def test_each_beam_sees_the_images_of_its_row(family: Family) -> None:
    model, inputs = family.model(), family.batch([2, 1])
    del inputs["labels"]
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    one, beams = (model.generate(**inputs, **options, num_beams=count).logits[0] for count in (1, 3))  # (B or 3 B, V)
    torch.testing.assert_close(beams, one.repeat_interleave(3, 0), rtol=1e-5, atol=1e-5)
