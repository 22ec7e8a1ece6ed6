"""The clean process of the doctor: import the class, load a folder through the Auto classes, write its logits.

FOLDER with plan.json {file, module} and inputs.safetensors -> logits.safetensors, and a line of JSON {class}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfcustom.naming import import_file


def main(folder: Path) -> None:
    """Do what a stranger's script does who has got a folder and a file."""
    plan: dict[str, str] = json.loads((folder / "plan.json").read_text())
    import_class(plan["module"], Path(plan["file"]))
    AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(folder / "inputs.safetensors")).logits
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    print(json.dumps({"class": type(model).__name__}))


def import_class(module: str, file: Path) -> None:
    """Import a module by name where that name leads to the file, as in a package, else the file by itself."""
    try:
        found = None if module == "__main__" else importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it
        found = None
    if found is not None and found.origin is not None and Path(found.origin).resolve() == file:
        importlib.import_module(module)
    else:
        import_file(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
