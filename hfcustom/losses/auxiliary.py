"""Terms for a head of the user's own on the language model's hidden states: what else a row is to tell.

hidden states (B, T, D) -> one vector a row of data (R, D) -> head -> (R, C) classes or (R, 1) numbers, against the batch's
`auxiliary_labels` (R,). The head is a module of the model's class, so that it is trained, saved and loaded with it.
Letters: B rows of a tensor, R rows of data, T text tokens, S tokens that are no padding, D hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hfcustom.losses.chunked import accumulation_dtype
from hfcustom.losses.context import LossContext, mean_rows
from hfcustom.losses.contract import IGNORE, Batch, count_rows, real_tokens, row_ids, term
from hfcustom.naming import unknown


def row_labels(batch: Batch) -> torch.Tensor:
    """Return the batch's auxiliary_labels, (R,); ValueError where they are missing, or not one a row of data."""
    labels = batch.get("auxiliary_labels")
    if labels is None:
        raise ValueError(
            "The batch has no auxiliary_labels: give the rows a column auxiliary_labels, and let "
            "Collator(processor, columns=['auxiliary_labels']) put it there, as fit() does by itself."
        )
    if tuple(labels.shape) != (count_rows(batch),):
        raise ValueError(
            f"auxiliary_labels are {tuple(labels.shape)}; they must be one number a row of data, ({count_rows(batch)},)."
        )
    return labels


def count_classes(batch: Batch) -> int:
    """Count rows that have a class: those whose label is not -100."""
    labels = row_labels(batch)
    if labels.is_floating_point():
        raise ValueError(
            f"auxiliary_classification needs whole numbers as auxiliary_labels, not {labels.dtype}: classes from 0, -100 for "
            "a row without one. Use auxiliary_regression for other numbers."
        )
    return int((labels != IGNORE).sum())


def count_numbers(batch: Batch) -> int:
    """Count rows that have a number: those whose label is not NaN."""
    return int((~row_labels(batch).isnan()).sum())


def add_head(model: Any, outputs: int) -> None:
    """Give a model a head of so many outputs, for tests."""
    model.auxiliary_head = nn.Linear(model.config.get_text_config().hidden_size, outputs)


@term(count=count_classes, columns=("auxiliary_labels",), prepare=partial(add_head, outputs=3))
def auxiliary_classification(
    context: LossContext, head: str = "auxiliary_head", pooling: str = "last"
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """-log softmax(head(h))_y of each row whose label y is not -100; the model's class defines the module `head`.

    h is the hidden state of the row's last token that is no padding, or with pooling="mean" the mean over all of them.
    Mind that the last one has read the answer. BERT's classification, https://arxiv.org/abs/1810.04805, section 4.1, at the
    end of the text instead of its beginning, since a causal language model has read the text only there.

    >>> from types import SimpleNamespace
    >>> model = nn.ModuleDict({"auxiliary_head": nn.Identity()})  # the hidden state is the logits
    >>> hidden = torch.tensor([[[5.0, 5.0], [1.0, 0.0]], [[3.0, 0.0], [9.0, 9.0]]])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> batch = {"labels": mask, "attention_mask": mask, "auxiliary_labels": torch.tensor([0, 1])}
    >>> context = SimpleNamespace(model=model, hidden_states=hidden, batch=batch)
    >>> auxiliary_classification(context)  # log(e + 1) - 1 = 0.3133, log(e^3 + 1) - 0 = 3.0486
    (tensor(3.3618), 2)
    """
    labels = row_labels(context.batch).to(context.hidden_states.device)
    keep = labels != IGNORE
    logits = _outputs(context, head, pooling)[keep]  # (n, C)
    wrong = labels[keep][(labels[keep] < 0) | (labels[keep] >= logits.shape[-1])]
    if len(wrong):
        raise ValueError(
            f"auxiliary_labels hold the class {int(wrong[0])}; {head!r} has {logits.shape[-1]} outputs, for the classes 0 to "
            f"{logits.shape[-1] - 1}. Mark rows without a class by -100, or give the head more outputs."
        )
    return F.cross_entropy(logits, labels[keep].long(), reduction="sum"), int(keep.sum())


@term(count=count_numbers, columns=("auxiliary_labels",), prepare=partial(add_head, outputs=1))
def auxiliary_regression(
    context: LossContext, head: str = "auxiliary_head", pooling: str = "last"
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """(head(h) - y)^2 of each row whose label y is not NaN; head and h as in `auxiliary_classification`.

    Least squares on one linear layer, as the regression reward models of HelpSteer2, https://arxiv.org/abs/2406.08673.

    >>> from types import SimpleNamespace
    >>> model = nn.ModuleDict({"auxiliary_head": nn.Identity()})
    >>> labels = torch.tensor([1.0, float("nan")])
    >>> batch = {"labels": torch.zeros(2, 2), "auxiliary_labels": labels}
    >>> hidden = torch.tensor([[[2.0], [4.0]], [[7.0], [7.0]]])
    >>> context = SimpleNamespace(model=model, hidden_states=hidden, batch=batch)
    >>> auxiliary_regression(context, pooling="mean")  # ((2 + 4) / 2 - 1)^2, the second row has no label
    (tensor(4.), 1)
    """
    labels = row_labels(context.batch).to(context.hidden_states.device)
    keep = ~labels.isnan()
    outputs = _outputs(context, head, pooling)  # (R, 1)
    if outputs.shape[-1] != 1:
        raise ValueError(
            f"{head!r} has {outputs.shape[-1]} outputs; auxiliary_regression needs one: nn.Linear(size, 1)."
        )
    return (outputs[keep, 0] - labels[keep].to(outputs)).square().sum(), int(keep.sum())


def _outputs(context: LossContext, head: str, pooling: str) -> torch.Tensor:
    """Apply the head to each row of data: (B, T, D) -> (R, C), float32 or better."""
    if pooling not in POOLINGS:
        raise ValueError(unknown("pooling", pooling, POOLINGS))
    hidden = context.hidden_states
    real = real_tokens(context.batch).to(hidden.device)  # (B, T)
    rows = row_ids(context.batch).to(hidden.device)[real]  # (S,)
    pooled = POOLINGS[pooling](hidden[real], rows, count_rows(context.batch))  # (R, D)
    outputs = _find_head(context.model, head)(pooled.to(hidden.dtype))  # (R, C)
    return outputs.to(accumulation_dtype(outputs))


def _find_head(model: nn.Module, head: str) -> nn.Module:
    try:
        return model.get_submodule(head)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {head!r}, which the auxiliary loss needs. Subclass it: in __init__(self, "
            f"config) call super().__init__(config), set self.{head} = nn.Linear(config.get_text_config().hidden_size, "
            "outputs), and end with self.post_init(); or name another of its modules by the option head."
        ) from None


def _last_of_rows(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the last value of each row, (S, D), (S,) -> (R, D); tokens of a row stand in reading order."""
    places = torch.arange(len(rows), device=rows.device)
    last = rows.new_zeros(num_rows).scatter_reduce(0, rows, places, "amax")  # (R,)
    return values[last]


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "last": _last_of_rows,
    "mean": mean_rows,
}
