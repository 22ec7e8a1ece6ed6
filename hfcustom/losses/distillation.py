"""Token losses that pull a student's distribution towards a teacher's: (logits (M, V), targets (M,), teacher) -> (M,).

The teacher is a model that runs along, model.set_teacher(other), or, for `topk_distillation`, columns of the rows with
its likeliest tokens. z are the student's logits, q = softmax(z / T), p the teacher's softmax at the same temperature
T. Each loss is at least 0, and 0 where q = p; each is multiplied by T^2, which keeps gradients of one size whatever T
is. A p below float32's smallest normal number, 1e-38, counts as that, so that a teacher may rule tokens out
altogether.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    >>> targets = torch.tensor([0, 2])

So log q is [-0.1698, -2.1698, -3.1698] and -log 3 each, and q is [0.8438, 0.1142, 0.0420], whose entropy is 0.5243,
and a third each. Letters: M supervised tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import math

import torch

from hfcustom.losses.checks import check_number, check_temperature, check_whole, refuse
from hfcustom.losses.contract import token_loss
from hfcustom.losses.inputs import Teacher

LOG_SMALLEST = math.log(torch.finfo(torch.float32).tiny)  # -87.3
LOG_ZERO = -1e30  # log 0 as a number: times 0 it is 0


@token_loss(inputs=("teacher",))
def alpha_distillation(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, alpha: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 (sum_c p_c^alpha q_c^(1 - alpha) - 1) / (alpha (alpha - 1)): KL(p || q) at alpha = 1, KL(q || p) at 0.

    Amari's alpha-divergence as in AlphaNet, Wang et al. 2021, https://arxiv.org/abs/2102.07954, without its clipping:
    a larger alpha punishes a student more for missing what the teacher holds likely, a smaller one for the reverse.

    >>> teacher = Teacher(3, logits=torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
    >>> alpha_distillation(logits, targets, teacher)  # sum_c (p_c q_c)^0.5 = 0.9210 and 0.9856: 4 (1 - 0.9210), ...
    tensor([0.3161, 0.0576])
    """
    check_number("alpha_distillation", "alpha", alpha)
    p, q = _log_probs("alpha_distillation", logits, teacher, temperature)  # (M, V) each
    return temperature**2 * _alpha_divergence(p, q, alpha)


@token_loss(inputs=("teacher",))
def jsd_distillation(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q, 0 < beta < 1.

    The generalised Jensen-Shannon divergence of GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, section 2:
    bounded, whatever the teacher rules out. Near beta = 0 it goes as beta KL(p || q), near 1 as (1 - beta) KL(q || p).

    >>> teacher = Teacher(3, logits=torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
    >>> jsd_distillation(logits, targets, teacher)  # m_0 = [0.6719, 0.1821, 0.1460]: (0.0659 + 0.0866) / 2, ...
    tensor([0.0763, 0.0144])
    """
    check_number("jsd_distillation", "beta", beta, 0, 1)
    if beta in (0, 1):
        refuse("jsd_distillation", "beta", beta, "between 0 and 1; for the limits take kl_distillation and reverse_kl")
    p, q = _log_probs("jsd_distillation", logits, teacher, temperature)  # (M, V) each
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))  # (M, V)
    return temperature**2 * (beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture))


@token_loss(inputs=("teacher",))
def kl_distillation(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(p || q) = T^2 sum_c p_c (log p_c - log q_c): the student covers all that the teacher holds likely.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2.

    >>> teacher = Teacher(3, logits=torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
    >>> kl_distillation(logits, targets, teacher)  # 0.1698 / 2 + 2.1698 / 4 + 3.1698 / 4 - log 2 - log(2) / 2, ...
    tensor([0.3801, 0.0589])
    """
    p, q = _log_probs("kl_distillation", logits, teacher, temperature)  # (M, V) each
    return temperature**2 * _kl(p, q)


@token_loss(inputs=("teacher",))
def reverse_kl(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(q || p) = T^2 sum_c q_c (log q_c - log p_c): the student keeps to what the teacher holds likely.

    The divergence of MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543, eq. 1, token by token and on the rows'
    answers, where the paper samples answers of the student.

    >>> teacher = Teacher(3, logits=torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
    >>> reverse_kl(logits, targets, teacher)  # 0.8438 log 2 + 0.1562 log 4 - 0.5243, 5/3 log 2 - log 3
    tensor([0.2772, 0.0566])
    """
    p, q = _log_probs("reverse_kl", logits, teacher, temperature)  # (M, V) each
    return temperature**2 * _kl(q, p)


@token_loss(inputs=("teacher",), optional_columns=("teacher_ids", "teacher_log_probs"))
def topk_distillation(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, k: int = 32, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 (sum_{c in K} p_c log(p_c / q_c) + r log(r / s)): K the k likeliest by p, r and s are p and q of the rest.

    The forward KL of two distributions over k + 1 outcomes, a lower bound of `kl_distillation` that a cache of the
    teacher suffices for. The outcome for the rest is the "ghost token" of Anshumann et al. 2025,
    https://arxiv.org/abs/2503.16870; without it the student would be taught that the rest is impossible.

    >>> teacher = Teacher(3, logits=torch.tensor([[0.5, 0.25, 0.25]] * 2).log())
    >>> topk_distillation(logits, targets, teacher, k=1)  # (log(0.5 / 0.8438) + log(0.5 / 0.1562)) / 2, ...
    tensor([0.3201, 0.0589])
    """
    check_whole("topk_distillation", "k", k, 1, logits.shape[-1] - 1)
    check_temperature("topk_distillation", temperature)
    ids, p = teacher.top(k, temperature)  # (M, K), (M, K)
    scaled = logits / temperature  # (M, V)
    total = scaled.logsumexp(-1, keepdim=True)  # (M, 1)
    q = (scaled.gather(-1, ids) - total).clamp(min=LOG_ZERO)  # (M, K)
    q_rest = scaled.scatter(-1, ids, LOG_ZERO).logsumexp(-1) - total[:, 0]  # (M,)
    p_rest = (1 - p.exp().sum(-1)).clamp(min=torch.finfo(p.dtype).tiny)  # (M,); rounding may leave less than nothing
    rest = p_rest * (p_rest.log() - q_rest.clamp(min=LOG_ZERO))  # (M,)
    return temperature**2 * (_kl(p.clamp(min=LOG_SMALLEST), q) + rest)


# ---- what they share ------------------------------------------------------------------------------------------------


def _log_probs(
    loss: str, logits: torch.Tensor, teacher: Teacher, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of the teacher and log q of the student, (M, V) each, finite."""
    check_temperature(loss, temperature)
    student = (logits / temperature).log_softmax(-1)  # (M, V)
    return teacher.log_probs(temperature).clamp(min=LOG_SMALLEST), student.clamp(min=LOG_ZERO)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of log-probabilities, (M, V) twice -> (M,)."""
    return (p.exp() * (p - q)).sum(-1)


def _alpha_divergence(p: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the alpha-divergence of log-probabilities, (M, V) twice -> (M,), precise near 0 and 1 too."""
    if alpha in (0, 1):
        return _kl(p, q) if alpha else _kl(q, p)
    if alpha < 0.5:  # D_alpha(p || q) = D_(1 - alpha)(q || p)
        p, q, alpha = q, p, 1 - alpha
    if alpha > 1:
        q = q.clamp(min=LOG_SMALLEST)  # (p / q)^(alpha - 1) of a token that both rule out
    exponent = (1 - alpha) * (q - p)  # (M, V)
    large = (p + exponent).exp() - p.exp()  # p^alpha q^(1 - alpha) - p, where p may be 0
    small = p.exp() * torch.expm1(exponent.clamp(max=1.0))  # the same without cancellation
    return torch.where(exponent > 1, large, small).sum(-1) / (alpha * (alpha - 1))
