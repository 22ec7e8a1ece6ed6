"""Checks of other arithmetic: bfloat16, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from hfcustom.doctor.finding import Failed, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference, inputs_of
from hfcustom.ragged import RaggedImages

COARSE = 0.15  # of the largest logit: what 8 bits of mantissa cost a model of a few layers


@check(
    expected=f"finite logits in bfloat16, within {COARSE:.0%} of those in float32, and a finite loss",
    why="Checkpoints are bfloat16. A float32 tensor made in a seam meets a bfloat16 weight behind it, and that is an error.",
    cure="Make new tensors with the dtype and device of what comes in: x.new_full(...), or buffers of the module.",
)
def bf16(patient: Patient) -> str:
    """Run in bfloat16 what ran in float32."""
    model, batch = patient.model(), patient.batch([2, 1])
    with torch.no_grad():
        expected = model(**batch).logits
        found: Any = model.to(torch.bfloat16)(**_to_bf16(batch))
        loss = model.train()(**_to_bf16(batch)).loss
    if not (torch.isfinite(found.logits).all() and torch.isfinite(loss)):
        raise Failed(f"logits finite: {bool(torch.isfinite(found.logits).all())}, loss {float(loss):g}")
    change = difference(found.logits.float(), expected)
    measured = f"{change:.1%} of the logits, loss {float(loss):.3g}"
    if change > COARSE:
        raise Failed(measured)
    return measured


def _to_bf16(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in batch.items()}


@check(
    expected="the traced model has the logits of the eager one",
    why="What torch.compile traces is what runs; Python that it does not follow is left out or frozen as it was.",
    cure="Leave no state and no branch for torch.compiler.is_compiling() in the seams.",
)
def compiled(patient: Patient) -> str:
    """Trace with torch.compile, without generating code: backend="eager"."""
    model, inputs = patient.model(), inputs_of(patient.batch([1]))
    torch._dynamo.reset()
    scalars = not isinstance(
        model, RaggedImages
    )  # sizes read from tensors stay Python there: stock fails to trace them
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=scalars):
        expected = model(**inputs).logits
        found = torch.compile(model, backend="eager")(**inputs).logits
    torch._dynamo.reset()
    measured = f"{difference(found, expected):.1e} of the logits"
    if not difference(found, expected) <= ROUNDING:
        raise Failed(measured)
    return measured
