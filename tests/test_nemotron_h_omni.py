"""Nemotron 3 Nano Omni beside what every family must do: labels, speech, a head that stock does not name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, picture
from conversations import with_markers
from safetensors.torch import load_file

from hfcustom.families import class_of, missing_packages

pytestmark = pytest.mark.skipif(bool(missing_packages("nemotron_h_omni")), reason="works with torchvision only")


@pytest.fixture
def nemotron(families: dict[str, Family]) -> Family:
    return families["nemotron_h_omni"]


def test_the_assistant_mask_is_the_answer_and_its_end(nemotron: Family) -> None:
    processor = with_markers(nemotron.processor)
    content: list[dict[str, Any]] = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "It is nothing."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    outputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = outputs["input_ids"][0][outputs["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(said) == "It is nothing.<|im_end|>\n"


def test_replacements_are_returned_only_where_they_are_asked_for(nemotron: Family) -> None:
    inputs = {"text": ["a<image>b"], "images": [[picture()]]}
    assert "text_replacement_offsets" not in nemotron.processor(**inputs)
    for asked in (
        {"return_text_replacement_offsets": True},
        {"text_kwargs": {"return_text_replacement_offsets": True}},
    ):
        ((replaced,),) = nemotron.processor(**inputs, **asked)["text_replacement_offsets"]
        assert replaced["span"] == (1, 8) and replaced["new_span"] == (1, 1 + len(replaced["replacement"]))


def test_the_published_config_is_this_familys(nemotron: Family, tmp_path: Path) -> None:
    nemotron.model(nemotron.stock_class).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "NemotronH_Nano_Omni_Reasoning_V3"}))
    assert class_of(str(tmp_path)) is nemotron.model_class
    _, info = nemotron.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "nemotron"}))
    for load in (class_of, nemotron.model_class.from_pretrained):
        with pytest.raises(ValueError, match="model_type '?nemotron"):
            load(str(tmp_path))


def test_speech_and_its_projector_are_other_parts(nemotron: Family) -> None:
    model = nemotron.model()
    parts = model.stock_parts()
    assert parts.paths["connector"] == ("multi_modal_projector",)
    assert parts.paths["other"] == ("audio_tower", "embed_audio")
    assert model.get_output_embeddings() is model.language_model.lm_head
    config = nemotron.module.tiny_config()
    config.audio_config = None
    assert nemotron.model_class(config).stock_parts().paths["other"] == ()


def test_the_hub_layout_has_the_names_of_the_published_checkpoint(nemotron: Family, tmp_path: Path) -> None:
    nemotron.model().save_pretrained(tmp_path, save_original_format=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    for part in ("mlp1.0.", "sound_encoder.encoder.", "sound_projection.", "vision_model.radio_model.model.blocks."):
        assert any(name.startswith(part) for name in names), part
    assert "language_model.backbone.layers.1.mixer.experts.3.up_proj.weight" in names  # one tensor an expert


def test_speech_reaches_the_language_model_as_in_stock(nemotron: Family) -> None:
    waveform = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    model, stock = nemotron.model(), nemotron.model(nemotron.stock_class)
    frames = torch.tensor(nemotron.processor.feature_extractor([waveform], sampling_rate=16000).input_features)
    inputs = {"input_features": frames.transpose(1, 2)[:, :104]}  # (clips, frames, mel bins)
    tokens = len(stock.get_audio_features(**inputs).pooler_output)
    ids = [5, *[model.config.audio_token_id] * tokens, 6]
    with torch.no_grad():
        logits = [net(input_ids=torch.tensor([ids]), **inputs).logits for net in (model, stock)]
    assert tokens > 4 and torch.equal(*logits)
