"""Norms of the gradient by part: those of the whole step before clipping, whose squares sum to the whole norm's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Family
from training import short_config

import hfcustom
from hfcustom.train import make_accelerator, make_optimizer, train_step
from hfcustom.training.norms import part_norms


def test_norms_are_of_the_accumulated_gradient_before_clipping(family: Family, tmp_path: Path) -> None:
    model = family.model()
    parts = hfcustom.find_parts(model)
    batches = [family.batch([1, 0]), family.batch([2, 1])]
    counts = model.loss_counts(batches)
    for batch in batches:
        model(**batch, loss_divisors=counts).loss.backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = parts.part_of(name)
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.double().square().sum())
    model.zero_grad()
    config = short_config(tmp_path, max_grad_norm=1e-3)
    report = train_step(model, batches, make_optimizer(model, config), make_accelerator(config), config)
    found = {part: float(norm) for part, norm in report.part_norms.items()}
    assert {part: norm for part, norm in found.items() if part in squares} == pytest.approx(
        {part: value**0.5 for part, value in squares.items()}, rel=1e-4
    )
    assert sum(norm**2 for norm in found.values()) ** 0.5 == pytest.approx(float(report.grad_norm), rel=1e-4)


def test_one_part_alone_has_the_norm_of_the_whole(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    hfcustom.train_only(model, "connector")
    optimizer = make_optimizer(model, short_config(tmp_path))
    model(**internvl.batch([1])).loss.backward()
    assert part_norms(optimizer) == {}


def test_a_part_without_a_gradient_has_a_norm_of_0(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    optimizer = make_optimizer(model, short_config(tmp_path))
    assert part_norms(optimizer) == {}  # no step has been computed
    model(**internvl.batch([0])).loss.backward()
    norms = part_norms(optimizer)
    assert norms["vision"] == norms["connector"] == torch.tensor(0.0)
    assert norms["language"] > 0
