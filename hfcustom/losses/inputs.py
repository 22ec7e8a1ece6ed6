"""What a token loss may get beside logits and targets: tensors of the batch, and what can be derived from it.

`@token_loss(inputs=("token_weights",))` -> function(logits (M, V), targets (M,), token_weights (M,)). INPUTS lists what
is derived; any other name is a tensor (B, T, ...) of the batch, taken at the supervised tokens.
Letters: B rows, T text tokens, M supervised tokens, K most likely tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfcustom.losses.chunked import Head
from hfcustom.losses.context import LossContext, Supervised
from hfcustom.losses.contract import IGNORE
from hfcustom.losses.frozen import frozen_context
from hfcustom.naming import unknown


def token_inputs(
    context: LossContext, labels: torch.Tensor, chosen: Supervised, names: Iterable[str]
) -> dict[str, Any]:
    """Return the named inputs for the tokens that `labels` (B, T) supervise."""
    return {
        name: INPUTS[name](context, labels, chosen) if name in INPUTS else _from_batch(context, labels, name)
        for name in names
    }


def _from_batch(context: LossContext, labels: torch.Tensor, name: str) -> torch.Tensor:
    tensor = context.batch.get(name)
    if tensor is None:
        tensors = [key for key, value in context.batch.items() if isinstance(value, torch.Tensor)]
        cure = (
            f"Give the rows a column {name!r} with a number for each label token: fit() puts it into the batch, elsewhere "
            f"Collator(processor, token_columns=[{name!r}]) does."
        )
        raise ValueError(unknown("tensor of the batch, which a token loss needs:", name, [*tensors, *INPUTS], cure))
    if tensor.shape[:2] != labels.shape:
        raise ValueError(
            f"The batch's {name!r} is {tuple(tensor.shape)}; a token loss needs one entry a token, (B, T, ...) = "
            f"{tuple(labels.shape)} first."
        )
    keep = labels[:, 1:] != IGNORE
    return tensor[:, 1:].to(labels.device)[keep].to(context.hidden_states.device)  # (M, ...)


# ---- a teacher ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """What a teacher says at M tokens: all of its distribution, from its hidden states, or the K likeliest, cached."""

    width: int  # V of the student; a teacher's logits beyond it are padding
    hidden: torch.Tensor | None = None  # (M, D of the teacher)
    head: Head | None = None
    logits: torch.Tensor | None = None  # (M, V), of one chunk
    ids: torch.Tensor | None = None  # (M, K)
    top_log_probs: torch.Tensor | None = None  # (M, K)

    def __getitem__(self, rows: slice) -> Teacher:
        names = ("hidden", "logits", "ids", "top_log_probs")
        own = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value[rows] for name, value in own.items() if value is not None})

    @torch.no_grad()
    def evaluated(self) -> Teacher:
        """Return the same with the logits of these tokens, where they can be had."""
        if self.hidden is None or self.logits is not None:
            return self
        assert self.head is not None
        logits = self.head.logits(self.hidden)
        if logits.shape[-1] < self.width:
            raise ValueError(
                f"The teacher's head has {logits.shape[-1]} logits, the student's {self.width}: a teacher must know every "
                "token of the student. Take one with the same tokenizer."
            )
        return replace(self, logits=logits[:, : self.width].float())

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        """Return log p of the whole vocabulary, (M, V)."""
        if self.logits is None:
            kept = 0 if self.ids is None else self.ids.shape[-1]
            raise ValueError(
                f"This batch caches the teacher's {kept} likeliest tokens, but the loss needs its whole distribution: use "
                "topk_distillation, or let the teacher run along (model.set_teacher)."
            )
        return (self.logits / temperature).log_softmax(-1)

    def top(self, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and log p (of the whole vocabulary's mass, at the temperature) of the k likeliest: (M, k) twice.

        Raises ValueError for more than are cached, and for a temperature that a cache cannot know the sum of.
        """
        if self.logits is not None:
            top = self.log_probs(temperature).topk(k, -1)
            return top.indices, top.values
        assert self.ids is not None and self.top_log_probs is not None
        if k > self.ids.shape[-1] or temperature != 1.0:
            raise ValueError(
                f"The cache holds the teacher's {self.ids.shape[-1]} likeliest tokens at temperature 1; k={k} at temperature "
                f"{temperature} cannot be had from it. Choose a smaller k, or let the teacher run along (model.set_teacher)."
            )
        return self.ids[:, :k], self.top_log_probs[:, :k].float()


def _teacher(context: LossContext, labels: torch.Tensor, chosen: Supervised) -> Teacher:
    width = context.head.vocabulary_size(chosen.hidden)
    if context.batch.get("teacher_ids") is not None:
        ids, log_probs = (_from_batch(context, labels, f"teacher_{name}") for name in ("ids", "log_probs"))
        return Teacher(width, ids=ids, top_log_probs=log_probs)
    other = frozen_context(context.model, "teacher", context.batch, context.labels)
    return Teacher(width, other.select(labels).hidden, other.head)


def _previous_tokens(context: LossContext, labels: torch.Tensor, chosen: Supervised) -> torch.Tensor:
    """Return the supervised tokens that come before each one in its row, (M, longest answer), -100 beyond them."""
    rows, targets = chosen.rows, chosen.targets
    counts = torch.bincount(rows, minlength=context.num_rows)  # (R,)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(targets), device=targets.device) - starts[rows]  # (M,) in its own row
    before = torch.arange(int(counts.max()), device=targets.device)[None]  # (1, L)
    taken = targets[(starts[rows][:, None] + before).clamp(max=len(targets) - 1)]  # (M, L)
    return taken.masked_fill(before >= place[:, None], IGNORE)


INPUTS: dict[str, Callable[[LossContext, torch.Tensor, Supervised], Any]] = {
    "previous_tokens": _previous_tokens,
    "teacher": _teacher,
}
