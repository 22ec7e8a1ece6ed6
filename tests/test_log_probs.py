"""Log-probabilities without the whole logits: values and gradients are those of full logits, whatever the head is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hfcustom.losses import chunked, parse_losses

D, V, M = 8, 50, 70


class Capped(nn.Module):
    """A head with a bias and soft-capped logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.linear(x) / 3)


def adapted() -> nn.Module:
    holder = nn.ModuleDict({"head": nn.Linear(D, V)})
    model: Any = get_peft_model(holder, LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))  # type: ignore[arg-type]
    return model.base_model.model["head"]


HEADS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(D, V, bias=False),
    "biased": lambda: nn.Linear(D, V),
    "frozen": lambda: nn.Linear(D, V).requires_grad_(False),
    "frozen but for the bias": lambda: _with_frozen_weight(nn.Linear(D, V)),
    "capped": Capped,
    "LoRA": adapted,
}


def _with_frozen_weight(head: nn.Linear) -> nn.Linear:
    head.weight.requires_grad_(False)
    return head


def naive(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    return logits.to(chunked.accumulation_dtype(logits)).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ours(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return chunked.token_log_probs(chunked.Head.of(head), hidden, targets)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, targets, and what a loss makes of each log-probability."""
    return torch.randn(M, D, dtype=dtype, requires_grad=True), torch.randint(0, V, (M,)), torch.randn(M)


def values_and_gradients(function: Any, head: nn.Module, hidden: torch.Tensor, *rest: torch.Tensor) -> list[Any]:
    targets, factors = rest
    hidden.grad = None
    head.zero_grad()
    values = function(head, hidden, targets)
    (values * factors.to(values)).sum().backward()
    return [values.detach(), hidden.grad, *(p.grad for p in head.parameters())]


@pytest.fixture(params=[1, 10**9], ids=["many chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_those_of_full_logits(make_head: Any, chunk: None) -> None:
    head, (hidden, *rest) = make_head(), inputs()
    expected = values_and_gradients(naive, head, hidden, *rest)
    found = values_and_gradients(ours, head, hidden, *rest)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_gradients_are_right_in_float64(make_head: Any, chunk: None) -> None:
    head = make_head().double()
    hidden, targets, _ = inputs(torch.float64)
    few = slice(0, 20)
    trained = [p for p in head.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda x, *_: ours(head, x, targets[few]), (hidden.detach()[few].requires_grad_(), *trained)
    )


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_sixteen_bits_are_as_exact_as_with_full_logits(make_head: Any, how: str, chunk: None) -> None:
    """Both round as the head does; what they are off from float64 is alike."""
    head, (hidden, *rest) = make_head(), inputs()
    exact = values_and_gradients(naive, head, hidden, *rest)
    if how == "bfloat16":
        head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    results = []
    for function in (naive, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            results.append(values_and_gradients(function, head, hidden, *rest))
    for full, got, want in zip(*results, exact, strict=True):
        if want is None:
            continue
        assert got.dtype == full.dtype
        errors = [float((found.float() - want).norm() / want.norm()) for found in (full, got)]
        assert errors[1] < 2 * errors[0] + 1e-4, errors


def test_a_sure_model_learns_no_rounding_in_sixteen_bits() -> None:
    """1 - p is small; formed from the weights' mean after rounding it would be noise."""
    head = nn.Linear(64, V, bias=False).bfloat16().requires_grad_(False)
    targets = torch.randint(0, V, (M,))
    hidden = (head.weight[targets] * 40 + torch.randn(M, 64) * 0.1).bfloat16().requires_grad_()
    exact = copy.deepcopy(head).double()
    want = values_and_gradients(naive, exact, hidden.detach().double().requires_grad_(), targets, torch.ones(M))
    assert 0.99 < float(want[0].exp().mean()) < 1
    errors = []
    for function in (naive, ours):
        found = values_and_gradients(function, head, hidden, targets, torch.ones(M))
        errors.append(float((found[1].double() - want[1]).norm() / want[1].norm()))
    assert errors[1] < 1.5 * errors[0] < 0.1


def test_half_precision_does_not_overflow_in_a_flat_distribution() -> None:
    """The sum of exp(z - max) over 128,000 logits that are nearly equal passes 65,504."""
    head = nn.Linear(2, 128_000, bias=False).half()
    head.weight.data.mul_(1e-3)
    hidden = torch.randn(4, 2).half().requires_grad_()
    found = values_and_gradients(ours, head, hidden, torch.tensor([0, 1, 2, 3]), torch.ones(4))
    assert all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("name", ["plain", "LoRA"])
def test_a_graph_can_be_used_twice(name: str) -> None:
    head, (hidden, targets, factors) = HEADS[name](), inputs()
    values = ours(head, hidden, targets)
    grads = []
    for keep in (True, False):
        hidden.grad = None
        head.zero_grad()
        (values * factors).sum().backward(retain_graph=keep)
        grads.append([hidden.grad, *(p.grad for p in head.parameters())])
    for first, second in zip(*grads, strict=True):
        assert first is None or torch.equal(first, second)


def test_a_tied_head_gets_the_gradient_of_both_uses() -> None:
    weight = nn.Parameter(torch.randn(V, D))
    head = nn.Linear(D, V, bias=False)
    head.weight = weight
    ids, targets = torch.randint(0, V, (M,)), torch.randint(0, V, (M,))
    grads = []
    for function in (naive, ours):
        weight.grad = None
        function(head, torch.tanh(weight[ids]), targets).sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remember how many elements the largest tensor had that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_no_more_logits_live_than_a_chunk(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * V)
    head, (hidden, targets, _) = make_head(), inputs()
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
        values = ours(head, hidden, targets)
    assert max(saved) < 20 * V, "a chunk's logits were kept for the backward pass"
    with largest:
        values.sum().backward()
    assert largest.elements == 20 * V


def test_nothing_supervised_keeps_the_graph() -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    values = ours(nn.Linear(D, V), hidden, torch.empty(0, dtype=torch.long))
    assert values.shape == (0,) and values.requires_grad


def test_without_gradients_none_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's weight asks for one also where grad mode is off."""
    products: list[Any] = []
    monkeypatch.setattr(chunked._Gradients, "add", lambda *args: products.append(args))
    head, (hidden, targets, _) = nn.Linear(D, V), inputs()
    with torch.no_grad():
        ours(head, hidden, targets)
        work = chunked.Work(targets, parse_losses("cross_entropy"), torch.tensor([1.0]))
        total, sums = chunked.token_loss_total(chunked.Head.of(head), hidden, work)
    assert not products
    torch.testing.assert_close(float(total), float(-naive(head, hidden, targets).sum()), rtol=1e-5, atol=1e-5)
    assert float(sums[0]) == float(total)
