"""The loss contract: what a user writes, and who divides.

A token loss is a plain function of supervised positions only, float32 whatever the model's dtype:

    (logits (M, V), targets (M,), **options) -> (M,)          one value a target, not a mean

A term is a function of a LossContext (hidden states, image features, the batch) that returns a sum and a count:

    (context, **options) -> (sum (), count)

Dividing is the toolkit's work: each loss's sum over all micro-batches and ranks of one optimiser step is divided by its
count over the same, so that 8x1 == 4x2 == 2 processes, in value and in gradient. A token loss counts supervised tokens;
a term says what it counts (`@term(count="image_tokens")`), because the divisor must be known before the first backward.
hfcustom/chunked.py evaluates token losses without building the (B, T, V) logits.
Letters: B rows, T text tokens, M supervised tokens, N image tokens, P crops, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from hfcustom.chunked import token_loss_sums
from hfcustom.naming import load_object, unknown

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM

IGNORE = -100

Batch = Mapping[str, Any]
TokenFunction = Callable[..., torch.Tensor]
TermFunction = Callable[..., tuple[torch.Tensor, float | torch.Tensor]]


@dataclass
class LossContext:
    """What a term may look at; tensors carry gradients."""

    model: CustomVLM
    batch: Batch  # what forward() was given
    labels: torch.Tensor  # (B, T), -100 where nothing is supervised
    hidden_states: torch.Tensor  # (B, T, D) as the head gets them
    outputs: Any  # the stock class's output object (router_logits and the like)
    image_mask: torch.Tensor | None = None  # (B, T)
    vision_features: torch.Tensor | None = None  # (P, patches, D_vision)
    image_features: torch.Tensor | None = None  # (P, N, D), after the connector


# ---- what a term may be divided by: each is known from the batch alone ----------------------------------------------


def count_tokens(batch: Batch) -> int:
    """Count supervised tokens: labels that are not -100, the first position left out because nothing predicts it."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def count_rows(batch: Batch) -> int:
    """Count rows of the batch."""
    return len(batch["labels"])


COUNTS: dict[str, Callable[[Batch], int]] = {"rows": count_rows, "tokens": count_tokens}


# ---- registering ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A registered loss: a token loss when `count` is None, else a term divided by what `count` names."""

    name: str
    function: Callable[..., Any]  # a TokenFunction or a TermFunction
    count: str | Callable[[Batch], int] | None = None

    @property
    def is_term(self) -> bool:
        """Whether this is a term, which says itself what it is divided by."""
        return self.count is not None

    def count_in(self, batch: Batch, image_token_id: int) -> int:
        """Return this loss's divisor for one batch."""
        if self.count is None:
            return count_tokens(batch)
        if self.count == "image_tokens":
            if "input_ids" not in batch:
                raise ValueError(f"Term {self.name!r} counts image tokens, which needs input_ids in the batch.")
            return int((batch["input_ids"] == image_token_id).sum())
        return COUNTS[self.count](batch) if isinstance(self.count, str) else int(self.count(batch))

    def options(self) -> dict[str, inspect.Parameter]:
        """Return the options that the function takes beyond its tensors, by name."""
        named = list(inspect.signature(self.function).parameters.items())[1 if self.is_term else 2 :]
        return {
            name: option for name, option in named if option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
        }

    @property
    def takes_any_option(self) -> bool:
        """Whether the function has **options."""
        kinds = {parameter.kind for parameter in inspect.signature(self.function).parameters.values()}
        return inspect.Parameter.VAR_KEYWORD in kinds


def token_loss(function: TokenFunction) -> TokenFunction:
    """Register a function (logits (M, V) float32, targets (M,), **options) -> (M,) under its own name.

    Raises ValueError when the name belongs to another function, TypeError when it does not take two arguments.
    """
    if len(inspect.signature(function).parameters) < 2:
        raise TypeError(f"{function.__qualname__} must take (logits, targets, **options) to be a token loss.")
    _register(Loss(function.__name__, function))
    return function


def term(*bare: Any, count: str | Callable[[Batch], int] | None = None) -> Callable[[TermFunction], TermFunction]:
    """Register a function (context, **options) -> (sum, count) under its own name: `@term(count="tokens")`.

    `count` says what the sum is divided by: "tokens", "rows", "image_tokens", or a function of the batch. Raises TypeError
    without it, ValueError for an unknown one or a name that is taken.
    """
    if bare or count is None:
        raise TypeError(
            "Write @hfcustom.term(count='tokens'): a term says what its sum is divided by, one of "
            f"{', '.join([*COUNTS, 'image_tokens'])}, or a function of the batch."
        )
    if isinstance(count, str) and count not in (*COUNTS, "image_tokens"):
        cure = "Pass a function of the batch for another count."
        raise ValueError(unknown("count", count, [*COUNTS, "image_tokens"], cure))

    def register(function: TermFunction) -> TermFunction:
        _register(Loss(function.__name__, function, count))
        return function

    return register


def _register(loss: Loss) -> None:
    if loss.name in RESERVED or loss.name.startswith("lr_"):
        raise ValueError(f"A loss cannot be named {loss.name!r}, which the log has already; rename the function.")
    if "weight" in loss.options():
        raise ValueError(
            f"Loss {loss.name!r} has an option 'weight', which is what a config calls its share; rename it."
        )
    taken = LOSSES.get(loss.name)
    if taken is not None and _origin(taken.function) != _origin(loss.function):
        raise ValueError(
            f"The loss name {loss.name!r} belongs to {_origin(taken.function)}; rename {_origin(loss.function)}."
        )
    LOSSES[loss.name] = loss


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


# ---- reading a config -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with the weight and options that a config gave it."""

    loss: Loss
    weight: float
    options: dict[str, Any] = field(default_factory=dict)


def parse_losses(spec: str | Mapping[str, Any]) -> list[WeightedLoss]:
    """Read `"focal"` or `{"cross_entropy": 1.0, "focal": {"weight": 0.5, "gamma": 2.0}}`.

    Raises ValueError naming an unknown loss or option and the nearest known one.
    """
    entries = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    if "stock" in entries:
        raise ValueError("The parent's own loss stands alone: loss='stock', without a weight and without others.")
    if not entries:
        raise ValueError("The loss is empty; name at least one, for instance {'cross_entropy': 1.0}.")
    return [_parse_entry(name, value) for name, value in entries.items()]


def _parse_entry(name: str, value: Any) -> WeightedLoss:
    loss = find_loss(name)
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"The weight of loss {name!r} is {weight!r}; it must be a finite number.")
    known = loss.options()
    for option in options:
        if option not in known and not loss.takes_any_option:
            raise ValueError(unknown(f"option of loss {name!r}:", option, ["weight", *known]))
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(
                f"Loss {name!r} needs its option {option!r}: {{{name!r}: {{'weight': 1.0, {option!r}: ...}}}}."
            )
    return WeightedLoss(loss, float(weight), options)


def find_loss(name: str) -> Loss:
    """Return a registered loss; ValueError suggests the nearest. No file is imported: configs come with checkpoints."""
    if name in LOSSES:
        return LOSSES[name]
    cure = "Decorate your own with @hfcustom.token_loss or @hfcustom.term, and import its file first."
    raise ValueError(unknown("loss", name, LOSSES, cure))


def import_losses(spec: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Import the files of `file.py:function` names and return the spec with the functions' registered names.

    This runs the files: it is for a command line, never for a config out of a checkpoint. An undecorated function is
    registered as a token loss.
    """
    if isinstance(spec, str):
        return _import_loss(spec)
    return {_import_loss(name): value for name, value in spec.items()}


def _import_loss(name: str) -> str:
    if ".py:" not in name:
        return name
    function = load_object(name, kind="loss")
    registered = LOSSES.get(function.__name__)
    if registered is None or registered.function is not function:
        token_loss(function)
    return function.__name__


# ---- evaluating -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossValue:
    """One loss in one batch: sum / count is its mean, weight * sum / count what it adds to the total."""

    sum: torch.Tensor  # ()
    count: int
    weight: float


def evaluate(
    context: LossContext, losses: list[WeightedLoss], divisors: Mapping[str, float | torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[str, LossValue]]:
    """Return the total loss and the value of each named loss.

    `divisors` gives each loss's count over the whole optimiser step; without it, this batch is the step. A batch in
    which a loss has nothing to count adds zero, with a zero gradient.
    """
    token = [item for item in losses if not item.loss.is_term]
    hidden, targets = supervised_positions(context)  # (M, D), (M,)
    values: dict[str, LossValue] = {}
    for item, total in zip(token, token_loss_sums(context.model.compute_logits, hidden, targets, token), strict=True):
        values[item.loss.name] = LossValue(total, len(targets), item.weight)
    for item in losses:
        if item.loss.is_term:
            values[item.loss.name] = _evaluate_term(context, item)
    total = context.hidden_states[:0].sum().float()  # zero that keeps the graph
    for name, value in values.items():
        divisor = value.count if divisors is None else divisors[name]
        total = total + value.weight * value.sum / (
            divisor.clamp(min=1) if torch.is_tensor(divisor) else max(divisor, 1)
        )
    return total, {name: LossValue(value.sum.detach(), value.count, value.weight) for name, value in values.items()}


def supervised_positions(context: LossContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the hidden states that predict a supervised token, and those tokens: (M, D), (M,)."""
    targets = context.labels[:, 1:].to(context.hidden_states.device)  # (B, T-1): position t predicts token t+1
    keep = targets != IGNORE
    return context.hidden_states[:, :-1][keep], targets[keep]


def _evaluate_term(context: LossContext, item: WeightedLoss) -> LossValue:
    loss = item.loss
    expected = loss.count_in(context.batch, context.model.config.image_token_id)
    if expected == 0:
        return LossValue(context.hidden_states[:0].sum().float(), 0, item.weight)
    result = loss.function(context, **item.options)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"Term {loss.name!r} returned {type(result).__name__}; it must return (sum, count). Do not average: "
            "hfcustom divides by the count over the whole optimiser step."
        )
    total, count = result
    if not isinstance(total, torch.Tensor) or total.ndim != 0:
        found = f"shape {tuple(total.shape)}" if isinstance(total, torch.Tensor) else type(total).__name__
        raise ValueError(f"Term {loss.name!r} returned a sum of {found}; it must be a scalar tensor.")
    if not isinstance(count, int | float | torch.Tensor) or float(count) != expected:
        raise ValueError(
            f"Term {loss.name!r} summed over {count} items, but count={loss.count!r} finds {expected} in this batch. "
            "The divisor must be known before the forward pass: return that count, or give @term a function of the batch."
        )
    return LossValue(total.float(), expected, item.weight)


# ---- shipped token losses -------------------------------------------------------------------------------------------


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target): logsumexp(z) - z_y. What the stock classes minimise."""
    return F.cross_entropy(logits, targets, reduction="none")


def focal(logits: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """-(1 - p)^gamma log p: easy tokens weigh less. Lin et al. 2017, https://arxiv.org/abs/1708.02002, eq. 4."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (-torch.expm1(-nll)) ** gamma * nll  # 1 - p without cancellation


def label_smoothing(logits: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.1) -> torch.Tensor:
    """(1 - eps) * -log p(target) + eps * mean over V of -log p. Szegedy et al. 2016, https://arxiv.org/abs/1512.00567."""
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)


def z_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logsumexp(z)^2, which keeps logits from drifting; use a weight near 1e-4. PaLM, https://arxiv.org/abs/2204.02311."""
    return torch.logsumexp(logits, -1).square()


RESERVED = ("grad_norm", "images_per_s", "loss", "lr", "step", "stock", "tokens_per_s")  # names in the log

STOCK = Loss("stock", cross_entropy)  # the parent's own path, for its name and its count only

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss("cross_entropy", cross_entropy),
    "focal": Loss("focal", focal),
    "label_smoothing": Loss("label_smoothing", label_smoothing),
    "z_loss": Loss("z_loss", z_loss),
}
