"""Proof that a bundle is the model: a process that can import neither hfcustom nor the user's files loads it and computes the same.

Weights up to FULL_BYTES are loaded whole, here and there. Of larger ones a small copy of the class is bundled the same way
and compared, and the tensors' names of the real bundle are compared with what its code builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hfcustom.bundle.cargo import Cargo
from hfcustom.bundle.child import answer_of, observe
from hfcustom.bundle.code import Code
from hfcustom.bundle.folder import fill_folder, weight_files
from hfcustom.bundle.modules import OWN

FULL_BYTES = 4 << 30
LIMIT_SECONDS = 3600
CHILD = Path(__file__).with_name("child.py")


@dataclass
class Verdict:
    """What the comparison found: facts in words, and what is wrong, if anything."""

    facts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def verify(cargo: Cargo, code: Code, bundle: Path, how: str) -> Verdict:
    """Compare a written bundle with its model; `how` is "full", "small" (a small copy), or "auto", which goes by the size."""
    size = sum((cargo.checkpoint / name).stat().st_size for name in weight_files(cargo.checkpoint))
    if how == "full" or (how == "auto" and (size <= FULL_BYTES or cargo.kind != "vlm")):
        with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
            return _compare(cargo, bundle, Path(folder), code.user_modules())
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        verdict = _verify_small(cargo, Path(folder), code.user_modules())
        verdict.facts.append(
            f"compared on a small copy, since the weights are {size / 2**30:.1f} GiB (--verify full for all)"
        )
        return _check_names(cargo, bundle, verdict, code.user_modules())


def _compare(cargo: Cargo, bundle: Path, folder: Path, modules: list[str]) -> Verdict:
    expected, job = expect(cargo, bundle, folder)
    (said,) = run_child([job], modules)
    return judge(cargo, said, expected, Path(job["results"]))


@dataclass
class Expected:
    """What the checkpoint computes where hfcustom is."""

    tensors: dict[str, torch.Tensor]
    answer: str  # of pipeline()


def expect(cargo: Cargo, bundle: Path, folder: Path) -> tuple[Expected, dict[str, Any]]:
    """Return what the checkpoint computes here, and the job that finds out what the bundle computes elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = cargo.model_class.from_pretrained(cargo.checkpoint)
        try:
            with_loss, tensors = True, observe(model, cargo.processor, cargo.kind)
        except ValueError:  # a loss that wants more than a row: pairs, a teacher, columns
            with_loss, tensors = False, observe(model, cargo.processor, cargo.kind, with_loss=False)
        answer = answer_of(cargo.kind, model=model, **pipeline_parts(cargo))
    finally:
        torch.set_num_threads(threads)
    autos = list(dict.fromkeys(["AutoModel", cargo.model_class.auto_classes[0].__name__]))
    results = str(folder / f"{bundle.name}.safetensors")
    job = {
        "folder": str(bundle),
        "kind": cargo.kind,
        "auto_classes": autos,
        "with_loss": with_loss,
        "results": results,
    }
    return Expected(tensors, answer), job


def pipeline_parts(cargo: Cargo) -> dict[str, Any]:
    """Return what pipeline() wants beside a model that is loaded."""
    if cargo.kind == "vlm":
        return {"processor": cargo.processor}
    return {"tokenizer": cargo.processor.tokenizer, "image_processor": cargo.processor.image_processor}


def run_child(jobs: list[dict[str, Any]], modules: Iterable[str]) -> list[dict[str, Any]]:
    """Do jobs in a process where these modules, and hfcustom, are not to be found; return what it says of each."""
    blocked = sorted({OWN, *(name.partition(".")[0] for name in modules)})
    with tempfile.TemporaryDirectory(prefix="bundle-modules-") as cache:
        plan = Path(cache) / "plan.json"
        plan.write_text(json.dumps({"blocked": blocked, "jobs": jobs}), encoding="utf-8")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": f"{cache}/modules",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(CHILD), str(plan)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return [{"error": f"the process was not done after {LIMIT_SECONDS} seconds"}] * len(jobs)
    said = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return said + [{"error": f"the process ended with code {done.returncode}: {last}"}] * (len(jobs) - len(said))


def judge(cargo: Cargo, said: dict[str, Any], known: Expected, results: Path) -> Verdict:
    """Compare what the other process found with what was expected, bit for bit."""
    if "error" in said:
        return Verdict(faults=[f"the bundle does not load or run without hfcustom: {said['error']}"])
    verdict, found, expected = Verdict(), load_file(results), known.tensors
    wanted = {"config": cargo.model_class.config_class, "model": cargo.model_class, "processor": type(cargo.processor)}
    for what, its_class in wanted.items():
        if said[what] != its_class.__name__:
            verdict.faults.append(f"the {what} is loaded as {said[what]}, not as {its_class.__name__}")
    if said["answer"] != known.answer:
        verdict.faults.append(f"pipeline() answers {said['answer']!r}, not {known.answer!r}")
    for name in sorted(expected.keys() | found.keys()):
        mine, theirs = expected.get(name), found.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            shapes = [None if one is None else list(one.shape) for one in (theirs, mine)]
            verdict.faults.append(f"{name} has the shape {shapes[0]}, not {shapes[1]}")
        elif not torch.equal(mine, theirs):
            verdict.faults.append(f"{name} differs by up to {(mine.double() - theirs.double()).abs().max():.1e}")
    shape = list(expected["logits"].shape)
    verdict.facts.append(f"{said['config']}, {said['processor']}, {said['model']} through the Auto classes")
    verdict.facts.append("pipeline() gives the same answer")
    verdict.facts.append(f"inputs {'and loss ' if 'loss' in expected else ''}bit-equal, logits {shape} bit-equal")
    if "generated cached" in expected:
        same = torch.equal(expected["generated cached"], expected["generated uncached"])
        verdict.facts.append(
            "generated tokens equal, with cache and without" + ("" if same else " (those differ here too)")
        )
    if "loss" not in expected:
        verdict.facts.append(
            f"the loss {cargo.config.get('loss')!r} needs more than a made-up row, and was not compared"
        )
    return verdict


def _verify_small(cargo: Cargo, folder: Path, modules: list[str]) -> Verdict:
    """Bundle and compare a small copy of the class, with the checkpoint's own settings."""
    from hfcustom.doctor.examine import own_settings, quiet
    from hfcustom.doctor.patient import Patient

    with quiet():
        patient = Patient(cargo.model_class, folder, own_settings(cargo.model_class, str(cargo.checkpoint)))
        patient.model().save_pretrained(folder / "small")
        patient.processor.save_pretrained(folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text(encoding="utf-8"))
    small = Cargo(folder / "small", config, cargo.model_class, patient.processor, cargo.folders)
    (folder / "bundle").mkdir()
    fill_folder(small, Code(small), folder / "bundle")
    return _compare(small, folder / "bundle", folder, modules)


def _check_names(cargo: Cargo, bundle: Path, verdict: Verdict, modules: list[str]) -> Verdict:
    """Compare the tensors in a bundle's weights with those that its code builds from its config."""
    job = {"folder": str(bundle), "kind": cargo.kind, "names_only": True}
    (said,) = run_child([job], modules)
    if "error" in said:
        verdict.faults.append(f"the bundle's config does not build its model: {said['error']}")
        return verdict
    stored: set[str] = set()
    for name in weight_files(bundle):
        if name.endswith(".safetensors"):
            with safe_open(bundle / name, "pt") as file:
                stored |= set(file.keys())
    unknown = sorted(stored - set(said["tensors"]))
    if unknown:
        verdict.faults.append(
            f"the code builds no tensor {unknown[0]!r} ({len(unknown)} of {len(stored)} are not found)"
        )
    verdict.facts.append(
        f"{len(stored) - len(unknown)} of {len(stored)} tensors of the weights are in the model that the code builds"
    )
    return verdict
