"""Packing: the rows of a step that one rank has, cut into micro-batches of a fixed number of tokens.

[Batch of a row, ...] -> [Batch, ...]: where a family can keep rows apart, those of a micro-batch become one row of it, (1, T)
at its own length without padding, with position_ids that start again and no attention_mask; rows are chosen best-fit
decreasing. In other families rows of similar length are padded together. Either way a step has the same rows, and so the
same losses and gradients.
Letters: B rows of a batch, R rows of data, T text tokens, K entries of a column.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from hfcustom.cache.levels import same_levels
from hfcustom.console import out
from hfcustom.data.collate import Batch, Collator
from hfcustom.data.columns import PER_TOKEN, TOKEN_WEIGHTS
from hfcustom.data.messages import RowError
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.losses import IGNORE
from hfcustom.packed import why_not_packed
from hfcustom.parts import unwrap
from hfcustom.train_config import TrainConfig

Tensors = Mapping[str, torch.Tensor]
Collate = Callable[[Sequence[Any]], Batch]
MergeImages = Callable[[Sequence[Tensors]], dict[str, torch.Tensor]]

DEFAULT_TOKENS = 4096
GRIDS = ("image_grid_thw", "image_grid_hw", "target_sizes")  # an entry an image, where pixels come as patches


@dataclass(frozen=True)
class Size:
    """What a row takes of the budget of a micro-batch."""

    tokens: int
    crops: int = 0


@dataclass(frozen=True)
class Cut:
    """How a step's rows were cut, in tokens: what is useful, what is computed, what padding them all together computes."""

    rows: int = 0
    batches: int = 0
    tokens: int = 0
    computed: int = 0
    padded: int = 0
    budget: int = DEFAULT_TOKENS  # tokens of a micro-batch
    too_long: int = 0  # rows beyond the budget, which are a micro-batch of their own

    def __str__(self) -> str:
        useful, padded = (100 * self.tokens / max(total, 1) for total in (self.computed, self.padded))
        return (
            f"{self.rows} rows in {self.batches} micro-batches: {useful:.1f} % of the computed tokens are useful "
            f"(padded in one batch {padded:.1f} %)"
        )


@dataclass(frozen=True)
class Packer:
    """Cut the rows of a step into micro-batches of at most `tokens` tokens and `crops` image crops, where it is given.

    `merge_images` puts the image tensors of rows together, a method of the model's class; None pads rows instead.
    """

    tokens: int = DEFAULT_TOKENS
    crops: int | None = None
    merge_images: MergeImages | None = None

    @classmethod
    def of(cls, model: Any, tokens: int | None = None, crops: int | None = None) -> Packer:
        """Return the packer for a model, one that pads if its rows cannot be kept apart (`why_not_packed` says why).

        ValueError for more tokens than the family can have in one row.
        """
        merge = None if why_not_packed(model) else type(model).merge_images
        tokens = DEFAULT_TOKENS if tokens is None else tokens
        if merge is not None and model.max_packed_tokens is not None and tokens > model.max_packed_tokens:
            raise ValueError(
                f"pack_tokens={tokens}, but rows packed into one may have at most {model.max_packed_tokens} tokens in this "
                "family (max_packed_tokens): set pack_tokens to that or less."
            )
        return cls(tokens, crops, merge)

    def cut(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Return which rows go into each micro-batch; a row that is too large by itself goes alone."""
        if self.merge_images is None:
            return group_by_length(sizes, self.tokens, self.crops)
        return best_fit(sizes, self.tokens, self.crops)

    def __call__(self, collate: Collate, rows: Sequence[Any], singles: Sequence[Batch]) -> tuple[list[Batch], Cut]:
        """Return micro-batches of rows that are collated one by one already, and what the cut comes to."""
        sizes = [size_of(single) for single in singles]
        groups = self.cut(sizes)
        batches = [self.join(collate, [rows[at] for at in group], [singles[at] for at in group]) for group in groups]
        for batch, group in zip(batches, groups, strict=True):
            batch.places = group
        tokens = [int(length) for single in singles for length in single["attention_mask"].sum(1)]
        return batches, Cut(
            rows=len(rows),
            batches=len(batches),
            tokens=sum(tokens),
            computed=sum(batch["labels"].numel() for batch in batches),
            padded=len(tokens) * max(tokens, default=0),
            budget=self.tokens,
            too_long=sum(size.tokens > self.tokens for size in sizes),
        )

    def join(self, collate: Collate, rows: Sequence[Any], singles: Sequence[Batch]) -> Batch:
        """Return rows, which are collated one by one already, as one micro-batch."""
        if self.merge_images is None:
            return singles[0] if len(rows) == 1 else collate(rows)
        return pack_rows(singles, self.merge_images, row_columns(collate))


def make_packer(core: Any, config: TrainConfig) -> Packer | None:
    """Return what packs rows for a model; if it, or its teacher, cannot keep them apart, say so and return what pads them."""
    if not config.packing:
        return None
    if isinstance(core, CustomDualEncoder):
        raise ValueError(
            f"packing has no effect on {type(core).__name__}, whose texts are short captions; leave it out of the config."
        )
    models = (core, *core.companions.values())
    refusing = next((model for model in models if why_not_packed(model)), core)
    reason = why_not_packed(refusing)
    if reason and PartialState().is_main_process:
        out.print(
            f"packing: rows of similar length are padded together instead: in {type(refusing).__name__} {reason}"
        )
    return Packer.of(refusing, config.pack_tokens, config.pack_crops)


# ---- which rows go together -----------------------------------------------------------------------------------------


def best_fit(sizes: Sequence[Size], tokens: int, crops: int | None = None) -> list[list[int]]:
    """Put each row, the longest first, where it leaves the fewest tokens free; equal rows keep their order.

    Best-fit decreasing (Johnson 1974, https://doi.org/10.1137/0203025): at most 11/9 of the fewest possible, plus 4.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens that are free in a pack, and which; sorted
    shown = [0] * len(sizes)  # crops of each pack
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at].tokens):
        size = sizes[at]
        place = bisect_left(free, (size.tokens, -1))
        while place < len(free) and crops is not None and shown[free[place][1]] + size.crops > crops:
            place += 1
        if place < len(free):
            left, pack = free.pop(place)
        else:
            left, pack = tokens, len(packs)
            packs.append([])
        packs[pack].append(at)
        shown[pack] += size.crops
        insort(free, (left - size.tokens, pack))
    return [sorted(pack) for pack in packs]


def group_by_length(sizes: Sequence[Size], tokens: int, crops: int | None = None) -> list[list[int]]:
    """Put rows together, the longest first, while they fit the budget with the padding up to the longest."""
    groups: list[list[int]] = []
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at].tokens):
        if groups:
            longest = sizes[groups[-1][0]].tokens
            shown = sum(sizes[other].crops for other in groups[-1]) + sizes[at].crops
            if longest * (len(groups[-1]) + 1) <= tokens and (crops is None or shown <= crops):
                groups[-1].append(at)
                continue
        groups.append([at])
    return [sorted(group) for group in groups]


def size_of(single: Tensors) -> Size:
    """Return the tokens of a row and its image crops, or its images in families that take them whole."""
    tokens = int(single["attention_mask"].sum())
    whole = next((single[name] for name in GRIDS if name in single), None)
    if whole is not None:
        return Size(tokens, len(whole))
    pixels = single.get("pixel_values")
    return Size(tokens, 0 if pixels is None else pixels.shape[: max(pixels.ndim - 3, 1)].numel())


# ---- rows into one --------------------------------------------------------------------------------------------------


def row_columns(collate: Collate) -> frozenset[str]:
    """Return the tensors of the collator's batches that have an entry a row, (B, ...), rather than one a token."""
    if not isinstance(collate, Collator):
        return frozenset({"preference"})
    per_token = {TOKEN_WEIGHTS, *collate.token_columns}
    own = {name for name in collate.columns if name not in per_token and not name.startswith(PER_TOKEN)}
    return frozenset({"preference", *own})


def pack_rows(
    singles: Sequence[Tensors],
    merge_images: MergeImages,
    by_row: Iterable[str] = ("preference",),
) -> Batch:
    """Return the rows of batches as one row (1, T); `by_row` names what has an entry a row. One row stays as it is.

    Nothing predicts a row's first token, so it carries no label.
    """
    if len(singles) == 1 and len(singles[0]["labels"]) == 1:
        return _described(Batch(singles[0]), singles)
    by_row, singles = frozenset(by_row), same_levels(singles)
    text = {name for single in singles for name in single if _is_by_token(name, single) and name not in by_row}
    packed = Batch()
    for name in sorted(text - {"attention_mask"}):
        _check_everyone_has(name, singles)
        real = [single[name][single["attention_mask"].bool()] for single in singles]  # (tokens, ...) each
        packed[name] = torch.cat(real)[None]  # (1, T, ...)
    for name in sorted(by_row.intersection(set().union(*singles))):
        _check_everyone_has(name, singles)
        packed[name] = _stacked(name, [single[name] for single in singles])  # (R, ...)
    lengths = [int(length) for single in singles for length in single["attention_mask"].sum(1)]
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]  # (1, T)
    packed["labels"] = packed["labels"].masked_fill(packed["position_ids"] == 0, IGNORE)
    if TOKEN_WEIGHTS in packed:
        packed[TOKEN_WEIGHTS] = packed[TOKEN_WEIGHTS].masked_fill(packed["labels"] == IGNORE, 0.0)
    seen = [{name: single[name] for name in single if name not in text | by_row} for single in singles]
    packed.update(merge_images([images for images in seen if images]))
    return _described(packed, singles)


def _described(batch: Batch, singles: Sequence[Tensors]) -> Batch:
    """Say of a batch what the collator says of those that it is made of."""
    known = [single for single in singles if isinstance(single, Batch)]
    batch.images = sum(single.images for single in known)
    batch.levels = next((single.levels for single in known if single.levels is not None), None)
    batch.pictures = [picture for single in known for picture in single.pictures]
    batch.rows = [name for single in known for name in single.rows]
    batch.source_tokens = dict(sum((Counter(single.source_tokens) for single in known), Counter()))
    return batch


def _is_by_token(name: str, single: Tensors) -> bool:
    value = single[name]
    return value.ndim >= 2 and value.shape[:2] == single["labels"].shape


def _check_everyone_has(name: str, singles: Sequence[Tensors]) -> None:
    lacking = next((single for single in singles if name not in single), None)
    if lacking is not None:
        which = ", ".join(lacking.rows) if isinstance(lacking, Batch) else "one"
        raise RowError(f"{which}: has no {name!r}, which other rows of the step have; train on rows of one kind.")


def _stacked(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = dict.fromkeys(tuple(value.shape[1:]) for value in values)
    if len(shapes) > 1:
        found = " and ".join(map(str, shapes))
        raise RowError(f"Column {name!r} has shapes {found} in rows of one step; all of them need the same shape.")
    return torch.cat(list(values))


# ---- for transformers.Trainer ---------------------------------------------------------------------------------------


class PackingCollator:
    """Collate rows as Collator does, then pack them into one row: a `data_collator` for transformers.Trainer.

    All rows of a call are packed, whatever their tokens: Trainer decides how many there are. `options` are Collator's. Raises
    ValueError for a model whose rows cannot be kept apart.
    """

    def __init__(self, model: Any, processor: Any, max_length: int | None = None, **options: Any) -> None:
        core = unwrap(model)
        if reason := why_not_packed(core):
            raise ValueError(f"{type(core).__name__} cannot be trained on packed rows: {reason}. Use Collator.")
        self.collate = Collator(processor, max_length, **options)
        self.merge_images = type(core).merge_images

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pack_rows([self.collate([row]) for row in rows], self.merge_images, row_columns(self.collate))
