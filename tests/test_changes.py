"""What a class changes of its parent: methods with their seams, settings, new modules, losses; the user's own alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from torch import nn

import hfcustom
from hfcustom import changes
from hfcustom.adapt import lora
from hfcustom.card import card_facts
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.losses import LOSSES
from hfcustom.parts import class_of_model
from hfcustom.registry import REGISTERED
from hfcustom.sentinel import relies_on


def twice(logits: torch.Tensor, targets: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return -factor * logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.fixture
def mine(internvl: Family) -> Any:
    hfcustom.token_loss(twice)

    class Mixin:
        def helper(self) -> int:
            return 1

    @hfcustom.register
    class Mine(Mixin, internvl.model_class):
        default_loss = {"cross_entropy": 1.0, "twice": {"weight": 0.5, "factor": 3.0}}
        default_connector = {"name": "average_pool", "size": 2}
        not_plain = nn.Linear

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gate = nn.Linear(4, 2)
            self.bare = nn.Parameter(torch.zeros(3))
            self.post_init()

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_image_features(*args, **kwargs)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * self.get_output_embeddings()(hidden_states)

        @property
        def placeholder_token_id(self) -> int:
            return super().placeholder_token_id or 0

    return Mine


def test_each_method_is_named_with_its_seam_and_what_it_does_to_the_parent_s(mine: Any) -> None:
    found = {change.name: (change.seam, change.how, change.parent) for change in changes.changes_of(mine)}
    assert found == {
        "__init__": ("construction", "extends", "CustomVLM.__init__"),
        "transform_hidden_states": ("hidden states", "fills", "CustomVLM.transform_hidden_states"),
        "get_image_features": ("", "extends", "InternVLForConditionalGeneration.get_image_features"),
        "compute_logits": ("head", "replaces", "CustomVLM.compute_logits"),
        "placeholder_token_id": ("", "extends", "SeamHooks.placeholder_token_id"),
        "helper": ("", "adds", ""),
    }


def test_what_replaces_is_a_diff_and_what_fills_or_extends_is_its_source(mine: Any) -> None:
    text = {change.name: change.text for change in changes.changes_of(mine)}
    assert text["compute_logits"].startswith("--- CustomVLM.compute_logits\n+++ Mine.compute_logits\n")
    assert "\n-    return self.get_output_embeddings()(hidden_states)\n" in text["compute_logits"]
    assert "\n+    return 2 * self.get_output_embeddings()(hidden_states)\n" in text["compute_logits"]
    assert text["transform_hidden_states"].startswith("def transform_hidden_states(")
    assert "super().get_image_features" in text["get_image_features"]


def test_a_hook_that_a_parent_of_the_user_s_fills_is_replaced(mine: Any) -> None:
    class Child(mine):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * hidden_states

    found = {change.name: change for change in changes.changes_of(Child)}
    child = found["transform_hidden_states"]
    assert (child.how, child.owner, child.parent) == ("replaces", "Child", "Mine.transform_hidden_states")
    assert "\n-    return hidden_states\n+    return 2 * hidden_states\n" in child.text
    assert found["compute_logits"].owner == "Mine"


def test_a_class_without_a_file_has_no_source_and_says_so(internvl: Family) -> None:
    namespace: dict[str, Any] = {"Base": internvl.model_class, "__name__": "typed_in"}
    exec(
        "class Typed(Base):\n    def transform_embeddings(self, embeddings, image_mask):\n        return embeddings",
        namespace,
    )
    (change,) = changes.changes_of(namespace["Typed"])
    assert (change.how, change.text) == ("fills", changes.NO_SOURCE)
    assert changes.mentioned(namespace["Typed"]) == frozenset()


def test_families_and_encoders_change_nothing_of_a_user_s(family: Family) -> None:
    assert changes.changes_of(family.model_class) == []
    assert changes.own_classes(family.model_class) == []
    assert changes.class_settings(family.model_class) == {}
    assert changes.new_modules(family.model()) == []


@pytest.mark.parametrize("name", encoder_names())
def test_an_encoder_s_seams_have_names(name: str) -> None:
    load_encoder(name)
    base: Any = REGISTERED[f"custom_{name}"]

    class Mine(base):
        def transform_text_features(self, features: torch.Tensor) -> torch.Tensor:
            return features

    (change,) = changes.changes_of(Mine)
    assert (change.seam, change.parent) == ("text features", "CustomDualEncoder.transform_text_features")
    (loss,) = changes.losses_of(base(load_encoder(name).tiny_config()).config)
    assert (loss.weight, loss.source) == (1.0, "")


def test_settings_are_those_that_can_be_written_down(mine: Any) -> None:
    assert changes.class_settings(mine) == {
        "default_loss": {"cross_entropy": 1.0, "twice": {"weight": 0.5, "factor": 3.0}},
        "default_connector": {"name": "average_pool", "size": 2},
    }


def test_new_modules_have_their_tensors_also_under_an_adapter(mine: Any, internvl: Family) -> None:
    expected = {"gate": ("Linear", {"weight": (2, 4), "bias": (2,)}, 10), "bare": ("Parameter", {"": (3,)}, 3)}
    model = internvl.model(mine, connector=None, loss="cross_entropy")
    found = {item.path: (item.kind, item.tensors, item.parameters) for item in changes.new_modules(model)}
    assert found["gate"] == expected["gate"]
    assert found["bare"] == ("Parameter", {"bare": (3,)}, 3)
    del model.bare
    wrapped = lora(model, rank=2)
    (gate,) = [item for item in changes.new_modules(wrapped) if item.path == "gate"]
    assert (gate.kind, gate.tensors, gate.parameters) == expected["gate"]


def test_losses_have_weights_options_and_the_source_of_a_user_s_function(mine: Any, internvl: Family) -> None:
    plain, own = changes.losses_of(internvl.model(mine).config)
    assert (plain.name, plain.weight, plain.options, plain.source) == ("cross_entropy", 1.0, {}, "")
    assert (own.name, own.weight, own.options) == ("twice", 0.5, {"factor": 3.0})
    assert own.source.startswith("def twice(")
    LOSSES.pop("twice")
    assert changes.losses_of(internvl.model(mine, loss={"twice": 1.0}).config)[0].source == ""


def test_what_the_code_mentions(mine: Any) -> None:
    assert {"get_image_features", "get_output_embeddings", "placeholder_token_id"} <= changes.mentioned(mine)
    assert "multi_modal_projector" not in changes.mentioned(mine)


def test_a_class_that_torch_puts_before_a_model_s_own_is_passed_over(mine: Any, internvl: Family) -> None:
    model = internvl.model(mine)
    model.__class__ = type("FSDPMine", (mine,), {"__module__": "torch.distributed.fsdp"})
    assert class_of_model(model) is mine
    assert card_facts(model)["class"] == relies_on(model)["class"] == "Mine"
