"""The upgrade sentinel: silent when nothing has changed, one line for each thing that has, an error for what is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from torch import nn
from transformers import Qwen3Config

import hfcustom
from hfcustom import cli, record, sentinel
from hfcustom.doctor.examine import examine
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.registry import REGISTERED

Edit = Callable[[dict[str, Any]], None]


def reader_class(internvl: Family) -> Any:
    """Return a class that overrides a stock method, calls another, names a module and reads a config field."""

    @hfcustom.register
    class Relying(internvl.model_class):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = nn.Linear(1, 1)
            self.post_init()

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_image_features(*args, **kwargs)

        def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            assert self.model.multi_modal_projector is not None
            assert callable(self.prepare_inputs_for_generation)
            return embeddings

    return Relying


@pytest.fixture
def saved(internvl: Family, tmp_path: Path) -> tuple[Any, Path]:
    model_class = reader_class(internvl)
    internvl.model(model_class).save_pretrained(tmp_path)
    return model_class, tmp_path


def edit(folder: Path, change: Edit) -> None:
    """Let the folder have been saved where things were otherwise."""
    path = folder / record.FILE
    content = json.loads(path.read_text())
    change(content["relies_on"])
    path.write_text(json.dumps(content))


def said(model_class: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load and return what the sentinel said."""
    heard: list[str] = []
    monkeypatch.setattr(sentinel.logger, "warning", heard.append)
    model_class.from_pretrained(folder)
    return "\n".join(heard)


@pytest.fixture
def load(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    return lambda: said(*saved, monkeypatch)


def test_nothing_is_said_when_nothing_has_changed(
    saved: tuple[Any, Path], load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load() == ""
    edit(saved[1], lambda then: then.update(transformers="5.20.0", hfcustom="0.0.9"))
    assert load() == "", "another version alone is no news"


def test_every_family_is_as_it_was_saved(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    then = record.read_record(tmp_path)["relies_on"]
    assert then["stock_class"] == family.stock_class.__name__
    assert then["methods"]["forward"]["signature"].startswith("(self")
    assert then["parts"].keys() <= {"vision", "connector", "language"}
    assert then["modules"]
    assert said(family.model_class, tmp_path, monkeypatch) == ""
    family.stock_class.from_pretrained(tmp_path)  # which looks at no file of ours


@pytest.mark.parametrize("name", encoder_names())
def test_encoders_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, model_class = load_encoder(name), REGISTERED[f"custom_{name}"]
    model_class(module.tiny_config()).save_pretrained(tmp_path)
    assert said(model_class, tmp_path, monkeypatch) == ""
    edit(tmp_path, lambda then: then["config"].append("old_field"))
    assert "old_field is gone" in said(model_class, tmp_path, monkeypatch)


def test_what_is_recorded_is_what_the_class_relies_on(saved: tuple[Any, Path]) -> None:
    then = record.read_record(saved[1])["relies_on"]
    assert then["methods"].keys() == {
        *("forward", "get_image_features", "prepare_inputs_for_generation", "transform_embeddings")
    }
    assert then["methods"]["get_image_features"]["of"] == "InternVLForConditionalGeneration"
    assert then["methods"]["transform_embeddings"]["of"] == "CustomVLM"
    assert then["parts"]["vision"]["path"] == "model.vision_tower"
    assert "model.vision_tower.encoder.layer.*.mlp.fc1" in then["modules"]
    assert "scale" not in then["modules"], "of the stock graph alone"


# ---- methods --------------------------------------------------------------------------------------------------------


def test_other_code_of_an_overridden_method_is_to_be_looked_at(
    internvl: Family, load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = internvl.stock_class
    signature = sentinel.signature_of(stock.get_image_features)

    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("another version")

    get_image_features.__signature__ = __import__("inspect").signature(stock.get_image_features)  # type: ignore[attr-defined]
    assert sentinel.signature_of(get_image_features) == signature
    monkeypatch.setattr(stock, "get_image_features", get_image_features)
    assert (
        "InternVLForConditionalGeneration.get_image_features() has other code; Relying overrides it: look at it"
        in load()
    )


def test_other_arguments_are_shown_in_both_forms(
    internvl: Family, load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_image_features(self: Any, pixels: Any, deep: bool = True) -> Any:
        raise NotImplementedError("another version")

    monkeypatch.setattr(internvl.stock_class, "get_image_features", get_image_features)
    text = load()
    assert "get_image_features() takes other arguments; Relying overrides it:" in text
    assert re.search(r"then \(self, pixel_values", text)
    assert "now  (self, pixels, deep=True)" in text


def test_the_forward_that_hfcustom_runs_is_watched_without_an_override(
    saved: tuple[Any, Path], load: Callable[[], str]
) -> None:
    edit(saved[1], lambda then: then["methods"]["forward"].update(source="0" * 16))
    assert "InternVLForConditionalGeneration.forward() has other code\n" in load()


@pytest.mark.parametrize("name", ["get_image_features", "prepare_inputs_for_generation"])
def test_a_method_that_is_gone_is_an_error_until_the_class_does_without(
    name: str, internvl: Family, saved: tuple[Any, Path], load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(model_class: Any, asked: str) -> Any:
        return None if asked == name else found(model_class, asked)

    found = sentinel.method_facts
    monkeypatch.setattr(sentinel, "method_facts", gone)
    effect = "overrides, so that its own is never called" if name == "get_image_features" else "calls"
    with pytest.raises(ValueError, match=rf"LOST  \w+\.{name}\(\) is gone, which Relying {effect}") as error:
        load()
    assert "Change Relying to what there is now, or install transformers==" in str(error.value)
    for method in ("get_image_features", "transform_embeddings"):
        monkeypatch.delattr(saved[0], method)
    assert load() == "", "mended, it is loaded"


# ---- config and modules ---------------------------------------------------------------------------------------------


def test_a_config_field_that_is_gone(
    saved: tuple[Any, Path], load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved[1], lambda then: then["config"].append("pooling_mode"))
    assert "InternVLConfig.pooling_mode is gone" in load()
    monkeypatch.setattr(sentinel, "mentioned", lambda model_class: frozenset({"pooling_mode"}))
    with pytest.raises(ValueError, match="LOST  InternVLConfig.pooling_mode is gone, which the code of Relying reads"):
        load()


def test_a_module_that_is_gone(
    saved: tuple[Any, Path], load: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved[1], lambda then: then["modules"].extend(["model.abstractor.query", "model.abstractor.layers.*.mlp"]))
    assert "the module model.abstractor is gone\n" in load()
    before = sentinel.mentioned
    monkeypatch.setattr(sentinel, "mentioned", lambda model_class: before(model_class) | {"abstractor"})
    with pytest.raises(ValueError, match="LOST  the module abstractor is gone, which the code of Relying names"):
        load()


def test_a_module_that_has_another_name(saved: tuple[Any, Path], load: Callable[[], str]) -> None:
    def rename(then: dict[str, Any]) -> None:
        then["modules"] = [name.replace("model.vision_tower", "model.vision_encoder") for name in then["modules"]]

    edit(saved[1], rename)
    assert "the module model.vision_encoder is called model.vision_tower now" in load()
    assert load().count("vision_encoder") == 1, "one line, not one a layer"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"class": "OldTower"}, "the part vision is a InternVLVisionModel, it was a OldTower"),
        (
            {"forward": "(self, images)"},
            "InternVLVisionModel.forward() takes other arguments:\n      then (self, images)",
        ),
    ],
)
def test_a_part_that_is_another(
    change: dict[str, str], text: str, saved: tuple[Any, Path], load: Callable[[], str]
) -> None:
    edit(saved[1], lambda then: then["parts"]["vision"].update(change))
    assert text in load()


# ---- how it is said -------------------------------------------------------------------------------------------------


def test_versions_are_named_and_the_rest_is_one_screen(saved: tuple[Any, Path], load: Callable[[], str]) -> None:
    def age(then: dict[str, Any]) -> None:
        then["transformers"] = "5.20.0"
        then["config"] += [f"field_{at}" for at in range(40)]

    edit(saved[1], age)
    text, here = load(), record.versions()
    assert (
        f"was saved under transformers 5.20.0 and hfcustom {here['hfcustom']}; here are {here['transformers']}" in text
    )
    assert (
        f"and 22 more: `hfcustom doctor {saved[1]} --custom test_sentinel.py:Relying --check upgrade` lists them"
        in text
    )
    assert len(text.splitlines()) == sentinel.SCREEN + 3


def test_an_error_while_loading_carries_what_has_changed(internvl: Family, tmp_path: Path) -> None:
    @hfcustom.register
    class Late(internvl.model_class):
        broken = False

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if self.broken:
                raise AttributeError("no multi_modal_projector")
            self.post_init()

    internvl.model(Late).save_pretrained(tmp_path)
    edit(tmp_path, lambda then: then["config"].append("old_field"))
    Late.broken = True
    with pytest.raises(AttributeError, match="no multi_modal_projector") as error:
        Late.from_pretrained(tmp_path)
    assert "old_field is gone" in error.value.__notes__[0]


def test_a_relative_s_checkpoint_says_nothing(
    internvl: Family, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved[1], lambda then: then.update(stock_class="AnotherModel", config=["old_field"]))
    assert said(saved[0], saved[1], monkeypatch) == ""


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"origin": 1, "training": [], "relies_on": {}}',
        '{"origin": null, "training": [1], "relies_on": {}}',
    ],
)
def test_a_damaged_record_is_named_and_left_aside(
    content: str, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved[1] / record.FILE).write_text(content)
    heard: list[str] = []
    monkeypatch.setattr(record.logger, "warning", heard.append)
    model = saved[0].from_pretrained(saved[1])
    assert "hfcustom.json cannot be used" in heard[0]
    assert list(model.training_runs) == []


@pytest.mark.parametrize("value", [None, 1, "x", ["x", 2], {"vision": 3}, {"forward": {"signature": 4}}])
@pytest.mark.parametrize("key", ["methods", "modules", "parts", "config", "transformers"])
def test_nothing_that_a_record_can_hold_breaks_loading(key: str, value: Any, saved: tuple[Any, Path]) -> None:
    edit(saved[1], lambda then: then.update({key: value}))
    saved[0].from_pretrained(saved[1])
    for finding in [sentinel.all_drifts(saved[0].from_pretrained(saved[1]), record.read_record(saved[1]))]:
        assert all(isinstance(drift.what, str) for drift in finding)


def test_an_adapter_is_watched_too(internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfcustom.training.checkpoint import save_model

    internvl.model().save_pretrained(tmp_path / "base")
    wrapped = hfcustom.lora(internvl.model_class.from_pretrained(tmp_path / "base"), rank=2)
    save_model(wrapped, internvl.processor, tmp_path / "adapter")
    heard: list[str] = []
    monkeypatch.setattr(sentinel.logger, "warning", heard.append)
    hfcustom.load_adapter(tmp_path / "adapter")
    assert not heard
    edit(tmp_path / "adapter", lambda then: then["config"].append("old_field"))
    hfcustom.load_adapter(tmp_path / "adapter")
    assert "old_field is gone" in heard[0]


def test_the_doctor_reports_it(
    saved: tuple[Any, Path], internvl: Family, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = saved[1]
    (finding,) = examine(str(folder), ["upgrade"])
    assert finding.status == "ok"
    assert finding.measured.startswith("4 methods, ")
    edit(folder, lambda then: then["config"].append("old_field"))
    assert cli.main(["doctor", str(folder), "--check", "upgrade"]) == 1
    assert "InternVLConfig.old_field is gone" in capsys.readouterr().out
    (skipped,) = examine(saved[0], ["upgrade"])
    assert skipped.status == "skipped"
    (folder / record.FILE).unlink()
    (skipped,) = examine(str(folder), ["upgrade"])
    assert "has no hfcustom.json" in skipped.measured


def test_the_doctor_looks_at_the_checkpoint_s_own_make(internvl: Family, tmp_path: Path) -> None:
    text = internvl.module.tiny_config().text_config.to_dict()
    config = internvl.module.tiny_config()
    config.text_config = Qwen3Config(**{key: value for key, value in text.items() if key != "model_type"})
    internvl.model_class(config).save_pretrained(tmp_path)
    assert "model.language_model.layers.*.self_attn.q_norm" in record.read_record(tmp_path)["relies_on"]["modules"]
    (finding,) = examine(str(tmp_path), ["upgrade"])
    assert finding.status == "ok", finding.measured


def test_what_changes_no_behaviour_changes_no_hash() -> None:
    plain = "def f(x):\n    return x + 1\n"
    told = 'def f(x):\n    """Say.\n\n    More.\n    """\n\n    # why\n    return x + 1\n'
    assert sentinel.hash_of(plain) == sentinel.hash_of(told) != sentinel.hash_of(plain.replace("1", "2"))
    assert sentinel.hash_of("") == ""


def test_a_signature_has_no_addresses() -> None:
    marker = object()

    def f(x: int, *, y: Any = marker, z: float = 0.5) -> None: ...

    assert sentinel.signature_of(f) == "(x, *, y=<object object>, z=0.5)"
