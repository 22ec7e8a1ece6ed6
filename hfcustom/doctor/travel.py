"""Checks of what a class saves and loads: a checkpoint of the stock class, one for the stock class, and one for a clean process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hfcustom.doctor.finding import Failed, Skipped, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference, inputs_of, shorten

LIMIT_SECONDS = 300


@check(
    expected="every stock tensor of a checkpoint in the hub's layout is in the model, bit for bit",
    why="A tensor that is not loaded starts at random: the model trains, and is worse than its base for no visible reason.",
    cure="Keep the names of the parent's modules, and add your own beside them; see README_customize_hf_models.md, section 2.",
)
def strict_load(patient: Patient) -> str:
    """Load what the stock class wrote."""
    stock = patient.stock()
    stock.save_pretrained(patient.folder / "stock")
    loaded, info = patient.model_class.from_pretrained(
        patient.folder / "stock", output_loading_info=True, **patient.settings
    )
    mine, expected = loaded.state_dict(), stock.state_dict()
    replaced = loaded.stock_tensor_names() - mine.keys()
    wanted = [name for name in expected if name not in replaced]
    wrong = [name for name in wanted if name not in mine or not torch.equal(mine[name], expected[name])]
    beside = f", {len(replaced)} tensors of parts that the class replaces aside" if replaced else ""
    measured = f"{len(wanted) - len(wrong)} of {len(wanted)} tensors{beside}"
    if wrong or info["mismatched_keys"]:
        raise Failed(f"{measured}; not as in the checkpoint: {shorten(wrong)}")
    return measured


@check(
    expected="the stock class loads every tensor of what was saved, and finds none that it does not know",
    why="A model without modules of its own is served by whatever runs its parent, if the names are the parent's.",
    cure="Do not rename tensors in state_dict() or save_pretrained().",
)
def stock_reload(patient: Patient) -> str:
    """Load in the stock class what the custom class saved."""
    model = patient.model()
    if structure := patient.is_structural(model):
        raise Skipped(f"the class {structure}, so the stock class is another model")
    model.save_pretrained(patient.folder / "for_stock")
    stock, info = type(patient.stock()).from_pretrained(patient.folder / "for_stock", output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    expected = model.state_dict()
    wrong = [name for name, tensor in stock.state_dict().items() if not torch.equal(tensor, expected[name])]
    if missing or unexpected or wrong:
        found = {"missing": missing, "unexpected": unexpected, "different": wrong}
        raise Failed("; ".join(f"{kind}: {shorten(names)}" for kind, names in found.items() if names))
    return f"{len(expected)} of {len(expected)} tensors"


@check(
    expected="the Auto classes load what was saved, in a process that has only imported the class, with equal logits",
    why="What a notebook has set, what a seed or a hash has drawn and what was never registered is not in the folder; whoever "
    "loads it later has another model.",
    cure="Put what the model needs into its config or a buffer, and @hfcustom.register above the class.",
)
def clean_process(patient: Patient) -> str:
    """Save, and load in another interpreter."""
    if "<locals>" in patient.model_class.__qualname__:
        raise Skipped("the class is defined inside a function, which no other process can import; move it to a file")
    plan = {"file": str(file_of(patient.model_class)), "module": patient.model_class.__module__}
    model, folder = patient.model(), patient.folder / "travels"
    model.save_pretrained(folder)
    patient.processor.save_pretrained(folder)
    inputs = inputs_of(patient.batch([1, 2]))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    (folder / "plan.json").write_text(json.dumps(plan))
    said = _run(folder)
    with torch.no_grad():
        expected = model(**inputs).logits
    found = load_file(folder / "logits.safetensors")["logits"]
    if said["class"] != type(model).__name__:
        raise Failed(f"the folder loaded as {said['class']}")
    change = difference(found, expected)
    measured = f"relative difference of the logits {change:.1e}"
    if change > ROUNDING:
        raise Failed(measured)
    return measured


def file_of(model_class: type) -> Path:
    """Return the file that defines a class; Skipped for one that is in none."""
    try:
        return Path(inspect.getfile(model_class)).resolve()
    except (OSError, TypeError):  # a notebook, or an interpreter's prompt
        raise Skipped("the class is defined in no file, which another process could import; move it to one") from None


def _run(folder: Path) -> dict[str, Any]:
    """Run hfcustom/doctor/child.py, which finds modules where this process does."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hfcustom.doctor.child", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"the process was not done after {LIMIT_SECONDS} seconds") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise Failed(f"the process ended with code {done.returncode}: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
