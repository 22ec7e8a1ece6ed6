"""From a target to what is known of it: architecture, stages, tokens, the switch of tiles, the layout of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hfcustom.inspector.architecture import Architecture, find_architecture
from hfcustom.inspector.formula import SIZES, Count, find_formula, find_tile_rule
from hfcustom.inspector.layout import Layout, find_layout
from hfcustom.inspector.record import Size, Stage, stages
from hfcustom.inspector.settings import own_settings, shown_settings
from hfcustom.inspector.small import SmallModel
from hfcustom.inspector.switch import Switch, find_switch
from hfcustom.inspector.target import Subject, find_subject
from hfcustom.inspector.tokens import fold, image_text, placeholder_runs
from hfcustom.inspector.views import Look, Looker, View
from hfcustom.quiet import quiet

DEFAULT_SIZE: Size = (800, 1300)
LARGEST = 40_000_000  # pixels


@dataclass
class Tokens:
    """The tokens of an image: of this one, of others, as a formula, as text."""

    count: int  # places in the text
    around: int  # other tokens that are written for an image: marks, line ends, numbers of rows and columns
    formula: str | None  # None where no formula gives the counts
    checked: int  # sizes that formula and rule were checked on
    tile_rule: str | None
    grids: list[tuple[int, int]] | None  # rows and columns of tokens of each view of this image
    queries: bool | None  # whether each token is made of all patches of a view
    mark: str  # why a token holds nothing of the image, where that is so
    text: str
    sizes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Inspection:
    """All that is known of one target, for one image."""

    name: str
    source: str
    summary: str
    size: Size
    architecture: Architecture
    processor: str
    settings: dict[str, Any]
    stages: list[Stage]
    views: list[View]
    grid: tuple[int, int]
    overviews: int
    crops: int
    seen: float
    pixels: str  # name, shape and type of what the tower gets
    tokens: Tokens | None  # None for a contrastive encoder
    encoder: dict[str, int] | None  # of a contrastive encoder: tokens in the tower, length of the vector
    switch: Switch | None
    layout: Layout

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def inspect_target(target: str, size: Size = DEFAULT_SIZE) -> Inspection:
    """Return what is known of a target for an image of a size; errors as for find_subject, ValueError for a size."""
    check_size(size)
    with quiet():
        return _examine(find_subject(target), size)


def check_size(size: Size) -> None:
    """Raise ValueError for an image that nobody sends to a model."""
    if min(size) < 16 or size[0] * size[1] > LARGEST:
        raise ValueError(
            f"An image of {size[0]} x {size[1]} pixels cannot be looked at: sides must be 16 at least, and the area {LARGEST:,} "
            "pixels at most. Resize it."
        )


def _examine(subject: Subject, size: Size) -> Inspection:
    looker = Looker(subject.processor, with_text=not subject.is_encoder)
    counts = [_count(subject, looker, one) for one in dict.fromkeys((size, *SIZES))]
    look = counts[0].look
    small = SmallModel(subject)
    return Inspection(
        name=subject.name,
        source=subject.source,
        summary=_first_sentence(subject.module.__doc__ or ""),
        size=size,
        architecture=find_architecture(subject),
        processor=f"{type(subject.processor).__name__}, {type(subject.processor.image_processor).__name__.removesuffix('Pil')}",
        settings=shown_settings(subject.processor),
        stages=stages(look.steps),
        views=look.views,
        grid=look.grid(),
        overviews=look.overviews(),
        crops=look.crops(),
        seen=look.seen(),
        pixels=_pixels(look),
        tokens=_tokens(subject, counts, small),
        encoder=find_encoder(subject, look) if subject.is_encoder else None,
        switch=None
        if subject.is_encoder
        else find_switch(subject, looker, size if look.crops() > 1 else DEFAULT_SIZE, small),
        layout=find_layout(subject, [next(one for one in counts if one.size == size) for size in LAYOUT_SIZES]),
    )


LAYOUT_SIZES = ((800, 1300), (640, 480), (300, 1000))


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."


def _count(subject: Subject, looker: Looker, size: Size) -> Count:
    look = looker.look(size)
    runs = [] if subject.placeholder is None else placeholder_runs(look.features, subject.placeholder)
    return Count(size, sum(runs), look, tuple(runs))


def _tokens(subject: Subject, counts: Sequence[Count], small: SmallModel) -> Tokens | None:
    if subject.placeholder is None:
        return None
    this = counts[0]
    formula = find_formula(counts)
    queries = small.token_sees_all()
    text = image_text(subject.processor, this.look.features)
    return Tokens(
        count=this.tokens,
        around=len(text) - this.tokens,
        formula=None if formula is None else formula.text,
        checked=len(counts),
        tile_rule=find_tile_rule(counts, own_settings(subject.processor)),
        grids=formula.grids(this) if formula and small.is_targets_own and not queries else None,
        queries=queries,
        mark=subject.family_class.lacks.get("placeholders", ""),
        text=fold(text),
        sizes=[_line(count) for count in counts],
    )


def _line(count: Count) -> dict[str, Any]:
    rows, columns = count.look.grid()
    return {
        "size": list(count.size),
        "tiles": [rows, columns],
        "views": len(count.look.views),
        "seen_by_tower": sorted({view.size for view in count.look.views}),
        "tokens": count.tokens,
    }


def find_encoder(subject: Subject, look: Look) -> dict[str, int]:
    """Return how many tokens a contrastive encoder's tower has for a picture, and how long its vector is; run without weights."""
    model = subject.skeleton().eval()
    pixels = look.features["pixel_values"].to("meta")
    tower = model.vision_model(pixel_values=pixels).last_hidden_state  # (1, N, D)
    vector = model.get_image_features(pixel_values=pixels).pooler_output  # (1, D)
    return {"tokens_in_tower": tower.shape[1], "vector": vector.shape[-1]}


def _pixels(look: Look) -> str:
    for name, value in look.features.items():
        if name.startswith("pixel_values"):
            return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return ""
