"""A second vision tower, and several: which ones can be had, what reaches them, how their features join, and that they travel."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, KINDS, Family, assert_same_model, chat_row, picture
from test_cache import assert_same, caches_for, step
from torch import nn
from transformers import AutoModelForImageTextToText

import hfcustom
from hfcustom.cache.features import TowerCache
from hfcustom.cache.refusals import why_not_cached
from hfcustom.connectors import build_connector

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {**SIZES, "image_size": 24, "patch_size": 6}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}  # a multiple of the width there
TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": VIT,
    "convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 32},
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": VIT,
    "internvl_vision": {**SIZES, "image_size": [24, 24], "patch_size": [6, 6]},
    "siglip_vision_model": VIT,
    "vit": VIT,
}


def spec(model_type: str = "dinov2", **options: Any) -> dict[str, Any]:
    return {
        "name": "two_encoders",
        "tower": {"model_type": model_type, **TOWERS.get(model_type, VIT)},
        "num_heads": 4,
        **options,
    }


def wake(connector: Any) -> None:
    """Draw what starts at zero, so that the second tower has a say."""
    if hasattr(connector, "blocks"):
        layers = [block.o_proj for block in connector.blocks]
    else:
        layers = [connector.proj if connector.fusion == "concat" else connector.attention.o_proj]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.2)


class Stub(nn.Module):
    """A tower of 2 x 2 patches of 12 pixels whose features are the patch's number, after a class token."""

    def __init__(self, width: int, image_size: int = 24) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=image_size, patch_size=image_size // 2)
        self.width, self.anything = width, nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.seen = pixel_values
        numbers = torch.tensor([99.0, 0.0, 1.0, 2.0, 3.0])[None, :, None]
        return SimpleNamespace(last_hidden_state=numbers.expand(len(pixel_values), -1, self.width))


def stubbed(width: int = 16, **options: Any) -> Any:
    connector: Any = build_connector(spec(**options), 8)
    connector.tower = Stub(width)
    return connector


# ---- what reaches the tower, and how its features join ---------------------------------------------------------------


def test_channels_stand_side_by_side_on_the_first_towers_grid() -> None:
    connector = stubbed()
    with torch.no_grad():
        connector.proj.weight.zero_()
        connector.proj.weight[0, 8] = 1.0  # the first channel of the result is the first of the second tower
        features = torch.randn(2, 4, 8)
        assert connector(features, torch.zeros(2, 3, 24, 24))[1, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        finer = connector(torch.randn(2, 16, 8), torch.zeros(2, 3, 24, 24))[0, :, 0].view(4, 4)
        torch.testing.assert_close(finer[0], torch.tensor([0.0, 0.25, 0.75, 1.0]))  # bilinear between 0 and 1
        torch.testing.assert_close(finer[:, 0], torch.tensor([0.0, 0.5, 1.5, 2.0]))
        coarser = connector(torch.randn(1, 1, 8), torch.zeros(1, 3, 24, 24))
        torch.testing.assert_close(coarser[0, 0, 0], torch.tensor(1.5))  # the mean of all four


def test_each_patch_attends_to_all_of_the_second_tower() -> None:
    connector: Any = build_connector(spec(fusion="cross_attend"), 8)
    wake(connector)
    features, pictures = torch.randn(2, 4, 8), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        second = connector.tower(pictures).last_hidden_state[:, 1:]
        found = connector.attention(connector.norm(features), connector.norm_tower(second))
        torch.testing.assert_close(connector(features, pictures), features + found)
        assert not torch.allclose(connector(features, pictures.flip(0)), features + found)


def test_a_grid_of_other_proportions_spans_the_same_picture() -> None:
    connector = stubbed()
    with torch.no_grad():
        connector.proj.weight.zero_()
        connector.proj.weight[0, 8] = 1.0
        found = connector(torch.randn(1, 8, 8), torch.zeros(1, 3, 12, 48), (2, 4))[0, :, 0].view(2, 4)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.25, 0.75, 1.0], [2.0, 2.25, 2.75, 3.0]]))


# ---- in a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fusion", "model_type"),
    [*(("concat", model_type) for model_type in TOWERS), ("cross_attend", "convnext"), ("cross_attend", "dinov2")],
)
def test_any_tower_starts_without_effect_learns_and_travels(
    internvl: Family, model_type: str, fusion: str, tmp_path: Path
) -> None:
    model, batch = internvl.model(connector=spec(model_type, fusion=fusion)), internvl.batch([1, 0, 1])
    with torch.no_grad():
        stock = internvl.model()(**batch).logits
        assert torch.equal(model(**batch).logits, stock)
        wake(model.custom_connector)
        assert not torch.allclose(model(**batch).logits, stock)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_model(again, model, batch)
    assert not any(p.requires_grad for p in again.custom_connector.tower.parameters())
    assert all(p.requires_grad for p in again.custom_connector.proj.parameters()) if fusion == "concat" else True
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():
        assert torch.isfinite(half(**inputs).logits).all()


SIZES_OF_ROWS = [[(70, 28), (42, 42)], [], [(28, 70)], [(42, 70), (70, 28), (28, 28)]]  # width, height of images
CONNECTORS: dict[str, dict[str, Any]] = {
    "concat": spec(),
    "cross_attend": spec(fusion="cross_attend"),
    "several": {
        "name": "multi_encoder_resampler",
        "towers": [
            {"tower": {"model_type": "dinov2", **DINO}},
            {"tower": {"model_type": "siglip_vision_model", **VIT}},
        ],
        "num_queries": 3,
        "num_heads": 4,
    },
}

# Every family with each connector; how features of a second tower are fused is seen in a family of each kind.
PAIRS = [
    pytest.param(family, CONNECTORS[name], id=f"{family}-{name}")
    for family in FAMILIES
    for name in CONNECTORS
    if family in KINDS or name != "cross_attend"
]
each_pair = pytest.mark.parametrize(("family", "connector"), PAIRS, indirect=["family"])


def awake(family: Family, connector: dict[str, Any], **config: Any) -> tuple[Any, Any]:
    """Return a model whose added towers have a say, and a processor that writes its placeholders; None where it has none."""
    model = family.corrected(connector=connector, **config)
    wake(model.custom_connector)
    return model, model.match_processor(copy.deepcopy(family.processor))


def rows_of(sizes: list[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    rows = [chat_row(len(row), seed) for seed, row in enumerate(sizes)]
    for at, row in enumerate(rows):
        row["images"] = [picture(10 * at + image, size) for image, size in enumerate(sizes[at])]
    return rows


def test_images_of_any_sizes_start_as_without_a_second_tower(family: Family) -> None:
    """With fusion="cross_attend", too: IDENTITY in test_connectors.py."""
    if "connector" in family.model_class.lacks:
        return
    model, batch = family.model(connector=spec()), dict(hfcustom.Collator(family.processor)(rows_of(SIZES_OF_ROWS)))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, family.model()(**batch).logits)


@each_pair
def test_crops_keep_their_own_pictures(family: Family, connector: dict[str, Any]) -> None:
    """A batch of 2, 0, 1 and 3 images equals its rows, and so do 3, 2 and 1: no crop is looked at with another's picture."""
    if "connector" in family.model_class.lacks:
        return
    model, processor = awake(family, connector)
    rows = rows_of(SIZES_OF_ROWS)
    collate = hfcustom.Collator(processor)
    orders = [[0, 1, 2, 3], [3, 0, 2]] if family.name in KINDS else [[0, 1, 2, 3]]
    with torch.no_grad():
        alone = [model(**collate([row])).logits[0] for row in rows]
        for order in orders:
            batch = dict(collate([rows[at] for at in order]))
            logits = model(**batch).logits
            for row, at in zip(logits, order, strict=True):
                torch.testing.assert_close(row[: len(alone[at])], alone[at], rtol=1e-4, atol=2e-6)
        for layer in (model.custom_connector.tower,) if "tower" in connector else model.custom_connector.projs:
            for parameter in layer.parameters():
                parameter.zero_()
        assert not torch.allclose(model(**batch).logits, logits)  # so the added towers had a say


@pytest.mark.parametrize(
    ("family", "connector"),
    [pair for pair in PAIRS if pair.values[0] in KINDS or pair.values[1] is CONNECTORS["several"]],
    indirect=["family"],
)
def test_generation_with_cache_equals_generation_without(family: Family, connector: dict[str, Any]) -> None:
    """In every family with other placeholders than stock's."""
    if "connector" in family.model_class.lacks:
        return
    model, processor = awake(family, connector)
    batch = dict(hfcustom.Collator(processor)(rows_of(SIZES_OF_ROWS[:1])))
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


def test_a_second_tower_can_be_trained_too(family: Family) -> None:
    if "connector" in family.model_class.lacks:
        return
    model, processor = awake(family, spec(trainable=True))
    batch = dict(hfcustom.Collator(processor)(rows_of(SIZES_OF_ROWS)))
    model.train()(**batch).loss.backward()
    lacking = [name for name, p in model.custom_connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in lacking if "mask_token" not in name and "cls_token" not in name]


def test_what_is_frozen_is_cached_or_says_why_not(family: Family, tmp_path: Path) -> None:
    if "connector" in family.model_class.lacks:
        return
    for name in ("concat", "several"):
        connector = CONNECTORS[name]
        model, processor = awake(family, connector)
        hfcustom.freeze(model.train(), [part for part in ("vision", "connector") if part in family.parts])
        collate, rows = hfcustom.Collator(processor), rows_of([[(70, 28)], [], [(28, 70)]])
        if why := why_not_cached(model):
            reasons = [model.no_feature_cache, model.no_tower_cache, "is a part of it", "are changed inside of it"]
            assert any(reason and reason in why for reason in reasons), why
            continue
        plain = step(model, collate(rows))
        caches = caches_for(model, tmp_path / connector["name"], pixels_wanted=True)
        with TowerCache(model, caches.features).installed():
            for _ in range(2):
                assert_same(step(model, hfcustom.Collator(processor, caches=caches)(rows)), plain)


def test_features_can_be_asked_for_without_text(internvl: Family) -> None:
    model, batch = internvl.model(connector=spec()), internvl.batch([1])
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    assert features.shape == (7, 4, 64)


def test_a_stock_checkpoint_gets_a_second_tower(internvl: Family, tmp_path: Path) -> None:
    stock = internvl.model(internvl.stock_class)
    stock.save_pretrained(tmp_path)
    model = internvl.model_class.from_pretrained(tmp_path, connector=spec())
    batch = internvl.batch([1])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock.eval()(**batch).logits)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "custom_connector" in name}
    assert trained == {"custom_connector.proj.weight", "custom_connector.proj.bias"}


def projector_input(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the projector gets of a batch, (P, patches, D_vision)."""
    seen: list[torch.Tensor] = []
    projector = model.get_submodule(model.stock_parts().paths["connector"][0])
    projector.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -3)))
    with torch.no_grad():
        model(**batch)
    return seen[0]


def test_padding_and_empty_slots_stay_as_they_are(families: dict[str, Family]) -> None:
    """Idefics2's tower makes features of padding, Llama 3.2's of empty slots for tiles, and a class token of each slot."""
    rows = rows_of(SIZES_OF_ROWS)
    for name in ("idefics2", "mllama"):
        family = families[name]
        model, processor = awake(family, spec())
        batch = dict(hfcustom.Collator(processor)(rows))
        before, after = projector_input(family.corrected(), batch), projector_input(model, batch)
        changed = (before != after).any(-1)  # (P, patches)
        if name == "mllama":
            filled = batch["cross_attention_mask"].any(1).flatten()  # (P,)
            assert 0 < filled.sum() < len(filled)
            assert torch.equal(changed[:, 1:].any(1), filled) and not changed[:, 0].any()
        else:
            assert torch.equal(changed, model._patches.flatten(1)) and not changed.all()


def test_features_without_a_picture_are_an_error(internvl: Family) -> None:
    model = internvl.model(connector=spec())
    with pytest.raises(ValueError, match="there are 2 crops and 0 pictures"):
        model._vision_features(torch.randn(2, 16, 32))


# ---- several towers, read into few tokens -----------------------------------------------------------------------------


def several(*towers: dict[str, Any], **options: Any) -> dict[str, Any]:
    small = {"num_queries": 4, "num_heads": 4, "num_layers": 1}
    return {"name": "multi_encoder_resampler", "towers": list(towers), **small, **options}


SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 1],
    "image_size": 32,
    "window_size": 2,
}


def test_queries_read_all_that_the_towers_make() -> None:
    norms = {"processor_mean": 0.5, "processor_std": 0.5, "tower_mean": 0.25, "tower_std": 1.0}
    connector: Any = build_connector(several({"tower": {"model_type": "vit", **VIT}, **norms}, {"tower": SWIN}), 8)
    features, pictures = torch.randn(2, 16, 8), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        pooled = build_connector("average_pool", 8)(features)
        torch.testing.assert_close(connector(features, pictures), pooled)  # at first the towers have no say
        for block in connector.blocks:
            nn.init.normal_(block.o_proj.weight)
        vit = connector.towers[0].tower(pixel_values=pictures * 0.5 + 0.25).last_hidden_state  # (2, CLS + 16, 16)
        swin = connector.towers[1].sequence(pictures)  # (2, 16, 16): no grid is needed
        memory = [features, connector.projs[0](vit), connector.projs[1](swin)]
        expected = connector.blocks[0](pooled, torch.cat(memory, 1))
        torch.testing.assert_close(connector(features, pictures), expected)
    connector.train()(features, pictures).sum().backward()
    assert all(proj.weight.grad.abs().sum() > 0 for proj in connector.projs)
    assert not any(tower.tower.training for tower in connector.towers)
    assert not any(p.requires_grad for p in connector.towers.parameters())


def test_tiles_that_are_put_together_are_read_with_the_pictures_of_each(families: dict[str, Family]) -> None:
    tower = {"tower": {"model_type": "vit", **VIT}}
    model, processor = awake(families["llava_next"], several(tower))
    batch = dict(hfcustom.Collator(processor)(rows_of([[(56, 28), (28, 28)]])))
    read: list[tuple[int, ...]] = []
    block = model.custom_connector.blocks[0]
    block.register_forward_pre_hook(lambda module, args: read.append(tuple(args[1].shape)))
    with torch.no_grad():
        crops = model.loss_context(batch, batch["labels"]).vision_features
    assert (
        len(crops) == 2 * 3
    )  # a base view and two tiles each; of the second image one holds padding, which is cut off
    assert read == [
        (2, 16 + 17, 64),
        (1, 32 + 2 * 17, 64),
        (1, 16 + 2 * 17, 64),
    ]  # 17 for patches and class token of each
