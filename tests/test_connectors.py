"""Every connector, by enumeration: it makes the tokens it says, trains, saves, and the placeholders follow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfcustom
from hfcustom.connectors import CONNECTORS, build_connector

IDENTITY: dict[str, dict[str, Any]] = {"average_pool": {"size": 1}}  # settings that must equal "no connector"
SMALL: dict[str, dict[str, Any]] = {"perceiver_resampler": {"num_queries": 3, "num_heads": 4}}  # for 64 hidden units

NAMES = sorted(CONNECTORS)


def spec(name: str) -> dict[str, Any]:
    return {"name": name, **SMALL.get(name, {})}


@pytest.fixture(autouse=True)
def restore_registry() -> Iterator[None]:
    before = dict(CONNECTORS)
    yield
    CONNECTORS.clear()
    CONNECTORS.update(before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 16, 64])
def test_it_makes_as_many_tokens_as_it_says(name: str, tokens: int) -> None:
    module = build_connector(spec(name), 64)
    features = torch.randn(2, tokens, 64, requires_grad=True)
    out = module(features)
    assert out.shape == (2, module.num_tokens_out(tokens), 64)
    out.sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("name", sorted(IDENTITY))
def test_identity_settings_equal_no_connector(family: Family, name: str) -> None:
    batch = family.batch([2, 1])
    model, plain = family.model(connector={"name": name, **IDENTITY[name]}), family.model()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_follow_and_travel(family: Family, name: str, tmp_path: Path) -> None:
    processor = copy.deepcopy(family.processor)
    model = family.model(connector=spec(name))
    model.match_processor(processor)
    model.match_processor(processor)  # a second time changes nothing
    batch, before = family.batch([2, 0, 1], processor), family.batch([2, 0, 1])
    follows = "placeholders" not in model.lacks
    count = [(b["input_ids"] == model.placeholder_token_id).sum(1) for b in (batch, before)]  # (B,) each
    changed = count[0] != count[1]
    assert changed.tolist() == [follows, False, follows]
    with torch.no_grad():
        features = model.loss_context(batch, batch["labels"]).image_features  # (P, M, D)
        before = family.model().loss_context(before, before["labels"]).image_features
    assert features.shape[1] < before.shape[1] and features.shape[::2] == before.shape[::2]
    assert not follows or features.shape[:2].numel() == count[0].sum()
    loss = model.train()(**batch).loss
    loss.backward()
    assert all(p.grad is not None for p in model.custom_connector.parameters())
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    reread = family.batch([2, 0, 1], reader)
    assert all(torch.equal(reread[key], batch[key]) for key in batch)
    assert_same_model(again, model, batch)


def test_a_processor_that_was_not_matched_is_told_so(family: Family) -> None:
    model = family.model(connector="average_pool")
    if "placeholders" in model.lacks:
        assert model(**family.batch([1])).loss.isfinite()
        return
    with pytest.raises(
        ValueError, match=r"image placeholders, the connector 'average_pool' made .*model.match_processor"
    ):
        model(**family.batch([1]))


def test_mistakes_name_the_value_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown connector 'averagepool'. Did you mean 'average_pool'"):
        build_connector("averagepool", 8)
    with pytest.raises(ValueError, match=r"option of connector 'average_pool': 'sise'. Did you mean 'size'"):
        build_connector({"name": "average_pool", "sise": 2}, 8)
    with pytest.raises(ValueError, match="average_pool size=0"):
        build_connector({"name": "average_pool", "size": 0}, 8)
    with pytest.raises(ValueError, match="square grid whose side it divides; got 6 tokens"):
        build_connector("average_pool", 8).num_tokens_out(6)
    with pytest.raises(ValueError, match="num_heads=3 does not divide the hidden size 8"):
        build_connector({"name": "perceiver_resampler", "num_heads": 3}, 8)


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
    hfcustom.connector(EveryOther)  # again is harmless
    with pytest.raises(ValueError, match="'average_pool' belongs to hfcustom.connectors.AveragePool"):
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
