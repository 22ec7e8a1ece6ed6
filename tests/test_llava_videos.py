"""Frames that reach the projector by a path of their own: what the seams see of them, and what stands beside their tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, picture
from torch.nn import functional as F

NAMES = ["llava_onevision", "video_llava"]
FRAMES = 2  # of each video
TOWER = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def matched(family: Family, spec: Any = None, model_class: Any = None) -> tuple[Any, Any]:
    model = family.model(model_class, connector=spec)
    return model, model.match_processor(copy.deepcopy(family.processor))


def with_video(processor: Any, images: int, videos: int = 1) -> dict[str, torch.Tensor]:
    """Return a prompt with images before videos, laid out as the processor does it, without torchvision."""
    rows = [[picture(seed) for seed in range(images)]] if images else None
    batch = dict(processor(text=["<image>" * images + "a video: "], images=rows, return_tensors="pt"))
    batch["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    written = "".join(processor.replace_video_token(batch, at) for at in range(videos))
    video = processor.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
    batch["input_ids"] = torch.cat([batch["input_ids"], video], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def frames_of(name: str, tokens: torch.Tensor, videos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split what get_video_features returns: frames' tokens, (V, F, N, D), and what stands beside them."""
    if name == "video_llava":  # CLS before each frame, (V * F, 1 + N, D)
        return tokens[:, 1:].unflatten(0, (videos, FRAMES)), tokens[:, :1]
    return tokens[:, :-1].unflatten(1, (FRAMES, -1)), tokens[:, -1:]  # a newline behind a video, (V, F * N + 1, D)


@pytest.mark.parametrize("spec", ["average_pool", "frame_average"])
def test_a_connector_reduces_frames_and_leaves_what_stands_beside_them(family: Family, spec: str) -> None:
    (plain, _), (model, processor) = matched(family), matched(family, spec)
    batch = with_video(processor, images=0, videos=2)
    pixels = batch["pixel_values_videos"]
    with torch.no_grad():
        given, beside = frames_of(family.name, plain.model.get_video_features(pixels).pooler_output, 2)
        found, same = frames_of(family.name, model.model.get_video_features(pixels).pooler_output, 2)
        model(**batch)
    assert torch.equal(beside, same)
    side = int(given.shape[2] ** 0.5)
    if spec == "average_pool":
        image = F.avg_pool2d(given.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side)), 2)
        expected = image.flatten(2).transpose(1, 2).unflatten(0, (2, FRAMES))
    else:
        expected = given.mean(1).unflatten(1, (FRAMES, -1))
    torch.testing.assert_close(found, expected)
    assert (
        int((batch["input_ids"] == processor.video_token_id).sum())
        == expected[..., 0].numel() + beside[..., 0].numel()
    )


@pytest.mark.parametrize("identity", [{"name": "average_pool", "size": 1}, {"name": "frame_average", "frames": 1}])
def test_a_video_is_as_in_stock_where_nothing_reduces_it(family: Family, identity: dict[str, Any]) -> None:
    (plain, processor), (model, other) = matched(family), matched(family, identity)
    batch = with_video(processor, images=2)
    assert torch.equal(with_video(other, images=2)["input_ids"], batch["input_ids"])
    with torch.no_grad():
        logits = family.model(family.stock_class)(**batch).logits
        assert torch.equal(plain(**batch).logits, logits)
        assert torch.equal(model(**batch).logits, logits)


def test_the_vision_seam_sees_images_and_frames_and_losses_see_images(family: Family) -> None:
    seen: list[torch.Size] = []

    class Doubled(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            seen.append(features.shape)
            return 2 * features

    model, processor = matched(family, "average_pool", Doubled)
    batch = with_video(processor, images=2)
    with torch.no_grad():
        logits = model(**batch).logits
        other = batch | {"pixel_values_videos": -batch["pixel_values_videos"]}
        assert not torch.equal(model(**other).logits, logits)
        assert not torch.equal(family.model(connector="average_pool")(**batch).logits, logits)
        context = model.loss_context(batch, batch["input_ids"])
    assert {tuple(shape) for shape in seen} == {(2, 16, 32)}  # crops or frames, patches without CLS
    assert context.vision_features.shape[0] == 2
    assert context.image_features[..., 0].numel() == int((batch["input_ids"] == model.placeholder_token_id).sum())


def test_a_connector_that_looks_at_pictures_gets_those_of_frames(family: Family) -> None:
    model, processor = matched(family, {"name": "two_encoders", "tower": TOWER})
    batch, seen = with_video(processor, images=2), []
    model.custom_connector.tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", args[0] if args else None)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**batch)
    assert [len(pictures) for pictures in seen] == [2, FRAMES]
    torch.testing.assert_close(seen[1].mean((2, 3)).argsort(), batch["pixel_values_videos"][0].mean((2, 3)).argsort())


def test_cached_generation_with_a_video_equals_uncached(family: Family) -> None:
    model, processor = matched(family, "frame_average")
    batch = with_video(processor, images=2)
    placeholders = [processor.image_token_id, processor.video_token_id]  # which a tiny model may well say
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": placeholders}
    cached, whole = (
        model.generate(**batch, **options, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, whole)


def test_frames_that_make_no_clip_and_a_processor_that_was_not_matched_are_named(family: Family) -> None:
    model, processor = matched(family, {"name": "frame_average", "frames": 4})
    batch = with_video(processor, images=0, videos=2)  # 4 frames, of two videos
    with pytest.raises(
        ValueError, match="takes 4 neighbouring crops together, but 2 came.* Give each video a multiple"
    ):
        model(**batch)
    batch = with_video(family.processor, images=0)
    with pytest.raises(ValueError, match=r"video placeholders, the connector 'average_pool' made .*match_processor"):
        family.model(connector="average_pool")(**batch)


def test_the_deprecated_name_of_pixels_still_works(families: dict[str, Family]) -> None:
    family = families["video_llava"]
    batch, model = family.batch([1]), family.model()
    old = {("pixel_values_images" if name == "pixel_values" else name): value for name, value in batch.items()}
    with torch.no_grad():
        assert torch.equal(model(**old).logits, model(**batch).logits)
    inputs = {name: value for name, value in old.items() if name != "labels"}
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] > 2
