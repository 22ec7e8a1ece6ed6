"""What is saved in one process loads in another that has done no more than import the class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, Family
from safetensors.torch import load_file, save_file

LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
import my_reader  # the user's script, alone so far: its import is all that the Auto classes need
model = AutoModelForImageTextToText.from_pretrained(f"{sys.argv[1]}/my_reader").eval()
logits = float(model(input_ids=torch.arange(10)[None]).logits.sum())
print("RESULT", json.dumps({"name": "loaded", "logits": logits, "class": type(model).__name__}))
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
    script = folder / "my_reader.py"
    script.write_text(USER_SCRIPT)
    saved = float(run(sys.executable, script, folder / "my_reader").split("RESULT ")[1])
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    output = run(sys.executable, "-c", LOAD, folder, *FAMILIES, env=environment)
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT")]
    found = {result["name"]: result for result in results}
    users = found.pop("loaded")
    weights = list(load_file(folder / "my_reader" / "model.safetensors"))
    return {**found, "saved": saved, "loaded": users["logits"], "class": users["class"], "weights": weights}


def test_auto_classes_load_with_equal_logits_in_a_fresh_process(family: Family, reloaded: dict[str, Any]) -> None:
    result = reloaded[family.name]
    assert result["difference"] <= 1e-6
    model_class = family.model_class
    assert result["classes"] == [
        model_class.config_class.__name__,
        model_class.processor_class.__name__,
        model_class.__name__,
    ]


def test_a_class_from_a_users_own_script_loads_after_importing_it(reloaded: dict[str, Any]) -> None:
    assert reloaded["class"] == "Dimmed" and reloaded["loaded"] == reloaded["saved"]
    assert "dim.weight" in reloaded["weights"] and "model.language_model.embed_tokens.weight" in reloaded["weights"]
