"""Rules about what stands around the model: its config, its processor, and the plans for several devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from hfcustom.origins import Place, is_users, place_of
from hfcustom.serving.finding import Found, Level, rule
from hfcustom.serving.syntax import place_of_class
from hfcustom.serving.target import Served

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
PICTURE = (96, 128)  # rows, columns


@rule(
    asks="the config has the language model's under get_text_config()",
    why="The server takes a model whose config is its text config for one without images, and reads layers, heads and the "
    f"vocabulary from there: {', '.join(NEEDED)}.",
    cure="Put the language model's config into `text_config` of yours, with those fields.",
)
def text_config(served: Served) -> Iterator[Found]:
    """Ask the config."""
    config: Any = served.config
    text = config.get_text_config()
    place = place_of_class(type(config)) or place_of_class(served.model_class)
    level: Level = "warning" if place is None else "error"
    if text is config:
        yield place, f"{type(config).__name__}.get_text_config() is the config itself: a model without images", level
    if lost := [name for name in NEEDED if not isinstance(getattr(text, name, None), int)]:
        yield place, f"{type(text).__name__} has no {', '.join(lost)}", level


@rule(
    asks="the processor says beforehand how many tokens an image becomes, and afterwards where they are",
    why="The server reserves room for _get_num_multimodal_tokens() tokens an image, and finds them by the text_replacement_offsets "
    "that the call returns: without either it stops, and an image of more tokens than were said is refused.",
    cure="Let __call__ reach ProcessorMixin's, write an image in replace_image_token(), and count it in "
    "_get_num_multimodal_tokens(image_sizes).",
)
def processor(served: Served) -> Iterator[Found]:
    """Call the processor with a picture."""
    processor: Any = served.processor
    if processor is None:
        return
    own = is_users(type(processor))
    place, level = (place_of(type(processor)), "error") if own else (None, "warning")
    for said in _faults(served, processor):
        yield place, f"{type(processor).__name__} {said}", level  # type: ignore[misc]


def _faults(served: Served, processor: Any) -> Iterator[str]:
    for name in ("image_processor", "image_token"):
        if getattr(processor, name, None) is None:
            yield f"has no {name}"
            return
    written, offsets = _write(served, processor)
    if not offsets:
        yield "returns no text_replacement_offsets for an image"
    try:
        said = processor._get_num_multimodal_tokens(image_sizes=[PICTURE])["num_image_tokens"][0]
    except (AttributeError, NotImplementedError, KeyError, TypeError) as error:
        yield f"cannot say how many tokens an image becomes ({type(error).__name__}: {error})"
        return
    if written > said:
        rows, columns = PICTURE
        yield f"says {said} tokens for an image of {columns} x {rows} and writes {written}"


def _write(served: Served, processor: Any) -> tuple[int, int]:
    """Return how many image tokens the processor writes for a picture, and how many replacements it reports."""
    pixels = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    text = f"{processor.image_token} what?"
    features = processor(
        text=[text], images=[[Image.fromarray(pixels)]], return_tensors="pt", return_text_replacement_offsets=True
    )
    token = getattr(served.model, "placeholder_token_id", None)
    offsets = features.get("text_replacement_offsets")
    found = (
        [] if offsets is None or len(offsets) == 0 else [item for item in offsets[0] if item.get("type") == "image"]
    )
    return int((features["input_ids"] == token).sum()) if token is not None else 0, len(found)


@rule(
    asks="matrices and layers of your own are in the plans for several devices",
    why="With tensor parallelism a Linear that no base_model_tp_plan names is copied to every device; with pipeline parallelism "
    "there may be one ModuleList of layers. On one device neither matters.",
    cure="Name it in base_model_tp_plan of the text config ('layers.*.mlp.my_proj': 'colwise'); keep one ModuleList.",
)
def parallel(served: Served) -> Iterator[Found]:
    """Look for Linears of the user's modules in the language model, and for stacks of layers."""
    level: Level = "warning"
    seen: set[type] = set()
    for name, module in served.own_modules():
        linears = [own for own, child in module.named_children() if type(child) is nn.Linear]
        if linears and type(module) not in seen and not _planned(served, name, linears):
            seen.add(type(module))
            yield (
                place_of_class(type(module)),
                f"{type(module).__name__}.{linears[0]} is in no base_model_tp_plan",
                level,
            )
    stacks = [name for name, child in served.decoder.named_children() if isinstance(child, nn.ModuleList)]
    if len(stacks) > 1 and (place := _own_place(served)) is not None:
        yield place, f"the language model has several stacks of layers: {', '.join(stacks)}", level


def _planned(served: Served, name: str, linears: list[str]) -> bool:
    plan = getattr(served.config.get_text_config(), "base_model_tp_plan", None) or {}
    usual = {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }  # which a server fuses by itself
    named = {pattern.rpartition(".")[2] for pattern in plan}
    return set(linears) <= usual | named


def _own_place(served: Served) -> Place | None:
    kinds = (type(served.decoder), type(served.alone), served.model_class)
    return next((place for kind in kinds if (place := place_of_class(kind)) is not None), None)
