"""Checks of a training step: gradients reach what they should, however the step is cut, and nothing comes of nothing.

Letters: B rows, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from hfcustom.data.collate import Collator
from hfcustom.doctor.finding import Failed, check
from hfcustom.doctor.patient import ROUNDING, Patient, shorten
from hfcustom.losses import IGNORE
from hfcustom.parts import find_parts
from hfcustom.train import checkpoint_activations
from hfcustom.training.step_plan import plan_step

Step = tuple[float, dict[str, torch.Tensor]]  # the loss, and the gradients by name
CUTS = (4, 2, 1)  # rows of a micro-batch


def run_step(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> Step:
    """Run one optimiser step's forwards and backwards as fit() does, and keep its gradients."""
    model.train().zero_grad()
    plan = plan_step(model, batches, Accelerator(cpu=True))
    total = 0.0
    for batch, told in zip(batches, plan, strict=True):
        loss = model(**batch, **told).loss
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Step, expected: Step) -> tuple[float, float]:
    """Return how far losses and gradients lie apart, as shares of the expected ones."""
    loss = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-30)
    names = found[1].keys() | expected[1].keys()
    zero = torch.zeros(())
    apart = [(found[1].get(name, zero) - expected[1].get(name, zero)).norm() for name in names]
    size = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    return loss, float(torch.stack(apart).norm() / size.clamp(min=1e-30))


def _compare(found: Step, expected: Step, what: str, cure: str = "") -> str:
    loss, gradient = distance(found, expected)
    measured = f"{what}: {loss:.1e} of the loss, {gradient:.1e} of the gradient"
    if not (loss <= ROUNDING and gradient <= 10 * ROUNDING):  # NaN is not
        raise Failed(measured, cure)
    return measured


@check(
    expected="every trainable tensor gets a finite gradient other than zero, those that images and text never pass aside",
    why="A part without a gradient does not learn, and weight decay, or nothing, is all that happens to it.",
    cure="Remove detach(), no_grad() and .data on the way, use what you add, or freeze what is meant to stay.",
)
def gradients(patient: Patient) -> str:
    """Count, part by part, what is trainable, has a gradient, a zero one or none."""
    model = patient.model()
    grads = run_step(model, [patient.batch([3, 2, 1])])[1]
    part_map, known = find_parts(model), tuple(model.unreached())
    reached: dict[str, list[int]] = {}
    problems: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name.startswith(known):
            continue
        gradient, part = grads.get(name), part_map.part_of(name)
        problem = _problem(name, gradient)
        if gradient is not None and not gradient.any() and not problem:
            continue
        counts = reached.setdefault(part, [0, 0])
        counts[0] += not problem
        counts[1] += 1
        if problem:
            problems.setdefault(f"{part} {problem}", []).append(name)
    table = ", ".join(f"{part} {good} of {all_}" for part, (good, all_) in reached.items())
    if problems:
        lost = [part for part, (good, _) in reached.items() if not good and part in PLACES]
        said = [f"{what}: {shorten(names)}" for what, names in problems.items()]
        said += [f"the LoRA in {PLACES[part]} gets no gradient" for part in lost]
        raise Failed(f"{table}; {'; '.join(said)}")
    return table


PLACES = {"connector": "the connector", "language": "the language model", "vision": "the vision tower"}


def _problem(name: str, gradient: torch.Tensor | None) -> str:
    if gradient is None:
        return "never reached"
    if not torch.isfinite(gradient).all():
        return "not finite"
    return "" if gradient.any() or name.endswith("bias") else "zero"  # a bias of keys cancels in the softmax


@check(
    expected="4 rows x 1, 2 x 2 and 1 x 4 micro-batches have the same loss and the same gradient",
    why="A mean of means weighs short answers more: training changes with the batch size that a GPU happens to hold.",
    cure="Write the loss as a token loss or a term and leave dividing to hfcustom; add nothing to outputs.loss in forward.",
)
def accumulation(patient: Patient) -> str:
    """Cut the same four rows into micro-batches."""
    rows = [patient.row(count, seed) for seed, count in enumerate((1, 0, 2, 1))]
    collate, steps = Collator(patient.processor), []
    for size in CUTS:
        batches = [collate(rows[at : at + size]) for at in range(0, len(rows), size)]
        steps.append(run_step(patient.model(), batches))
    return "; ".join(
        _compare(step, steps[0], f"{len(rows) // size} x {size}", patient.corrections())
        for step, size in zip(steps[1:], CUTS[1:], strict=True)
    )


@check(
    expected="a loss of 0 and no gradient",
    why="A micro-batch whose answers were cut off has no labels; a NaN from it ends the run, anything else trains on nothing.",
    cure="Divide by what hfcustom counts, or by at least 1, and give a term with nothing to look at the value 0.",
)
def all_masked(patient: Patient) -> str:
    """Train on a batch without a label."""
    model, batch = patient.model(), patient.batch([1, 0])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    loss, grads = run_step(model, [batch])
    largest = max((float(gradient.abs().max()) for gradient in grads.values()), default=0.0)
    measured = f"loss {loss:g}, largest gradient {largest:g}"
    counts_labels = not any(model.loss_counts([batch]).values())
    if loss != loss or largest != largest or (counts_labels and (loss or largest)):
        raise Failed(measured)
    return measured + ("" if counts_labels else ", of losses that count other things than labels")


@check(
    expected="the same loss and the same gradient with activations recomputed",
    why="A layer that computes something else the second time gets the gradient of another model.",
    cure="Keep no state in a layer's forward, take no hook off before the backward pass, and draw no random numbers of your own.",
)
def checkpointing(patient: Patient) -> str:
    """Recompute the layers in the backward pass."""
    batch = patient.batch([2, 1])
    expected = run_step(patient.model(), [batch])
    model = patient.model()
    checkpoint_activations(model)
    return _compare(run_step(model, [batch]), expected, "recomputed")
