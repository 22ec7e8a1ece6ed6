"""Frames that pass the same projector as images keep stock's tokens: seams and connector are for images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, picture

TOKENS = {"llava_onevision": 2 * 4 + 1, "video_llava": 2 * 17}  # of two frames


@pytest.fixture(params=sorted(TOKENS))
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def with_video(family: Family, processor: Any, images: int) -> dict[str, torch.Tensor]:
    """Return a prompt with images before a video of two frames."""
    rows = [[picture(seed) for seed in range(images)]] if images else None
    batch = dict(processor(text=["<image>" * images + "a video: "], images=rows, return_tensors="pt"))
    video = torch.full((1, TOKENS[family.name]), processor.video_token_id)
    batch["input_ids"] = torch.cat([batch["input_ids"], video], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | {"pixel_values_videos": torch.randn(1, 2, 3, 28, 28)}


def test_a_video_alone_is_as_in_stock(family: Family) -> None:
    class Doubled(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * features

    model = family.model(Doubled, connector="average_pool")
    batch = with_video(family, model.match_processor(copy.deepcopy(family.processor)), images=0)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, family.model(family.stock_class)(**batch).logits)


@pytest.mark.parametrize("connector", [None, "average_pool"])
def test_seams_see_the_images_beside_a_video(family: Family, connector: str | None) -> None:
    crops: list[int] = []

    class Seen(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            crops.append(len(features))
            return features

    model = family.model(Seen, connector=connector)
    processor = model.match_processor(copy.deepcopy(family.processor))
    batch = with_video(family, processor, images=2)
    other = batch | {"pixel_values_videos": -batch["pixel_values_videos"]}
    with torch.no_grad():
        logits = model(**batch).logits
        assert crops == [2]
        assert not torch.equal(model(**other).logits, logits)
        if connector is None:
            assert torch.equal(logits, family.model(family.stock_class)(**batch).logits)


def test_a_connector_that_takes_frames_together_is_refused_for_a_video(family: Family) -> None:
    model = family.model(connector="frame_average")
    batch = with_video(family, model.match_processor(copy.deepcopy(family.processor)), images=0)
    with pytest.raises(
        ValueError, match=r"'frame_average' takes frames together, but Custom.* Give the frames as images"
    ):
        model(**batch)


def test_the_deprecated_name_of_pixels_still_works(families: dict[str, Family]) -> None:
    family = families["video_llava"]
    batch, model = family.batch([1]), family.model()
    old = {("pixel_values_images" if name == "pixel_values" else name): value for name, value in batch.items()}
    with torch.no_grad():
        assert torch.equal(model(**old).logits, model(**batch).logits)
    inputs = {name: value for name, value in old.items() if name != "labels"}
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] > 2
