"""Write a custom checkpoint as its stock parent would have: weights under the hub's names, config, processor.

One copy of the weights is in memory: the parent takes the very tensors, and its save_pretrained writes shard after shard.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from hfcustom.export.departures import Departure, build_skeletons, find_departures
from hfcustom.export.source import Source, check_dtype, find_source
from hfcustom.export.verify import Verdict, verify
from hfcustom.parts import unwrap
from hfcustom.training.checkpoint import write_json

SHARD = "5GB"
SAMPLE = "What is in this picture?"
Say = Callable[[str], None]


class NotStock(ValueError):
    """The stock class would compute something else; `departures` are why."""

    def __init__(self, message: str, departures: list[Departure]) -> None:
        super().__init__(message)
        self.departures = departures


@dataclass(frozen=True)
class Exported:
    """A folder that was written, what was left out by consent, and what was found on loading it."""

    folder: Path
    stock_class: str
    num_tensors: int
    dropped: list[Departure]
    verdict: Verdict | None


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
    weights_only: bool = False,
    check: bool = True,
    say: Say = print,
) -> Exported:
    """Write a checkpoint, its adapter merged, for its stock parent; return what was done, or raise and leave nothing.

    NotStock where the parent would compute something else: `weights_only` consents to drop what it has no place for, unless
    the parent's own tensors are not all there. RuntimeError where the folder does not load as it should.
    """
    cast_to, folder = check_dtype(dtype), Path(out)
    refuse_full(folder)
    source = find_source(str(checkpoint), None if base is None else str(base))
    dropped = find_departures(source.model_class, source.config)
    _refuse(source, dropped, weights_only)
    processor = source.processor()
    say(f"loading {source.base or source.checkpoint}{f' with the adapter {source.checkpoint}' if source.base else ''}")
    model = source.load()
    with new_folder(folder) as partial:
        comparable = not any(item.kind == "connector" for item in dropped)
        expected = _reference(source, model, processor, partial) if check and comparable else None
        if source.is_adapter:
            say("merging the adapter")
            model = model.merge_and_unload()
        stock = _as_stock(source, unwrap(model), cast_to)
        tensors = fingerprints(stock) if check else {}
        count = len(stock.state_dict())
        del model
        say(f"writing {count} tensors as {type(stock).__name__}")
        stock.save_pretrained(partial, max_shard_size=max_shard_size)
        if processor is not None:
            save_stock_processor(processor, partial)
        name = type(stock).__name__
        del stock
        verdict = None
        if check:
            say("loading that in a process without hfcustom")
            exact = not source.is_adapter and cast_to is None and not dropped
            verdict = verify(
                partial, name, tensors, expected, source.is_encoder, exact=exact, may_differ=bool(dropped)
            )
    return Exported(folder, name, count, dropped, verdict)


def _refuse(source: Source, departures: list[Departure], weights_only: bool) -> None:
    if not departures or (weights_only and all(item.dropped_by_consent for item in departures)):
        return
    stock = source.model_class.stock_class().__name__
    lines = [f"{stock} would compute something else than {source.model_class.__name__}:", *map(str, departures)]
    if all(item.dropped_by_consent for item in departures):
        lines.append("--weights-only exports the stock weights without them: what they did is then gone.")
    elif weights_only:
        kept = ", ".join(item.name for item in departures if not item.dropped_by_consent)
        lines.append(
            f"--weights-only does not help: without {kept} the stock class is not the model that was trained."
        )
    lines.append("`hfcustom bundle` makes a folder that brings this code along.")
    raise NotStock("\n  ".join(lines), departures)


# ---- folders --------------------------------------------------------------------------------------------------------


def refuse_full(folder: Path) -> None:
    """Raise FileExistsError for what is there and not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; name a new folder, or empty this one.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its place once the block ends, and is deleted where it does not."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()  # empty: refuse_full
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- weights --------------------------------------------------------------------------------------------------------


def _as_stock(source: Source, model: Any, dtype: torch.dtype | None) -> Any:
    """Return the stock parent holding the model's own tensors, cast one by one."""
    if dtype is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    _, stock = build_skeletons(source.model_class, model.config)
    names = stock.state_dict().keys()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    stock.load_state_dict(own, assign=True)
    stock.tie_weights()
    if stock.can_generate():
        stock.generation_config = model.generation_config
    return stock


def fingerprints(model: nn.Module) -> dict[str, int]:
    """Return a checksum of the bytes of each tensor that is saved."""
    return {name: zlib.crc32(as_bytes(tensor)) for name, tensor in model.state_dict().items()}


def as_bytes(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor without copying them, whatever its dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---- processor ------------------------------------------------------------------------------------------------------


def save_stock_processor(processor: Any, folder: Path) -> None:
    """Write a processor under the name of its stock parent, without what only a custom one reads."""
    own = [base for base in type(processor).__mro__ if base.__module__.startswith("transformers.models.")]
    name = own[0].__name__
    processor.connector = None
    processor.save_pretrained(folder)
    for file in ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = folder / file
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if key not in ("auto_map", "connector")}
        if "processor_class" in content:
            content["processor_class"] = name
        write_json(path, content)


# ---- what the source computes ---------------------------------------------------------------------------------------


def _reference(source: Source, model: Any, processor: Any, folder: Path) -> torch.Tensor | None:
    """Return the logits of a made-up question, which is left in the folder for the other process; None without a processor."""
    if processor is None:
        return None
    from safetensors.torch import save_file

    question = probe(source, processor)
    inputs = ask(question, processor, unwrap(model).dtype)
    with torch.no_grad():
        outputs = model(**inputs)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "probe.safetensors")
    picture().save(folder / "probe.png")
    write_json(folder / "probe.json", question)
    logits: torch.Tensor = outputs.logits_per_image if source.is_encoder else outputs.logits
    return logits.float()


def picture() -> Image.Image:
    """Return noise, so that no weight of the vision tower is idle."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


def probe(source: Source, processor: Any) -> dict[str, Any]:
    """Return a question about a picture, {text, images: how many of each row, options}, as the arguments of a processor."""
    if source.is_encoder:
        length = source.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        return {"text": [SAMPLE, "a dog"], "nested": False, "options": options}
    content = [{"type": "image"}, {"type": "text", "text": SAMPLE}]
    text = f"{getattr(processor, 'image_token', '<image>')}{SAMPLE}"
    if processor.chat_template:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    begun = bos is not None and text.startswith(bos)
    return {"text": [text], "nested": True, "options": {"add_special_tokens": False} if begun else {}}


def ask(question: dict[str, Any], processor: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a question as a model's inputs, floating point in its dtype."""
    images = [[picture()] if question["nested"] else picture() for _ in question["text"]]
    inputs = processor(text=question["text"], images=images, return_tensors="pt", **question["options"])
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if torch.is_tensor(value)
    }
