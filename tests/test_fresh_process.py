"""What is saved in one process loads in another that has done no more than import the class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, Family
from safetensors.torch import load_file, save_file

LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
for name in sys.argv[2:]:
    __import__(f"hfcustom.families.{name}")
    folder = f"{sys.argv[1]}/{name}"
    inputs = load_file(f"{folder}/batch.safetensors")
    expected = inputs.pop("logits")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        difference = float((model(**inputs).logits - expected).abs().max())
    classes = [type(AutoConfig.from_pretrained(folder)), type(AutoProcessor.from_pretrained(folder)), type(model)]
    print("RESULT", json.dumps({"name": name, "difference": difference, "classes": [c.__name__ for c in classes]}))
"""

USER_SCRIPT = '''
import sys
import torch
from torch import nn
import hfcustom
from hfcustom.families import internvl

class Dimmed(internvl.CustomInternVLForConditionalGeneration):
    """A change of ten lines, in a script of the user's own."""
    def __init__(self, config):
        super().__init__(config)
        self.dim = nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return hidden_states * torch.sigmoid(self.dim(hidden_states))

hfcustom.register(Dimmed)

if __name__ == "__main__":
    tiny = internvl.tiny_config().to_dict()
    tiny.pop("model_type")
    torch.manual_seed(0)
    model = Dimmed(Dimmed.config_class(**tiny))
    model.save_pretrained(sys.argv[1])
    internvl.tiny_processor().save_pretrained(sys.argv[1])
    print("RESULT", float(model.eval()(input_ids=torch.arange(10)[None]).logits.sum()))
'''


def run(*command: Any, **options: Any) -> str:
    """Run a command in a clean interpreter; its output, or a failure that shows both streams."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def reloaded(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Save every family, load them all in one fresh process, and return what it saw."""
    folder = tmp_path_factory.mktemp("saved")
    for name in FAMILIES:
        family = families[name]
        model, batch = family.model(), family.batch([1, 2])
        model.save_pretrained(folder / name)
        family.processor.save_pretrained(folder / name)
        del batch["labels"]
        with torch.no_grad():
            save_file({**batch, "logits": model(**batch).logits}, folder / name / "batch.safetensors")
    output = run(sys.executable, "-c", LOAD, folder, *FAMILIES)
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT")]
    return {result["name"]: result for result in results}


def test_auto_classes_load_with_equal_logits_in_a_fresh_process(family: Family, reloaded: dict[str, Any]) -> None:
    result = reloaded[family.name]
    assert result["difference"] <= 1e-6
    model_class = family.model_class
    assert result["classes"] == [
        model_class.config_class.__name__,
        model_class.processor_class.__name__,
        model_class.__name__,
    ]


def test_a_class_from_a_users_own_script_loads_after_importing_it(tmp_path: Path) -> None:
    script = tmp_path / "my_reader.py"
    script.write_text(USER_SCRIPT)
    saved = run(sys.executable, script, tmp_path / "model").split("RESULT ")[1]
    load = (
        "import torch, my_reader; from transformers import AutoModelForImageTextToText as A; "
        f"m = A.from_pretrained({str(tmp_path / 'model')!r}).eval(); assert type(m) is my_reader.Dimmed; "
        "print('RESULT', float(m(input_ids=torch.arange(10)[None]).logits.sum()))"
    )
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    assert float(run(sys.executable, "-c", load, env=environment).split("RESULT ")[1]) == float(saved)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "dim.weight" in weights and "model.language_model.embed_tokens.weight" in weights
