"""trl's trainers with a custom model's own forward, and SFTTrainer with its loss: `honour_model(trainer)`.

trl (since 1.16) replaces `model.forward` on the instance and has `compute_loss` run the inner model and a fused head, so
neither the class's forward nor its loss is called (trl/trainer/utils.py, add_fused_lm_head). Here the forward is put
back. For SFTTrainer the loss is computed, divided and evaluated by transformers.Trainer, which trl's trainer inherits
from. DPOTrainer keeps its own loss, which is what it is chosen for; its log probabilities come from the class's forward
(hfcustom/trl_log_probs.py), those of the reference model too.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers import Trainer

from hfcustom.base import CustomVLM
from hfcustom.losses import count_all_tokens
from hfcustom.parts import unwrap
from hfcustom.trainer_callback import LossCallback
from hfcustom.trl_log_probs import is_read_from_forward, read_from_forward

OWN_LOSSES = {  # what trl's other trainers compute, and what to do instead
    "GRPOTrainer": "a policy loss of completions that it samples, which a loss of labels cannot stand in for",
    "KTOTrainer": "a preference loss of rated answers. Use hfcustom's loss 'dpo' with fit() or SFTTrainer",
    "RLOOTrainer": "a policy loss of completions that it samples, which a loss of labels cannot stand in for",
    "RewardTrainer": "a ranking loss of a score head. Train it on a stock ...ForSequenceClassification class",
}


def honour_model(trainer: Any) -> Any:
    """Make a trl SFTTrainer call its custom model's forward and loss, a DPOTrainer its forward; use it before train().

    Named losses are added to the log (hfcustom/trainer_callback.py); trl's entropy and token accuracy, which its fused
    head computes, are not under SFTTrainer. Raises TypeError for another trainer, for a subclass with a compute_loss of
    its own and for a model that is not custom; ValueError for arguments of the trainer, or under DPOTrainer a loss of the
    model, that would have no effect.
    """
    library = _check_trainer(trainer)
    core = unwrap(trainer.model)
    if not isinstance(core, CustomVLM):
        raise TypeError(
            f"{type(core).__name__} is no custom model; load it with its family's custom class (hfcustom.load_family), "
            "or leave honour_model() out."
        )
    if library.__name__ == "DPOTrainer":
        return _honour_dpo(trainer, core)
    _check_arguments(trainer)
    _restore_forward(core)
    trainer.compute_loss = MethodType(_compute_loss, trainer)
    trainer.prediction_step = MethodType(Trainer.prediction_step, trainer)
    LossCallback.add_to(trainer)
    return _checked(trainer)


def _honour_dpo(trainer: Any, core: CustomVLM) -> Any:
    if core.config.loss != "cross_entropy":
        raise ValueError(
            f"loss={core.config.loss!r} has no effect: DPOTrainer computes its own, of both answers' log probabilities. Set "
            "model.config.loss = 'cross_entropy', or train with fit() and loss={'dpo': 1.0, ...}, where losses add up."
        )
    for model in filter(None, (core, trainer.ref_model)):
        _restore_forward(unwrap(model))
        read_from_forward(unwrap(model))
    return _checked(trainer)


def _checked(trainer: Any) -> Any:
    if reasons := why_bypassed(trainer):
        raise RuntimeError(
            f"The model is still bypassed: {'; '.join(reasons)}. This trl is newer than the adapter knows; use "
            "transformers.Trainer or hfcustom.fit()."
        )
    return trainer


def why_bypassed(trainer: Any) -> list[str]:
    """Return why a live trainer would not use its model's own forward and loss, one reason a line; empty if it would.

    Read from the trainer, without running it; a Trainer subclass of your own is trusted to call super().compute_loss. Of a
    DPOTrainer under honour_model, whose loss is its purpose, the forward counts alone.
    """
    core, reasons = unwrap(trainer.model), []
    library = _trl_class(trainer)
    if library is not None and library.__name__ == "DPOTrainer" and is_read_from_forward(core):
        return []
    if library is not None and not _is_honoured(trainer):
        reasons.append(f"compute_loss of trl's {library.__name__} computes a loss of its own from the inner model")
    if (place := _replaced_by(core)) and (place != "trl" or reasons):
        reasons.append(f"{type(core).__name__}.forward is replaced on the instance by {place}")
    if trainer.compute_loss_func is not None:
        reasons.append("compute_loss_func takes the labels away from the model")
    if trainer.label_smoother is not None:
        reasons.append("label_smoothing_factor takes the labels away from the model")
    return reasons


def _check_trainer(trainer: Any) -> type:
    """Return which of trl's trainers it is."""
    if not isinstance(trainer, Trainer):
        raise TypeError(f"honour_model() takes a trl SFTTrainer or DPOTrainer, not a {type(trainer).__name__}.")
    library = _trl_class(trainer)
    if library is None:
        raise TypeError(
            f"{type(trainer).__name__} is a transformers.Trainer, which calls the model's own forward and loss as it is; "
            "leave honour_model() out. hfcustom.LossCallback.add_to(trainer) logs the named losses."
        )
    if library.__name__ == "DPOTrainer":
        return library
    if library.__name__ != "SFTTrainer":
        own = OWN_LOSSES.get(library.__name__, "a loss of its own. Use fit() or SFTTrainer with a loss of hfcustom")
        raise TypeError(f"honour_model() takes a trl SFTTrainer or DPOTrainer; {library.__name__} computes {own}.")
    for method in ("compute_loss", "prediction_step"):
        owner = next(cls for cls in type(trainer).__mro__ if method in vars(cls))
        if owner is not library and issubclass(owner, library):
            raise TypeError(
                f"{owner.__name__}.{method} would be replaced; remove it, or have it call transformers.Trainer.{method}"
                "(self, ...) in place of super() and leave honour_model() out."
            )
    return library


def _check_arguments(trainer: Any) -> None:
    args, smoothing = trainer.args, trainer.args.label_smoothing_factor
    without_effect = {
        "compute_loss_func": (trainer.compute_loss_func, "register it with @hfcustom.token_loss"),
        "label_smoothing_factor": (smoothing, f"use loss={{'label_smoothing': {{'epsilon': {smoothing}}}}}"),
        "loss_type": (args.loss_type if args.loss_type != "nll" else None, "name the model's loss instead"),
        "router_aux_loss_coef": (args.router_aux_loss_coef, "add a term to the model's loss"),
    }
    for name, (value, cure) in without_effect.items():
        if value:
            raise ValueError(f"{name}={value!r} has no effect when the model computes its own loss; {cure}.")


def _trl_class(trainer: Any) -> type | None:
    """Return the class of trl that a trainer is of, asked without importing trl."""
    return next((cls for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "trl"), None)


def _is_honoured(trainer: Any) -> bool:
    method = vars(trainer).get("compute_loss")
    return isinstance(method, MethodType) and method.__func__ is _compute_loss


def _replaced_by(core: Any) -> str | None:
    """Return the package whose function stands in for the class's forward on this instance.

    What accelerate puts around a forward (autocast, the hooks of a device map) calls it and is passed over.
    """
    layer: Any = vars(core).get("forward")
    while layer is not None:
        layer = layer.__func__ if isinstance(layer, MethodType) else layer
        if (package := _package(layer)) not in ("accelerate", "torch"):
            return None if layer is type(core).forward else package
        layer = vars(layer).get("__wrapped__")
    return None


def _package(layer: Any) -> str:
    """Return the package that a function was written in; functools.wraps changes what it says of itself."""
    function = layer.func if isinstance(layer, partial) else layer
    module = function.__globals__["__name__"] if inspect.isfunction(function) else type(function).__module__
    return str(module).partition(".")[0]


def _restore_forward(core: Any) -> None:
    """Put back the forward that trl's fused head stands in for, so that a deep copy of the model runs its own.

    Under a wrapper it stays; there it passes on every call that does not ask for the fused head.
    """
    forward = vars(core).get("forward")
    if isinstance(forward, MethodType) and _package(forward.__func__) == "trl":
        original = inspect.getclosurevars(forward.__func__).nonlocals["original_forward"]
        del core.forward
        if core.forward != original:  # a hook of accelerate's
            core.forward = original


def _compute_loss(
    self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """Compute the loss as transformers.Trainer does, and keep trl's count of the tokens seen in its log."""
    mode = "train" if self.model.training else "eval"
    if mode == "train":
        tokens = torch.tensor(count_all_tokens(inputs), device=self.args.device)
        self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item() // self._tp_size
    self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
    return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
