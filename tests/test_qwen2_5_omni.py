"""Qwen2.5-Omni's thinker: loaded out of a whole checkpoint, with sound beside images, and sound in videos."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, picture
from safetensors.torch import save_file

from hfcustom.families import class_of
from hfcustom.parts import find_parts


@pytest.fixture
def omni(families: dict[str, Family]) -> Family:
    return families["qwen2_5_omni"]


def save_whole(omni: Family, folder: Path) -> Any:
    """Write a checkpoint as the hub has it: thinker, talker and vocoder in one, one config in another."""
    stock = omni.model(omni.stock_class)
    config = {**stock.config.to_dict(), "model_type": "qwen2_5_omni_thinker"}
    whole = {
        "model_type": "qwen2_5_omni",
        "thinker_config": config,
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    names = {name: f"thinker.{name.removeprefix('model.')}" for name in stock.state_dict()}
    names = {name: new.replace("thinker.language_model.", "thinker.model.") for name, new in names.items()}
    tensors = {names[name]: tensor for name, tensor in stock.state_dict().items()}
    tensors |= {"talker.codec_head.weight": torch.zeros(2), "token2wav.code2wav_dit_model.scale": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return stock


def test_the_thinker_of_a_whole_checkpoint_loads_every_tensor(
    omni: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = save_whole(omni, tmp_path)
    assert class_of(str(tmp_path)) is omni.model_class
    logger = logging.getLogger("hfcustom")
    logger.addHandler(caplog.handler)
    try:
        model, info = omni.model_class.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not caplog.text
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.model_type == "custom_qwen2_5_omni"
    assert model.config.vision_start_token_id == stock.config.vision_start_token_id


def test_the_thinker_alone_is_the_familys_too(omni: Family, tmp_path: Path) -> None:
    omni.model(omni.stock_class).save_pretrained(tmp_path)
    assert class_of(str(tmp_path)) is omni.model_class


# ---- sound ----------------------------------------------------------------------------------------------------------


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=int(16000 * seconds)).astype(np.float32)


def sound_batch(processor: Any) -> dict[str, torch.Tensor]:
    """Return two rows: an image and a sound, and a sound alone."""
    texts = [
        "<|vision_bos|><|IMAGE|><|vision_eos|> and <|audio_bos|><|AUDIO|><|audio_eos|> what?",
        "<|audio_bos|><|AUDIO|><|audio_eos|>?",
    ]
    batch = dict(
        processor(
            text=texts,
            images=[[picture(1)], []],
            audio=[sound(0.4), sound(0.7, 1)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def test_with_sound_logits_and_every_gradient_are_bit_equal_to_stock(omni: Family) -> None:
    batch = sound_batch(omni.processor)
    model, stock = omni.model(loss="stock"), omni.model(omni.stock_class)
    outputs, expected = model(**batch), stock(**batch)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
    outputs.loss.backward()
    expected.loss.backward()
    theirs = dict(stock.named_parameters())
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in silent if "audio_bos_eos_token" not in name]  # which stock never looks at
    for name, parameter in model.named_parameters():
        assert name in silent or torch.equal(parameter.grad, theirs[name].grad), name


def test_the_audio_tower_is_a_part_of_its_own(omni: Family) -> None:
    assert find_parts(omni.model()).paths["other"] == ("model.audio_tower",)


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_sound_and_images_train_as_they_are_read(omni: Family, connector: Any) -> None:
    """In training the mask stays, of which stock makes the images' height and width."""
    model = omni.model(connector=connector)
    batch = sound_batch(model.match_processor(copy.deepcopy(omni.processor)))
    with torch.no_grad():
        read, trained = model.eval()(**batch).loss, model.train()(**batch).loss
    torch.testing.assert_close(trained, read, rtol=1e-6, atol=0)


def test_sound_in_a_video_is_laid_between_the_frames_that_the_connector_leaves(omni: Family) -> None:
    """As many video placeholders, and at the same places, as in a video that was smaller from the start."""
    processor = omni.model(connector="average_pool").match_processor(copy.deepcopy(omni.processor))
    plain = copy.deepcopy(omni.processor)
    options = {"load_audio_from_video": True, "seconds_per_chunk": 2.0, "position_id_per_seconds": 25}
    texts = []
    for writer, size in ((processor, (6, 8, 4)), (plain, (6, 4, 2))):
        writer.video_processor = SimpleNamespace(merge_size=2)
        videos = {"video_grid_thw": np.array([size]), "video_second_per_grid": [1.0]}
        options |= {"processed_audio": {"num_audio_tokens": [120]}, "video_to_audio_indices": [0]}
        texts.append(writer.replace_video_token(videos, 0, **options))
    assert texts[0] == texts[1]
    assert texts[0].count("<|VIDEO|>") == 12 and texts[0].count("<|AUDIO|>") == 120
    assert texts[0].index("<|AUDIO|>") < texts[0].rindex("<|VIDEO|>")
