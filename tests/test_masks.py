"""Training without a mask on a CPU: only where padding stays out all the same, in every family."""

from __future__ import annotations

from typing import Any

import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401

from hfcustom import seams


def masks_seen(model: Any) -> list[bool]:
    """Return, as forwards run, whether the inner model was given a mask."""
    seen: list[bool] = []
    model.get_submodule(model.inner_path()).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    return seen


def test_a_mask_is_left_out_only_where_nothing_looks_ahead(family: Family) -> None:
    model, batch = family.model().train(), family.batch([2, 0, 1])
    assert not batch["attention_mask"].all()
    causal = all(getattr(module, "is_causal", True) for module in model.get_decoder().modules())
    needed = "token_type_ids" in batch or not causal
    assert seams.needs_no_mask(batch, model.config.get_text_config(), model.get_decoder()) != needed
    seen = masks_seen(model)
    model(**batch)
    assert seen == [needed] or not model.inner_path()  # a class without an inner model is hooked before the mask goes


def test_padded_rows_train_as_in_stock_with_token_types_and_without(family: Family) -> None:
    batch = family.batch([2, 0, 1])
    for _ in range(2):
        losses = [model.train()(**batch).loss for model in (family.model(), family.model(family.stock_class))]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        if batch.pop("token_type_ids", None) is None:
            return


def test_a_window_is_kept_without_a_mask(families: dict[str, Family]) -> None:
    family, losses = families["idefics2"], []
    batch = family.batch([2, 0, 1])
    for window in (8, None):
        text_config = family.module.tiny_config().text_config
        text_config.sliding_window = window
        model, stock = (family.model(kind, text_config=text_config).train() for kind in (None, family.stock_class))
        seen = masks_seen(model)
        losses.append(model(**batch).loss)
        assert seen == [False]
        torch.testing.assert_close(losses[-1], stock(**batch).loss, rtol=1e-6, atol=0)
    assert not torch.isclose(*losses, rtol=1e-4), "rows are longer than the window"
