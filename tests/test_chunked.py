"""Chunked evaluation: equal to one product, small in memory, whatever the head is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hfcustom.losses import chunked, parse_losses

D, V, M = 8, 50, 70


class Biased(nn.Module):
    """A head with a bias and capped logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(self.linear(x) / 5)


def frozen() -> nn.Module:
    return nn.Linear(D, V, bias=False).requires_grad_(False)


HEADS: dict[str, Any] = {"plain": lambda: nn.Linear(D, V, bias=False), "biased and capped": Biased, "frozen": frozen}


def total_of(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    items = parse_losses({"cross_entropy": 1.0, "z_loss": 1e-4})
    work = chunked.Work(targets, items, torch.tensor([1.0, 1e-4]))
    return chunked.token_loss_total(chunked.Head.of(head), hidden, work)[0]


@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_chunks_equal_one_product(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    hidden = torch.randn(M, D, requires_grad=True)
    targets = torch.randint(0, V, (M,))
    whole = total_of(head, hidden, targets)
    whole.backward()
    expected = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    cut = total_of(head, hidden, targets)
    cut.backward()
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-5)
    for got, want in zip([hidden.grad, *(p.grad for p in head.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_no_more_logits_live_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 20 * V)
    widest: list[int] = []
    saved: list[int] = []
    head = nn.Linear(D, V, bias=False)
    head.register_forward_hook(lambda module, args, out: widest.append(len(out)))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = total_of(head, torch.randn(M, D, requires_grad=True), torch.randint(0, V, (M,)))
    assert max(widest) == 20
    assert max(saved) < 20 * V, "a chunk's logits were kept for the backward pass"
    total.backward()


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
    head, widest, saved = Biased(), list[int](), list[int]()
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
