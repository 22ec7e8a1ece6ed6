"""Time the code that can evaluate cross entropy through a head: hfcustom's chunks and each kernel that is present.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --tokens 4096 --hidden-size 896 --device cuda --dtype bfloat16

The head alone, forward and backward, in interleaved rounds; prints a table. hfcustom/losses/kernels.py chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hfcustom.options import parse


@dataclass(kw_only=True)
class HeadConfig:
    """Sizes of the head; each annotation is the flag's help."""

    tokens: Annotated[int, "supervised tokens of a step"] = 281
    hidden_size: Annotated[int, "width of a token"] = 256
    vocabulary: Annotated[int, "ids"] = 151_674
    rounds: Annotated[int, "measured steps of each"] = 4
    threads: Annotated[int, "processor threads"] = 1
    dtype: Annotated[Literal["float32", "bfloat16"], "of weights and hidden states"] = "float32"
    device: Annotated[Literal["cpu", "cuda"], "where"] = "cpu"

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        names = ("tokens", "hidden_size", "vocabulary", "rounds", "threads")
        return [f"{name}={getattr(self, name)} must be positive" for name in names if getattr(self, name) < 1]


if __name__ == "__main__":
    CONFIG = parse(HeadConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import time

import torch
from torch import nn

from hfcustom.console import out, show_table
from hfcustom.losses import parse_losses
from hfcustom.losses.chunked import Head, Work, token_loss_total
from hfcustom.losses.kernels import KERNELS, fused_cross_entropy, hindrance


def step(kernel: str, head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Run forward and backward; return the seconds and the loss."""
    items = parse_losses({"cross_entropy": {"kernel": kernel}})
    work = Work(targets, items, torch.tensor([1 / len(targets)], device=hidden.device))
    head.zero_grad()
    hidden.grad = None
    began = time.perf_counter() if hidden.is_cuda else time.process_time()
    found = fused_cross_entropy(Head.of(head), hidden, work)
    total = token_loss_total(Head.of(head), hidden, work)[0] if found is None else found[0]
    total.backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if hidden.is_cuda else time.process_time()) - began, float(total.detach())


def main(config: HeadConfig) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    head = nn.Linear(config.hidden_size, config.vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(config.tokens, config.hidden_size, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, config.vocabulary, (config.tokens,), device=device)
    reasons = {name: hindrance(name, device, head, dtype) for name in sorted(KERNELS)}
    names = ["chunked", *(name for name, reason in reasons.items() if not reason)]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(config.rounds + 1):  # the first one warms up
        for name in names:
            taken[name].append(step(name, head, hidden, targets))
    rows = [(name, min(seconds for seconds, _ in taken[name][1:]), f"{taken[name][0][1]:.6f}") for name in names]
    show_table(("kernel", "seconds", "loss"), rows)
    for name, reason in reasons.items():
        if reason:
            out.print(f"{name} {reason}")


if __name__ == "__main__":
    main(CONFIG)
