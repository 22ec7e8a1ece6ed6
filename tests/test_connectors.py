"""Every connector, by enumeration: it makes the tokens it says, trains, saves, and the placeholders follow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, KINDS, Family, assert_compiles, assert_same_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfcustom
from hfcustom import adapt
from hfcustom.connectors import (
    CONNECTORS,
    build_connector,
    count_tokens_out,
    find_connector,
    frames_together,
    grid_out,
    takes_grid,
    takes_pictures,
)

TOWER = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 6,
}
# settings that must equal "no connector"
IDENTITY: dict[str, dict[str, Any]] = {
    "attention_pooling": {"size": 1},
    "average_pool": {"size": 1},
    "frame_average": {"frames": 1},
    "linear": {},
    "mlp": {},
    "patch_merger": {"size": 1},
    "pixel_shuffle": {"size": 1},
    "temporal_dedup": {"frames": 1, "keep_ratio": 1.0},
    "token_pruning": {"keep_ratio": 1.0},
    "two_encoders": {"tower": TOWER, "num_heads": 4, "fusion": "cross_attend"},
}
# for 64 hidden units
SMALL: dict[str, dict[str, Any]] = {
    "multi_encoder_resampler": {
        "towers": [{"tower": TOWER}, {"tower": {**TOWER, "model_type": "clip_vision_model"}}],
        "num_queries": 3,
        "num_heads": 4,
    },
    "perceiver_resampler": {"num_queries": 3, "num_heads": 4},
    "query_cross_attention": {"num_queries": 3, "num_heads": 4},
    "two_encoders": {"tower": TOWER},
}

NAMES = sorted(CONNECTORS)


def spec(name: str) -> dict[str, Any]:
    return {"name": name, **SMALL.get(name, {})}


def run(module: nn.Module, features: torch.Tensor, **known: Any) -> torch.Tensor:
    """Run a connector on (P, N, D), with pictures of the crops where it looks at them."""
    if takes_pictures(module):
        generator = torch.Generator().manual_seed(1)
        known["pixel_values"] = torch.randn(len(features), 3, 24, 24, generator=generator).to(features)
    return module(features, **known)


def refused(family: Family, name: str) -> bool:
    """Whether a family says that it cannot have a connector; then saying so is what is tested."""
    reason = family.model_class.lacks.get("connector")
    if reason:
        with pytest.raises(ValueError, match=re.escape(reason)):
            family.model(connector=spec(name))
    return reason is not None


def clips(name: str, images: list[int]) -> list[int]:
    """Return image counts of rows in which neighbouring crops can be taken together."""
    return [count * frames_together(build_connector(spec(name), 64)) for count in images]


@pytest.fixture(autouse=True)
def restore_registry() -> Iterator[None]:
    before = dict(CONNECTORS)
    yield
    CONNECTORS.clear()
    CONNECTORS.update(before)


# ---- the module by itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 16, 64])
def test_it_makes_as_many_tokens_as_it_says(name: str, tokens: int) -> None:
    module = build_connector(spec(name), 64)
    features = torch.randn(2 * frames_together(module), tokens, 64, requires_grad=True)
    out = run(module, features)
    assert out.shape == (len(features), module.num_tokens_out(tokens), 64)
    assert torch.equal(run(module, features), out)
    (out * torch.randn_like(out)).sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name in NAMES if takes_grid(CONNECTORS[name])])
@pytest.mark.parametrize("grid", [(2, 6), (3, 5), (1, 7)])
def test_a_grid_of_any_sides_is_reduced(name: str, grid: tuple[int, int]) -> None:
    module = build_connector(spec(name), 64)
    tokens = grid[0] * grid[1]
    out = run(module, torch.randn(2, tokens, 64), grid=grid)
    rows, columns = grid_out(module, tokens, grid)
    assert out.shape == (2, rows * columns, 64)
    assert count_tokens_out(module, tokens, grid) == rows * columns


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_runs_in_16_bits(name: str, dtype: torch.dtype) -> None:
    module = build_connector(spec(name), 64)
    features = torch.randn(2 * frames_together(module), 16, 64)
    expected = run(module, features)
    out = run(module.to(dtype), features.to(dtype))
    assert out.dtype == dtype
    assert out.shape == expected.shape and torch.isfinite(out).all()
    if not name.startswith(("token_", "temporal_")):  # rounding may settle between two tokens otherwise
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_where_it_comes_from(name: str) -> None:
    assert "https://arxiv.org/abs/" in (CONNECTORS[name].__doc__ or "")


# ---- in a model -----------------------------------------------------------------------------------------------------


# Every connector in a family of each kind, and every
# family with a connector that asks for the grid and one that does not.

PAIRS = [
    pytest.param(family, name, id=f"{family}-{name}")
    for family in FAMILIES
    for name in NAMES
    if family in KINDS or name in ("average_pool", "multi_encoder_resampler", "perceiver_resampler", "two_encoders")
]
IDENTITY_PAIRS = [pair for pair in PAIRS if pair.values[1] in IDENTITY]


@pytest.mark.parametrize(("family", "name"), IDENTITY_PAIRS, indirect=["family"])
def test_identity_settings_equal_no_connector(family: Family, name: str) -> None:
    if refused(family, name):
        return
    batch = family.batch([2, 1])
    model, plain = family.model(connector={"name": name, **IDENTITY[name]}), family.model()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(("family", "name"), PAIRS, indirect=["family"])
def test_placeholders_follow_and_travel(family: Family, name: str, tmp_path: Path) -> None:
    if refused(family, name):
        return
    processor = copy.deepcopy(family.processor)
    model = family.model(connector=spec(name))
    model.match_processor(processor)
    model.match_processor(processor)  # a second time changes nothing
    images = clips(name, [2, 0, 1])
    batch, before = family.batch(images, processor), family.batch(images)
    reduces = build_connector(spec(name), 64).num_tokens_out(16) != 16
    follows = reduces and "placeholders" not in model.lacks
    count = [(b["input_ids"] == model.placeholder_token_id).sum(1) for b in (batch, before)]  # (B,) each
    assert (count[0] != count[1]).tolist() == [follows, False, follows]
    with torch.no_grad():
        features = model.loss_context(batch, batch["labels"]).image_features  # (P, M, D)
        before = family.model().loss_context(before, before["labels"]).image_features
    assert (features.shape[1] < before.shape[1]) == reduces and features.shape[::2] == before.shape[::2]
    assert "placeholders" in model.lacks or features.shape[:2].numel() == count[0].sum()
    loss = model.train()(**batch).loss
    loss.backward()
    assert all(p.grad is not None for p in model.custom_connector.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    reread = family.batch(images, reader)
    assert all(torch.equal(reread[key], batch[key]) for key in batch)
    assert_same_model(again, model, batch)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(internvl: Family, name: str) -> None:
    """Every weight moves, those behind a start at zero too, and the loss falls."""
    model = internvl.model(connector=spec(name))
    batch = internvl.batch(clips(name, [1, 2]), model.match_processor(copy.deepcopy(internvl.processor)))
    hfcustom.freeze(model, ["vision", "connector", "head"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_logits_equal_eager(internvl: Family, name: str) -> None:
    model = internvl.model(connector=spec(name))
    batch = internvl.batch(clips(name, [1]), model.match_processor(copy.deepcopy(internvl.processor)))
    del batch["labels"]
    assert_compiles(model, batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["internvl", "qwen2_vl"])  # positions in one dimension, and in three
def test_generation_with_cache_equals_generation_without(of: str, name: str, families: dict[str, Family]) -> None:
    if refused(families[of], name):
        return
    model = families[of].model(connector=spec(name))
    batch = families[of].batch(clips(name, [2]), model.match_processor(copy.deepcopy(families[of].processor)))
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_trains_it_as_it_is(families: dict[str, Family], name: str) -> None:
    """Under peft's wrapper it still learns how its tokens lie, and what it froze stays frozen."""
    for family in (families["internvl"], families["qwen2_vl"]):
        if refused(family, name):
            continue
        plain = family.model(connector=spec(name))
        batch = family.batch(clips(name, [1, 0, 1]), plain.match_processor(copy.deepcopy(family.processor)))
        with torch.no_grad():
            expected = plain(**batch).logits
        frozen = {name for name, p in plain.named_parameters() if "custom_connector" in name and not p.requires_grad}
        model = adapt.lora(plain, rank=2)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits, expected)
        for parameter, tensor in model.named_parameters():
            if "custom_connector.modules_to_save" in parameter:
                assert tensor.requires_grad == (hfcustom.parts.without_wrappers(parameter) not in frozen), parameter


def test_a_processor_that_was_not_matched_is_told_so(family: Family) -> None:
    if refused(family, "average_pool"):
        return
    model = family.model(connector="average_pool")
    if "placeholders" in model.lacks:
        assert model(**family.batch([1])).loss.isfinite()
        return
    with pytest.raises(
        ValueError, match=r"image placeholders, the connector 'average_pool' made .*model.match_processor"
    ):
        model(**family.batch([1]))


# ---- mistakes, and connectors of one's own --------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, str]] = {
    "name": ("averagepool", r"Unknown connector 'averagepool'. Did you mean 'average_pool'"),
    "option": (
        {"name": "average_pool", "sise": 2},
        r"option of connector 'average_pool': 'sise'. Did you mean 'size'",
    ),
    "no name": ({"size": 2}, r"connector=\{'size': 2\}; give a name, or a mapping with one"),
    "no spec": (3, "connector=3; give a name"),
    "text for a number": ({"name": "average_pool", "size": "2"}, "'average_pool': size='2'; it takes int"),
    "a share for a number": ({"name": "token_pruning", "num_kept": 0.5}, r"num_kept=0.5; it takes int \| None"),
    "size": ({"name": "average_pool", "size": 0}, "average_pool size=0; it must be at least 1"),
    "heads": ({"name": "perceiver_resampler", "num_heads": 3}, "num_heads=3 does not divide the hidden size 8"),
    "window heads": ({"name": "attention_pooling", "num_heads": 3}, "attention_pooling num_heads=3 does not divide"),
    "queries": ({"name": "query_cross_attention", "num_queries": 0}, "num_queries=0; it must be at least 1"),
    "start": ({"name": "perceiver_resampler", "start": "mean"}, "perceiver_resampler start: 'mean'"),
    "none kept": ({"name": "token_pruning", "num_kept": 0}, "num_kept=0; it must be at least 1"),
    "two counts": ({"name": "token_pruning", "num_kept": 2, "keep_ratio": 0.5}, "exclude each other"),
    "choice": ({"name": "token_pruning", "by": "questions"}, "token_pruning by: 'questions'. Did you mean 'question'"),
    "ratio": ({"name": "token_pruning", "keep_ratio": 1.5}, "keep_ratio=1.5; it must be above 0 and at most 1"),
    "frames": ({"name": "frame_average", "frames": 0}, "frame_average frames=0; it must be at least 1"),
    "first frame": ({"name": "temporal_dedup", "frames": 4, "keep_ratio": 0.2}, r"choose at least 1 / frames = 0.25"),
    "no towers": ("multi_encoder_resampler", r"multi_encoder_resampler towers=\(\) names no tower; write"),
    "tower option": (
        {"name": "multi_encoder_resampler", "num_heads": 4, "towers": [{"towr": TOWER}]},
        "option of a tower of multi_encoder_resampler: 'towr'. Did you mean 'tower'",
    ),
    "tower of several": (
        {"name": "multi_encoder_resampler", "num_heads": 4, "towers": [{"tower": {"model_type": "dinov3"}}]},
        "model_type of an added tower: 'dinov3'. Did you mean 'dino",
    ),
    "no tower": ("two_encoders", "tower=None names no model_type; write"),
    "tower": ({"name": "two_encoders", "tower": {"model_type": "dinov3"}}, "'dinov3'. Did you mean 'dino"),
    "fusion": ({"name": "two_encoders", "tower": TOWER, "fusion": "concta"}, "'concta'. Did you mean 'concat'"),
    "half a norm": (
        {"name": "two_encoders", "tower": TOWER, "tower_mean": 0.5},
        "processor_std, .* together, or none",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_value_and_the_cure(mistake: str) -> None:
    wrong, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        build_connector(wrong, 8)


@pytest.mark.parametrize("name", ["attention_pooling", "average_pool", "patch_merger", "pixel_shuffle"])
def test_a_crop_without_a_square_grid_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} size=2 needs a square grid whose side it divides; got 6 tokens"):
        build_connector(name, 8).num_tokens_out(6)


def test_a_users_connector_is_one_class() -> None:
    @hfcustom.connector
    class EveryOther(nn.Module):
        def __init__(self, hidden_size: int) -> None:
            super().__init__()

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, ::2]

        def num_tokens_out(self, num_tokens: int) -> int:
            return (num_tokens + 1) // 2

    assert build_connector("every_other", 8)(torch.zeros(1, 5, 8)).shape == (1, 3, 8)
    assert find_connector("every_other") == (EveryOther, {})
    hfcustom.connector(EveryOther)  # again is harmless
    with pytest.raises(ValueError, match="'average_pool' belongs to hfcustom.connectors.average_pool.AveragePool"):
        hfcustom.connector(type("AveragePool", (EveryOther,), {}))
    with pytest.raises(TypeError, match=r"needs a method num_tokens_out\(\)"):
        hfcustom.connector(nn.Linear)


def test_a_connector_that_does_not_keep_its_word_is_named(internvl: Family) -> None:
    @hfcustom.connector
    class Liar(nn.Module):
        def __init__(self, hidden_size: int, width: int = 0) -> None:
            super().__init__()
            self.width = width or hidden_size

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, :2, : self.width]

        def num_tokens_out(self, num_tokens: int) -> int:
            return 2 if self.width < 64 else 1

    for spec, found, expected in (
        ("liar", "7, 2, 64", "7, 1, 64"),
        ({"name": "liar", "width": 8}, "7, 2, 8", "7, 2, 64"),
    ):
        model = internvl.model(connector=spec)
        processor = model.match_processor(copy.deepcopy(internvl.processor))
        with pytest.raises(
            ValueError, match=rf"returned \({found}\); it must return \({expected}\), \(crops, num_tokens_out"
        ):
            model(**internvl.batch([1], processor))
