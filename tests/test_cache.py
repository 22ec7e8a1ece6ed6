"""Tests of hfcustom/cache: features and processed images read back are those computed, and nothing stale is ever read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from torch import nn

import hfcustom
from hfcustom.cache.features import FeatureCache
from hfcustom.cache.pictures import ImageCache
from hfcustom.cache.refusals import why_not_cached
from hfcustom.cache.run import Caches, serving
from hfcustom.cache.store import ShardStore
from hfcustom.data.collate import Batch, Collator


def frozen(family: Family, model_class: Any = None, **config: Any) -> Any:
    """Return a tiny model in train mode whose language model alone is trained."""
    model = family.model(model_class, **config).train()
    hfcustom.freeze(model, [part for part in ("vision", "connector") if part in family.parts])
    return model


def caches_for(model: Any, folder: Path, **options: Any) -> Caches:
    """Return caches of features and layouts in a folder, newly opened."""
    layouts = ImageCache(ShardStore(folder, "layouts", 1e12), keeps_pixels=False)
    features = ShardStore(folder, "features", 1e12)
    return Caches(layouts, features, model.placeholder_token_id, **{"pixels_wanted": False, **options})


def step(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and every gradient of one forward and backward."""
    model.zero_grad()
    with serving(model, batch):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert not [name for name in first[1] if not torch.equal(first[1][name], second[1][name])]


def count_runs(model: Any) -> list[int]:
    """Return a list that grows with each run of the vision tower."""
    runs: list[int] = []
    for path in model.stock_parts().paths["vision"]:
        model.get_submodule(path).register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


# ---- every family ---------------------------------------------------------------------------------------------------


def test_cached_features_change_no_bit(family: Family, tmp_path: Path) -> None:
    model, rows = frozen(family), [chat_row(2, 0), chat_row(0, 1), chat_row(1, 2)]
    if model.no_feature_cache:
        assert model.no_feature_cache in why_not_cached(model)
        return
    assert not why_not_cached(model)
    runs = count_runs(model)
    plain = step(model, Collator(family.processor)(rows))
    ran = len(runs)
    caches = caches_for(model, tmp_path)
    assert ran and caches.features is not None
    with FeatureCache(model, caches.features).installed():
        collate = Collator(family.processor, caches=caches)
        assert_same(step(model, collate(rows)), plain)
        assert len(runs) == 2 * ran
        known = collate(rows)
        assert_same(step(model, known), plain)
        some = collate([chat_row(1, 3), *rows])  # one image is new, pixels of the others are blank
    cached = Collator(family.processor, caches=caches_for(model, tmp_path))  # as another process reads it
    with FeatureCache(model, caches.features).installed():
        assert_same(step(model, cached(rows)), plain)
        assert len(runs) == 2 * ran
        mixed = step(model, some)
    assert len(runs) == 3 * ran
    torch.testing.assert_close(mixed[0], step(model, Collator(family.processor)([chat_row(1, 3), *rows]))[0])
