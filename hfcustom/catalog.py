"""What a family is, in numbers that are computed, not remembered: `hfcustom families` prints it.

Parameters come from the published checkpoints' configs, built on the meta device and split by the part map; tokens from
running the published image settings over a picture; checks from what the test suite last recorded (families/verified.json).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hfcustom.base import SEAM_METHODS
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.encoders import load_encoder
from hfcustom.families import load_family, missing_packages
from hfcustom.parts import PARTS, part_table
from hfcustom.registry import REGISTERED

VERIFIED = Path(__file__).parent / "families" / "verified.json"
PICTURE = (800, 1300)  # width, height in pixels
SEAMS = (*SEAM_METHODS, "connector", "loss")


@dataclass(frozen=True)
class CheckpointFacts:
    """A published checkpoint: its parameters, by part and together."""

    id: str
    parameters: int
    parts: dict[str, int]


@dataclass(frozen=True)
class FamilyFacts:
    """One family: what it customises, how large it is, what of it is verified."""

    name: str
    summary: str
    stock_class: str
    custom_class: str
    checkpoints: list[CheckpointFacts]
    image_tokens: int | None  # of a PICTURE, None where a package is missing; 0 for an encoder, which makes one vector
    seams: dict[str, str]  # seam -> "yes", or why there is none
    missing_packages: list[str]
    verified: list[str] = field(default_factory=list)  # what the test suite checks, in words

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def family_facts(name: str) -> FamilyFacts:
    """Return the facts of a family; ValueError suggests the nearest name."""
    module = load_family(name)
    model_class = REGISTERED[f"custom_{name}"]
    missing = missing_packages(name)
    return FamilyFacts(
        name=name,
        summary=(module.__doc__ or "").strip().partition("\n")[0],
        stock_class=model_class.stock_class().__name__,
        custom_class=f"{module.__name__}.{model_class.__name__}",
        checkpoints=[_checkpoint(model_class, id, values) for id, values in module.CHECKPOINTS.items()],
        image_tokens=None if missing else image_tokens(name),
        seams={seam: model_class.lacks.get(seam, "yes") for seam in SEAMS},
        missing_packages=missing,
        verified=verified_checks().get(name, []),
    )


def _checkpoint(model_class: Any, id: str, values: dict[str, Any]) -> CheckpointFacts:
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    parts = {row.part: row.parameters for row in part_table(model)}
    return CheckpointFacts(id, sum(parts.values()), {part: parts[part] for part in PARTS if part in parts})


def encoder_facts(name: str) -> FamilyFacts:
    """Return the facts of a contrastive encoder; its text tower counts as language. ValueError suggests the nearest name."""
    module = load_encoder(name)
    model_class: Any = REGISTERED[f"custom_{name}"]
    checkpoints = []
    for id, values in module.CHECKPOINTS.items():
        with torch.device("meta"):
            model = model_class(model_class.config_class(**values))
        parts = {"vision": 0, "language": 0, "other": 0}
        for path, parameter in model.named_parameters():
            part = "vision" if path.startswith("vis") else "language" if path.startswith("text") else "other"
            parts[part] += parameter.numel()
        checkpoints.append(CheckpointFacts(id, sum(parts.values()), parts))
    own = [seam for seam in vars(CustomDualEncoder) if seam.startswith("transform_")]
    return FamilyFacts(
        name=name,
        summary=(module.__doc__ or "").strip().partition("\n")[0],
        stock_class=model_class.stock_class().__name__,
        custom_class=f"{module.__name__}.{model_class.__name__}",
        checkpoints=checkpoints,
        image_tokens=0,
        seams={seam: model_class.lacks.get(seam, "yes") for seam in dict.fromkeys((*own, *SEAMS))},
        missing_packages=[],
        verified=verified_checks().get(name, []),
    )


def image_tokens(name: str, size: tuple[int, int] = PICTURE) -> int:
    """Return how many places in the text a picture of `size` (width, height in pixels) takes with the published settings."""
    module = load_family(name)
    processor = module.published_processor()
    with torch.device("meta"):
        placeholder = REGISTERED[f"custom_{name}"](module.tiny_config()).placeholder_token_id
    picture = Image.effect_noise(size, 64).convert("RGB")
    features = processor(text=[processor.image_token], images=[[picture]], return_tensors="pt")
    return int((features["input_ids"] == placeholder).sum())


def verified_checks() -> dict[str, list[str]]:
    """Return what the test suite last recorded as passing, {family: [check, ...]}."""
    checks: dict[str, list[str]] = json.loads(VERIFIED.read_text(encoding="utf-8"))["families"]
    return checks
