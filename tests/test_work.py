"""mfu: what a step is said to cost is what its operations cost, in every family, whatever is trained, at other lengths and images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from full_memory import room_for
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training import short_config, train, uneven_rows, weights

import hfcustom
from hfcustom.data.collate import Batch, Collator
from hfcustom.data.packing import pack_rows
from hfcustom.train import checkpoint_activations, make_accelerator, train_step
from hfcustom.train_config import TrainConfig
from hfcustom.training.work import FORMULAS, Count, Work, device_rate

OTHER_SIZES = ((90, 40), (40, 120))
STEPS: list[
    tuple[list[int], list[int], Sequence[tuple[int, int]]]
] = [  # images and words of each row, sizes of pictures
    ([1, 0, 2], [3, 9, 2], ()),
    ([0, 0], [5, 30], ()),
    ([3], [40], ()),
    ([1, 2], [2, 30], OTHER_SIZES),
]
TOLERANCE = {
    "idefics2": 0.06,  # its resampler costs the same for a picture of any size
    "minicpmv4_6": 0.1,  # gated layers run in blocks of 64 tokens, which these rows fill badly
    "mistral3": 0.015,  # pictures of other sizes are padded for a convolution
    "molmo2": 0.002,
    "nemotron_h_omni": 0.02,  # layers with a state run in blocks, too
    "pixtral": 0.015,
}


class Reference(TorchDispatchMode):
    """Adds up what runs, whatever it belongs to, but for what runs again in the backward pass."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        again = torch._C._current_autograd_node() is not None and torch.is_grad_enabled()
        if (formula := FORMULAS.get(func._overloadpacket)) is not None and not again:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out


def batch_of(family: Family, images: list[int], words: list[int], sizes: Sequence[tuple[int, int]] = ()) -> Batch:
    rows = [chat_row(count, seed) for seed, count in enumerate(images)]
    for row, length in zip(rows, words, strict=True):
        row["messages"][-1]["content"] = " ".join(str(at % 10) for at in range(length))
        if sizes:
            row["images"] = [picture(at, sizes[at % len(sizes)]) for at in range(len(row["images"]))]
    return Collator(family.processor)(rows)


class Stepper:
    """Takes steps with a model, and says what each has cost by its Work and, where asked, by what ran."""

    def __init__(self, model: nn.Module) -> None:
        self.config = TrainConfig(max_grad_norm=0)
        self.accelerator = make_accelerator(self.config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        self.work = Work(self.model)

    def step(self, *batches: Batch) -> tuple[float, int]:
        reference = Reference()
        with self.work.watching(), self.work.step(batches), reference:
            train_step(self.model, batches, self.optimizer, self.accelerator, self.config)
        return self.work.flop, reference.flop


def with_lora(model: Any) -> Any:
    return hfcustom.lora(model, rank=2)


@pytest.mark.parametrize("trained", ["in full", "with LoRA"])
def test_a_step_costs_what_its_operations_cost_at_other_lengths_and_images(trained: str, family: Family) -> None:
    """With LoRA the tower is frozen."""
    stepper = Stepper(with_lora(family.model()) if trained == "with LoRA" else family.model())
    for at, (images, words, sizes) in enumerate(STEPS):
        if trained == "with LoRA" and at in (1, 2):
            continue
        counted = stepper.work.counted
        flop, reference = stepper.step(batch_of(family, images, words, sizes))
        assert (stepper.work.counted > counted) == (at < 2)  # the first step with images and the first without
        tolerance = TOLERANCE.get(family.name, 1e-6) if at > 1 else 1e-6
        assert flop == pytest.approx(reference, rel=tolerance), images


def test_what_is_run_again_does_not_count_and_what_is_frozen_has_no_backward(internvl: Family) -> None:
    batch = batch_of(internvl, [1, 0, 2], [3, 9, 2])
    plain = internvl.model()
    recomputed = internvl.model()
    checkpoint_activations(recomputed)
    (flop, _), (same, _) = Stepper(plain).step(batch), Stepper(recomputed).step(batch)
    assert flop == same
    frozen = internvl.model()
    hfcustom.freeze(frozen, ["vision", "connector"])
    work = Stepper(frozen)
    assert work.step(batch)[0] < flop
    assert work.work.costs[True]["patches"] < Stepper(plain).work.costs.get(True, {"patches": math.inf})["patches"] / 2


def test_packed_rows_cost_the_squares_of_their_own_lengths(internvl: Family) -> None:
    model = internvl.model()
    singles = [batch_of(internvl, [count], [words]) for count, words in ((1, 30), (0, 9), (2, 50))]
    stepper = Stepper(model)
    stepper.step(*singles)
    packed = pack_rows(singles, type(model).merge_images)
    flop, reference = stepper.step(packed)
    assert stepper.work.counted == 1 and len(packed["input_ids"]) == 1
    assert flop == pytest.approx(reference, rel=1e-6)


def test_micro_batches_add_up_and_a_teacher_counts(internvl: Family) -> None:
    student = internvl.model(loss={"cross_entropy": 1.0, "kl_distillation": 1.0})
    student.set_teacher(internvl.model(seed=1))
    stepper = Stepper(student)
    stepper.step(batch_of(internvl, [1, 2], [3, 9]))
    flop, reference = stepper.step(batch_of(internvl, [1], [30]), batch_of(internvl, [2, 2], [3, 20]))
    assert stepper.work.counted == 1
    assert flop == pytest.approx(reference, rel=0.02)


# ---- formulas -------------------------------------------------------------------------------------------------------


def cost_of(module: nn.Module, *inputs: torch.Tensor) -> list[int]:
    """Return the cost of each product of a forward and backward."""
    work = Work.__new__(Work)
    work.inside, work.active = [""], True
    count = Count(work)
    with count.running():
        module(*inputs).sum().backward()
    return [operation.flop for operation in count.operations]


class Attention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, key)


def test_formulas_by_hand() -> None:
    """Forward, then what backward makes: of a Linear both gradients, of a first convolution that of its weight alone."""
    assert cost_of(nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)) == [2 * 3 * 5 * 7] * 3
    assert cost_of(nn.Linear(5, 7), torch.randn(3, 5)) == [2 * 3 * 5 * 7] * 2
    places, weight = 2 * 4 * 4, 3 * 6 * 2 * 2
    assert cost_of(nn.Conv2d(3, 6, 2, 2), torch.randn(2, 3, 8, 8)) == [2 * places * weight] * 2
    depthwise = cost_of(nn.Conv1d(6, 6, 3, groups=6), torch.randn(2, 6, 10, requires_grad=True))
    assert depthwise == [2 * 2 * 8 * 6 * 3, 2 * 2 * 2 * 8 * 6 * 3]  # both gradients in one
    query, key = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(2, 4, 11, 8, requires_grad=True)
    forward = 2 * 2 * (2 * 4) * 9 * 11 * 8  # scores, then their mixing
    assert cost_of(Attention(), query, key) == [forward, 2 * forward]


def test_kernels_that_torch_does_not_count() -> None:
    left, stacked = torch.Size([10, 8]), torch.Size([3, 8, 5])
    grouped = FORMULAS[torch.ops.aten._grouped_mm]
    assert grouped(torch.empty(left), torch.empty(stacked), out_val=torch.empty(10, 5)) == 2 * 10 * 8 * 5


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_layers_cost_what_plain_ones_do(bits: Any, internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path)
    config = hfcustom.quantization_config(tmp_path, bits)
    held = internvl.model_class.from_pretrained(tmp_path, quantization_config=config)
    batch = batch_of(internvl, [1, 0], [3, 9])
    (flop, _), (plain, _) = (
        Stepper(hfcustom.lora(model, "language", rank=2)).step(batch) for model in (held, internvl.model())
    )
    assert flop == plain


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_with_mfu_is_bit_equal_to_one_without(internvl: Family, tmp_path: Path) -> None:
    model, counted = internvl.model(), internvl.model()
    plain = train(model, internvl, tmp_path / "plain")
    result = train(counted, internvl, tmp_path / "counted", mfu=True)
    assert all(torch.equal(value, weights(counted)[name]) for name, value in weights(model).items())
    assert not any("mfu" in line for line in plain.history)
    assert all(0 < line["mfu"] < 10 for line in result.history)  # a busy machine may be slow when it is measured
    for one, other in zip(model.modules(), counted.modules(), strict=True):  # nothing is left behind
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)


def test_mfu_is_the_share_of_the_rate_that_was_measured(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hfcustom.training.work.device_rate", lambda device, precision: 1e9)
    result = train(internvl.model(), internvl, tmp_path, mfu=True)
    assert "mfu: share of 0.001 TFLOP/s, what a matrix product in fp32 reaches here" in capsys.readouterr().out
    batch = Collator(internvl.processor)(uneven_rows())  # a step has them all
    flop, _ = Stepper(internvl.model()).step(batch)
    for line in result.history:
        assert line["mfu"] == pytest.approx(flop / 1e9 * line["tokens_per_s"] / int(batch["attention_mask"].sum()))


def test_an_attempt_without_memory_is_no_arithmetic_of_the_step(internvl: Family, tmp_path: Path) -> None:
    rows, options = uneven_rows(), {"max_steps": 4, "batch_size": 4, "mfu": True}
    costs: list[float] = []
    step = Work.step

    @contextmanager
    def noted(self: Work, batches: Any) -> Iterator[None]:
        with step(self, batches):
            yield
        costs.append(self.flop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "step", noted)
        train(internvl.model(), internvl, tmp_path / "halves", rows=rows, micro_batch_size=2, **options)
        with room_for(330) as room:
            train(internvl.model(), internvl, tmp_path / "cut", rows=rows, **options)
    halves, cut = costs[:4], costs[4:]
    assert room.failures and cut[0] == halves[0]  # counted
    assert cut[2:] == halves[2:]  # made of what each quantity costs; the second step fits whole


def test_a_language_model_that_is_not_seen_costs_the_log_its_mfu_and_the_run_nothing(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = SimpleNamespace(paths={})  # as where FSDP hides it
    monkeypatch.setattr("hfcustom.training.work.find_parts", lambda model: hidden)
    result = train(internvl.model(), internvl, tmp_path, mfu=True)
    assert result.step == 3 and not any("mfu" in line for line in result.history)


def test_a_compiled_model_is_refused_where_mfu_is_asked_for(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="mfu=True: what a compiled model does cannot be counted"):
        hfcustom.fit(model, internvl.processor, uneven_rows(), short_config(tmp_path, mfu=True))


def test_the_rate_is_that_of_the_precision() -> None:
    for precision in ("fp32", "bf16"):
        assert 1e8 < device_rate(torch.device("cpu"), precision) < 1e15
