"""Strict loading of modules that a class adds: new where that can be meant, an error that names them where not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model
from safetensors.torch import load_file, save_file
from torch import nn


def gated(model_class: Any) -> Any:
    class Gated(model_class):
        """Adds a gate with two tensors and a buffer that no checkpoint holds."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gate = Gate(config.text_config.hidden_size)
            self.post_init()

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.gate(hidden_states)

    return Gated


class Gate(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, size)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, size), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.proj(hidden_states) * self.scale


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("hfcustom"), "propagate", True)
    return caplog


def drop(file: Path, *names: str) -> None:
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k not in names}, file, metadata={"format": "pt"})


def test_a_stock_checkpoint_leaves_new_modules_initialised_and_says_so(
    family: Family, tmp_path: Path, messages: Any
) -> None:
    family.model(family.stock_class).save_pretrained(tmp_path)
    model = gated(family.model_class).from_pretrained(tmp_path)
    assert f"Gated: gate not in {tmp_path}; newly initialised" in messages.text
    assert 0.01 < float(model.gate.proj.weight.detach().std()) < 0.03  # the model's own initializer_range
    assert not model.gate.proj.bias.any()


def test_a_new_module_survives_saving_buffers_included(family: Family, tmp_path: Path) -> None:
    mine = gated(family.model_class)
    model, batch = family.model(mine), family.batch([1])
    model.save_pretrained(tmp_path)
    again = mine.from_pretrained(tmp_path)
    assert torch.equal(again.gate.scale, model.gate.scale)
    assert_same_model(again, model, batch)


def test_a_new_module_missing_from_its_own_checkpoint_is_an_error_with_a_cure(family: Family, tmp_path: Path) -> None:
    mine = gated(family.model_class)
    family.model(mine).save_pretrained(tmp_path)
    drop(tmp_path / "model.safetensors", "gate.proj.weight", "gate.proj.bias")
    with pytest.raises(
        ValueError, match=r"no tensor for 'gate.proj.bias' \(new module gate of Gated\).*new_modules=\['gate'\]"
    ):
        mine.from_pretrained(tmp_path)
    mine.from_pretrained(tmp_path, new_modules=["gate"])
    with pytest.raises(ValueError, match=r"new_modules names 'gatee', which Gated does not add .*added: gate"):
        mine.from_pretrained(tmp_path, new_modules=["gatee"])


def test_half_a_new_module_is_a_damaged_checkpoint(family: Family, tmp_path: Path) -> None:
    mine = gated(family.model_class)
    family.model(mine).save_pretrained(tmp_path)
    drop(tmp_path / "model.safetensors", "gate.proj.bias")
    with pytest.raises(ValueError, match=r"no tensor for 'gate.proj.bias'"):
        mine.from_pretrained(tmp_path, new_modules=["gate"])


def test_another_shape_names_the_tensor(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.multi_modal_projector.linear_1.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"multi_modal_projector.linear_1.bias"):
        internvl.model_class.from_pretrained(tmp_path)


def test_tensors_without_a_place_are_named(internvl: Family, tmp_path: Path, messages: Any) -> None:
    internvl.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.critic.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    internvl.model_class.from_pretrained(tmp_path)
    assert "has no place for 1 tensors of" in messages.text and "model.critic.weight" in messages.text


def test_loading_info_comes_back_when_asked_for(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path)
    model, info = internvl.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, internvl.model_class) and not info["missing_keys"]


def test_sharded_checkpoints_and_16_bit_weights_load(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = internvl.model_class.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert internvl.model_class.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
