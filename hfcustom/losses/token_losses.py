"""Token losses on logits and targets alone: (logits (M, V) float32, targets (M,), **options) -> (M,).

Each docstring gives the formula and its source, and an example that the tests run. z are the logits, p their softmax, y the
target.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    >>> targets = torch.tensor([0, 2])
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hfcustom.losses.contract import token_loss


@token_loss
def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, kernel: str = "auto") -> torch.Tensor:
    """-log p_y = logsumexp(z) - z_y. What the stock classes minimise; `kernel` as in hfcustom/losses/kernels.py.

    >>> cross_entropy(logits, targets)
    tensor([0.1698, 1.0986])
    """
    return F.cross_entropy(logits, targets, reduction="none")


@token_loss
def focal(logits: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """-(1 - p_y)^gamma log p_y: easy tokens weigh less. Lin et al. 2017, https://arxiv.org/abs/1708.02002, eq. 4.

    >>> focal(logits, targets)  # (1 - exp(-0.1698))^2 * 0.1698, (2/3)^2 * 1.0986
    tensor([0.0041, 0.4883])
    """
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (-torch.expm1(-nll)) ** gamma * nll  # 1 - p without cancellation


@token_loss
def label_smoothing(logits: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.1) -> torch.Tensor:
    """(1 - eps) * -log p_y + eps * mean over V of -log p. Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

    >>> label_smoothing(logits, targets)  # 0.9 * 0.1698 + 0.1 * (2.1698 - 1/3), 1.0986
    tensor([0.3365, 1.0986])
    """
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)


@token_loss
def z_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logsumexp(z)^2, which keeps logits from drifting; use a weight near 1e-4. PaLM, https://arxiv.org/abs/2204.02311.

    >>> z_loss(logits, targets)  # 2.1698^2, (log 3 + 0.5)^2
    tensor([4.7082, 2.5556])
    """
    return torch.logsumexp(logits, -1).square()
