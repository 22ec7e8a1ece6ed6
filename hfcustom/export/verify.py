"""Load an exported folder where there is no hfcustom, and compare it with what was exported.

folder, checksums, logits -> Verdict; RuntimeError where the stock class does not come up with the same model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CHILD = Path(__file__).with_name("child.py")
LEFTOVERS = ("probe.safetensors", "probe.png", "probe.json", "logits.safetensors", "plan.json")
ROUNDING = {
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}  # of the largest logit, after a merge or a cast
HUGE = 1e30


@dataclass(frozen=True)
class Verdict:
    """What the other process found; `difference` is a share of the largest logit, None where there were none to compare."""

    loaded: str
    num_tensors: int
    difference: float | None
    processor: str

    def __str__(self) -> str:
        logits = "logits not compared" if self.difference is None else _in_words(self.difference)
        return (
            f"{self.loaded}: {self.num_tensors} of {self.num_tensors} tensors, bit for bit; {logits}; {self.processor}"
        )


def _in_words(difference: float) -> str:
    return "logits equal bit for bit" if difference == 0 else f"logits differ by {difference:.1e} of the largest"


def verify(
    folder: Path,
    stock_class: str,
    tensors: dict[str, int],
    expected: torch.Tensor | None,
    is_encoder: bool,
    *,
    exact: bool,
    may_differ: bool,
) -> Verdict:
    """Load a folder in another process; `exact` where nothing was merged, cast or dropped, `may_differ` where some was dropped."""
    auto = "AutoModelForZeroShotImageClassification" if is_encoder else "AutoModelForImageTextToText"
    (folder / "plan.json").write_text(json.dumps({"auto": auto}))
    try:
        answer = _run(folder)
        found = load_file(folder / "logits.safetensors")["logits"] if expected is not None else None
    finally:
        for name in LEFTOVERS:
            (folder / name).unlink(missing_ok=True)
    _check_tensors(answer, stock_class, tensors)
    difference = None
    if expected is not None and found is not None:
        difference = relative(found, expected)
        dtype = getattr(torch, answer["dtype"])
        limit = ROUNDING[torch.float32] if exact and dtype == torch.float32 else ROUNDING.get(dtype, 0.0)
        if not may_differ and not difference <= limit:
            raise RuntimeError(
                f"{stock_class} loads every tensor, yet its logits differ from the source's by {difference:.1e} of the largest "
                f"({limit:.0e} is rounding). Something that is neither a module nor a method of the class changes what is "
                "computed: a value set on a part in __init__, a hook, a replaced function. `hfcustom bundle` takes it along; "
                "--weights-only exports the weights without it."
            )
    return Verdict(answer["class"], len(tensors), difference, answer["processor"])


def _check_tensors(answer: dict[str, Any], stock_class: str, tensors: dict[str, int]) -> None:
    if answer["class"] != stock_class:
        raise RuntimeError(f"The folder loads as {answer['class']}, not as {stock_class}.")
    for kind in ("missing", "unexpected", "mismatched"):
        if answer[kind]:
            raise RuntimeError(f"{stock_class}: {len(answer[kind])} tensors are {kind}, first {answer[kind][0]}.")
    wrong = [name for name in tensors if answer["tensors"].get(name) != tensors[name]]
    if wrong:
        right = len(tensors) - len(wrong)
        raise RuntimeError(f"{stock_class}: {right} of {len(tensors)} tensors are as exported; not so {wrong[0]}.")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest value that was expected; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    said = ~((found == expected) & (expected.abs() > HUGE))  # a family may rule tokens out by a logit of -3e38
    return float((found - expected)[said].abs().max() / expected[said].abs().max().clamp(min=1e-30))


def _run(folder: Path) -> dict[str, Any]:
    """Run child.py, which forbids itself hfcustom; -P keeps this folder's modules from standing in for others."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-P", str(CHILD), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"The exported folder does not load without hfcustom: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
