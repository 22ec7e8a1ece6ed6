"""Checks of what a class is: its parent where nothing is overridden, and another model where something is.

Letters: B rows, T text tokens, V vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch

from hfcustom.base import SEAM_METHODS
from hfcustom.doctor.finding import Failed, Skipped, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference

COMPUTING = (*SEAM_METHODS, "compute_logits", "forward")  # methods that a training step must come through
Outputs = tuple[torch.Tensor, torch.Tensor]  # logits (B, T, V), loss ()


def run(model: Any, batch: Mapping[str, torch.Tensor]) -> Outputs:
    """Return the logits and the loss of a batch."""
    with torch.no_grad():
        outputs = model(**batch)
    return outputs.logits, outputs.loss


@check(
    expected="logits and stock loss equal the stock class's bit for bit",
    why="What differs with every override off was changed in passing: in __init__, in a config value, in a replaced part. "
    "The stock class, and every server that runs it, computes without that change.",
    cure="Move the change into a transform_* method, a connector or a loss; leave the parts and the config of the parent as "
    "__init__ finds them.",
)
def parity(patient: Patient) -> str:
    """Compare with the parent when the overrides are switched off."""
    model = patient.model()
    if lost := set(model.stock_tensor_names()) - set(model.state_dict()):
        raise Skipped(f"the class takes parts of the stock graph out, such as {sorted(lost)[0]}: there is no way back")
    off = patient.variant(model, _stock_methods(patient, patient.own_methods()), connector=None, loss="stock")
    batch = patient.batch([2, 1], off.match_processor(patient.module.tiny_processor()))
    (logits, loss), (expected, stock_loss) = run(off, batch), run(patient.stock(off), batch)
    found = (difference(logits, expected), difference(loss, stock_loss))
    measured = "relative difference {:.1e} in logits, {:.1e} in loss".format(*found)
    if any(found):
        raise Failed(measured)
    return measured


@check(
    expected="every override is called in a training step, and every seam changes the logits or the loss",
    why="An override that nobody calls, or that changes nothing, trains the stock model under another name.",
    cure="Check the spelling of the method, call super() where its result is wanted, and give a new module a start other "
    "than one that multiplies by zero for good.",
)
def overrides(patient: Patient) -> str:
    """Say which seams are overridden, whether they are called, and what each changes when the others stay."""
    methods = patient.own_methods()
    _refuse_misspelt(patient, methods)
    model, calls = patient.model(), dict.fromkeys((name for name in COMPUTING if name in methods), 0)
    batch = patient.batch([2, 1])
    with_all = run(model, batch)
    run(patient.variant(model, _counted(patient, calls)), batch)
    effects = {name: _effect(patient, model, with_all, {name: methods[name]}) for name in calls}
    if model.config.connector is not None:
        effects["connector"] = _effect(patient, model, with_all, {}, connector=None)
    if model.config.loss not in ("cross_entropy", "stock"):
        effects["loss"] = _effect(patient, model, with_all, {}, loss="cross_entropy")
    lines = [f"{name}: {_in_words(effect)}" for name, effect in effects.items()]
    if patient.loss_left_out:
        lines.append(f"loss: not examined, {patient.loss_left_out}")
    idle = [f"{name} is never called" for name, count in calls.items() if not count]
    idle += [
        f"{name} changes neither logits nor loss"
        for name, effect in effects.items()
        if not any(effect) and calls.get(name, 1) and name != "forward"  # which may have come to look only
    ]
    if idle:
        raise Failed("; ".join([*idle, *lines]))
    return "; ".join(lines) or "nothing is overridden"


def _stock_methods(patient: Patient, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the family's own methods of these names."""
    return {name: getattr(patient.family_class, name) for name in names if name in dir(patient.family_class)}


def _counted(patient: Patient, calls: dict[str, int]) -> dict[str, Any]:
    """Return methods that count their calls."""

    def counting(name: str) -> Any:
        own = getattr(patient.model_class, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return own(self, *args, **kwargs)

        return method

    return {name: counting(name) for name in calls}


def _effect(
    patient: Patient, model: Any, with_all: Outputs, methods: Mapping[str, Any], **settings: Any
) -> tuple[float, float]:
    """Return what switching one override off changes in logits and loss; a connector may change their number, too."""
    without = patient.variant(model, _stock_methods(patient, methods), **settings)
    processor = without.match_processor(patient.module.tiny_processor())
    logits, loss = run(without, patient.batch([2, 1], processor))
    here, loss_here = with_all
    return (difference(here, logits) if here.shape == logits.shape else float("inf")), difference(loss_here, loss)


def _in_words(effect: tuple[float, float]) -> str:
    logits, loss = effect
    tokens = "another number of image tokens" if logits == float("inf") else f"{logits:.1e} of the logits"
    return f"{tokens}, {loss:.1e} of the loss"


def _refuse_misspelt(patient: Patient, methods: Mapping[str, Any]) -> None:
    for name in methods:
        if name in dir(patient.family_class):
            continue
        near = difflib.get_close_matches(name, COMPUTING, n=1, cutoff=0.85)
        if near or name.startswith("transform_"):
            meant = near[0] if near else ", ".join(SEAM_METHODS)
            raise Failed(f"{name} overrides nothing and is never called", f"Did you mean {meant}? Rename it.")


@check(
    expected="another picture in any place changes the logits of words behind it",
    why="A model that answers without looking passes every other check, and its loss goes down on questions alone.",
    cure="Follow the picture: transform_vision_features and the connector must pass on what they get, in eval mode too.",
)
def image_sensitivity(patient: Patient) -> str:
    """Swap one picture at a time and look at the logits of everything but image tokens."""
    model, shown = patient.model(), patient.batch([2])
    words = shown["input_ids"] != model.placeholder_token_id  # (1, T)
    logits = run(model, shown)[0][words]  # (M, V)
    changes = [difference(run(model, patient.batch([2], swapped=at))[0][words], logits) for at in range(2)]
    measured = ", ".join(f"picture {at}: {change:.1e} of the logits" for at, change in enumerate(changes))
    if min(changes) < ROUNDING / 10:
        raise Failed(measured)
    return measured
