"""The tensors of a batch of rows whose images stand between words: shapes, what each axis counts, and what fills the gaps.

Several batches are collated, with other numbers of rows, images and tiles; an axis is what has its length in all of them.
Letters: B rows, T text tokens, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfcustom.data.captions import CaptionCollator
from hfcustom.data.collate import Collator
from hfcustom.inspector.formula import Count
from hfcustom.inspector.record import Size
from hfcustom.inspector.settings import own_settings
from hfcustom.inspector.target import Subject

Rows = Sequence[Sequence[int]]  # for each row, which of the sizes its images have
BATCHES: tuple[Rows, ...] = (((0, 1), (2,)), ((1,),))  # the first is shown: its last row and image have least


@dataclass(frozen=True)
class Tensor:
    """One tensor of the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    filled: str  # what stands where a row or an image has less than others

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Layout:
    """A batch: which images its rows have, its tensors, and on which side rows are padded."""

    rows: list[list[Size]]
    tensors: list[Tensor]
    padding: str
    lengths: list[int]  # tokens of each row

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass
class Facts:
    """A collated batch and the quantities that its axes may count, the likelier first."""

    batch: Mapping[str, torch.Tensor]
    quantities: dict[str, int]
    sizes: list[Size]  # of all images in order
    tokens: list[int]  # of all images in order


def find_layout(subject: Subject, counts: Sequence[Count]) -> Layout:
    """Collate batches of pictures of three of the sizes that were looked at; `counts` says what each becomes alone."""
    collate = _collator(subject)
    facts = [_facts(collate, rows, counts, subject.is_encoder) for rows in _batches(subject)]
    shown = facts[0].batch
    tensors = [_tensor(name, facts, subject) for name in shown]
    rows = [[counts[at].size for at in row] for row in _batches(subject)[0]]
    mask = shown.get("attention_mask")
    lengths = [] if mask is None else mask.sum(1).tolist()
    return Layout(rows, tensors, _padding(subject, shown), lengths)


def _batches(subject: Subject) -> Sequence[Rows]:
    """Return the batches; a contrastive encoder's rows have one image each."""
    return (((0,), (1,), (2,)), ((1,), (0,))) if subject.is_encoder else BATCHES


def _collator(subject: Subject) -> Any:
    if not subject.is_encoder:
        return Collator(subject.processor)
    length = subject.config.text_config.max_position_embeddings
    return CaptionCollator(subject.processor, length, padding=subject.model_class.text_padding)


def _facts(collate: Any, rows: Rows, counts: Sequence[Count], captions: bool) -> Facts:
    batch = collate([_row([counts[at].size for at in row], number, captions) for number, row in enumerate(rows)])
    crops = [[_leading(counts[at]) for at in row] for row in rows]  # as the tensor of one image alone has them
    views = [counts[at] for row in rows for at in row]
    quantities = {
        "rows": len(rows),
        "tokens of the longest row": batch["input_ids"].shape[1],
        "images": sum(map(len, rows)),
        "images of the row with most": max(map(len, rows)),
        "views": sum(map(sum, crops)),
        "views of the row with most": max(map(sum, crops)),
        "views of the image with most": max(max(row) for row in crops),
        "image tokens": sum(count.tokens for count in views),
        "views of all images": sum(len(count.look.views) for count in views),
    }
    return Facts(dict(batch), quantities, [count.size for count in views], [count.tokens for count in views])


def _leading(count: Count) -> int:
    """Return how many pictures, or patches where an image is a list of those, one image is in the tensor."""
    values = _pixels(count.look.features)
    if values.ndim == 2:
        return len(values)
    return count.look.crops()


def _pixels(features: Mapping[str, Any]) -> Any:
    return next(value for name, value in features.items() if name.startswith("pixel_values"))


def _row(sizes: Sequence[Size], number: int, captions: bool) -> dict[str, Any]:
    images = [picture(size, number + at) for at, size in enumerate(sizes)]
    if captions:
        return {"image": images[0], "text": " ".join(["a picture", *(str(word) for word in range(4 * number))])}
    content: list[dict[str, Any]] = []
    for at in range(len(sizes)):
        content += [{"type": "text", "text": f"picture {at}: "}, {"type": "image"}]
    content.append({"type": "text", "text": f"What is number {number}?"})
    answer = " ".join(["It is", *(str(word) for word in range(1 + 4 * number))])
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": images,
    }


def picture(size: Size, seed: int = 0) -> Image.Image:
    """Return noise in large squares, which costs little to make and is no padding anywhere."""
    pixels = np.random.default_rng(seed).integers(32, 224, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


# ---- axes -----------------------------------------------------------------------------------------------------------


def _tensor(name: str, facts: Sequence[Facts], subject: Subject) -> Tensor:
    values = [one.batch[name] for one in facts if name in one.batch]
    shown = values[0]
    axes: list[str] = []
    for at in range(shown.ndim):
        axes.append(_axis(name, at, axes, facts, subject))
    dtype = str(shown.dtype).removeprefix("torch.")
    return Tensor(name, tuple(shown.shape), dtype, tuple(axes), _filled(shown, axes, name))


def _axis(name: str, at: int, before: Sequence[str], facts: Sequence[Facts], subject: Subject) -> str:
    lengths = [one.batch[name].shape[at] for one in facts]
    for quantity in facts[0].quantities:
        if quantity not in before and lengths == [one.quantities[quantity] for one in facts]:
            return _rename(quantity, name, at, facts)
    shape = facts[0].batch[name].shape
    if name.startswith("pixel") and at >= len(shape) - 2 and shape[-1] > 8:
        if "mask" in name:
            return _side_of(at, name, facts)
        return _of_pixels(name, at, facts, subject)
    if name.startswith("pixel") and at == len(shape) - 3 and lengths[0] == 3 and len(shape) > 3:
        return "colours"
    if len(set(lengths)) > 1:
        return "as many as the largest image needs" if name.startswith("pixel") else "varies with the images"
    return _constant_axis(name, at, facts, subject)


def _rename(quantity: str, name: str, at: int, facts: Sequence[Facts]) -> str:
    """A list of patches is counted like views, and is none."""
    if quantity.startswith("views") and name.startswith("pixel") and facts[0].batch[name].ndim == 2:
        return quantity.replace("views", "patches of all images")
    return quantity.replace("views of all images", "views")


def _of_pixels(name: str, at: int, facts: Sequence[Facts], subject: Subject) -> str:
    """Return what one of the last two axes of pixels is: a side of a picture, patches of it, or the numbers of a patch."""
    values, lengths = facts[0].batch[name], [one.batch[name].shape[at] for one in facts]
    settings = own_settings(subject.processor)
    side = settings.get("patch_size") or _vision_patch(subject)
    side = side["height"] if isinstance(side, Mapping) else side
    frames = settings.get("temporal_patch_size") or 1
    last = at == values.ndim - 1
    if isinstance(side, int) and values.ndim < 4 and last and lengths[0] == 3 * side * side * frames:
        return f"numbers of a patch: 3 colours x {f'{frames} frames x ' if frames > 1 else ''}{side} x {side} pixels"
    if values.ndim < 4:
        return "patches of a view"
    if (
        isinstance(side, int)
        and not last
        and lengths[0] == side
        and values.shape[-1] % side == 0
        and values.shape[-1] > 8 * side
    ):
        return "rows of a patch"
    if len(set(lengths)) > 1 and values.shape[-2] == side:
        return "patches of all views side by side, a patch as many columns as it has rows"
    return _side_of(at, name, facts)


def _side_of(at: int, name: str, facts: Sequence[Facts]) -> str:
    words = "width" if at == facts[0].batch[name].ndim - 1 else "height"
    vary = len({one.batch[name].shape[-2:] for one in facts}) > 1
    return f"{words} in pixels" + (" of the largest" if vary else "")


def _vision_patch(subject: Subject) -> Any:
    return getattr(getattr(subject.config, "vision_config", None), "patch_size", None)


def _constant_axis(name: str, at: int, facts: Sequence[Facts], subject: Subject) -> str:
    """Return what a short axis holds, from its values."""
    first = facts[0]
    values = first.batch[name]
    length = values.shape[at]
    if at == 1 and values.ndim == 2 and not values.is_floating_point():
        if found := _numbers(values.tolist(), first):
            return found
    settings = own_settings(subject.processor)
    limits = [key for key, value in settings.items() if key.startswith("max_") and value == length]
    return f"tiles of an image, always {length} ({limits[0]})" if limits else f"always {length}"


def _numbers(numbers: list[list[int]], facts: Facts) -> str:
    """Return what the few numbers in a line are, from what they agree with."""
    pixels = _pixels(facts.batch)
    patches = pixels.shape[0] if pixels.ndim == 2 else pixels.shape[0] * pixels.shape[1]
    if numbers == [[height, width] for width, height in facts.sizes]:
        return "height and width of the image in pixels"
    if sum(math.prod(line) for line in numbers) == patches:
        return {2: "rows and columns of patches", 3: "frames, rows and columns of patches"}.get(len(numbers[0]), "")
    if [sum(a * b for a, b in zip(line[::2], line[1::2], strict=False)) for line in numbers] == facts.tokens:
        return "rows and columns of tokens, view by view"
    if len(numbers) == sum(facts.tokens) and -1 <= min(map(min, numbers)) and max(map(max, numbers)) < patches:
        return "the patches that a token is made of, counted over the batch; -1 for none"
    if len(numbers[0]) == 2 and len(numbers) == len(facts.sizes):
        return "height and width after resizing, in pixels"
    return "rows and columns of patches" if len(numbers[0]) == 2 else ""


# ---- what fills the gaps --------------------------------------------------------------------------------------------


def _filled(values: torch.Tensor, axes: Sequence[str], name: str) -> str:
    """Return the one value at the end of the last row, or image, which has less than others."""
    for at, axis in enumerate(axes):
        if at and ("with most" in axis or "largest image" in axis):
            end = values[-1].movedim(at - 1, 0)[-1]
            return f"{end.flatten()[0].item():g}" if bool((end == end.flatten()[0]).all()) else ""
        if "of the largest" in axis:
            corner = values[-1].movedim(at - 1, 0)[-1]
            return f"{corner.flatten()[-1].item():g}"
    return ""


def _padding(subject: Subject, batch: Mapping[str, torch.Tensor]) -> str:
    """Return on which side rows are padded in training, with which token, and on which the processor pads by itself."""
    tokenizer = subject.processor.tokenizer
    pad = tokenizer.pad_token_id
    shorter = [row for row in batch["input_ids"].tolist() if pad in (row[0], row[-1])]
    if not shorter:
        return "none: every row has as many tokens as the tower of texts reads"
    said = f"on the {_side(shorter[0], pad)} in training, with {tokenizer.pad_token} ({pad}); labels there are -100"
    if subject.is_encoder:
        return said.partition(";")[0]
    if subject.own_tokenizer:
        alone = subject.processor(text=["one", "one two three four"], padding=True)["input_ids"][0]
        said += f"; on the {_side(list(alone), pad)} where the processor pads by itself"
    return said


def _side(row: Sequence[int], pad: int) -> str:
    return "left" if row[0] == pad else "right"
