"""LossContext: what a term may look at, and what it may ask for at the price of one chunk of logits.

hidden (B, T, D), labels (B, T) -> log-probabilities of the supervised tokens (M,), sums a row of data (R,), logits of a
few tokens of the vocabulary (M, K), and the same of a frozen reference.
Letters: B rows of a tensor, R rows of data, T text tokens, M supervised tokens, N image tokens, P crops, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hfcustom.losses.chunked import Head, accumulation_dtype, logits_of, token_log_probs
from hfcustom.losses.contract import IGNORE, Batch, check_metric_name, count_rows, row_ids, row_tokens
from hfcustom.losses.frozen import frozen_context

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM


@dataclass(frozen=True)
class Supervised:
    """The M supervised tokens of a batch, in reading order."""

    hidden: torch.Tensor  # (M, D) that predicts each
    targets: torch.Tensor  # (M,)
    rows: torch.Tensor  # (M,) row of data of each


@dataclass(frozen=True)
class StepSummary:
    """What a term's `summary` returned for every row of the optimiser step, and where this batch's rows stand in it."""

    values: torch.Tensor  # (n of the step, ...), without gradient
    start: int

    def with_own(self, own: torch.Tensor) -> torch.Tensor:
        """Return the step's values with this batch's own, which carry gradients, in their place."""
        return torch.cat([self.values[: self.start].to(own), own, self.values[self.start + len(own) :].to(own)])


def mean_rows(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Average over each row of data, (S, ...), (S,) -> (R, ...), float32 or better; 0 for a row that has nothing."""
    values = values.to(accumulation_dtype(values))
    sums = values.new_zeros(num_rows, *values.shape[1:]).index_add(0, rows, values)  # (R, ...)
    counts = torch.bincount(rows, minlength=num_rows).clamp(min=1)
    return sums / counts.view(-1, *[1] * (values.ndim - 1)).to(sums)


@dataclass
class LossContext:
    """What a term may look at; tensors carry gradients."""

    model: CustomVLM
    batch: Batch  # what forward() was given
    labels: torch.Tensor  # (B, T), -100 where nothing is supervised
    hidden_states: torch.Tensor  # (B, T, D) as the head gets them
    outputs: Any  # the stock class's output object
    image_mask: torch.Tensor | None = None  # (B, T)
    vision_features: torch.Tensor | None = None  # (P, patches, D_vision)
    image_features: torch.Tensor | None = None  # (P, N, D), after the connector
    summaries: Mapping[str, StepSummary] = field(default_factory=dict)
    running: str = ""  # the name of the term that is being evaluated
    frozen: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which this context's head computes
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # what terms recorded: sum and count, (2,)

    @cached_property
    def supervised(self) -> Supervised:
        """The supervised tokens: position t predicts token t + 1."""
        return self.select(self.labels)

    def select(self, labels: torch.Tensor) -> Supervised:
        """Return the tokens that `labels` (B, T) supervise."""
        targets = labels[:, 1:].to(self.hidden_states.device)  # (B, T-1)
        keep = targets != IGNORE
        rows = row_ids(self.batch).to(targets.device)[:, 1:]
        return Supervised(self.hidden_states[:, :-1][keep], targets[keep], rows[keep])

    @cached_property
    def head(self) -> Head:
        """The model's head."""
        return self.model.loss_head()

    @cached_property
    def token_log_probs(self) -> torch.Tensor:
        """Log p of each supervised token, (M,), without the logits of the whole batch."""
        with self.frozen():
            return token_log_probs(self.head, self.supervised.hidden, self.supervised.targets)

    @property
    def num_rows(self) -> int:
        """R, the rows of data in this batch."""
        return count_rows(self.batch)

    def sum_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a value a supervised token for each row of data: (M,) -> (R,)."""
        return values.new_zeros(self.num_rows).index_add(0, self.supervised.rows, values)

    @cached_property
    def row_log_probs(self) -> torch.Tensor:
        """Log p of each row's supervised tokens together, (R,)."""
        return self.sum_rows(self.token_log_probs)

    @cached_property
    def row_tokens(self) -> torch.Tensor:
        """The number of each row's supervised tokens, (R,)."""
        return row_tokens(self.batch).to(self.hidden_states.device)

    def record(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor) -> None:
        """Report a number beside the running term: its mean over the step is logged as `<term>_<name>`.

        Give the sum and the count of this batch; tensors stay tensors, as asking a device for their values would wait for it.
        """
        name = f"{self.running}_{name}"
        check_metric_name(name)
        device = self.hidden_states.device
        values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in (total, count)])
        values = values.detach()  # (2,)
        self.metrics[name] = self.metrics[name] + values if name in self.metrics else values

    def logits_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the supervised tokens' logits of K tokens of the vocabulary: (K,) -> (M, K), float32 or better."""
        with self.frozen():
            return logits_of(self.head, self.supervised.hidden, ids)

    @cached_property
    def reference(self) -> LossContext:
        """The same batch seen by the frozen reference: the model given as such, else this one with its adapter off."""
        return frozen_context(self.model, "reference", self.batch, self.labels)

    @cached_property
    def reference_log_probs(self) -> torch.Tensor:
        """Log p of each row's supervised tokens under the reference, (R,): the batch's cached column, else computed."""
        cached = self.batch.get("reference_log_probs")
        found = self.reference.row_log_probs if cached is None else cached
        if found.shape != (self.num_rows,):
            raise ValueError(
                f"The batch's reference_log_probs are {tuple(found.shape)} for {self.num_rows} rows; they are one number a "
                "row, log p of all its supervised tokens: hfcustom.cache_reference makes them."
            )
        return found.to(self.hidden_states.device)

    @property
    def router_logits(self) -> tuple[torch.Tensor, ...]:
        """The router logits (B * T, experts) of each mixture-of-experts layer; ValueError for a dense model."""
        found = self.outputs.get("router_logits")
        if not found:
            raise ValueError(
                f"Term {self.running!r} needs router logits, but {self.model.stock_class().__name__} returned none: it is no "
                "mixture of experts, or this version of transformers does not record them."
            )
        for logits in found:
            if logits.ndim != 2 or len(logits) != self.labels.numel():
                raise ValueError(
                    f"Term {self.running!r} needs router logits (B * T = {self.labels.numel()}, experts) of every layer, but "
                    f"transformers recorded {tuple(logits.shape)}. Keep adapters off the routers."
                )
        sums = found[0].detach().sum(-1)
        if found[0].shape[-1] > 1 and bool((found[0] >= 0).all() & ((sums - 1).abs() < 1e-2).all()):  # so does Gemma 4
            raise ValueError(
                f"Term {self.running!r} needs router logits, but {self.model.stock_class().__name__} records probabilities, "
                "which sum to 1, under that name. Leave the term out for this family."
            )
        self.check_trains("router logits", found)
        return tuple(found)

    def check_trains(self, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """Raise ValueError when the model is trained but none of the tensors that a term looks at is."""
        if self.hidden_states.requires_grad and not any(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                f"Term {self.running!r} would train nothing, because the {what} carry no gradient: train a part that they "
                "depend on, and with gradient checkpointing choose use_reentrant=False, as fit() does."
            )

    @property
    def features(self) -> torch.Tensor:
        """image_features; ValueError when the batch has no image."""
        if self.image_features is None:
            raise ValueError(f"Term {self.running!r} needs image features, but no row of this batch has an image.")
        return self.image_features

    @property
    def image_rows(self) -> torch.Tensor:
        """The row of data of each image token, (P * N,): that of its placeholder, unless the family says otherwise."""
        rows = self.model.image_token_rows(self.batch)
        if rows is None:
            assert self.image_mask is not None, "a row with an image has placeholders"
            rows = row_ids(self.batch)[self.image_mask.to(self.labels.device)]
        return rows.to(self.hidden_states.device)

    def step_summary(self) -> StepSummary | None:
        """Return what the running term's `summary` gave for the whole step; None where this batch is the step."""
        return self.summaries.get(self.running)
