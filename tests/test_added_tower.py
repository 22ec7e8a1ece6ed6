"""Towers that a connector adds: what they see, which ones can be had, how their weights and norms are found."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model, chat_row
from PIL import Image
from test_loading import messages  # noqa: F401
from test_two_encoders import SIZES, VIT, spec, stubbed, wake
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import hfcustom
from hfcustom import adapt
from hfcustom.connectors import build_connector
from hfcustom.connectors.added_tower import describe_tower, describe_towers
from hfcustom.families import tiny
from hfcustom.parts import unwrap

# ---- what reaches a tower --------------------------------------------------------------------------------------------


def test_pixels_are_normalised_as_the_second_tower_knows_them() -> None:
    connector = stubbed(processor_mean=0.5, processor_std=0.5, tower_mean=[0.1, 0.2, 0.3], tower_std=[1.0, 2.0, 0.5])
    raw = torch.rand(2, 3, 24, 24)
    connector(torch.randn(2, 4, 8), (raw - 0.5) / 0.5)
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.1, 0.2, 0.3], [1.0, 2.0, 0.5]))
    torch.testing.assert_close(connector.tower.seen, (raw - mean) / std)
    plain = stubbed()
    plain(torch.randn(2, 4, 8), raw)
    assert torch.equal(plain.tower.seen, raw)


def test_a_tower_sees_all_pictures_in_its_own_size() -> None:
    connector = stubbed()
    connector(torch.randn(1, 4, 8), torch.full((1, 3, 30, 30), 0.25))
    assert connector.tower.seen.shape == (1, 3, 24, 24)
    torch.testing.assert_close(connector.tower.seen, torch.full((1, 3, 24, 24), 0.25))
    wide = torch.linspace(0, 1, 48).expand(1, 3, 12, 48)
    connector(torch.randn(1, 4, 8), wide, (1, 4))
    narrowed = torch.linspace(1 / 94, 93 / 94, 24).expand(1, 3, 24, 24)  # as wide as the picture, half as many pixels
    torch.testing.assert_close(connector.tower.seen[..., 2:-2], narrowed[..., 2:-2], rtol=0, atol=2e-3)
    connector.tower.config.image_size = None
    connector.tower.config.patch_size = 15
    with pytest.raises(
        ValueError, match="7 patches of a crop of 30 x 30 pixels are no grid.*use fusion='cross_attend'"
    ):
        connector(torch.randn(1, 7, 8), torch.randn(1, 3, 30, 30))


@pytest.mark.parametrize("fusion", ["concat", "cross_attend"])
def test_images_of_all_sizes_are_one_pass_and_each_is_as_if_alone(fusion: str) -> None:
    connector: Any = build_connector(spec(fusion=fusion), 8)
    wake(connector)
    passes: list[int] = []
    connector.tower.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    grids = [(2, 4), (3, 3), (2, 4), (4, 2)]
    features = [torch.randn(1 + at, rows * columns, 8) for at, (rows, columns) in enumerate(grids)]
    pictures = [torch.randn(1 + at, 3, 6 * rows, 6 * columns) for at, (rows, columns) in enumerate(grids)]
    found = connector(features, pixel_values=pictures, grid=grids)
    assert passes == [10]
    for at, image in enumerate(found):
        torch.testing.assert_close(image, connector(features[at], pictures[at], grids[at]))


def test_a_tower_without_a_size_of_its_own_sees_a_pass_for_each_size() -> None:
    class Free(nn.Conv2d):
        config = SimpleNamespace()

        def forward(self, pixel_values: torch.Tensor) -> Any:  # type: ignore[override]
            passes.append(tuple(pixel_values.shape))
            return SimpleNamespace(last_hidden_state=super().forward(pixel_values))

    passes: list[tuple[int, ...]] = []
    connector = stubbed()
    connector.tower = Free(3, 16, 16, 16)
    pictures = [torch.randn(1, 3, *size) for size in ((32, 64), (64, 64), (32, 64))]
    grids = [(2, 4), (4, 4), (2, 4)]
    found = connector([torch.randn(1, rows * columns, 8) for rows, columns in grids], pictures, grids)
    assert passes == [(2, 3, 32, 64), (1, 3, 64, 64)] and [len(image[0]) for image in found] == [8, 16, 8]


def test_towers_that_cannot_be_matched_are_named() -> None:
    with pytest.raises(
        ValueError, match="Siglip2VisionModel, wants pixel_attention_mask, spatial_shapes beside pixel"
    ):
        build_connector({"name": "two_encoders", "tower": {"model_type": "siglip2_vision_model", **SIZES}}, 8)
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32}
    connector = build_connector({"name": "two_encoders", "tower": {**swin, "window_size": 2}}, 8)
    with pytest.raises(ValueError, match="SwinModel, makes 16 tokens of a picture of 8 x 8 patches, which is no grid"):
        connector(torch.randn(1, 4, 8), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="makes features 5 wide, which its config, with 16, does not say"):
        stubbed(width=5)(torch.randn(1, 4, 8), torch.randn(1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"built for vision features 8 wide and got 6: the family's vision_width\(\)"):
        stubbed()(torch.randn(1, 4, 6), torch.randn(1, 3, 24, 24))


TOWER = spec()["tower"]
NORMS = {"processor_mean": 0.5, "processor_std": 0.5, "tower_mean": 0.5, "tower_std": 0.5}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a name": ("facebook/dinov2-base", {}, "'facebook/dinov2-base' is no mapping.*describe_tower"),
    "a list": (["dinov2"], {}, r"tower=\['dinov2'\] is no mapping.*describe_tower"),
    "a misspelt size": (
        {**TOWER, "hiden_size": 16},
        {},
        "size of tower 'dinov2'.* 'hiden_size'. Did you mean 'hidden_size'",
    ),
    "a misspelt size inside": (
        {"model_type": "clip", "vision_config": {**VIT, "patchsize": 6}},
        {},
        "'patchsize'. Did you mean 'patch_size'",
    ),
    "a reader of text": (
        {"model_type": "bert", **TEXT},
        {},
        "BertModel, reads input_ids, not pixel_values; choose a vision",
    ),
    "a hearer": (
        {"model_type": "audio-spectrogram-transformer", **TEXT},
        {},
        "ASTModel, reads input_values, not pixel",
    ),
    "a tower that is no model": (
        {"model_type": "qwen2_vl"},
        {},
        "'qwen2_vl': transformers builds no .*; choose another",
    ),
    "no deviation": (TOWER, {**NORMS, "tower_std": 0}, "tower_std=0; it takes a positive number, or three"),
    "a negative deviation": (
        TOWER,
        {**NORMS, "processor_std": [1, -1, 1]},
        r"processor_std=\[1, -1, 1\]; it takes a pos",
    ),
    "two channels": (
        TOWER,
        {**NORMS, "processor_mean": [0.5, 0.5]},
        r"processor_mean=\[0.5, 0.5\]; it takes a number, or",
    ),
    "a word": (TOWER, {**NORMS, "tower_mean": "half"}, "tower_mean='half'; it takes a number, or three"),
}


@pytest.mark.parametrize(("tower", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistaken_tower_is_named_before_it_sees_anything(tower: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_connector({"name": "two_encoders", "tower": tower, **options}, 8)
    with pytest.raises(ValueError, match=message):
        build_connector({"name": "multi_encoder_resampler", "towers": [{"tower": tower, **options}]}, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": "facebook/dinov2-base"}, "towers='facebook/dinov2-base'.*describe_towers"),
        ({"towers": ["facebook/dinov2-base"]}, "'facebook/dinov2-base', which is no mapping.*describe_towers"),
        ({"towers": {"tower": TOWER}}, "towers={'tower'.*is no list.*describe_towers"),
        ({"towers": [TOWER]}, "option of a tower.*'model_type'.*write {'tower': {'model_type': ...}}"),
        ({"towers": [{"tower": TOWER}], "num_layers": 0}, "num_layers=0; it must be at least 1"),
    ],
)
def test_mistaken_towers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_connector({"name": "multi_encoder_resampler", **options}, 8)


def test_what_a_tower_does_not_know_is_left_out_of_its_description(tmp_path: Path) -> None:
    save_tower("clip_vision_model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= {"old_setting": 1.0, "dtype": "float16"}  # as old files on the hub have it
    (tmp_path / "config.json").write_text(json.dumps(config))
    connector = describe_tower(str(tmp_path))
    assert "old_setting" not in connector["tower"] and connector["tower"]["patch_size"] == 6
    assert type(build_connector(connector, 8).tower).__name__ == "CLIPVisionModel"


def test_a_frozen_tower_stays_as_it_is() -> None:
    for trainable in (False, True):
        connector: Any = build_connector(spec(trainable=trainable), 8).train()
        wake(connector)
        connector(torch.randn(2, 4, 8), torch.randn(2, 3, 24, 24)).sum().backward()
        assert connector.tower.training == trainable
        assert any(p.grad is not None for p in connector.tower.parameters()) == trainable
        assert connector.proj.weight.grad is not None


# ---- weights from a checkpoint ---------------------------------------------------------------------------------------


def save_tower(model_type: str, folder: Path) -> Any:
    text = {**SIZES, "vocab_size": 50}
    kind = model_type.removesuffix("_vision_model")
    parts = {"text_config": text, "vision_config": VIT, "projection_dim": 16} if kind in ("clip", "siglip") else VIT
    model = AutoModel.from_config(AutoConfig.for_model(kind, **parts))
    model.save_pretrained(folder)
    images = tiny.image_processor(
        {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}.get(kind, "BitImageProcessor")
    )
    images(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return getattr(model, "vision_model", model).eval()


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", "siglip_vision_model"])
def test_a_checkpoint_is_described_and_its_weights_are_taken(
    internvl: Family, model_type: str, tmp_path: Path
) -> None:
    tower = save_tower(model_type, tmp_path / "tower")
    connector = describe_tower(str(tmp_path / "tower"), internvl.processor, fusion="cross_attend", num_heads=4)
    assert connector["tower"]["model_type"] == model_type
    assert (connector["tower_mean"], connector["tower_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert connector["processor_std"] == list(internvl.processor.image_processor.image_std)
    model = internvl.model(connector=connector)
    model.custom_connector.load_tower(str(tmp_path / "tower"))
    pictures = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = tower(pixel_values=pictures).last_hidden_state
        torch.testing.assert_close(model.custom_connector.tower(pixel_values=pictures).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert_same_model(again, model, internvl.batch([1]))


def test_a_checkpoint_of_another_tower_is_an_error(internvl: Family, tmp_path: Path) -> None:
    save_tower("dinov2", tmp_path)
    model = internvl.model(connector=spec("clip_vision_model"))
    with pytest.raises(
        ValueError, match="has no tensor for .* of CLIPVisionModel. Make the connector with describe_tower"
    ):
        model.custom_connector.load_tower(str(tmp_path))
    described = describe_tower(str(tmp_path))
    assert described.keys() == {"name", "tower"} and described["tower"]["model_type"] == "dinov2"


def test_towers_are_described_and_loaded_in_order(internvl: Family, tmp_path: Path) -> None:
    folders = [str(tmp_path / kind) for kind in ("dinov2", "clip")]
    towers = [
        save_tower(kind, tmp_path / kind.removesuffix("_vision_model")) for kind in ("dinov2", "clip_vision_model")
    ]
    spec = describe_towers(folders, internvl.processor, num_queries=2, num_heads=4)
    assert [tower["tower_mean"] for tower in spec["towers"]] == [[0.1, 0.2, 0.3]] * 2
    model = internvl.model(connector=spec)
    model.custom_connector.load_towers(folders)
    pictures = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        for mine, theirs in zip(model.custom_connector.towers, towers, strict=True):
            expected = theirs(pixel_values=pictures).last_hidden_state
            torch.testing.assert_close(mine.tower(pixel_values=pictures).last_hidden_state, expected)
    with pytest.raises(ValueError, match="1 checkpoints for 2 added towers; name one each"):
        model.custom_connector.load_towers(folders[:1])


def test_a_tower_is_described_for_the_pixels_of_each_family(family: Family, tmp_path: Path) -> None:
    if "connector" in family.model_class.lacks:
        return
    save_tower("dinov2", tmp_path)
    model = family.model(connector=describe_tower(str(tmp_path), family.processor))
    row, seen = chat_row(1), []
    row["images"] = [Image.new("RGB", (56, 56), (102, 102, 102))]
    model.custom_connector.tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**hfcustom.Collator(family.processor)([row]))
    expected = (102 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(seen[0][0, :, 12, 12], expected, rtol=0, atol=2e-3)  # Llama 4's are 16-bit


@pytest.mark.parametrize("name", ["two_encoders", "multi_encoder_resampler"])
def test_a_frozen_tower_without_weights_is_not_trained_with(
    internvl: Family,
    name: str,
    tmp_path: Path,
    messages: Any,  # noqa: F811
) -> None:
    """A stock checkpoint has none for it: said while loading, refused by fit(), until it has got them."""
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    save_tower("dinov2", tmp_path / "tower")
    source = str(tmp_path / "tower")
    several = name == "multi_encoder_resampler"
    connector = describe_towers([source], num_queries=2, num_heads=4) if several else describe_tower(source)
    model = internvl.model_class.from_pretrained(tmp_path / "stock", connector=connector)
    cure = "custom_connector.load_towers([checkpoint, ...])" if several else "custom_connector.load_tower(checkpoint)"
    assert f"Dinov2Model has random weights until model.{cure}" in messages.text
    processor = model.match_processor(copy.deepcopy(internvl.processor))
    config = hfcustom.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, batch_size=1, micro_batch_size=1)
    with pytest.raises(ValueError, match="Dinov2Model, is frozen with random weights.*" + re.escape(cure)):
        hfcustom.fit(model, processor, [chat_row(1)], config)
    wrapped = adapt.lora(copy.deepcopy(model), rank=2)
    with pytest.raises(ValueError, match="Dinov2Model, is frozen with random weights"):
        hfcustom.fit(wrapped, processor, [chat_row(1)], config)
    (model.custom_connector.load_towers if several else model.custom_connector.load_tower)(
        [source] if several else source
    )
    hfcustom.fit(model, processor, [chat_row(1)], config)
    again = internvl.model_class.from_pretrained(tmp_path / "run/model")
    hfcustom.fit(again, processor, [chat_row(1)], dataclasses.replace(config, output_dir=str(tmp_path / "more")))


def test_a_tower_may_start_from_nothing_where_it_is_trained(internvl: Family, tmp_path: Path) -> None:
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    model = internvl.model_class.from_pretrained(tmp_path / "stock", connector=spec(trainable=True))
    config = hfcustom.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, batch_size=1, micro_batch_size=1)
    assert hfcustom.fit(model, internvl.processor, [chat_row(1)], config).step == 1


def test_an_adapter_brings_the_weights_of_a_tower(internvl: Family, tmp_path: Path) -> None:
    """A run goes on from an adapter whose base, a stock checkpoint, has no tower."""
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    save_tower("dinov2", tmp_path / "tower")
    model = internvl.model_class.from_pretrained(tmp_path / "stock", connector=describe_tower(str(tmp_path / "tower")))
    model.custom_connector.load_tower(str(tmp_path / "tower"))
    config = hfcustom.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, batch_size=1, micro_batch_size=1)
    hfcustom.fit(adapt.lora(model, rank=2), internvl.processor, [chat_row(1)], config)
    again = adapt.load_adapter(tmp_path / "run/model", tmp_path / "stock", trainable=True)
    for mine, theirs in zip(
        unwrap(again).custom_connector.tower.parameters(), model.custom_connector.tower.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    hfcustom.fit(
        again, internvl.processor, [chat_row(1)], dataclasses.replace(config, output_dir=str(tmp_path / "more"))
    )
