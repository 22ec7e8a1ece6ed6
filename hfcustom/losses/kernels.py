"""Which code evaluates plain cross entropy through a plain Linear head: ours, torch's, Liger's or Cut Cross-Entropy's.

They agree to float32 rounding (tests/test_kernels.py); the choice is printed once. "auto" is ours on a CPU, where it was
measured faster than torch's (benchmarks/README.md), and on a CUDA device Liger's, then Cut Cross-Entropy's where they are
installed, else ours. A config names another one: {"cross_entropy": {"kernel": "torch"}}.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from hfcustom.losses.chunked import Head, Work, accumulation_dtype, product_dtype
from hfcustom.naming import unknown

logger = logging.get_logger("hfcustom")

TORCH_CHUNK = 128  # rows; torch's own choice was measured 8 to 35 times slower
PACKAGES = {"cce": "cut_cross_entropy", "liger": "liger_kernel"}
PIP_NAMES = {"cce": "cut-cross-entropy", "liger": "liger-kernel"}

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def fused_cross_entropy(head: Head, hidden: torch.Tensor, work: Work) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return total and sums as `token_loss_total` does, or None where this is not plain cross entropy, or is ours."""
    asked = next(
        (item.options.get("kernel", "auto") for item in work.losses if item.loss.name == "cross_entropy"), None
    )
    if asked is None or not len(work.targets):
        return None
    if len(work.losses) > 1:
        if asked not in ("auto", "chunked"):
            others = ", ".join(item.loss.name for item in work.losses if item.loss.name != "cross_entropy")
            raise ValueError(f"kernel={asked!r} evaluates cross entropy alone, not beside {others}; leave it out.")
        return None
    dtype = product_dtype(hidden)
    name = choose_kernel(asked, hidden.device, head.linear, dtype)
    if name == "chunked":
        return None
    assert head.linear is not None
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.linear.bias is None else head.linear.bias.to(dtype)
        sum_ = KERNELS[name](hidden.to(dtype), head.linear.weight.to(dtype), bias, work.targets)
        sum_ = sum_.to(accumulation_dtype(hidden))
    return sum_ * work.scales[0], sum_.detach()[None]


def choose_kernel(asked: str, device: torch.device, linear: nn.Linear | None, dtype: torch.dtype) -> str:
    """Return the kernel to use for a head, `linear` where it is a plain one; one that is not ours is printed once.

    Raises ValueError for an unknown name, one that is not installed, and one that cannot do what this head or device needs.
    """
    if asked not in ("auto", "chunked", *KERNELS):
        raise ValueError(unknown("kernel of cross_entropy:", asked, ["auto", "chunked", *KERNELS]))
    if asked == "auto":
        present = [name for name in ("liger", "cce") if not hindrance(name, device, linear, dtype)]
        name = present[0] if present and device.type == "cuda" else "chunked"
    elif reason := "" if asked == "chunked" else hindrance(asked, device, linear, dtype):
        raise ValueError(f"kernel={asked!r} {reason}. Choose 'auto' or 'chunked', which handles it.")
    else:
        name = asked
    if name != "chunked":
        logger.warning_once(f"cross_entropy is evaluated by {DESCRIPTIONS[name]}.")
    return name


def hindrance(name: str, device: torch.device, linear: nn.Linear | None, dtype: torch.dtype) -> str:
    """Return why a kernel cannot be used, or nothing."""
    if name in PACKAGES and not is_installed(name):
        return f"needs a package: pip install {PIP_NAMES[name]}"
    interpreted = name == "liger" and os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, to compare with
    if name in PACKAGES and device.type != "cuda" and not interpreted:
        return f"runs on a CUDA device, not on {device.type}"
    if name == "torch" and "linear_cross_entropy" not in vars(F):
        return f"needs torch 2.13, this is {torch.__version__}"
    if linear is None:
        return "needs a head that is a plain Linear; this one is adapted, quantised, capped, scaled or hooked"
    if name == "cce" and linear.bias is not None:
        return "knows no bias, which this head has"
    if name == "cce" and dtype not in (torch.bfloat16, torch.float16):
        return f"trains in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    return ""


def is_installed(name: str) -> bool:
    """Whether a kernel's package can be imported."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def _torch(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
    call: Any = F.linear_cross_entropy
    return call(hidden, weight, targets, linear_bias=bias, reduction="sum", options=options)


def _liger(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")


def _cce(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    assert bias is None
    return linear_cross_entropy(
        hidden, weight, targets, reduction="sum", filter_eps=None
    )  # it would drop small gradients


KERNELS: dict[str, Kernel] = {"cce": _cce, "liger": _liger, "torch": _torch}
DESCRIPTIONS = {
    "cce": "Cut Cross-Entropy's kernel",
    "chunked": "hfcustom's chunked product (hfcustom/losses/chunked.py)",
    "liger": "Liger's fused kernel",
    "torch": "torch.nn.functional.linear_cross_entropy",
}
