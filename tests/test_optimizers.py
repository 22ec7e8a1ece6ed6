"""The optimizer: each part at its rate and with its decay, in every family; kinds that need a package or a GPU say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import Family
from training import curve, short_config, train, uneven_rows

import hfcustom
from hfcustom.exits import ConfigError
from hfcustom.parts import find_parts
from hfcustom.runs.folder import checkpoint_bytes
from hfcustom.training.optimizers import make_optimizer, set_lr


def rates_of(optimizer: Any) -> dict[str, set[tuple[float, float]]]:
    found: dict[str, set[tuple[float, float]]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["part"], set()).add((group["peak_lr"], group["weight_decay"]))
    return found


def test_parts_have_rates_and_decays_of_their_own(family: Family, tmp_path: Path) -> None:
    parts = [part for part in family.parts if part in ("vision", "connector", "language")]
    rates = {part: 10.0**-at for at, part in enumerate(parts, 3)}
    decays = {parts[0]: 0.3}
    config = short_config(tmp_path, part_lr=rates, part_weight_decay=decays, weight_decay=0.1)
    for part, seen in rates_of(make_optimizer(family.model(), config)).items():
        decayed = {pair for pair in seen if pair[1]}
        assert {rate for rate, _ in seen} == {rates.get(part, config.lr)}
        assert decayed <= {(rates.get(part, config.lr), decays.get(part, 0.1))}
        assert decayed or part not in ("vision", "language")


def test_a_part_moves_by_its_rate(internvl: Family, tmp_path: Path) -> None:
    """AdamW's first step moves a weight by about its learning rate."""
    model = internvl.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"vision": 1e-5, "connector": 1e-3, "head": 3e-3}
    train(model, internvl, tmp_path, uneven_rows(), max_steps=1, part_lr=rates, weight_decay=0.0, schedule="constant")
    parts, moved = find_parts(model), dict[str, float]()
    for name, p in model.named_parameters():
        part = parts.part_of(name)
        moved[part] = max(moved.get(part, 0.0), float((p - before[name]).abs().max()))
    assert moved == pytest.approx({"language": 1e-3, **rates}, rel=0.05)


def test_a_schedule_scales_every_part_alike(internvl: Family, tmp_path: Path) -> None:
    config = short_config(tmp_path, part_lr={"vision": 1e-5}, schedule="linear", min_lr_ratio=0.0)
    optimizer = make_optimizer(internvl.model(), config)
    set_lr(optimizer, 5, 10, config)
    assert {group["lr"] / group["peak_lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_lr": {"visoin": 1e-3}}, "Unknown part in part_lr: 'visoin'. Did you mean 'vision'"),
        ({"part_lr": {"vision": 0.0}}, "part_lr: 0.0 of vision must be positive"),
        ({"part_weight_decay": {"vision": -0.1}}, "part_weight_decay: -0.1 of vision must not be negative"),
        (
            {"part_lr": {"vision": 1e-3}, "vision_lr": 1e-3},
            "vision_lr and part_lr both name the vision; leave one out",
        ),
        ({"part_lr": {"new": 1e-3}}, "Unknown part 'new'; this model has vision, connector, language, head"),
        ({"optimizer": "paged_adamw_8bit"}, "there is no GPU here; use adamw_8bit"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_is_named(internvl: Family, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if "paged" in str(options) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where a paged optimizer works")
    with pytest.raises(ValueError, match=message):
        train(internvl.model(), internvl, tmp_path, uneven_rows(), **options)


def test_a_rate_of_a_frozen_part_is_an_error(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    hfcustom.freeze(model, "vision")
    with pytest.raises(ValueError, match=r"part_lr=\{'vision': 0.001\} has no effect on 'vision'"):
        make_optimizer(model, short_config(tmp_path, part_lr={"vision": 1e-3}))


def test_eight_bits_train_near_thirty_two(internvl: Family, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    curves = [
        curve(train(internvl.model(), internvl, tmp_path / kind, uneven_rows(), optimizer=kind))
        for kind in ("adamw", "adamw_8bit")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-2) and curves[0][-1] < curves[0][0]


def test_a_missing_package_is_named(internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="optimizer=adamw_8bit needs bitsandbytes: pip install"):
        make_optimizer(internvl.model(), short_config(tmp_path, optimizer="adamw_8bit"))


def test_room_on_disk_is_asked_for_what_the_moments_take() -> None:
    class AdamW8bit(torch.optim.SGD):
        """By its name one of bitsandbytes."""

    model = torch.nn.Linear(1000, 1000, bias=False)
    Accelerator(cpu=True)
    sizes = [
        checkpoint_bytes(model, AcceleratedOptimizer(kind(model.parameters(), lr=0.1)))
        for kind in (torch.optim.SGD, AdamW8bit)
    ]
    assert [round((size - 2**20) / 1.02e6) for size in sizes] == [12, 6]  # weights in float32 and two moments
