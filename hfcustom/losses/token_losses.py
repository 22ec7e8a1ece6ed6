"""Token losses on logits and targets: (logits (M, V) float32, targets (M,), **options) -> (M,).

Each docstring gives the formula and its source, and an example that the tests run. z are the logits, p their softmax,
y the target.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    >>> targets = torch.tensor([0, 2])

So logsumexp(z) is 2.1698 and log 3 + 0.5, and p is [0.8438, 0.1142, 0.0420] and a third each.
Letters: M supervised tokens, V vocabulary, L longest answer.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hfcustom.losses.checks import check_number
from hfcustom.losses.contract import IGNORE, token_loss


@token_loss
def confidence_penalty(logits: torch.Tensor, targets: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """-log p_y - beta H(p), H(p) = -sum_c p_c log p_c: certainty costs. A positive beta raises the entropy.

    Pereyra et al. 2017, https://arxiv.org/abs/1701.06548, section 3, without annealing and threshold.

    >>> confidence_penalty(logits, targets)  # 0.1698 - 0.1 * 0.5243, 1.0986 - 0.1 * log 3
    tensor([0.1174, 0.9888])
    """
    check_number("confidence_penalty", "beta", beta)
    log_probs = logits.log_softmax(-1)  # (M, V)
    return F.nll_loss(log_probs, targets, reduction="none") - beta * _entropy(log_probs)


@token_loss
def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, kernel: str = "auto") -> torch.Tensor:
    """-log p_y = logsumexp(z) - z_y. What the stock classes minimise; `kernel` as in hfcustom/losses/kernels.py.

    >>> cross_entropy(logits, targets)  # 2.1698 - 2, log 3
    tensor([0.1698, 1.0986])
    """
    return F.cross_entropy(logits, targets, reduction="none")


@token_loss(surrogate=True)
def dft(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """sg(p_y) * -log p_y, where no gradient flows through sg(.): tokens that the model finds unlikely hardly move it.

    Dynamic fine-tuning, Wu et al. 2025, https://arxiv.org/abs/2508.05629, its token-level objective. The gradient is
    p_y times that of cross entropy.

    >>> dft(logits, targets)  # 0.8438 * 0.1698, 1/3 * 1.0986
    tensor([0.1433, 0.3662])
    """
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (-nll.detach()).exp() * nll


@token_loss
def entropy_regularisation(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """H(p) = -sum_c p_c log p_c: a positive weight lowers the entropy, a negative one raises it.

    Grandvalet & Bengio 2004, https://papers.nips.cc/paper/2740-semi-supervised-learning-by-entropy-minimization; for
    use beside another loss, as targets have no part in it.

    >>> entropy_regularisation(logits, targets)  # 2.1698 - (0.8438 * 2 - 0.0420), log 3
    tensor([0.5243, 1.0986])
    """
    return _entropy(logits.log_softmax(-1))


@token_loss
def focal(logits: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """-(1 - p_y)^gamma log p_y: easy tokens weigh less. Lin et al. 2017, https://arxiv.org/abs/1708.02002, eq. 4.

    >>> focal(logits, targets)  # (1 - exp(-0.1698))^2 * 0.1698, (2/3)^2 * 1.0986
    tensor([0.0041, 0.4883])
    """
    check_number("focal", "gamma", gamma, low=0)
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (-torch.expm1(-nll)) ** gamma * nll  # 1 - p without cancellation


@token_loss
def label_smoothing(logits: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.1) -> torch.Tensor:
    """(1 - eps) * -log p_y + eps * mean over V of -log p. Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

    >>> label_smoothing(logits, targets)  # 0.9 * 0.1698 + 0.1 * (2.1698 - 1/3), 1.0986
    tensor([0.3365, 1.0986])
    """
    check_number("label_smoothing", "epsilon", epsilon, 0, 1)
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)


@token_loss
def poly1(logits: torch.Tensor, targets: torch.Tensor, epsilon: float = 1.0) -> torch.Tensor:
    """-log p_y + eps (1 - p_y), eps >= -1. Poly-1 of Leng et al. 2022, https://arxiv.org/abs/2204.12511.

    Cross entropy is the sum of (1 - p_y)^j / j; eps is what the first of these terms weighs more or less.

    >>> poly1(logits, targets)  # 0.1698 + 1 - 0.8438, 1.0986 + 2/3
    tensor([0.3261, 1.7653])
    """
    check_number("poly1", "epsilon", epsilon, low=-1)
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll - epsilon * torch.expm1(-nll)  # 1 - p without cancellation


@token_loss(inputs=("previous_tokens",))
def unlikelihood(
    logits: torch.Tensor, targets: torch.Tensor, previous_tokens: torch.Tensor, alpha: float = 1.0
) -> torch.Tensor:
    """-log p_y - alpha sum_{c in C} log(1 - p_c): what was said before becomes less likely.

    Welleck et al. 2019, https://arxiv.org/abs/1908.04319, the token-level objective: C are the different supervised
    tokens that come before y in its row, but not y itself. `previous_tokens` (M, L) holds them, -100 where there are fewer.

    >>> previous_tokens = torch.tensor([[1, 1, 0], [2, 1, -100]])  # C is {1} for y = 0, {1} for y = 2
    >>> unlikelihood(logits, targets, previous_tokens)  # 0.1698 - log(1 - 0.1142), 1.0986 - log(2/3)
    tensor([0.2911, 1.5041])
    """
    check_number("unlikelihood", "alpha", alpha, low=0)
    ids = previous_tokens.sort(-1).values  # (M, L)
    counts = (ids != IGNORE) & (ids != targets[:, None])  # (M, L)
    counts[:, 1:] &= ids[:, 1:] != ids[:, :-1]  # each token once
    values = _log_one_minus_p(logits, ids.clamp(min=0)).masked_fill(~counts, 0.0)  # (M, L)
    return F.cross_entropy(logits, targets, reduction="none") - alpha * values.sum(-1)


@token_loss(inputs=("token_weights",), count="token_weights", columns=("token_weights",))
def weighted_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """-w log p_y, divided by the sum of w over the step: a mean in which a token weighs w.

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html with weights, reduction="mean",
    but a weight a token instead of a class.

    >>> token_weights = torch.tensor([1.0, 0.5])
    >>> weighted_cross_entropy(logits, targets, token_weights)  # 1 * 0.1698, 0.5 * 1.0986
    tensor([0.1698, 0.5493])
    """
    return F.cross_entropy(logits, targets, reduction="none") * token_weights


@token_loss
def z_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logsumexp(z)^2, which keeps logits from drifting; weight it near 1e-4. PaLM, https://arxiv.org/abs/2204.02311.

    >>> z_loss(logits, targets)  # 2.1698^2, (log 3 + 0.5)^2
    tensor([4.7082, 2.5556])
    """
    return torch.logsumexp(logits, -1).square()


# ---- what they share ------------------------------------------------------------------------------------------------


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Return -sum p log p, (M, V) -> (M,); 0 log 0 = 0, also where log p is -inf."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)


def _log_one_minus_p(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return log(1 - p) of L tokens of the vocabulary each, (M, V), (M, L) -> (M, L).

    Only the likeliest token can come near p = 1, where 1 - p cancels; it gets the log of the others' sum instead.
    """
    total = logits.logsumexp(-1, keepdim=True)  # (M, 1)
    top = logits.argmax(-1, keepdim=True)  # (M, 1)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)  # (M, 1)
    is_top = ids == top  # (M, L)
    log_probs = (logits.gather(-1, ids) - total).masked_fill(is_top, -torch.inf)  # (M, L)
    return torch.where(is_top, others - total, torch.log1p(-log_probs.exp()))
