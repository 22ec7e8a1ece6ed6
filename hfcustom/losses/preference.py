"""Preference losses: terms over whole answers, in pairs (chosen, rejected) or judged one by one.

log p of each row's answer (R,), preference (R,) 1 or -1 -> the sum over pairs (or rows), and their count. Of a pair, the
chosen answer's row comes first. Each docstring gives the formula and its source, and an example that the tests run:
pi is the model, ref the reference, r(y) = log pi(y|x) - log ref(y|x), |y| the supervised tokens of an answer, w the chosen
and l the rejected one, s the logistic function. A pair of which neither answer has a supervised token adds zero and is not
counted; where only one of them has none, counting it is an error.

Logged besides, as <loss>_margin and <loss>_accuracy: the mean of what the loss wants to be large, and how often it is
above zero. Beside any of these, token losses see the chosen answers only.
Letters: R rows of data, P pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hfcustom.losses.context import LossContext
from hfcustom.losses.contract import PAIRS, term

COLUMNS = ("preference",)
REFERENCE = ("reference_log_probs",)  # a column, if hfcustom.cache_reference was there before

Term = tuple[torch.Tensor, torch.Tensor | int]


@term(count="pairs", columns=COLUMNS, optional_columns=REFERENCE)
def dpo(context: LossContext, beta: float = 0.1, label_smoothing: float = 0.0) -> Term:
    """-log s(beta (r(w) - r(l))). DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.

    `label_smoothing` is the share of pairs thought to be the wrong way round: (1 - eps) of the above and eps of its
    mirror image. Conservative DPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.

    >>> from types import SimpleNamespace
    >>> context = SimpleNamespace(row_log_probs=torch.tensor([-1.0, -3.0]), row_tokens=torch.tensor([1, 2]))
    >>> context.reference_log_probs, context.record = torch.tensor([-2.0, -2.0]), lambda name, total, count: None
    >>> dpo(context, beta=0.5)  # r = 1, -1: log(1 + exp(-0.5 * 2))
    (tensor(0.3133), tensor(1))
    >>> dpo(context, beta=0.5, label_smoothing=0.1)  # 0.9 * 0.3133 + 0.1 * 1.3133
    (tensor(0.4133), tensor(1))
    """
    _check("dpo", "beta", beta, beta > 0, "above 0")
    _check("dpo", "label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
    chosen, rejected = _pairs(context.row_log_probs - context.reference_log_probs)
    margins = beta * (chosen - rejected)  # (P,)
    values = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return _sum_pairs(context, values, margins)


@term(count="pairs", columns=COLUMNS, optional_columns=REFERENCE)
def ipo(context: LossContext, beta: float = 0.1) -> Term:
    """(r(w) / |w| - r(l) / |l| - 1 / (2 beta))^2. IPO, Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.

    beta is the paper's tau. The paper writes r without the division by length; the mean over tokens is what its authors
    told the makers of trl that they had run (trl 1.16, dpo_trainer.py, loss_type "ipo"), and what trl computes.

    >>> from types import SimpleNamespace
    >>> context = SimpleNamespace(row_log_probs=torch.tensor([-1.0, -3.0]), row_tokens=torch.tensor([1, 2]))
    >>> context.reference_log_probs, context.record = torch.tensor([-2.0, -2.0]), lambda name, total, count: None
    >>> ipo(context, beta=0.5)  # (1 / 1 + 1 / 2 - 1)^2
    (tensor(0.2500), tensor(1))
    """
    _check("ipo", "beta", beta, beta > 0, "above 0")
    chosen, rejected = _pairs((context.row_log_probs - context.reference_log_probs) / _lengths(context))
    margins = chosen - rejected  # (P,)
    return _sum_pairs(context, (margins - 1 / (2 * beta)).square(), margins)


@term(count="pairs", columns=COLUMNS)
def orpo(context: LossContext) -> Term:
    """-log s(log odds(w) - log odds(l)), odds = p / (1 - p), log p = log pi(y|x) / |y|. No reference is needed.

    The odds ratio part of ORPO, Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 7; its total, eq. 6, is
    {"cross_entropy": 1.0, "orpo": 0.1}, of which the cross entropy sees chosen answers only.

    >>> from types import SimpleNamespace
    >>> context = SimpleNamespace(row_log_probs=torch.tensor([-1.0, -3.0]), row_tokens=torch.tensor([1, 2]))
    >>> context.record = lambda name, total, count: None
    >>> orpo(context)  # p = exp(-1), exp(-1.5): log odds = -0.5413, -1.2475
    (tensor(0.4011), tensor(1))
    """
    log_p = context.row_log_probs / _lengths(context)  # (R,)
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)  # p = 1 has infinite odds
    chosen, rejected = _pairs(log_p - _log_one_minus_exp(log_p))
    margins = chosen - rejected  # (P,)
    return _sum_pairs(context, -F.logsigmoid(margins), margins)


@term(count="pairs", columns=COLUMNS)
def simpo(context: LossContext, beta: float = 2.0, gamma: float = 1.0) -> Term:
    """-log s(beta (log pi(w|x) / |w| - log pi(l|x) / |l|) - gamma). No reference is needed.

    SimPO, Meng et al. 2024, https://arxiv.org/abs/2405.14734, eq. 6.

    >>> from types import SimpleNamespace
    >>> context = SimpleNamespace(row_log_probs=torch.tensor([-1.0, -3.0]), row_tokens=torch.tensor([1, 2]))
    >>> context.record = lambda name, total, count: None
    >>> simpo(context, beta=2.0, gamma=0.5)  # 2 * (-1 + 1.5) - 0.5 = 0.5
    (tensor(0.4741), tensor(1))
    """
    _check("simpo", "beta", beta, beta > 0, "above 0")
    chosen, rejected = _pairs(context.row_log_probs / _lengths(context))
    margins = beta * (chosen - rejected) - gamma  # (P,)
    return _sum_pairs(context, -F.logsigmoid(margins), margins)


@term(count="rows", columns=COLUMNS, optional_columns=REFERENCE)
def kto(
    context: LossContext,
    beta: float = 0.1,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Term:
    """weight * (1 - s(beta (r(y) - z0))) of a desirable answer, weight * (1 - s(beta (z0 - r(y)))) of another.

    KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 8. Answers are judged one by one, in any order
    and proportion. The paper estimates z0 >= 0 from mismatched answers of the same batch, which would let the loss depend
    on how a step is cut; here it is the option `reference_point`, in nats. At 0 this is trl's "apo_zero_unpaired". A
    row without a supervised token adds zero, and is counted.

    >>> from types import SimpleNamespace
    >>> context = SimpleNamespace(row_log_probs=torch.tensor([-1.0, -3.0]), row_tokens=torch.tensor([1, 2]))
    >>> context.batch = {"preference": torch.tensor([1.0, -1.0])}
    >>> context.reference_log_probs, context.record = torch.tensor([-2.0, -2.0]), lambda name, total, count: None
    >>> kto(context, beta=0.5)  # r = 1, -1: 2 * (1 - s(0.5))
    (tensor(0.7551), 2)
    """
    _check("kto", "beta", beta, beta > 0, "above 0")
    preference, known = _preference(context), context.row_tokens > 0  # (R,)
    ratios = context.row_log_probs - context.reference_log_probs
    margins = beta * preference * (ratios - reference_point)  # (R,)
    weights = (desirable_weight * (1 + preference) + undesirable_weight * (1 - preference)) / 2
    values = (weights * torch.sigmoid(-margins)).where(known, 0)  # (R,)
    _record(context, margins, known)
    return values.sum(), len(values)


def _pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of chosen and of rejected answers: (R,) -> (P,), (P,)."""
    return values[0::2], values[1::2]


def _lengths(context: LossContext) -> torch.Tensor:
    """Return |y| of each row, 1 where nothing is supervised: (R,)."""
    return context.row_tokens.clamp(min=1)


def _sum_pairs(context: LossContext, values: torch.Tensor, margins: torch.Tensor) -> Term:
    """Add up what counts as a pair, as hfcustom.losses.contract.count_pairs does: (P,) -> ()."""
    known = context.row_tokens[0::2] > 0  # (P,)
    _record(context, margins, known)
    return values.where(known, 0).sum(), known.sum()


def _record(context: LossContext, margins: torch.Tensor, known: torch.Tensor) -> None:
    context.record("margin", margins.where(known, 0).sum(), known.sum())
    context.record("accuracy", ((margins > 0) & known).sum(), known.sum())


def _preference(context: LossContext) -> torch.Tensor:
    preference = context.batch.get("preference")
    if preference is None or preference.shape != context.row_tokens.shape:
        found = "no preference" if preference is None else f"a preference of {tuple(preference.shape)}"
        raise ValueError(
            f"The batch has {found} for {len(context.row_tokens)} rows; it must be 1 or -1 for each. Give rows with "
            f"'prompt', 'completion' and 'label' (true or false). {PAIRS}"
        )
    return preference.to(context.row_log_probs)


def _log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation, as Maechler 2012 (R package Rmpfr) splits it at -log 2."""
    near = x > -0.6931471805599453
    return torch.where(near, (-torch.expm1(x.where(near, -1.0))).log(), torch.log1p(-x.where(~near, -1.0).exp()))


def _check(loss: str, option: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"Option {option!r} of loss {loss!r} is {value!r}; it must be {allowed}.")
