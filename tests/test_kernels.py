"""Which code evaluates cross entropy: all that are present agree, and one that cannot is refused with the reason.

With liger-kernel and triton installed, TRITON_INTERPRET=1 runs Liger's kernel here, on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from torch import nn

from hfcustom.losses import chunked, kernels, parse_losses

D, V, M = 16, 60, 200


def grads_of(kernel: str, head: nn.Linear) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator)
    work = chunked.Work(targets, parse_losses({"cross_entropy": {"kernel": kernel}}), torch.tensor([0.5 / M]))
    found = kernels.fused_cross_entropy(chunked.Head.of(head), hidden, work)
    total, sums = chunked.token_loss_total(chunked.Head.of(head), hidden, work) if found is None else found
    head.zero_grad()
    total.backward()
    assert hidden.grad is not None
    return [total.detach(), sums, hidden.grad, *(p.grad.clone() for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("kernel", sorted(kernels.KERNELS))
def test_kernels_agree_with_ours(kernel: str, trains: bool, bias: bool) -> None:
    head = nn.Linear(D, V, bias=bias).requires_grad_(trains)
    reason = kernels.hindrance(kernel, torch.device("cpu"), head, torch.float32)
    if kernel in kernels.PACKAGES and reason:
        pytest.skip(f"{kernel} {reason}")
    for mine, theirs in zip(grads_of("chunked", head), grads_of(kernel, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_ours_is_chosen_and_nothing_is_said(capsys: Any) -> None:
    assert kernels.choose_kernel("auto", torch.device("cpu"), nn.Linear(D, V), torch.float32) == "chunked"
    assert capsys.readouterr() == ("", "")


def test_on_a_gpu_what_is_installed_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for installed, expected in (((), "chunked"), (("cce",), "cce"), (("cce", "liger"), "liger")):
        monkeypatch.setattr(kernels, "is_installed", lambda name, present=installed: name in present)
        assert kernels.choose_kernel("auto", gpu, nn.Linear(D, V, bias=False), torch.bfloat16) == expected
        assert kernels.choose_kernel("auto", gpu, None, torch.bfloat16) == "chunked"


REFUSALS = {
    "unknown": ("torhc", "cpu", "plain", r"Unknown kernel of cross_entropy: 'torhc'. Did you mean 'torch'"),
    "not installed": ("liger", "cuda", "plain", "pip install liger-kernel"),
    "no GPU": ("cce", "cpu", "plain", "runs on a CUDA device, not on cpu"),
    "head": ("torch", "cpu", "adapted", "needs a head that is a plain Linear"),
    "bias": ("cce", "cuda", "with a bias", "knows no bias"),
    "float32": ("cce", "cuda", "plain", "trains in 16 bits, not in float32"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_kernel_that_cannot_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, device, head, message = REFUSALS[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "is_installed", lambda name: name == "cce")
    with pytest.raises(ValueError, match=message):
        linear = None if head == "adapted" else nn.Linear(D, V, bias=head == "with a bias")
        kernels.choose_kernel(asked, torch.device(device), linear, torch.float32)


@pytest.mark.parametrize("kernel", ["torch", "bogus"])
def test_a_kernel_beside_another_token_loss_is_refused(internvl: Family, kernel: str) -> None:
    model = internvl.model(loss={"cross_entropy": {"kernel": kernel}, "z_loss": 1e-4})
    with pytest.raises(ValueError, match=f"kernel='{kernel}' evaluates cross entropy alone, not beside z_loss"):
        model(**internvl.batch([1]))


def test_a_config_chooses_it(internvl: Family) -> None:
    batch = internvl.batch([1, 0])
    ours, theirs = (
        internvl.model(loss={"cross_entropy": {"kernel": kernel}}).train()(**batch).loss
        for kernel in ("auto", "torch")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
