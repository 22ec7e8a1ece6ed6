"""Pictures of another size: positions are interpolated, everything else follows, and nothing half-done is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfcustom import adapt
from hfcustom.resize import interpolate_positions, resize_images


def side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def image_size(model: Any) -> int | None:
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    return None if size is None else side(size)


def tables(model: Any) -> dict[str, nn.Parameter]:
    """Return the vision tower's position tables by name."""
    parts = model.stock_parts()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parts.find(name) == "vision"
        and name.removesuffix(".weight").endswith(("position_embedding", "position_embeddings"))
    }


def resized(family: Family, factor: float, **config: Any) -> tuple[Any, Any]:
    """Return a model and its processor for pictures `factor` times as large; (None, None) where that is refused."""
    model, processor = family.model(**config), copy.deepcopy(family.processor)
    size = image_size(model)
    if "placeholders" in model.lacks or model.no_resizing or not tables(model):
        reasons = "no learned positions|no table of patches|counts image tokens by their placeholders|does not work in"
        with pytest.raises(ValueError, match=model.no_resizing or reasons):
            resize_images(model, processor, int((size or 28) * factor))
        return None, None
    assert size is not None
    model.match_processor(processor)
    assert resize_images(model, processor, int(size * factor)) is processor
    return model, processor


@pytest.mark.parametrize("connector", [None, "linear"])
def test_placeholders_follow_and_all_of_it_travels(family: Family, connector: str | None, tmp_path: Path) -> None:
    before = family.model()
    model, processor = resized(family, 0.5, connector=connector)
    if model is None:
        return
    assert image_size(model) == image_size(before) // 2 == side(model.get_encoder(modality="image").config.image_size)
    smaller, larger = family.batch([2, 0, 1], processor), family.batch([2, 0, 1])
    tokens = [int((batch["input_ids"] == model.placeholder_token_id).sum()) for batch in (smaller, larger)]
    assert 0 < tokens[0] <= tokens[1]  # a family may make the same number of any size (Gemma 3, Idefics2)
    assert smaller["pixel_values"].numel() < larger["pixel_values"].numel()
    model.train()(**smaller).loss.backward()
    reached = [table for name, table in tables(model).items() if not name.startswith(tuple(model.unreached()))]
    assert reached and all(table.grad is not None and table.grad.shape == table.shape for table in reached)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    reread = family.batch([2, 0, 1], reader)
    assert all(torch.equal(reread[key], smaller[key]) for key in smaller)
    assert_same_model(again, model, smaller)
    if connector is None:
        stock = family.stock_class.from_pretrained(tmp_path)
        assert_same_model(stock, model, smaller)


def test_the_same_size_changes_nothing(family: Family) -> None:
    model, processor = resized(family, 1.0)
    if model is None:
        return
    batch, expected = family.batch([1], processor), family.batch([1])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, family.model()(**batch).logits)


def test_larger_pictures_give_more_tokens_or_an_error_that_changes_nothing(family: Family) -> None:
    model, processor = family.model(), copy.deepcopy(family.processor)
    if not tables(model) or model.no_resizing or "placeholders" in model.lacks:
        return
    before, size = {name: table.clone() for name, table in tables(model).items()}, image_size(model)
    try:
        resize_images(model, processor, 2 * size)
    except ValueError as error:
        assert "Nothing was changed" in str(error)
        assert image_size(model) == size
        assert all(torch.equal(table, before[name]) for name, table in tables(model).items())
        batch, expected = family.batch([1], processor), family.batch([1])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    else:
        larger, smaller = family.batch([1], processor), family.batch([1])
        assert model(**larger).logits.shape[1] >= smaller["input_ids"].shape[1]
        assert larger["pixel_values"].numel() > smaller["pixel_values"].numel()


# ---- the interpolation ----------------------------------------------------------------------------------------------


def test_positions_are_interpolated_where_they_lie() -> None:
    """A slope keeps its direction, its middle and its level lines; the class token's row and the leading dimension stay."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.stack([rows.flatten(), columns.flatten()], -1)  # (16, 2)
    larger = interpolate_positions(table, 4, 8).view(8, 8, 2)
    heights = larger[:, 0, 0]
    assert torch.equal(larger[..., 0], heights[:, None].expand(8, 8)) and (heights.diff() > 0).all()
    torch.testing.assert_close(heights + heights.flip(0), torch.full((8,), 3.0))
    torch.testing.assert_close(larger[..., 1], larger[..., 0].T)
    with_class = torch.cat([torch.tensor([[7.0, -7.0]]), table])[None]  # (1, 17, 2)
    found = interpolate_positions(with_class, 4, 8)
    assert found.shape == (1, 65, 2) and found[0, 0].tolist() == [7.0, -7.0]
    torch.testing.assert_close(found[0, 1:], larger.flatten(0, 1))
    assert interpolate_positions(table.bfloat16(), 4, 2).dtype == torch.bfloat16


def test_it_is_the_interpolation_that_internvl_does_itself(internvl: Family) -> None:
    """InternVL interpolates whenever a picture of another size comes; done once beforehand, the logits are the same."""
    model, processor = resized(internvl, 2)
    batch = internvl.batch([1, 2], processor)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, internvl.model()(**batch).logits)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_is_the_interpolation_of_clip_and_siglip(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 6,
    }
    small, large = (
        AutoModel.from_config(AutoConfig.for_model(f"{kind}_vision_model", **sizes, image_size=size)).eval()
        for size in (24, 36)
    )
    weights = small.state_dict()
    (name,) = [name for name in weights if "position_embedding" in name]
    large.load_state_dict({**weights, name: interpolate_positions(weights[name], 4, 6)})
    pictures = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        expected = small(pictures, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(large(pictures).last_hidden_state, expected)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_name_the_value_and_the_cure(families: dict[str, Family]) -> None:
    def resize(name: str, size: Any, model: Any = None) -> None:
        resize_images(model or families[name].model(), copy.deepcopy(families[name].processor), size)

    with pytest.raises(
        ValueError, match=r"size=30 is no multiple of the 7 pixel patches of .*vision_tower\); take 28"
    ):
        resize("internvl", 30)
    with pytest.raises(ValueError, match=r"size='56' is no number of pixels; give the side of a crop, such as 56"):
        resize("internvl", "56")
    with pytest.raises(ValueError, match=r"size=0 is no multiple of the 7 pixel patches .*; take 7"):
        resize("internvl", 0)
    with pytest.raises(ValueError, match="size=21 does not work in CustomInternVL.*Nothing was changed"):
        resize("internvl", 21)  # 3 x 3 patches, which cannot be shuffled two by two
    with pytest.raises(ValueError, match="max_image_size must be either 490 or 980. Nothing was changed"):
        resize("aria", 700)
    with pytest.raises(
        ValueError,
        match=r"vision tower of .*Qwen2VL.* takes pictures of any size as they are: set the size in the proc",
    ):
        resize("qwen2_vl", 56)
    with pytest.raises(ValueError, match=r"has an adapter already: resize its images first, then call lora\(\)"):
        resize("internvl", 56, adapt.lora(families["internvl"].model(), rank=2))


def test_settings_of_an_absent_video_processor_follow(internvl: Family, tmp_path: Path) -> None:
    internvl.processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    resize_images(internvl.model(), processor, 56)
    if processor._video_settings is not None:
        assert processor._video_settings["size"] == {"height": 56, "width": 56}
    assert processor.to_dict()["video_processor"]["size"]["height"] == 56


def test_a_connector_of_frames_and_one_of_two_towers_follow(internvl: Family) -> None:
    from test_two_encoders import spec

    for connector in ({"name": "frame_average", "frames": 2}, spec()):
        model, processor = resized(internvl, 2, connector=connector)
        assert torch.isfinite(model(**internvl.batch([2], processor)).logits).all()
