"""What an image processor does, recorded while it does it: each function of its code that makes images of images.

a call -> [Step], in order. Steps of the same kind on several crops are one Stage, with the values that they were given.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

CODE = ("image_processing", "image_transforms")  # modules whose functions are steps
# functions that hand images on, or change how they are stored, and not what they show
NO_STEPS = (
    "__call__",
    "fetch_images",
    "group_images_by_shape",
    "infer_channel_dimension_format",
    "preprocess",
    "process_image",
    "reorder_images",
    "to_channel_dimension_format",
    "to_numpy_array",
    "to_pil_image",
)
INTERNAL = ("_expand", "_iterate", "_preprocess", "_prepare", "_rescale")
SHOWN = ("scale", "mean", "std", "resample", "background_color")  # besides limits: max_patches, min_size, ...
PER_PIXEL = ("convert_to_rgb", "normalize", "rescale")
FUSED_STEP = "rescale_and_normalize"
FUSED = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
Size = tuple[int, int]  # width, height


@dataclass
class Step:
    """One call: images in, images out."""

    name: str
    depth: int
    values: dict[str, Any]
    before: list[Size]
    after: list[Size] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)  # (C, H, W) each, what came out


@dataclass(frozen=True)
class Stage:
    """Steps of one kind: what it is called in the code, its values, how many images of which sizes went in and came out."""

    name: str
    values: dict[str, Any]
    before: tuple[Size, ...]
    after: tuple[Size, ...]


def record(call: Callable[[], Any]) -> tuple[Any, list[Step]]:
    """Run a call; return its result and the steps of image processors in it."""
    done: list[Step] = []  # in the order in which they end: what is inside comes before what holds it
    open_calls: list[Step | None] = []

    def watch(frame: FrameType, event: str, result: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if not any(part in code.co_filename for part in CODE) or code.co_name.startswith("<"):
            return
        if event == "return":
            step = open_calls.pop() if open_calls else None
            if step is not None:
                step.images = [image for image in flat_images(result)]
                step.after = [size_of(image) for image in step.images]
                done.append(step)
            return
        before = [image for value in frame.f_locals.values() for image in flat_images(value)]
        outer = {one.name for one in open_calls if one is not None}
        inside = code.co_name in outer  # super().resize() in resize()
        inside |= FUSED_STEP in outer and code.co_name in PER_PIXEL
        is_step = (
            bool(before) and not inside and code.co_name not in NO_STEPS and not code.co_name.startswith(INTERNAL)
        )
        step = None
        if is_step:
            depth = sum(one is not None for one in open_calls)
            step = Step(code.co_name, depth, plain_values(frame.f_locals), [size_of(image) for image in before])
        open_calls.append(step)

    sys.setprofile(watch)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return result, [step for step in done if step.after]


def flat_images(value: Any) -> Iterator[Any]:
    """Yield the images of a value: itself, the members of a list of lists, the rows of a stack."""
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, np.ndarray | torch.Tensor):
        if value.ndim == 3 and 3 in (value.shape[0], value.shape[2]):
            yield value
        elif value.ndim > 3:
            yield from (image for row in value for image in flat_images(row))
    elif isinstance(value, list | tuple):
        yield from (image for item in value for image in flat_images(item))


def size_of(image: Any) -> Size:
    """Return width and height of a picture or an array, channels first or last."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[1:] if image.shape[0] == 3 else image.shape[:2]
    return int(width), int(height)


def plain_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step that are settings: those of SHOWN, limits, and what size a tile has."""
    found = {}
    for name, value in given.items():
        limit = name.startswith(("max_", "min_", "use_", "patch_size", "overlap", "vision_encoder"))
        if name in SHOWN or limit or name in FUSED:
            if (shown := plain(name, value)) is not None:
                found[name] = shown
    return found


def plain(name: str, value: Any) -> Any:
    """Return a setting as JSON can hold it, None where it is no setting."""
    if name == "resample" and value is not None:
        return resampling(value)
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping | SizeDict):
        return {key: item for key, item in dict(value).items() if isinstance(item, int)}
    if isinstance(value, list | tuple) and 0 < len(value) <= 4:
        items = [plain(name, item) for item in value]
        return items if all(isinstance(item, int | float) for item in items) else None
    return None


def resampling(value: Any) -> str:
    """Return the filter's name: 3, PIL's enum and torchvision's are all 'bicubic'."""
    named = Image.Resampling(int(value)) if isinstance(value, int) else value
    return str(getattr(named, "name", named)).lower()


def stages(steps: Sequence[Step]) -> list[Stage]:
    """Put the steps of a kind together, at the place of their last; leave out what changed nothing, and mere wrappers."""
    groups: dict[tuple[str, str], list[Step]] = {}
    seen: dict[tuple[tuple[Size, ...], tuple[Size, ...]], Step] = {}
    for step in (single for whole in steps for single in split_fused(whole)):
        sizes = (tuple(step.before), tuple(step.after))
        if step.name not in PER_PIXEL:
            inner = seen.setdefault(sizes, step)
            if step.before == step.after:
                continue
            if inner.depth > step.depth:  # this one wraps that one, which says the same
                inner.values = {**step.values, **inner.values}
                continue
        key = (step.name, str(step.after) if step.name == "resize" else "")
        groups[key] = [*groups.pop(key, []), step]
    return [_together(group) for group in groups.values()]


def split_fused(step: Step) -> list[Step]:
    """Return what torchvision's path does in one call as the two steps that the other path takes; names without underscores."""
    name = step.name.strip("_").removesuffix("_np")
    if name != FUSED_STEP:
        values = {key: value for key, value in step.values.items() if key not in FUSED}
        return [Step(name, step.depth, values, step.before, step.after, step.images)]
    found, values = [], step.values
    if values.get("do_rescale"):
        scale = {"scale": values["rescale_factor"]}
        found.append(Step("rescale", step.depth, scale, step.before, step.after, step.images))
    if values.get("do_normalize"):
        given = {"mean": values["image_mean"], "std": values["image_std"]}
        found.append(Step("normalize", step.depth, given, step.before, step.after, step.images))
    return found


def _together(group: Sequence[Step]) -> Stage:
    first = group[0]
    same = {name: value for name, value in first.values.items() if all(one.values.get(name) == value for one in group)}
    return Stage(
        first.name, same, tuple(s for one in group for s in one.before), tuple(s for one in group for s in one.after)
    )
