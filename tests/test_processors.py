"""Processors with torchvision and without: images always work, videos ask for what they need, settings travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, Family, chat_row, picture
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from hfcustom.data.collate import Collator
from hfcustom.processors import OptionalVideo
from hfcustom.registry import REGISTERED

WITH_VIDEO = [name for name in FAMILIES if issubclass(REGISTERED[f"custom_{name}"].processor_class, OptionalVideo)]


def test_it_reloads_through_auto_and_makes_the_same_tensors(family: Family, tmp_path: Path) -> None:
    family.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    first, second = (Collator(processor)([chat_row(2), chat_row(0, 1)]) for processor in (family.processor, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def test_it_loads_from_the_folder_of_the_stock_class(family: Family, tmp_path: Path) -> None:
    """The hub's processor_config.json names the stock class; some were written with torchvision, some without."""
    family.processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    content = json.loads(file.read_text())
    stock_class = next(base for base in type(family.processor).__mro__ if base.__module__.startswith("transformers."))
    file.write_text(json.dumps({**content, "processor_class": stock_class.__name__}))
    again = family.model_class.processor_class.from_pretrained(tmp_path)
    assert type(again) is family.model_class.processor_class
    assert torch.equal(
        Collator(again)([chat_row(1)])["input_ids"], Collator(family.processor)([chat_row(1)])["input_ids"]
    )


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_video_settings_survive_a_machine_that_cannot_use_them(
    name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    processor: Any = families[name].processor
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    content = json.loads(file.read_text())
    content["video_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    file.write_text(json.dumps(content))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and type(again.tokenizer) is type(processor.tokenizer)
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"]
    for key in ("video_processor_type", "image_mean", "size"):
        assert written.get(key) == content["video_processor"].get(key), key  # MiniCPM-V's has no size
    assert written["video_processor_type"] == processor.video_processor_type


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_works_or_says_what_to_install(name: str, families: dict[str, Family]) -> None:
    processor: Any = families[name].processor
    video = np.stack([np.asarray(picture(seed, (32, 32))) for seed in range(4)])  # (F, H, W, C)
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="Videos need torchvision: pip install torchvision"):
            processor(text=["<video> what?"], videos=[video])
    elif name == "internvl":
        batch = processor(text=["<video> what?"], videos=[[video]], return_tensors="pt")
        assert batch["pixel_values"].ndim == 4
