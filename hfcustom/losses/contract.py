"""The loss contract: what a user writes, and what it says about itself.

A token loss is a plain function of supervised positions only, float32 whatever the model's dtype:

    (logits (M, V), targets (M,), **options) -> (M,)          one value a target, not a mean

A term is a function of a LossContext (hidden states, image features, the batch) that returns a sum and a count:

    (context, **options) -> (sum (), count)

Dividing is the toolkit's work (hfcustom/losses/total.py): each loss's sum over all micro-batches and ranks of one
optimiser step is divided by its count over the same, so that 8x1 == 4x2 == 2 processes, in value and in gradient. The
divisor must be known before the first backward, so a count is a function of the batch alone.
Letters: B rows of a tensor, R rows of data (more than B when packed), T text tokens, M supervised tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from hfcustom.exits import EXIT_NUMERIC, RunError
from hfcustom.naming import unknown

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM

IGNORE = -100

Batch = Mapping[str, Any]
Count = Callable[..., float]
TokenFunction = Callable[..., torch.Tensor]
TermFunction = Callable[..., tuple[torch.Tensor, float | torch.Tensor]]


class NonFiniteError(RunError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; the weights are those of the step before."""

    exit_code = EXIT_NUMERIC


# ---- what a loss may be divided by: each is known from the batch alone ----------------------------------------------


def is_packed(batch: Batch) -> bool:
    """Whether rows of data may be packed into one row of the batch, each with position_ids of its own.

    A batch with an attention_mask is not: transformers builds its block mask only where none is given.
    """
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def row_ids(batch: Batch) -> torch.Tensor:
    """Return which row of data each position belongs to, (B, T); rows packed into one restart their position_ids."""
    labels = batch["labels"]
    if not is_packed(batch) or batch["position_ids"].shape != labels.shape:
        return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    return row_starts(batch["position_ids"]).flatten().cumsum(0).view_as(labels) - 1


def row_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where a row of data begins, (B, T): where a position is not the one before it plus 1, as transformers has it."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def count_rows(batch: Batch) -> int:
    """Count rows of data, those packed into one row of the batch each."""
    return int(row_ids(batch).max()) + 1 if is_packed(batch) else len(batch["labels"])


def real_tokens(batch: Batch) -> torch.Tensor:
    """Return which positions are no padding, (B, T)."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["labels" if "labels" in batch else "input_ids"], dtype=torch.bool)
    return mask.bool()


def row_tokens(batch: Batch) -> torch.Tensor:
    """Return the number of supervised tokens of each row of data, (R,)."""
    supervised = (batch["labels"][:, 1:] != IGNORE).flatten().long()
    rows = row_ids(batch)[:, 1:].flatten().to(supervised.device)
    return supervised.new_zeros(count_rows(batch)).index_add(0, rows, supervised)


def liked_labels(batch: Batch) -> torch.Tensor:
    """Return the labels with those of rejected answers ignored: a token loss imitates only what is preferred."""
    labels = batch["labels"]
    if batch.get("preference") is None:
        return labels
    rejected = batch["preference"].to(labels.device) < 0  # (R,)
    return labels.masked_fill(rejected[row_ids(batch)], IGNORE)


def count_tokens(batch: Batch) -> int:
    """Count supervised tokens: labels that are not -100, the first position left out because nothing predicts it."""
    return int((liked_labels(batch)[:, 1:] != IGNORE).sum())


def count_pairs(batch: Batch) -> int:
    """Count pairs of answers, [chosen, rejected, ...]; one of which neither answer has a supervised token is none.

    Raises ValueError for rows that are no pairs, and for a pair of which only one answer has supervised tokens.
    """
    preference, supervised = batch.get("preference"), row_tokens(batch) > 0  # (R,)
    if preference is None:
        raise ValueError(f"The batch has no preference (R,), so no answer is chosen or rejected. {PAIRS}")
    if preference.shape != supervised.shape:
        found, wanted = tuple(preference.shape), len(supervised)
        raise ValueError(f"The batch's preference is {found} for {wanted} rows; it must be one number a row. {PAIRS}")
    signs, known = torch.stack([preference.to(supervised.device).double(), supervised.double()]).tolist()
    if signs != [1.0, -1.0] * (len(signs) // 2):
        shown = ", ".join(f"{sign:g}" for sign in signs[:8]) + (", ..." if len(signs) > 8 else "")
        raise ValueError(
            f"The {len(signs)} rows of the batch have preference {shown}; pairs are 1, -1, 1, -1, ... {PAIRS} Answers "
            "that are judged one by one are for the loss 'kto'."
        )
    for at, both in enumerate(zip(known[::2], known[1::2], strict=True)):
        if both[0] != both[1]:
            empty = "rejected" if both[0] else "chosen"
            raise ValueError(
                f"Pair {at} of the batch has no supervised token in its {empty} answer, so there is nothing to compare with; "
                "drop the row, or give that answer text of a weight above 0."
            )
    return int(sum(known[::2]))


def count_all_tokens(batch: Batch) -> int:
    """Count tokens that are no padding, supervised or not."""
    return int(real_tokens(batch).sum())


def count_token_weights(batch: Batch) -> float:
    """Sum the weights of supervised tokens."""
    if "token_weights" not in batch:
        raise ValueError(
            "The batch has no token_weights (B, T): Collator(processor, columns=['token_weights']) makes them from the "
            "rows' weights, as fit() does by itself."
        )
    supervised = liked_labels(batch)[:, 1:] != IGNORE
    return float(batch["token_weights"][:, 1:][supervised].sum())


PAIRS = "Give rows with 'chosen' and 'rejected', of which the collator makes two rows of the batch each."

COUNTS: dict[str, Callable[[Batch], float]] = {
    "all_tokens": count_all_tokens,
    "pairs": count_pairs,
    "rows": count_rows,
    "token_weights": count_token_weights,
    "tokens": count_tokens,
}


# ---- what a loss says about itself ----------------------------------------------------------------------------------

RESERVED = (  # names in the logs of fit() and of transformers.Trainer
    *("epoch", "grad_norm", "images_per_s", "learning_rate", "loss", "lr", "num_tokens"),
    *("peak_gib", "step", "stock", "tokens_per_s", "useful_tokens"),
)
SCHEDULE = ("weight", "warmup_steps", "decay_steps", "final_weight")  # what a config says beside a loss's own options

LOSSES: dict[str, Loss] = {}  # filled by the decorators below; the shipped ones stand in the files of this package


@dataclass(frozen=True)
class Loss:
    """A registered loss; the decorators `token_loss` and `term` explain the fields."""

    name: str
    function: Callable[..., Any]  # a TokenFunction or a TermFunction
    kind: Literal["token", "term"] = "token"
    count: str | Count = "tokens"
    inputs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    summary: Callable[..., torch.Tensor] | None = None
    surrogate: bool = False
    example: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None

    def example_options(self, processor: Any) -> dict[str, Any]:
        """Return options to test this loss with; those that are ids of tokens follow the processor."""
        return dict(self.example(processor) if callable(self.example) else self.example)

    @property
    def is_term(self) -> bool:
        """Whether this is a term, a function of a LossContext."""
        return self.kind == "term"

    def count_in(self, batch: Batch, model: CustomVLM, options: Mapping[str, Any] | None = None) -> float:
        """Return this loss's divisor for one batch; ValueError when it needs to know image tokens and nothing tells them."""
        if model.placeholder_token_id is None and self.counts_images:
            raise ValueError(
                f"Loss {self.name!r} looks for image tokens, and nothing says which id stands for one: "
                "hfcustom.wrap(model, image_token_id=...)."
            )
        if self.count == "image_tokens":
            if "input_ids" not in batch:
                raise ValueError(f"Term {self.name!r} counts image tokens, which needs input_ids in the batch.")
            rows = model.image_token_rows(batch)
            return int((batch["input_ids"] == model.placeholder_token_id).sum()) if rows is None else len(rows)
        if isinstance(self.count, str):
            return COUNTS[self.count](batch)
        wanted = list(inspect.signature(self.count).parameters)[1:]
        values = {name: parameter.default for name, parameter in self.options().items()} | dict(options or {})
        values["image_token_id"] = model.placeholder_token_id
        return self.count(batch, **{name: values[name] for name in wanted})

    @property
    def counts_images(self) -> bool:
        """Whether the divisor depends on where image tokens are."""
        return self.count == "image_tokens" or (
            callable(self.count) and "image_token_id" in inspect.signature(self.count).parameters
        )

    def options(self) -> dict[str, inspect.Parameter]:
        """Return the options that the function takes beyond its tensors, by name."""
        named = list(inspect.signature(self.function).parameters.items())[1 if self.is_term else 2 :]
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return {name: option for name, option in named if option.kind not in variadic and name not in self.inputs}

    @property
    def tensors(self) -> frozenset[str]:
        """Names of tensors of the batch that are this loss's own, none of the stock forward's business."""
        return frozenset((*self.inputs, *self.columns, *self.optional_columns))

    @property
    def takes_any_option(self) -> bool:
        """Whether the function has **options."""
        kinds = {parameter.kind for parameter in inspect.signature(self.function).parameters.values()}
        return inspect.Parameter.VAR_KEYWORD in kinds


# ---- registering ----------------------------------------------------------------------------------------------------


def token_loss(
    function: TokenFunction | None = None,
    *,
    inputs: tuple[str, ...] = (),
    count: str = "tokens",
    columns: tuple[str, ...] = (),
    optional_columns: tuple[str, ...] = (),
    surrogate: bool = False,
    example: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None,
) -> Any:
    """Register a function (logits (M, V) float32, targets (M,), **options) -> (M,) under its own name.

    Bare, or with what the function needs besides: `inputs` are arguments that it gets for the same M tokens, the name of a
    (B, T, ...) tensor of the batch or one of hfcustom.losses.INPUTS; `columns` are columns of the rows that `fit` must
    put into the batch, `optional_columns` those it does where rows have them; `count` is what the sum is divided by.
    `surrogate` says that the gradient is meant not to be the value's derivative; `example` holds options to test with, or
    is a function of a processor that returns them, for options that are ids of tokens.
    Raises ValueError when the name belongs to another function, TypeError when it does not take what it should.
    """
    if function is None:
        return lambda decorated: token_loss(
            decorated,
            inputs=inputs,
            count=count,
            columns=columns,
            optional_columns=optional_columns,
            surrogate=surrogate,
            example=example,
        )
    taken = list(inspect.signature(function).parameters)
    if len(taken) < 2:
        raise TypeError(f"{function.__qualname__} must take (logits, targets, **options) to be a token loss.")
    if missing := set(inputs).difference(taken[2:]):
        raise TypeError(f"{function.__qualname__} must take an argument {sorted(missing)[0]!r}, which inputs= names.")
    _check_count(count)
    loss = Loss(
        function.__name__,
        function,
        count=count,
        inputs=tuple(inputs),
        columns=tuple(columns),
        optional_columns=tuple(optional_columns),
        surrogate=surrogate,
        example=example or {},
    )
    _register(loss)
    return function


def term(
    *bare: Any,
    count: str | Count | None = None,
    columns: tuple[str, ...] = (),
    optional_columns: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    summary: Callable[..., torch.Tensor] | None = None,
    surrogate: bool = False,
    example: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Callable[[TermFunction], TermFunction]:
    """Register a function (context, **options) -> (sum, count) under its own name: `@term(count="tokens")`.

    `count` says what the sum is divided by: "tokens", "rows", "pairs", "image_tokens", "all_tokens", or a function of
    the batch (and of `image_token_id` and the term's options, where it names them). `outputs` are what the stock forward
    is to return besides, such as "router_logits" (asked for by output_router_logits=True). A term whose value for one row
    depends on the other rows of the step, as contrastive losses do, gives `summary`, (context, **options) -> (n, ...):
    `fit` runs it over the whole step first, and the term finds the result in `context.step_summary()`. `prepare` gives a bare model what the term asks of its class, a
    module of its own say, so that tests can run the term. The other arguments are those of `token_loss`.
    Raises TypeError without a count, ValueError for an unknown one or a name that is taken.
    """
    if bare or count is None:
        raise TypeError(
            "Write @hfcustom.term(count='tokens'): a term says what its sum is divided by, one of "
            f"{', '.join([*COUNTS, 'image_tokens'])}, or a function of the batch."
        )
    _check_count(count)

    def register(function: TermFunction) -> TermFunction:
        loss = Loss(
            function.__name__,
            function,
            kind="term",
            count=count,
            columns=tuple(columns),
            optional_columns=tuple(optional_columns),
            outputs=tuple(outputs),
            summary=summary,
            surrogate=surrogate,
            example=example or {},
            prepare=prepare,
        )
        _register(loss)
        return function

    return register


def _check_count(count: str | Count) -> None:
    if isinstance(count, str) and count not in (*COUNTS, "image_tokens"):
        cure = "Pass a function of the batch for another count."
        raise ValueError(unknown("count", count, [*COUNTS, "image_tokens"], cure))


def _register(loss: Loss) -> None:
    if _is_reserved(loss.name):
        raise ValueError(f"A loss cannot be named {loss.name!r}, which the log has already; rename the function.")
    if taken_options := set(SCHEDULE).intersection(loss.options()):
        option = sorted(taken_options)[0]
        raise ValueError(f"Loss {loss.name!r} has an option {option!r}, by which a config sets its weight; rename it.")
    taken = LOSSES.get(loss.name)
    if taken is not None and _origin(taken.function) != _origin(loss.function):
        raise ValueError(
            f"The loss name {loss.name!r} belongs to {_origin(taken.function)}; rename {_origin(loss.function)}."
        )
    LOSSES[loss.name] = loss


def check_metric_name(name: str) -> None:
    """Raise ValueError for a name under which the log has something else."""
    if _is_reserved(name) or name in LOSSES:
        raise ValueError(
            f"A recorded number cannot be named {name!r}, which the log has already; record another name."
        )


def _is_reserved(name: str) -> bool:
    return name in RESERVED or name.startswith("lr_") or name.endswith("_weighted")


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
