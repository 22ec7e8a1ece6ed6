"""The runs behind tests/golden/: checkpoints that this version has written, which every later version must go on from.

    python tests/golden_run.py      writes tests/golden/checkpoint-VERSION, once for each release

Everything that decides the numbers is written out here or lies in the folder: weights to begin with, rows, pictures.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

import hfcustom
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration, tiny_config, tiny_processor
from hfcustom.record import versions
from hfcustom.train import TrainResult, fit
from hfcustom.train_config import TrainConfig

GOLDEN = Path(__file__).resolve().parent / "golden"
WAYS = ("full", "lora")
CUT, STEPS = 2, 4  # the checkpoint's step, and the last one
README = """# A checkpoint of hfcustom {version}

Written by `python tests/golden_run.py`. `full/` and `lora/` each hold the checkpoint of step {cut} of {steps} as `hfcustom.fit` wrote
it, and `expected.json`: the loss and the gradient's norm of every step of that run. `base/` is what `lora` was trained on.
tests/test_golden.py lets the present version go on from each and compares the steps after it. The model is an InternVL of
a few thousand weights, with random ones; rows and pictures follow from formulas in tests/golden_run.py.

Never change these files: a later version that cannot read them cannot read its users' checkpoints either. For a release, write
a folder of its own beside this one.

Versions: {versions}.
"""


def picture(at: int) -> Image.Image:
    """Return a picture that follows from a formula, for no library's random numbers last for ever."""
    y, x, channel = np.indices((28, 28, 3))
    return Image.fromarray(((x * (3 + at) + y * (5 + channel) + 40 * at * channel) % 256).astype(np.uint8))


def rows() -> list[dict[str, Any]]:
    """Return eight rows, every second one with a picture."""
    found = []
    for at in range(8):
        images = [picture(at)] if at % 2 else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"What is number {at}?"}]
        answer = " ".join(str((at * step) % 10) for step in range(1, 3 + at))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        found.append({"messages": messages, "images": images})
    return found


def new_model() -> Any:
    """Return the model that the full run begins with; a resumed run gets its weights from the checkpoint."""
    config = tiny_config()
    config.tie_word_embeddings = True
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = 8, 16, 1, 2
    config.text_config.num_key_value_heads, config.text_config.head_dim = 1, 4
    config.text_config.layer_types = config.text_config.layer_types[:1]
    torch.manual_seed(0)
    return CustomInternVLForConditionalGeneration(config)


def build(way: str, folder: Path) -> Any:
    """Return a run's model before its first step; `folder` is a golden one."""
    if way == "full":
        return new_model()
    base = CustomInternVLForConditionalGeneration.from_pretrained(folder / "base")
    torch.manual_seed(0)
    return hfcustom.lora(base, rank=1)


def train(way: str, golden: Path, output_dir: Path, **options: Any) -> TrainResult:
    """Run or go on with a golden run."""
    fixed: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "warmup_steps": 1}
    fixed |= {"log_steps": 1, "save_steps": CUT, "precision": "fp32", "weight_decay": 0.1, "max_grad_norm": 0.5}
    config = TrainConfig(output_dir=str(output_dir), **fixed, **options)
    return fit(build(way, golden), tiny_processor(), rows(), config)


def curve(result: TrainResult) -> list[dict[str, float]]:
    """Return each step's loss and gradient norm."""
    return [{name: entry[name] for name in ("step", "loss", "grad_norm")} for entry in result.history]


def write(golden: Path) -> None:
    """Write the folder of this version; an existing one is an error."""
    golden.mkdir(parents=True)
    here = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # so that what is written names no place on this machine
        try:
            new_model().save_pretrained("base")
            for way in WAYS:
                result = train(way, Path(), Path(way))
                target = golden / way
                shutil.copytree(Path(way) / "checkpoints" / f"step-{CUT:06d}", target / f"step-{CUT:06d}")
                (target / "expected.json").write_text(json.dumps(curve(result), indent=1) + "\n")
            shutil.copytree("base", golden / "base")
        finally:
            os.chdir(here)
    words = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = README.format(version=hfcustom.__version__, cut=CUT, steps=STEPS, versions=words)
    (golden / "README.md").write_text(text)


if __name__ == "__main__":
    write(GOLDEN / f"checkpoint-{hfcustom.__version__}")
