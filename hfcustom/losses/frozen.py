"""A frozen model beside the one that trains: the teacher of a distillation, the reference of a preference loss.

Neither is part of the trained model: not of its state dict, its parameters or what is saved. The reference is by default
the model itself with its adapter switched off, which costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hfcustom.parts import is_adapter, is_trained_copy

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM
    from hfcustom.losses.context import LossContext

Role = Literal["reference", "teacher"]

CURES = {
    "reference": "Train with LoRA, so that the reference is the model without its adapter; or call "
    "model.set_reference(other), as recipes/finetune.py does with --reference; or give the rows a column "
    "reference_log_probs.",
    "teacher": "Call model.set_teacher(other), as recipes/finetune.py does with --teacher, for a model of the same "
    "tokenizer; or give the rows the columns teacher_ids and teacher_log_probs, its likeliest tokens.",
}


def check_companion(model: CustomVLM, other: Any, role: Role) -> None:
    """Raise TypeError or ValueError when a model cannot be the teacher or the reference of another."""
    from hfcustom.base import CustomVLM

    if not isinstance(other, CustomVLM):
        raise TypeError(f"The {role} is a {type(other).__name__}; load it with the custom class of its family.")
    if other is model:
        raise ValueError(f"A model cannot be its own {role}: it would train along. Pass copy.deepcopy(model).")


def frozen_context(model: CustomVLM, role: Role, batch: Mapping[str, Any], labels: torch.Tensor) -> LossContext:
    """Return what the teacher or reference of a model makes of a batch, in eval mode and without gradients.

    Raises ValueError where there is none, and where the model without its adapter would not stay what it is.
    """
    other: Any = model.companions.get(role)
    if other is None:
        if role == "teacher" or not adapter_layers(model):
            raise ValueError(f"The configured loss needs a {role}, and {type(model).__name__} has none. {CURES[role]}")
        _check_only_adapters_train(model)
    elif other.device != labels.device:
        other.to(labels.device)  # it is no part of the model, and has not moved with it
    frozen = partial(frozen_pass, model if other is None else other, with_adapter=other is not None)
    with frozen() as seen:
        context = seen.loss_context(model.stock_inputs(batch), labels)
    context.batch, context.frozen = {**batch, "labels": labels}, frozen
    return context


@contextmanager
def frozen_pass(model: CustomVLM, with_adapter: bool) -> Iterator[CustomVLM]:
    """Let a model compute in eval mode and without gradients; afterwards, and after an error, all is as it was."""
    with torch.no_grad(), evaluating(model), nullcontext() if with_adapter else adapters_off(model):
        yield model


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the modules through which peft changes a model; none without peft."""
    return [module for module in model.modules() if is_adapter(module) or is_trained_copy(module)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters, and the modules trained with them, off; those that were on are switched on again.

    peft's enable_adapters() would change requires_grad of every adapter weight besides, of inactive adapters too, in the
    middle of a forward pass; the flag that its layers read is all that is wanted here.
    """
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _check_only_adapters_train(model: CustomVLM) -> None:
    """Refuse a reference that would train along."""
    frozen = ("base_layer.", "original_module.")  # what peft's modules hold of the model itself
    own = {
        id(parameter)
        for layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if not name.startswith(frozen)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise ValueError(
                f"The reference is the model without its adapter, but {name} is trained outside of the adapter, so that the "
                f"reference would train along. Name its part in lora(model, train=...). {CURES['reference']}"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
