"""Any registered loss, ready to run in a tiny model: its options, the columns it wants, its teacher; and its naive value."""

from __future__ import annotations

from typing import Any

import torch
from conftest import Family

from hfcustom.losses import IGNORE, Teacher, find_loss


def loss_spec(family: Family, loss: Any) -> Any:
    """Return the config of a loss with its example options; what is no name is returned as it is."""
    if not isinstance(loss, str) or loss == "stock":
        return loss
    return {loss: {"weight": 1.0, **find_loss(loss).example_options(family.processor)}}


def loss_model(family: Family, loss: Any, **config: Any) -> Any:
    """Return a tiny model with a loss, a name or a mapping, and the teacher it may need."""
    model = family.model(loss=loss_spec(family, loss), **config)
    if any("teacher" in item.loss.inputs for item in model.losses()):
        model.set_teacher(family.model(seed=1))
    return model


def loss_batch(family: Family, images: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch with a row for each number of images, and every column that a shipped loss wants."""
    batch = family.batch(images)
    ids = batch["input_ids"]
    return {**batch, "token_weights": 0.5 + (ids + torch.arange(ids.shape[1])) % 3}


def naive_mean(family: Family, model: Any, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a token loss from full logits: what the chunked path must equal."""
    loss, targets = find_loss(name), batch["labels"][:, 1:]
    keep = targets != IGNORE
    logits = _logits(model, batch)[:, :-1][keep]  # (M, V)
    teacher = _logits(family.model(seed=1), batch)[:, :-1][keep]
    inputs = {
        "previous_tokens": _previous_tokens(batch["labels"]),
        "teacher": Teacher(logits.shape[-1], logits=teacher.detach()),
        "token_weights": batch["token_weights"][:, 1:][keep],
    }
    own = {key: inputs[key] for key in loss.inputs}
    values = loss.function(logits, targets[keep], **own, **loss.example_options(family.processor))
    return values.sum() / (own["token_weights"].sum() if loss.count == "token_weights" else len(values))


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "token_weights")}
    return model.compute_logits(model.model(**inputs, use_cache=False).last_hidden_state).float()  # (B, T, V)


def _previous_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return what was said before each supervised token, token by token: (B, T) -> (M, L)."""
    before = []
    for row in labels[:, 1:].tolist():
        answer = [token for token in row if token != IGNORE]
        before += [answer[:at] for at in range(len(answer))]
    longest = max(map(len, before))
    return torch.tensor([tokens + [IGNORE] * (longest - len(tokens)) for tokens in before])
