"""Checks of adapters and quantised weights: LoRA there and back, and 8 and 4 bits where they were planned."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from hfcustom import adapt
from hfcustom.doctor.finding import Failed, Skipped, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference, inputs_of

RATE, STEPS = 1e-2, 2
COARSE = {"8bit": 0.1, "4bit": 0.6}  # of the largest logit: rounding, not nonsense


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


@check(
    expected="the adapter trains, and has the same logits reloaded and merged",
    why="What an adapter does not hold is lost with the process that trained it, and merged weights are what is served.",
    cure="Wrap bare Parameters of your own into a small nn.Module, and use a Linear by calling it, not by its weight.",
)
def lora(patient: Patient) -> str:
    """Attach, train two steps, save, reload, merge."""
    base, folder = patient.model(), patient.folder / "lora"
    base.save_pretrained(folder / "base")
    wrapped = adapt.lora(patient.model_class.from_pretrained(folder / "base"), rank=2)
    batch = patient.batch([1, 0])
    moved = _train(wrapped, batch)
    wrapped.save_pretrained(folder / "adapter")
    inputs = inputs_of(batch)
    trained = _logits(wrapped, inputs)
    options = {"model_class": patient.model_class}
    found = {
        "reloaded": _logits(adapt.load_adapter(folder / "adapter", folder / "base", **options), inputs),
        "merged": _logits(adapt.merge_adapter(folder / "adapter", folder / "base", **options), inputs),
    }
    changes = {how: difference(logits, trained) for how, logits in found.items()}
    measured = f"{moved} tensors trained; " + ", ".join(f"{how} {value:.1e}" for how, value in changes.items())
    if not moved or not max(changes.values()) <= 5 * ROUNDING:
        raise Failed(measured)
    return measured


def _train(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Train a little; return how many tensors moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    adapt.unwrap(model).loss_step = 0
    for _ in range(STEPS):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@check(
    expected="after loading, the Linears of the language model are 8 and 4 bits and no others, and the model still computes",
    why="A quantiser goes by names: one that it does not find is left alone, or converted where nobody looked.",
    cure="Ask a Linear by calling it; its weight's dtype and shape are others in 8 and 4 bits (use the input's dtype).",
)
def quantized(patient: Patient) -> str:
    """Load in 8 and in 4 bits what was saved in full precision, and compare plan and outcome."""
    if find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed: pip install 'hfcustom[quantize]'")
    base, folder = patient.model(), patient.folder / "full"
    base.save_pretrained(folder)
    inputs = inputs_of(patient.batch([1]))
    expected, said = _logits(base, inputs), []
    for bits, most in COARSE.items():
        plan = adapt.quantization_config(folder, bits, model_class=patient.model_class)  # type: ignore[arg-type]
        model = patient.model_class.from_pretrained(folder, quantization_config=plan)
        rows = adapt.check_quantization(model)
        count = sum(row.count for row in rows if row.kind == adapt.QUANTIZED[bits])
        change = difference(_logits(model, inputs).float(), expected)
        said.append(f"{bits}: {count} Linears, {change:.1%} of the logits")
        if not change <= most:
            raise Failed("; ".join(said))
    return "; ".join(said)
