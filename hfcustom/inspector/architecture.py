"""What a model is made of: parts with their modules and parameters, counted on the meta device, and the tower's numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hfcustom.catalog import CheckpointFacts
from hfcustom.inspector.target import Subject
from hfcustom.parts import PARTS, find_parts, part_table

NUMBERS = {  # a config's field -> what it is called here
    "num_hidden_layers": "layers",
    "depth": "layers",
    "hidden_size": "hidden",
    "embed_dim": "hidden",
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "image_size": "image",
    "patch_size": "patch",
    "vocab_size": "vocabulary",
}


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    modules: str  # where it is
    what: str  # its class, and what it is made of
    parameters: int


@dataclass(frozen=True)
class Architecture:
    """The class, its parts, the numbers of tower and language model, and the parameters of the published checkpoints."""

    model_class: str
    stock_class: str
    parts: list[Part]
    vision: dict[str, Any]
    language: dict[str, Any]
    image_size: list[int]  # width and height that the tower is made for; empty where any goes
    checkpoints: list[CheckpointFacts]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def find_architecture(subject: Subject) -> Architecture:
    """Build the model without weights and look at it; those of the other published checkpoints are counted only."""
    model = subject.skeleton()
    vision = getattr(subject.config, "vision_config", None) or getattr(subject.config, "vq_config", None)
    text = subject.config.text_config if subject.is_encoder else subject.config.get_text_config()
    parts = _parts_of_encoder(model) if subject.is_encoder else _parts(model)
    config_class = subject.model_class.config_class
    return Architecture(
        model_class=subject.model_class.__name__,
        stock_class=subject.model_class.stock_class().__name__,
        parts=parts,
        vision=_numbers(vision),
        language=_numbers(text),
        image_size=_image_size(vision),
        checkpoints=[
            _count(id, subject.skeleton(config_class(**values)), subject.is_encoder)
            for id, values in (subject.published or {}).items()
        ],
    )


def _parts(model: Any) -> list[Part]:
    modules = dict(model.named_modules())
    paths = find_parts(model).paths
    found = []
    for row in part_table(model):
        names = [name for name in paths[row.part] if name in modules]
        inner = [path for part in PARTS for path in paths.get(part, ()) if path not in names]
        what = "; ".join(describe(modules[name], name, inner) for name in names[:3])
        parameters = row.parameters
        found.append(Part(row.part, row.modules, what or "a bare Parameter", parameters))
    return found


def _parts_of_encoder(model: Any) -> list[Part]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    modules = dict(model.named_children())
    return [
        Part(name, name, describe(modules[name], name, []) if name in modules else "a bare Parameter", count)
        for name, count in counts.items()
    ]


def describe(module: nn.Module, name: str, elsewhere: list[str]) -> str:
    """Return a module's class, and for a small one those of its own parts: `Projector: LayerNorm, 2 Linear, GELU`."""
    leaves: Counter[str] = Counter()
    for path, leaf in module.named_modules():
        full = f"{name}.{path}" if path else name
        if not any(full == other or full.startswith(other + ".") for other in elsewhere):
            if path and not any(True for _ in leaf.children()):
                leaves[_kind(leaf)] += 1
    title = type(module).__name__ if any(True for _ in module.children()) else _kind(module)
    if not leaves or sum(leaves.values()) > 40:
        return title
    inside = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in leaves.items())
    return f"{title}: {inside}"


def _kind(leaf: nn.Module) -> str:
    if isinstance(leaf, nn.Linear):
        return f"Linear({leaf.in_features}, {leaf.out_features})"
    return re.sub(r"(Activation|FunctionWrapper)$", "", type(leaf).__name__)


def _numbers(config: Any) -> dict[str, Any]:
    values = {} if config is None else config.to_dict()
    found: dict[str, Any] = {}
    for name, words in NUMBERS.items():
        if values.get(name) is not None and words not in found:
            value = values[name]
            found[words] = value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value
    return found


def _image_size(vision: Any) -> list[int]:
    size = getattr(vision, "image_size", None) or getattr(vision, "resolution", None)
    if isinstance(size, list | tuple):
        return [int(side) for side in reversed(size)]
    return [int(size)] * 2 if isinstance(size, int) else []


def _count(id: str, model: Any, is_encoder: bool) -> CheckpointFacts:
    if is_encoder:
        parts = {part.name: part.parameters for part in _parts_of_encoder(model)}
    else:
        parts = {row.part: row.parameters for row in part_table(model)}
    return CheckpointFacts(id, sum(parts.values()), parts)
