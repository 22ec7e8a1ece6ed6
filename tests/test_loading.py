"""Strict loading of modules that a class adds: new where that can be meant, an error that names them where not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model, stock_config
from safetensors.torch import load_file, save_file
from torch import nn

import hfcustom
from hfcustom.families import class_of
from hfcustom.registry import REGISTERED


def gated(model_class: Any) -> Any:
    class Gated(model_class):
        """Adds a gate with two tensors and a buffer that no checkpoint holds."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gate = Gate(config.get_text_config().hidden_size)
            self.post_init()

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.gate(hidden_states)

    return hfcustom.register(Gated)


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
    torch.testing.assert_close(model.gate.scale, torch.linspace(0.5, 1.5, len(model.gate.scale)))
    assert 0 < float(model.gate.proj.weight.detach().abs().max()) <= len(model.gate.scale) ** -0.5  # nn.Linear's own


class Assorted(nn.Module):
    """Tensors that transformers' own initialisation overwrites, or never reaches."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((size,), 0.25))
        self.closed = nn.Linear(size, size)
        nn.init.zeros_(self.closed.weight)
        self.recurrent = nn.GRU(4, 4)
        self.register_buffer("count", torch.tensor([3.0, 4.0]))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


def assert_as_made(assorted: Assorted) -> None:
    assert torch.equal(assorted.alpha.detach(), torch.full_like(assorted.alpha, 0.25))
    assert not assorted.closed.weight.any()
    for weight in assorted.recurrent.parameters():
        assert 0 < float(weight.detach().abs().max()) <= 0.5  # uniform within 1 / sqrt(4)
    assert torch.equal(assorted.count, torch.tensor([3.0, 4.0]))
    assert torch.equal(assorted.table, torch.arange(5.0))


def with_assorted(model_class: Any, **body: Any) -> Any:
    def __init__(self: Any, config: Any) -> None:
        model_class.__init__(self, config)
        self.assorted = Assorted(8)
        self.level = nn.Parameter(torch.tensor(7.0))
        self.post_init()

    names = {"__init__": __init__, "__module__": __name__, "__qualname__": "WithAssorted", **body}
    return hfcustom.register(type("WithAssorted", (model_class,), names))


def test_what_a_class_adds_starts_as_its_init_made_it(family: Family, tmp_path: Path) -> None:
    family.model(family.stock_class).save_pretrained(tmp_path / "stock")
    model_class = with_assorted(family.model_class)
    for model in (family.model(model_class), model_class.from_pretrained(tmp_path / "stock", dtype=torch.bfloat16)):
        assert_as_made(model.assorted)
        assert float(model.level) == 7
    model.save_pretrained(tmp_path / "own")
    assert_as_made(model_class.from_pretrained(tmp_path / "own").assorted)


def test_init_weights_is_asked_for_added_modules_where_a_class_overrides_it(internvl: Family, tmp_path: Path) -> None:
    def _init_weights(self: Any, module: nn.Module) -> None:
        internvl.model_class._init_weights(self, module)
        if isinstance(module, Assorted):
            nn.init.ones_(module.alpha)

    internvl.model(internvl.stock_class).save_pretrained(tmp_path)
    model_class = with_assorted(internvl.model_class, _init_weights=_init_weights)
    for model in (internvl.model(model_class), model_class.from_pretrained(tmp_path)):
        assert torch.equal(model.assorted.alpha.detach(), torch.ones(8))


def test_an_init_that_reads_stock_weights_is_told_when_to(internvl: Family, tmp_path: Path) -> None:
    class Copying(internvl.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.copied = nn.Linear(
                config.get_text_config().hidden_size, config.get_text_config().vocab_size, bias=False
            )
            self.copied.weight.data.copy_(self.lm_head.weight.data)
            self.post_init()

    internvl.model(internvl.stock_class).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Copying.__init__ reads weights of the stock parts.*after from_pretrained"):
        Copying.from_pretrained(tmp_path)


def test_a_class_brings_its_own_defaults_to_another_classs_checkpoint(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path / "plain")
    internvl.model(loss="z_loss").save_pretrained(tmp_path / "chosen")

    class Focused(internvl.model_class):  # type: ignore[misc, name-defined]
        default_loss = "focal"
        default_connector = "average_pool"

    for model_class in (Focused, hfcustom.register(Focused)):
        config = model_class.from_pretrained(tmp_path / "plain").config
        assert (config.loss, config.connector) == ("focal", "average_pool")
        assert model_class.from_pretrained(tmp_path / "plain", loss="cross_entropy").config.loss == "cross_entropy"
        assert model_class.from_pretrained(tmp_path / "chosen").config.loss == "z_loss"


def test_a_class_reads_its_own_familys_layout_whatever_had_its_name_before(
    families: dict[str, Family], tmp_path: Path
) -> None:
    for name in (
        "qwen2_vl",
        "internvl",
        "smolvlm",
        "qwen2_vl",
    ):  # the layouts of the hub differ, smolvlm's needs no conversion
        family = families[name]
        family.model(family.stock_class).save_pretrained(tmp_path / name)
        hfcustom.register(type("Namesake", (family.model_class,), {"__module__": __name__}), model_type=f"my_{name}")
        model = REGISTERED[f"my_{name}"].from_pretrained(tmp_path / name)
        assert_same_model(model, family.model(family.stock_class), family.batch([1]))


def test_what_is_not_registered_is_not_saved(internvl: Family, tmp_path: Path) -> None:
    class Nameless(internvl.model_class):  # type: ignore[misc, name-defined]
        pass

    with pytest.raises(ValueError, match=r"Nameless is not registered: .* as CustomInternVLFor.*@hfcustom.register"):
        internvl.model(Nameless).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_a_checkpoint_of_either_class_is_its_familys(family: Family, tmp_path: Path) -> None:
    config = family.module.tiny_config()
    stock_config(family.stock_class, config).save_pretrained(tmp_path / "stock")
    config.save_pretrained(tmp_path / "custom")
    assert class_of(str(tmp_path / "stock")) is class_of(str(tmp_path / "custom")) is family.model_class


@pytest.mark.parametrize("folder", ["./missing", "/missing/model", "../missing"])
def test_a_missing_folder_is_no_question_of_the_hub(internvl: Family, folder: str) -> None:
    for load in (internvl.model_class.from_pretrained, class_of):
        with pytest.raises(FileNotFoundError, match=f"There is no folder {folder}"):
            load(folder)


def test_what_is_saved_of_a_bundle_names_no_code_that_is_not_beside_it(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.config.auto_map = {"AutoConfig": "modeling_custom_internvl.CustomInternVLConfig"}
    model.save_pretrained(tmp_path / "bundle")
    internvl.model_class.from_pretrained(tmp_path / "bundle").save_pretrained(tmp_path / "again")
    assert "auto_map" in json.loads((tmp_path / "bundle/config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    assert "trust_remote_code" not in (tmp_path / "again/README.md").read_text()
