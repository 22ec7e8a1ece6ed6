"""Freezing: parts whole, all but their attention, all but their last layers; in every family."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Family

from hfcustom import freezing
from hfcustom.parts import find_parts, part_table


def test_freeze_stops_the_named_parts_and_no_other(family: Family) -> None:
    model = family.model()
    frozen = [part for part in family.parts if part in ("vision", "connector")]
    freezing.freeze(model, frozen)
    trainable = {row.part: row.trainable for row in part_table(model)}
    assert not any(trainable[part] for part in frozen) and trainable["language"]
    with pytest.raises(ValueError, match=r"Unknown part 'langauge'.*Did you mean 'language'"):
        freezing.freeze(model, "langauge")
    with pytest.raises(ValueError, match=rf"Unknown part 'new'; this model has {', '.join(family.parts)}"):
        freezing.freeze(model, "new")
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freezing.freeze(model, [part for part in family.parts if part not in frozen])


def test_freeze_can_leave_the_attention_layers_of_a_part(family: Family) -> None:
    model = family.model()
    tower = model.get_submodule(find_parts(model).paths["vision"][0])
    if not any(type(module).__name__.endswith("Attention") for module in tower.modules()):  # Chameleon's convolutions
        with pytest.raises(ValueError, match="'vision' .* has no attention layer to keep"):
            freezing.freeze(model, ["vision", "language"], keep="attention")
        return
    freezing.freeze(model, ["vision", "language"], keep="attention")
    layers = {part: freezing.attention_layers(model, part) for part in ("vision", "language")}
    for path in (path for paths in layers.values() for path in paths):
        own = (
            path.rpartition(".")[2] + type(model.get_submodule(path)).__name__
        )  # Nemotron-H calls each layer's core `mixer`
        assert "attn" in own.lower() or "attention" in own.lower()
    parts = find_parts(model)
    for name, parameter in model.named_parameters():
        part = parts.part_of(name)
        inside = any(name.startswith(path + ".") for path in layers.get(part, ()))
        assert parameter.requires_grad == (inside or part not in layers), name
    for part in layers:
        trained = {p.trainable for p in part_table(model) if p.part == part}
        assert 0 < max(trained) < sum(row.parameters for row in part_table(model) if row.part == part)


def test_attention_that_is_not_there_cannot_be_kept(internvl: Family) -> None:
    with pytest.raises(
        ValueError, match=r"The part 'head' \(lm_head\) has no attention layer to keep; freeze it whole"
    ):
        freezing.freeze(internvl.model(), "head", keep="attention")
    with pytest.raises(ValueError, match="freeze\\(\\) keep='attn'; choose 'attention', or leave it out"):
        freezing.freeze(internvl.model(), "vision", keep="attn")  # type: ignore[arg-type]


def test_freeze_can_leave_the_last_layers_of_a_part(family: Family) -> None:
    model = family.model()
    parts = [part for part in ("vision", "language") if has_stack(family, part)]
    freezing.freeze(model, parts, keep_last=1)
    part_map = find_parts(model)
    kept = {part: freezing.last_layers(model, part, 1) for part in parts}
    for paths in kept.values():
        stack, at = paths[0].rsplit(".", 1)
        assert int(at) == len(model.get_submodule(stack)) - 1  # type: ignore[arg-type]
        assert not any(name.startswith(f"{stack}.0.") for name in trained(model))
    for name, parameter in model.named_parameters():
        part = part_map.part_of(name)
        inside = any(name == path or name.startswith(path + ".") for path in kept.get(part, ()))
        assert parameter.requires_grad == (inside or part not in kept), name
    for part in parts:
        assert 0 < sum(row.trainable for row in part_table(model) if row.part == part)


def test_a_final_norm_is_trained_with_the_last_layers(internvl: Family) -> None:
    assert freezing.last_layers(internvl.model(), "language", 1) == [
        "model.language_model.layers.1",
        "model.language_model.norm",
        "model.language_model.rotary_emb",
    ]


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("aria", "model.vision_tower.post_layernorm"),  # beside the encoder, which holds the layers
        ("idefics2", "model.vision_model.post_layernorm"),
        ("janus", "model.vision_model.post_layernorm"),
        ("llava_next", "model.vision_tower.post_layernorm"),
        ("mllama", "model.vision_model.global_transformer"),
    ],
)
def test_what_is_behind_the_holder_of_the_layers_is_trained_too(
    families: dict[str, Family], name: str, behind: str
) -> None:
    model = families[name].model()
    freezing.freeze(model, "vision", keep_last=1)
    assert behind in freezing.last_layers(model, "vision", 1)
    assert all(parameter.requires_grad for parameter in model.get_submodule(behind).parameters())
    assert {find_parts(model).find(path) for path in freezing.last_layers(model, "vision", 1)} == {"vision"}


def test_both_towers_of_a_part_keep_their_last_layers(families: dict[str, Family]) -> None:
    kept = freezing.last_layers(families["video_llava"].model(), "vision", 1)
    assert {path.split(".")[1] for path in kept} == {"image_tower", "video_tower"}


def test_attention_of_the_last_layers(internvl: Family) -> None:
    model = internvl.model()
    freezing.freeze(model, ["vision", "connector", "head"])
    freezing.freeze(model, "language", keep="attention", keep_last=1)
    names = trained(model)
    assert names and all(name.startswith("model.language_model.layers.1.self_attn.") for name in names)


@pytest.mark.parametrize("count", [0, -1, 2, 40])
def test_layers_that_are_not_there_cannot_be_kept(internvl: Family, count: int) -> None:
    with pytest.raises(
        ValueError, match=rf"keep_last={count}: the part 'language' has 2 layers .*choose 1 to 1, freeze it"
    ):
        freezing.freeze(internvl.model(), "language", keep_last=count)
    with pytest.raises(ValueError, match="The part 'head' .lm_head. has no stack of layers"):
        freezing.freeze(internvl.model(), "head", keep_last=1)


@pytest.mark.parametrize("count", ["1", 1.0, True])
def test_a_count_of_layers_is_a_whole_number(internvl: Family, count: Any) -> None:
    with pytest.raises(ValueError, match=rf"keep_last={count!r}; it takes a whole number of layers"):
        freezing.freeze(internvl.model(), "language", keep_last=count)


def test_train_only_freezes_the_rest(family: Family) -> None:
    chosen = [part for part in family.parts if part in ("connector", "head")]
    model = family.model()
    freezing.train_only(model, chosen)
    assert {row.part for row in part_table(model) if row.trainable} <= set(chosen)
    with pytest.raises(ValueError, match=r"Unknown part 'visoin'.*Did you mean 'vision'"):
        freezing.train_only(model, "visoin")
    with pytest.raises(ValueError, match="train_only.. names no part; this model has vision"):
        freezing.train_only(model, [])


def has_stack(family: Family, part: str) -> bool:
    try:
        return bool(freezing.last_layers(family.model(), part, 1))
    except ValueError as error:
        assert "has no stack of layers" in str(error) or "has 1 layers" in str(error)
        return False


def trained(model: object) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
