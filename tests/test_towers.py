"""Which weights of a vision tower no feature passes through, by where features are read."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Family
from transformers import AutoConfig

from hfcustom.towers import unread

LAYER, NORM = "model.vision_tower.encoder.layers.{}.", "model.vision_tower.post_layernorm."


@pytest.mark.parametrize(
    ("layers", "unused"),
    [(-1, []), (-2, [1]), (1, [1]), (2, []), ([-2, -3], [1]), ([0, -1], []), ([0], [0, 1])],
    ids=str,
)
def test_gradients_reach_what_is_read_and_nothing_else(families: dict[str, Family], layers: Any, unused: Any) -> None:
    family = families["llava"]
    model = family.model(vision_feature_layer=layers)
    assert list(unread(model, "model.vision_tower", layers)) == [*map(LAYER.format, unused), NORM]
    model.train()(**family.batch([1])).loss.backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {name for name, _ in model.named_parameters() if name.startswith(tuple(model.unreached()))}


def test_a_tower_for_images_of_any_size_is_another_family(families: dict[str, Family]) -> None:
    tower = AutoConfig.for_model("pixtral")
    with pytest.raises(
        ValueError, match="square crops, and this checkpoint's vision tower, 'pixtral'.*family 'pixtral'"
    ):
        families["llava"].model(vision_config=tower)
