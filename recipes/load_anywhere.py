"""Load a saved custom model in a process that knows nothing but the file of its class, and ask it about a picture.

    python recipes/load_anywhere.py outputs/quickstart/merged --code recipes/quickstart.py \
        --image outputs/quickstart/question.png --question "Read the digits backwards."

AutoConfig, AutoProcessor, AutoModelForImageTextToText and pipeline("image-text-to-text") do all the loading; importing
the file that defines and registers the class is all they need. With --reference, logits must equal the saved ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    from hfcustom.naming import import_file

    import_file(options.code.resolve())
    config = AutoConfig.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    print(f"{type(config).__name__}, {type(processor).__name__}, {type(model).__name__} from {options.model}")
    if options.reference:
        saved = load_file(options.reference)
        logits = saved.pop("logits")
        with torch.no_grad():
            difference = (model(**saved).logits - logits).abs().max().item()
        print(f"largest difference from the saved logits: {difference}")
        if difference > 1e-5:  # float32 rounding; where a tensor lies in memory picks the kernel
            raise SystemExit("The reloaded model computes other logits.")
    content = [{"type": "image", "image": Image.open(options.image)}, {"type": "text", "text": options.question}]
    answer = pipeline("image-text-to-text", model=model, processor=processor)(
        text=[{"role": "user", "content": content}], max_new_tokens=32, return_full_text=False
    )
    print(f"{options.question} -> {answer[0]['generated_text'].strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of the saved model")
    parser.add_argument("--code", type=Path, required=True, help="Python file that defines and registers its class")
    parser.add_argument("--image", type=Path, required=True, help="picture to ask about")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument("--reference", type=Path, help="safetensors file of inputs and their logits")
    main(parser.parse_args())
