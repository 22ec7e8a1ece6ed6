"""A frozen model beside the one that trains: the teacher of a distillation, the reference of a preference loss.

Neither is part of the trained model: not of its state dict, its parameters or what is saved. The reference is by default
the model itself with its adapter switched off, which costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM
    from hfcustom.losses.context import LossContext

Role = Literal["reference", "teacher"]

CURES = {
    "reference": "Train with LoRA, so that the reference is the model without its adapter; or call "
    "model.set_reference(other); or give the rows a column reference_log_probs.",
    "teacher": "Call model.set_teacher(other) with a larger model of the same tokenizer; or give the rows the columns "
    "teacher_ids and teacher_log_probs, its likeliest tokens.",
}


def check_companion(model: CustomVLM, other: Any, role: Role) -> None:
    """Raise TypeError or ValueError when a model cannot be the teacher or the reference of another."""
    from hfcustom.base import CustomVLM

    if not isinstance(other, CustomVLM):
        raise TypeError(f"The {role} is a {type(other).__name__}; load it with the custom class of its family.")
    if other is model:
        raise ValueError(f"A model cannot be its own {role}: it would train along. Pass copy.deepcopy(model).")


@torch.no_grad()
def frozen_context(model: CustomVLM, role: Role, batch: Mapping[str, Any], labels: torch.Tensor) -> LossContext:
    """Return what the teacher or reference of a model makes of a batch, in eval mode and without gradients."""
    other = model.companions.get(role)
    frozen: Callable[[], AbstractContextManager[Any]] = torch.no_grad
    if other is None:
        if role == "teacher" or not adapter_layers(model):
            raise ValueError(f"The configured loss needs a {role}, and {type(model).__name__} has none. {CURES[role]}")
        other, frozen = model, lambda: adapters_off(model)
    with frozen(), evaluating(other):
        context = other.loss_context(batch, labels)
    context.frozen = frozen
    return context


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the modules through which peft changes a model; none without peft."""
    names = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
    return [module for module in model.modules() if any(base.__name__ in names for base in type(module).__mro__)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters and the modules trained with them off, without gradients; requires_grad is as before afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = adapter_layers(model)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
