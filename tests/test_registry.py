"""register(): one call, harmless twice, exact about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model, stock_config
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Idefics3Config,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import hfcustom
from hfcustom.registry import REGISTERED


def make_class(parent: Any, name: str, **body: Any) -> Any:
    return type(name, (parent,), {"__module__": __name__, "__qualname__": name, **body})


def test_a_class_without_a_config_gets_its_own_and_loads_back(family: Family, tmp_path: Path) -> None:
    mine = hfcustom.register(make_class(family.model_class, "MyOwnReader"))
    assert mine.config_class.__name__ == "MyOwnReaderConfig"
    assert mine.config_class.model_type == "my_own_reader"
    assert globals()["MyOwnReaderConfig"] is mine.config_class  # importable from where the class is
    model, batch = family.model(mine), family.batch([1])
    model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is mine.config_class
    assert type(AutoProcessor.from_pretrained(tmp_path)) is family.model_class.processor_class
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is mine
        assert_same_model(again, model, batch)


def test_a_new_model_type_inherits_the_key_conversion_of_the_hub_layout(family: Family, tmp_path: Path) -> None:
    mine = hfcustom.register(make_class(family.model_class, "ConvertedReader"))
    stock = family.model(family.stock_class)
    stock.save_pretrained(tmp_path)
    loaded = mine.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_config_of_ones_own_is_used(internvl: Family) -> None:
    config = type(
        "GatedConfig",
        (internvl.model_class.config_class,),
        {
            "model_type": "gated_reader",
            "gate_width": 3,
            "__annotations__": {"gate_width": int},
            "__module__": __name__,
        },
    )
    mine = hfcustom.register(make_class(internvl.model_class, "GatedReader", config_class=config))
    assert mine.config_class is config
    assert AutoConfig.for_model("gated_reader").gate_width == 3
    assert AutoConfig.for_model("gated_reader", gate_width=5).gate_width == 5


def test_a_parents_config_becomes_ones_own(internvl: Family, tmp_path: Path) -> None:
    """Kept as it is, it would be saved under the parent's model_type, and the folder would load as the parent."""
    Adopting = hfcustom.register(make_class(internvl.model_class, "Adopting"))
    for config in (internvl.module.tiny_config(), stock_config(internvl.stock_class, internvl.module.tiny_config())):
        Adopting(config).save_pretrained(tmp_path)
        assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is Adopting
    with pytest.raises(ValueError, match="This Idefics3Config has model_type 'idefics3', but AdoptingConfig takes"):
        Adopting(Idefics3Config())


def test_registering_again_is_harmless(internvl: Family) -> None:
    first = hfcustom.register(make_class(internvl.model_class, "Twice"))
    assert hfcustom.register(first) is first
    second = hfcustom.register(make_class(internvl.model_class, "Twice"))  # a notebook cell that ran again
    assert REGISTERED["twice"] is second
    assert AutoModelForImageTextToText._model_mapping[second.config_class] is second


def test_a_clash_names_both_classes(internvl: Family) -> None:
    hfcustom.register(make_class(internvl.model_class, "Clash"))
    other = make_class(internvl.model_class, "Clash")
    other.__qualname__ = "elsewhere.Clash"
    with pytest.raises(
        ValueError, match=r"'clash' belongs to test_registry.Clash; test_registry.elsewhere.Clash needs"
    ):
        hfcustom.register(other)
    hfcustom.register(other, model_type="clash_too")


def test_what_cannot_be_registered_says_why(internvl: Family) -> None:
    with pytest.raises(TypeError, match="takes a class, not the int 3"):
        hfcustom.register(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"InternVLForConditionalGeneration is not a custom model. Subclass one of"):
        hfcustom.register(internvl.stock_class)
    with pytest.raises(ValueError, match=r"model_type 'internvl' of .* is native to transformers"):
        hfcustom.register(make_class(internvl.model_class, "Native"), model_type="internvl")
    with pytest.raises(ValueError, match=r"model_type='My-Type' must be lower case"):
        hfcustom.register(make_class(internvl.model_class, "BadName"), model_type="My-Type")
    AutoConfig.register(
        "taken_by_hand", type("T", (internvl.stock_class.config_class,), {"model_type": "taken_by_hand"})
    )
    with pytest.raises(ValueError, match=r"model_type 'taken_by_hand' belongs to"):
        hfcustom.register(make_class(internvl.model_class, "ByHand"), model_type="taken_by_hand")


def test_a_class_needs_a_stock_parent() -> None:
    from hfcustom.base import CustomVLM

    with pytest.raises(TypeError, match="Orphan must inherit a model class of transformers after CustomVLM"):
        type("Orphan", (CustomVLM,), {})


def test_a_checkpoint_of_another_family_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    families["aria"].module.tiny_config().save_pretrained(tmp_path)
    message = r"model_type 'custom_aria', but CustomInternVLConfig takes custom_internvl, internvl"
    with pytest.raises(ValueError, match=message):
        families["internvl"].model_class.from_pretrained(tmp_path)


def test_a_refusal_changes_nothing(internvl: Family, tmp_path: Path) -> None:
    native = get_checkpoint_conversion_mapping("mixtral")
    refused = make_class(internvl.model_class, "Refused")
    with pytest.raises(ValueError, match="'mixtral' .* is native to transformers"):
        hfcustom.register(refused, model_type="mixtral")
    assert get_checkpoint_conversion_mapping("mixtral") is native or str(native) == str(
        get_checkpoint_conversion_mapping("mixtral")
    )
    assert refused.config_class is internvl.model_class.config_class
    hfcustom.register(refused)
    internvl.model(refused).save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is refused


def test_it_is_a_decorator_with_a_model_type_too(internvl: Family) -> None:
    @hfcustom.register(model_type="by_decorator")
    class Decorated(internvl.model_class):  # type: ignore[misc, name-defined]
        pass

    assert REGISTERED["by_decorator"] is Decorated
