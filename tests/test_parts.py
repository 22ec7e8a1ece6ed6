"""The part map: every tensor in exactly one part, the same under every wrapper, found without a table of types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from torch import nn

from hfcustom import adapt
from hfcustom.parts import check_parts, find_parts, part_table, unwrap

PATHS = {
    "aria": ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"),
    "chameleon": ("model.vqmodel", "", "model", "lm_head"),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model", "lm_head"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"),
    "smolvlm": ("model.vision_model", "model.connector", "model.text_model", "lm_head"),
}


def extended(model_class: Any) -> Any:
    class Renamed(model_class):
        """A subclass with a module at the top, one inside the language model, and a bare parameter."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.critic = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 1))
            self.get_decoder().gate = nn.Linear(64, 64)
            self.temperature = nn.Parameter(torch.ones(()))
            self.post_init()

    return Renamed


def test_parts_are_found_in_each_family(family: Family) -> None:
    model = family.model()
    paths = find_parts(model).paths
    found = tuple(", ".join(paths[part][:1]) for part in ("vision", "connector", "language", "head"))
    assert family.name not in PATHS or found == PATHS[family.name]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for part in ("vision", "connector", "language", "head"):
        first, *others = paths[part] or (
            "",
        )  # one module, beside it bare Parameters, and in vision a tower for videos
        assert first in modules and (first or part == "connector")
        assert all(path in parameters or (part == "vision" and path.endswith(".video_tower")) for path in others)
    assert paths["new"] == ()


def test_every_parameter_belongs_to_one_part_and_the_table_counts_them_all(family: Family) -> None:
    model = family.model(extended(family.model_class))
    parts = find_parts(model)
    for name, _ in model.named_parameters():
        assert parts.part_of(name) in parts.present()
    table = part_table(model)
    assert sum(row.parameters for row in table) == sum(p.numel() for p in model.parameters())
    assert sum(row.bytes for row in table) == sum(p.numel() * 4 for p in model.parameters())


def test_a_renamed_subclass_keeps_its_parts_and_shows_its_new_modules(family: Family) -> None:
    model = family.model(extended(family.model_class))
    paths, stock = find_parts(model).paths, find_parts(family.model()).paths
    assert set(paths["new"]) == {"critic", "temperature", f"{stock['language'][0]}.gate"}
    assert {part: paths[part] for part in stock if part != "new"} == {p: stock[p] for p in stock if p != "new"}


def test_a_replaced_stock_module_is_new(family: Family) -> None:
    class Replaced(family.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, config.get_text_config().vocab_size))
            self.set_submodule(self.stock_parts().paths["head"][0], head)
            self.post_init()

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            pass

    untied = {"tie_word_embeddings": False} if family.model().all_tied_weights_keys else {}
    model = family.model(Replaced, **untied)
    head = model.stock_parts().paths["head"][0]
    assert set(find_parts(model).paths["new"]) == {f"{head}.0", f"{head}.1"}


def test_wrappers_do_not_move_a_parameter(family: Family) -> None:
    plain = find_parts(family.model())
    beside = "connector" if "connector" in family.parts else "head"
    model = adapt.lora(family.model(), "language", train=beside)
    assert unwrap(model).__class__ is family.model_class
    wrapped = find_parts(model)
    assert {part: wrapped.paths[part] for part in plain.paths} == plain.paths
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[wrapped.part_of(name)] = counts.get(wrapped.part_of(name), 0) + 1
    assert set(counts) == {"language", beside}
    compiled = torch.compile(family.model(), backend="eager")
    assert find_parts(compiled).paths == plain.paths
    head = plain.paths["head"][0]
    assert find_parts(compiled).part_of(f"_orig_mod.{head}.weight") == "head"
    assert find_parts(compiled).part_of(f"module.{head}.weight") == "head"


def test_unknown_parts_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown part 'visoin'; this model has vision, .*Did you mean 'vision'"):
        check_parts(["language", "visoin"])
    assert check_parts("vision") == ("vision",)


def test_a_model_without_a_vision_tower_is_told_so() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from hfcustom.families import tiny

    text = {**tiny.TEXT, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **text))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no image encoder among its modules"):
        find_parts(model)
