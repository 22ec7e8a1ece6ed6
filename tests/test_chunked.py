"""Chunked evaluation: equal to full logits in value and every gradient, whatever the head is, and small in memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import Family
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import hfcustom
from hfcustom.losses import chunked, parse_losses, values

D, V, M = 8, 50, 70
MIXED = {"cross_entropy": 1.0, "focal": 0.5, "z_loss": 1e-2}


class Capped(nn.Module):
    """A head with a bias, scaled and capped logits, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(0.7 * self.linear(x) / 5)


def with_lora() -> nn.Module:
    """A frozen Linear with LoRA, as peft makes it."""
    model = get_peft_model(nn.Sequential(nn.Linear(D, V, bias=False)), LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model.base_model.model[0]


def in_8bit() -> nn.Module:
    """A head in 8 bits, as bitsandbytes makes it; its weights do not train, what lies below it does."""
    head = bitsandbytes.nn.Linear8bitLt(D, V, bias=False, has_fp16_weights=False)
    head.weight = bitsandbytes.nn.Int8Params(torch.randn(V, D) / 3, has_fp16_weights=False, requires_grad=False)
    return head.to("cpu")


def hooked() -> nn.Module:
    head = nn.Linear(D, V, bias=False)
    head.register_forward_hook(lambda module, args, out: 2 * out)
    return head


def only_bias() -> nn.Module:
    head = nn.Linear(D, V)
    head.weight.requires_grad_(False)
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(D, V, bias=False),
    "with a bias": lambda: nn.Linear(D, V),
    "frozen": lambda: nn.Linear(D, V, bias=False).requires_grad_(False),
    "only the bias trains": only_bias,
    "scaled and capped": Capped,
    "with a hook": hooked,
    "LoRA": with_lora,
    "8-bit": in_8bit,
}


def total_of(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, spec: Any = MIXED) -> torch.Tensor:
    items = parse_losses(spec)
    work = chunked.Work(targets, items, torch.tensor([item.weight / max(len(targets), 1) for item in items]))
    return chunked.token_loss_total(chunked.Head.of(head), hidden, work)[0]


def naive(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, spec: Any = MIXED) -> torch.Tensor:
    logits = head(hidden).float()
    return sum(item.weight * item.loss.function(logits, targets, **item.options).mean() for item in parse_losses(spec))


def grads_of(
    evaluate: Callable[..., torch.Tensor], head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, spec: Any
) -> list[torch.Tensor]:
    """Return the value and the gradients of hidden states and head."""
    hidden = hidden.detach().clone().requires_grad_()
    head.zero_grad()
    total = evaluate(head, hidden, targets, spec)
    (3 * total).backward()
    assert hidden.grad is not None
    return [total.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters() if p.grad is not None)]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype or mine.ndim == 0
        torch.testing.assert_close(mine, theirs, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), check_dtype=False)


@pytest.fixture(params=["one chunk", "many chunks"])
def size_of_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 3 * V)


@pytest.mark.parametrize("spec", ["cross_entropy", "focal", MIXED], ids=["cross_entropy", "focal", "mixed"])
@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_value_and_gradients_are_those_of_full_logits(make_head: Any, spec: Any, size_of_chunks: None) -> None:
    head, hidden, targets = make_head(), torch.randn(M, D), torch.randint(0, V, (M,))
    expected = grads_of(naive, head, hidden, targets, spec)
    assert len(expected) == 2 + sum(p.requires_grad for p in head.parameters())
    close(grads_of(total_of, head, hidden, targets, spec), expected)


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_which_heads_are_multiplied_by_directly(make_head: Any, request: pytest.FixtureRequest) -> None:
    plain = request.node.callspec.id in ("plain", "with a bias", "frozen", "only the bias trains")
    assert (chunked.Head.of(make_head()).linear is not None) == plain


@pytest.mark.parametrize("make_head", [HEADS["plain"], HEADS["with a bias"], Capped], ids=["plain", "bias", "capped"])
def test_bfloat16_weights_and_autocast_are_near_full_logits(make_head: Any, size_of_chunks: None) -> None:
    head, hidden, targets = make_head(), torch.randn(M, D), torch.randint(0, V, (M,))
    low = copy.deepcopy(head).bfloat16()
    expected = grads_of(naive, low, hidden.bfloat16(), targets, MIXED)
    close(grads_of(total_of, low, hidden.bfloat16(), targets, MIXED), expected, rtol=3e-2, atol=3e-3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = grads_of(naive, head, hidden, targets, MIXED)
        found = grads_of(total_of, head, hidden, targets, MIXED)
    close(found, expected, rtol=3e-2, atol=3e-3)
    assert found[2].dtype == torch.float32


def test_a_head_gradient_of_many_16_bit_chunks_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 chunks of 16 equal tokens: in bfloat16, a sum stops growing once a summand is below half its last digit."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    head = nn.Linear(D, V, bias=False).bfloat16()
    hidden, targets = torch.ones(8192, D).bfloat16(), torch.zeros(8192, dtype=torch.long)
    found = grads_of(total_of, head, hidden, targets, "cross_entropy")[2].float()
    exact = grads_of(naive, copy.deepcopy(head).float(), hidden.float(), targets, "cross_entropy")[2]
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("make_head", [HEADS["with a bias"], HEADS["with a hook"]], ids=["plain", "any"])
def test_gradcheck_in_float64(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck goes through the same graph more than once, which frees the gradients of the forward pass."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("test_chunked.D", 2)
    monkeypatch.setattr("test_chunked.V", 5)
    head, targets = make_head().double(), torch.randint(0, V, (18,))
    hidden = torch.randn(18, D, dtype=torch.float64, requires_grad=True)

    def evaluate(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return total_of(head, hidden, targets)

    assert torch.autograd.gradcheck(evaluate, (hidden, *head.parameters()))


def test_a_second_backward_pass_gives_the_same_again() -> None:
    head, targets = nn.Linear(D, V), torch.randint(0, V, (M,))
    hidden = torch.randn(M, D, requires_grad=True)
    total = total_of(head, hidden, targets)
    first = torch.autograd.grad(total, [hidden, *head.parameters()], retain_graph=True)
    second = torch.autograd.grad(total, [hidden, *head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tied_head_collects_the_gradient_of_both_its_uses() -> None:
    embedding = nn.Embedding(V, D)
    head = nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    ids, targets = torch.randint(0, V, (M,)), torch.randint(0, V, (M,))
    found = []
    for evaluate in (naive, total_of):
        head.zero_grad()
        evaluate(head, embedding(ids), targets).backward()
        found.append(head.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come() -> None:
    with torch.no_grad():
        total = total_of(nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,)))
    assert not total.requires_grad
    frozen = nn.Linear(D, V).requires_grad_(False)
    assert not total_of(frozen, torch.randn(M, D), torch.randint(0, V, (M,))).requires_grad


@pytest.mark.parametrize("make_head", [HEADS["plain"], HEADS["LoRA"]], ids=["plain", "LoRA"])
def test_no_more_logits_live_than_a_chunk(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * V)
    widest: list[int] = []
    tiles: list[weakref.ref[torch.Tensor]] = []
    original = values.token_values

    def look(tile: torch.Tensor, *args: Any) -> Any:
        widest.append(len(tile))
        tiles.append(weakref.ref(tile))
        return original(tile, *args)

    monkeypatch.setattr(chunked, "token_values", look)
    total = total_of(make_head(), torch.randn(M, D, requires_grad=True), torch.randint(0, V, (M,)))
    assert max(widest) == 20
    assert not any(tile() is not None for tile in tiles), "a chunk's logits are kept for the backward pass"
    total.backward()


@pytest.mark.parametrize("spec", ["cross_entropy", "focal"])
def test_a_loss_scale_comes_before_float16_rounds(spec: str) -> None:
    """A share of 1 / 65,536 of the step: gradients that float16 cannot hold until they are scaled."""
    head, hidden = nn.Linear(D, V, bias=False).half(), torch.randn(M, D).half().requires_grad_()
    targets, items = torch.randint(0, V, (M,)), parse_losses(spec)
    work = chunked.Work(targets, items, torch.tensor([1 / 65536]))
    (65536 * chunked.token_loss_total(chunked.Head.of(head), hidden, work)[0]).backward()
    exact = copy.deepcopy(head).float()
    exact.zero_grad()
    items[0].loss.function(exact(hidden.detach().float()), targets).sum().backward()
    assert head.weight.grad is not None and exact.weight.grad is not None
    torch.testing.assert_close(head.weight.grad.float(), exact.weight.grad, rtol=2e-2, atol=5e-3)


def test_nothing_supervised_keeps_the_graph() -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    total = total_of(nn.Linear(D, V), hidden, torch.empty(0, dtype=torch.long))
    assert float(total.detach()) == 0.0 and total.requires_grad


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_a_few_logits_are_columns_of_all(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * V)
    head, ids = make_head(), torch.tensor([3, 40, 7])
    hidden, scale = torch.randn(M, D, requires_grad=True), torch.randn(M, 3)
    found = chunked.logits_of(chunked.Head.of(head), hidden, ids)
    gradients = torch.autograd.grad((found * scale).sum(), hidden)
    expected = head(hidden)[:, ids]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * scale).sum(), hidden))
    assert chunked.logits_of(chunked.Head.of(head), hidden[:0], ids).shape == (0, 3)


def test_a_few_logits_of_a_head_that_is_called_cost_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * V)
    head, widest, saved = Capped(), list[int](), list[int]()
    head.register_forward_hook(lambda module, args, out: widest.append(len(out)))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = chunked.logits_of(chunked.Head.of(head), torch.randn(M, D, requires_grad=True), torch.tensor([1, 2]))
    assert max(widest) == 20
    assert max(saved, default=0) < 20 * V, "a chunk's logits were kept for the backward pass"
    found.sum().backward()
    assert sum(widest) == 2 * M, "each chunk is computed once more"


# ---- in a model -----------------------------------------------------------------------------------------------------


def test_a_class_that_caps_its_logits_is_heard(internvl: Family) -> None:
    class CappedModel(internvl.model_class):  # type: ignore[misc, name-defined]
        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 0.1 * torch.tanh(super().compute_logits(hidden_states))

    batch, model = internvl.batch([1, 0]), internvl.model(CappedModel).train()
    assert model.loss_head().linear is None
    targets = batch["labels"][:, 1:].flatten()
    context = model.loss_context(batch, batch["labels"])
    logits = model.compute_logits(context.hidden_states)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(model(**batch).loss, F.cross_entropy(logits, targets), rtol=1e-5, atol=1e-6)


def test_lora_on_the_head_is_heard_and_trained(internvl: Family) -> None:
    batch = internvl.batch([1, 0])
    model = hfcustom.lora(internvl.model(), "head", rank=2).train()
    assert model.get_base_model().loss_head().linear is None
    model(**batch).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all("lm_head.lora_B" in name for name in trained)


# ---- what a wrong loss is told --------------------------------------------------------------------------------------


def test_a_mean_in_disguise_is_refused() -> None:
    @hfcustom.token_loss
    def disguised(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets).expand(len(targets))

    with pytest.raises(
        ValueError, match=r"'disguised' is not one value a token: 4 tokens together give \[.*one by one"
    ):
        total_of(nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,)), "disguised")


def test_a_normalisation_over_the_tokens_is_refused() -> None:
    @hfcustom.token_loss
    def normalised(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nll = F.cross_entropy(logits, targets, reduction="none")
        return nll / nll.detach().max()

    with pytest.raises(ValueError, match="'normalised' is not one value a token"):
        total_of(nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,)), "normalised")


def test_each_setting_of_its_options_is_checked() -> None:
    @hfcustom.token_loss
    def optional(logits: torch.Tensor, targets: torch.Tensor, mean: bool = False) -> torch.Tensor:
        nll = F.cross_entropy(logits, targets, reduction="none")
        return nll.mean().expand(len(nll)) if mean else nll

    head, hidden, targets = nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,))
    total_of(head, hidden, targets, "optional")
    with pytest.raises(ValueError, match="'optional' is not one value a token"):
        total_of(head, hidden, targets, {"optional": {"mean": True}})


def test_a_loss_that_changes_the_logits_is_refused() -> None:
    @hfcustom.token_loss
    def in_place(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits /= 2
        return F.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(ValueError, match="'in_place' changes the logits in place"):
        total_of(
            nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,)), {"in_place": 1.0, "cross_entropy": 1.0}
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_with_the_cause(bad: float) -> None:
    @hfcustom.token_loss
    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.logsumexp(-1) + bad

    hidden, targets = torch.randn(M, D), torch.randint(0, V, (M,))
    with pytest.raises(FloatingPointError, match=rf"'broken' returned {bad} for logits that are finite. Clamp"):
        total_of(nn.Linear(D, V), hidden, targets, "broken")
    with pytest.raises(FloatingPointError, match="logits that are not finite. The model has diverged"):
        total_of(nn.Linear(D, V), hidden * bad, targets, "broken")


def test_a_loss_that_draws_random_numbers_is_let_through_and_moves_no_generator_by_being_checked() -> None:
    @hfcustom.token_loss
    def noisy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.logsumexp(-1) * torch.rand(len(targets))

    head, hidden, targets = nn.Linear(D, V), torch.randn(M, D), torch.randint(0, V, (M,))
    torch.manual_seed(0)
    first = total_of(head, hidden, targets, "noisy")
    torch.manual_seed(0)
    assert torch.equal(first, total_of(head, hidden, targets, "noisy"))
