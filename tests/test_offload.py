"""offload_activations: what backward needs lies in the CPU's memory meanwhile, comes back bit for bit, and holds no weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import Family
from test_plan import of_plan, planned
from test_recipes import stock_checkpoint
from torch import nn
from training import add_dropout, curve, train, uneven_rows, weights

import hfcustom
from hfcustom.exits import ConfigError
from hfcustom.train import checkpoint_activations
from hfcustom.train_config import TrainConfig
from hfcustom.training import offload
from hfcustom.training.offload import Offloaded, check_offloading


def step(model: Any, batch: dict[str, torch.Tensor], around: Any = None) -> dict[str, torch.Tensor]:
    """Return loss and gradients of a forward in a context."""
    model.zero_grad()
    with around or nullcontext():
        loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 1
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """What is copied to the CPU."""
    found: list[torch.Tensor] = []
    copy = offload.to_cpu

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(copy(tensor))
        return found[-1]

    monkeypatch.setattr(offload, "to_cpu", note)
    yield found


# ---- values ---------------------------------------------------------------------------------------------------------


def test_gradients_are_bit_equal_and_no_weight_is_copied(family: Family, copied: list[torch.Tensor]) -> None:
    model, batch = family.model().train(), family.batch([1, 0])
    expected = step(model, batch)
    assert_equal(expected, step(model, batch, Offloaded(model, min_bytes=0)))
    assert sum(tensor.numel() for tensor in copied) > 10_000
    matrices = [p.detach() for p in model.parameters() if p.ndim > 1]
    pairs = [(tensor, p) for tensor in copied for p in matrices if tensor.numel() == p.numel()]
    same = [p.numel() for tensor, p in pairs if torch.equal(tensor.flatten().sort()[0], p.flatten().sort()[0])]
    assert sum(same) < 0.01 * sum(p.numel() for p in matrices)  # Aria repeats its queries for each picture


@pytest.mark.parametrize("way", ["recomputed", "LoRA, recomputed", "bf16", "packed"])
def test_beside_recomputed_layers_adapters_and_autocast(
    internvl: Family, way: str, copied: list[torch.Tensor]
) -> None:
    model, batch = internvl.model().train(), internvl.batch([1, 2])
    if "LoRA" in way:
        model = hfcustom.lora(model, rank=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    if way == "packed":
        real = batch.pop("attention_mask").bool()
        batch |= {name: batch[name][real][None] for name in ("input_ids", "labels")}
        batch["position_ids"] = (real.cumsum(1) - 1)[real][None]
    if "recomputed" in way:
        checkpoint_activations(getattr(model, "base_model", model))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        expected = step(model, batch)
        assert_equal(expected, step(model, batch, Offloaded(model, min_bytes=0)))
    assert copied


def test_a_run_with_it_ends_bit_equal(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: list[torch.Tensor]
) -> None:
    ends = []
    for asked in (False, True):
        model = internvl.model()
        add_dropout(model, 0.2)
        monkeypatch.setattr(offload, "has_effect", lambda device: True)
        monkeypatch.setattr(offload, "MIN_BYTES", 1024)
        options: dict[str, Any] = {"max_steps": 2, "micro_batch_size": 4, "offload_activations": asked}
        ends.append((curve(train(model, internvl, tmp_path / str(asked), uneven_rows(), **options)), weights(model)))
        assert bool(copied) == asked
    assert ends[0][0] == ends[1][0]
    assert_equal(ends[0][1], ends[1][1])


# ---- what is copied -------------------------------------------------------------------------------------------------


def test_a_tensor_is_copied_once_unless_it_has_changed(copied: list[torch.Tensor]) -> None:
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    given = torch.randn(64, 64, requires_grad=True)
    offloaded = Offloaded(model, min_bytes=0)
    with offloaded:
        hidden = given * 1.0  # saves nothing
        outputs = [linear(hidden) for linear in model]
    assert len(copied) == 1 and offloaded.moved == 4 * 64 * 64
    sum(outputs).sum().backward()
    assert given.grad is not None
    with Offloaded(model, min_bytes=0):
        hidden = given * 1.0
        first = hidden.sin()
        hidden.add_(1)  # torch by itself would refuse the backward pass; the copy has the value that sin saw
        second = hidden.sin()
    given.grad = None
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(given.grad, given.detach().cos() + (given.detach() + 1).cos())


def test_strides_come_back_and_what_is_small_or_repeated_stays(copied: list[torch.Tensor]) -> None:
    offloaded = Offloaded(nn.Linear(2, 2), min_bytes=1024)
    for view in (torch.randn(40, 50).t(), torch.randn(40, 90)[:, 7:57], torch.randn(4, 5, 6, 50).transpose(1, 2)):
        back = offloaded._unpack(offloaded._pack(view))
        assert torch.equal(back, view) and back.stride() == view.stride() and back.data_ptr() != view.data_ptr()
    assert len(copied) == 3
    for kept in (torch.randn(8, 8), torch.randn(40, 1).expand(40, 50), torch.randn(99, 99).to_sparse()):
        assert offloaded._pack(kept) is kept


# ---- where ----------------------------------------------------------------------------------------------------------


def test_on_a_cpu_it_has_no_effect_and_that_is_said(
    internvl: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture, copied: list[torch.Tensor]
) -> None:
    offload.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING", "hfcustom"):
        train(internvl.model(), internvl, tmp_path, max_steps=1, offload_activations=True)
    assert not copied
    assert "offload_activations has no effect on a CPU" in caplog.text


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_it_is_refused_where_ranks_share_weights(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind)
    with pytest.raises(ConfigError, match=f"does not go with {kind.value}.*--gradient-checkpointing keeps less"):
        check_offloading(TrainConfig(offload_activations=True), accelerator)
    check_offloading(TrainConfig(), accelerator)


def test_a_plan_counts_it(families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)
    folder = stock_checkpoint(families["nano"], tmp_path)
    plain, moved = (of_plan(*planned(folder, *options)) for options in ([], ["--offload-activations"]))
    assert plain.offloaded == 0
    assert moved.peak < 0.9 * plain.peak and moved.offloaded > 0, (moved, plain)
    assert moved.total("weights") == plain.total("weights") and moved.at_peak["weights"] == plain.at_peak["weights"]
