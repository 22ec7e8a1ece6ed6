"""The process that has no hfcustom: load a folder through the Auto classes, say what came, and write its logits.

FOLDER with plan.json {auto} and perhaps probe.safetensors -> logits.safetensors, and a line of JSON.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

sys.modules["hfcustom"] = None  # type: ignore[assignment]  # importing it is an error from here on


def main(folder: Path) -> None:
    """Load, compare nothing, report."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    plan = json.loads((folder / "plan.json").read_text())
    auto = getattr(transformers, plan["auto"])
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    probe, dtype = folder / "probe.safetensors", str(model.dtype).removeprefix("torch.")
    if probe.is_file():
        with torch.no_grad():
            outputs = model.eval()(**load_file(probe))
        logits = outputs["logits"] if "logits" in outputs else outputs["logits_per_image"]
        save_file({"logits": logits.float().contiguous()}, folder / "logits.safetensors")
    tensors = {
        name: zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for name, tensor in model.state_dict().items()
    }
    kinds = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    answer = {"class": type(model).__name__, "dtype": dtype, "tensors": tensors, **kinds}
    print(json.dumps({**answer, "processor": load_processor(folder)}))


def load_processor(folder: Path) -> str:
    """Return what AutoProcessor makes of the folder, and whether it writes the tokens that the model was asked with, in words."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return "no processor: the checkpoint has none"
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, AttributeError) as error:
        if is_torchvision_available():
            raise
        return f"processor not tried, which wants torchvision in stock transformers ({str(error).strip().splitlines()[0]})"
    return f"{type(processor).__name__}{compare_tokens(folder, processor)}"


def compare_tokens(folder: Path, processor: Any) -> str:
    """Say whether the stock processor writes the same tokens; nothing where no question was asked."""
    from PIL import Image
    from safetensors.torch import load_file

    if not (folder / "probe.json").is_file():
        return ""
    question, image = json.loads((folder / "probe.json").read_text()), Image.open(folder / "probe.png")
    images = [[image] if question["nested"] else image for _ in question["text"]]
    found = processor(text=question["text"], images=images, return_tensors="pt", **question["options"])["input_ids"]
    asked = load_file(folder / "probe.safetensors")["input_ids"]
    if found.tolist() == asked.tolist():
        return f" writes the same {asked.shape[1]} tokens"
    return f" writes {found.shape[1]} tokens, not the {asked.shape[1]} that the source's processor wrote"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
