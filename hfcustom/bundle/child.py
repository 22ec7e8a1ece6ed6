"""What a model computes of a made-up picture and text; as a script, for folders in a process that cannot import hfcustom.

Nothing of hfcustom is imported here: `python child.py PLAN.json` runs as somebody would run a model they were sent. The plan is
{blocked: [module], jobs: [{folder, kind, results, ...}]}; of each job a line of JSON is printed, and tensors go to `results`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 4
QUESTION = "What is in this picture?"


class Blocked:
    """A finder that denies that some modules are there."""

    def __init__(self, names: list[str]) -> None:
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ModuleNotFoundError for a module that is blocked."""
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(
                f"No module named {name!r} (blocked, to see whether the bundle needs it)", name=name
            )


def picture() -> Any:
    """Return noise, the same each time."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))


def inputs_of(processor: Any, kind: str) -> dict[str, Any]:
    """Return what the processor makes of a picture and a question."""
    if kind == "encoder":
        return dict(processor(text=[QUESTION, "a cat"], images=[picture()], padding=True, return_tensors="pt"))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    spared = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    return dict(processor(text=[text], images=[[picture()]], return_tensors="pt", **spared))


def observe(model: Any, processor: Any, kind: str, *, with_loss: bool = True) -> dict[str, Any]:
    """Return the tensors that a model and its processor make: inputs, logits, loss, and generated tokens."""
    import torch

    model.eval()
    inputs = inputs_of(processor, kind)
    found = {f"input {name}": value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        if kind == "encoder":
            found["logits"] = model(**inputs).logits_per_image
            if with_loss:
                inputs["input_ids"] = inputs["input_ids"][:1]
                pairs = {name: value[:1] for name, value in inputs.items()}
                found["loss"] = model(**pairs, return_loss=True).loss
            return found
        found["logits"] = model(**inputs).logits
        if with_loss:
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -2:] = inputs["input_ids"][:, -2:]
            found["loss"] = model(**inputs, labels=labels).loss
        special = [token for token in processor.tokenizer.added_tokens_decoder if token < found["logits"].shape[-1]]
        for name, cached in (("cached", True), ("uncached", False)):
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            options["suppress_tokens"] = special  # an image token that an untrained model says would want an image
            found[f"generated {name}"] = model.generate(**inputs, **options, use_cache=cached)
    return found


def answer_of(kind: str, **loaded: Any) -> str:
    """Return what pipeline() answers, given a folder or a model with its processor; its error, which may be the model's own."""
    from transformers import pipeline

    try:
        if kind == "encoder":
            run: Any = pipeline("zero-shot-image-classification", **loaded)
            scores = {found["label"]: found["score"] for found in run(picture(), candidate_labels=["a cat", "a dog"])}
            return json.dumps(scores, sort_keys=True)
        run = pipeline("image-text-to-text", **loaded)
        content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
        answers = run(text=[{"role": "user", "content": content}], max_new_tokens=NEW_TOKENS, return_full_text=False)
        return str(answers[0]["generated_text"])
    except Exception as error:  # compared with what it raises elsewhere
        return f"{type(error).__name__}: {error}"


def load(folder: str, auto_class: str) -> Any:
    """Load a folder with the code in it."""
    import transformers

    return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Load a bundle through the Auto classes, write what it computes, and return what was loaded."""
    import torch
    from safetensors.torch import save_file

    folder, kind = job["folder"], job["kind"]
    config = load(folder, "AutoConfig")
    said = {"config": type(config).__name__}
    if job.get("names_only"):
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=True)
        return {**said, "model": type(model).__name__, "tensors": sorted(model.state_dict())}
    processor = load(folder, "AutoProcessor")
    names = job["auto_classes"]
    model = load(folder, names[-1])
    save_file(
        {
            name: value.contiguous()
            for name, value in observe(model, processor, kind, with_loss=job["with_loss"]).items()
        },
        job["results"],
    )
    said |= {"processor": type(processor).__name__, "model": type(model).__name__, "module": type(model).__module__}
    for name in names[:-1]:
        said[name] = type(load(folder, name)).__name__
    said["answer"] = answer_of(kind, model=folder, trust_remote_code=True)
    return said


def main(plan_file: str) -> None:
    """Do the jobs of a plan, each a line of JSON: what was loaded, or the error."""
    plan = json.loads(Path(plan_file).read_text(encoding="utf-8"))
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    sys.meta_path.insert(0, Blocked(plan["blocked"]))
    import torch

    torch.set_num_threads(1)
    for job in plan["jobs"]:
        try:
            said = run_job(job)
        except Exception as error:  # it is the finding, and the next job is another bundle
            import traceback

            said = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print("RESULT " + json.dumps({"folder": job["folder"], **said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
