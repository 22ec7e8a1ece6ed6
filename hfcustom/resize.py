"""resize_images(): let a pretrained model see pictures of another size than its vision tower was trained with.

A tower with learned positions has one vector a patch, (N, D) or (1, N, D), perhaps after one for a class token. They are
interpolated on their square grid, bicubic as transformers' own `interpolate_pos_encoding` does it, and everything that
follows from the image size follows: numbers that modules keep, the config, the processor's sizes and its placeholders.
What depends on the image size is not listed here but found, by building the class twice on the meta device, with the old
size and with the new, and comparing. Letters: N patches, D hidden.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from hfcustom.connectors import frames_together
from hfcustom.data.collate import Collator
from hfcustom.parts import unwrap, wrapped_by_peft

SIZES = ("size", "crop_size", "max_image_size", "image_grid_pinpoints")  # what image processors call them


def resize_images(model: Any, processor: Any, size: int) -> Any:
    """Make a custom model and its processor work on crops of size x size pixels; return the processor.

    The positions keep what they learned, interpolated; fine-tune the vision tower at least shortly, as the towers
    themselves were when their makers raised the resolution (ViT, https://arxiv.org/abs/2010.11929, section 3.2). The change
    is checked on one picture, and saved with the model and the processor. Raises ValueError, with nothing changed, for a
    tower without learned positions, a size that is no multiple of its patches, and one that the connector or the image
    processor does not take.
    """
    core = unwrap(model)
    if wrapped_by_peft(model):
        raise ValueError("This model has an adapter already: resize its images first, then call lora().")
    vision = _vision_config(core)
    old, patch = _side(vision.image_size), _side(vision.patch_size)
    if not isinstance(size, int):
        raise ValueError(f"size={size!r} is no number of pixels; give the side of a crop, such as {2 * old}.")
    if size < patch or size % patch:
        near = max(round(size / patch), 1) * patch
        raise ValueError(
            f"size={size} is no multiple of the {patch} pixel patches of the {_tower(core)}; take {near}."
        )
    before, after = _twin(core, old), _twin(core, size)
    tables = _position_tables(core, before, after, old // patch, size // patch)
    undo: list[Callable[[], None]] = []
    changed = copy.deepcopy(processor)
    try:
        _take_over(core, before, after, undo)
        for name, table in tables.items():
            _set(core.get_parameter(name), "data", table, undo)
        _scale_sizes(core, changed, size, undo)
        core.match_processor(changed)
        _check(core, changed, size)
    except Exception as error:
        for step in reversed(undo):
            step()
        reason = str(error).rstrip(".")
        raise ValueError(
            f"size={size} does not work in {type(core).__name__}: {reason}. Nothing was changed."
        ) from error
    processor.__dict__.update(changed.__dict__)
    return processor


def _vision_config(core: Any) -> Any:
    if "placeholders" in core.lacks:
        raise ValueError(f"resize_images counts image tokens by their placeholders, and {core.lacks['placeholders']}.")
    if core.no_resizing:
        raise ValueError(f"The {_tower(core)} {core.no_resizing}.")
    config = getattr(core.config, "vision_config", None)
    if getattr(config, "image_size", None) is None:
        raise ValueError(_no_positions(core))
    return config


def _no_positions(core: Any) -> str:
    return (
        f"The {_tower(core)} has no learned positions to interpolate: it takes pictures of any size as they are. Set the size in "
        "the processor alone, as in processor.image_processor.size = ..."
    )


def _tower(core: Any) -> str:
    path = core.stock_parts().paths["vision"][0]
    return f"vision tower of {type(core).__name__} ({path})"


def _side(size: Any) -> int:
    """Return the side of a square given as a number or as (height, width)."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"Sides of {tuple(size)} pixels: only square crops and patches can be resized.")
    return int(sides.pop())


def _sized(like: Any, size: int) -> Any:
    return size if isinstance(like, int) else type(like)([size] * len(like))


def _twin(core: Any, size: int) -> Any:
    """Build the model without weights for an image size, from a config that has been derived anew."""
    values = core.config.to_dict()
    values["vision_config"]["image_size"] = _sized(core.config.vision_config.image_size, size)
    with torch.device("meta"):
        return type(core)(type(core.config)(**{key: value for key, value in values.items() if key != "model_type"}))


# ---- what depends on the image size ---------------------------------------------------------------------------------


def _position_tables(core: Any, old: Any, new: Any, old_side: int, side: int) -> dict[str, torch.Tensor]:
    """Return the interpolated tables by name; ValueError for a parameter of another shape that is none."""
    shapes = {name: tuple(parameter.shape) for name, parameter in new.named_parameters()}
    resized = {}
    for name, parameter in old.named_parameters():
        if shapes[name] != tuple(parameter.shape):
            extra = parameter.shape[-2] - old_side**2 if parameter.ndim > 1 else -1
            known = name.removesuffix(".weight").endswith(("position_embedding", "position_embeddings"))
            if not known or extra not in (0, 1) or shapes[name][-2] - side**2 != extra:
                raise ValueError(
                    f"{name} of {type(core).__name__} depends on the image size and is no table of patches."
                )
            resized[name] = interpolate_positions(core.get_parameter(name).detach(), old_side, side)
    if not resized and old_side != side:
        raise ValueError(_no_positions(core))
    return resized


def interpolate_positions(table: torch.Tensor, old_side: int, side: int) -> torch.Tensor:
    """Interpolate learned positions, (extra + old_side^2, D) or with a leading 1; extra rows in front stay as they are."""
    extra = table.shape[-2] - old_side**2
    rows = table.float().reshape(-1, table.shape[-1])  # (extra + N, D)
    image = rows[extra:].T.unflatten(1, (old_side, old_side))[None]  # (1, D, rows, columns)
    image = nn.functional.interpolate(image, (side, side), mode="bicubic", align_corners=False)
    resized = torch.cat([rows[:extra], image[0].flatten(1).T])  # (extra + new N, D)
    return resized.reshape(*table.shape[:-2], -1, table.shape[-1]).to(table.dtype)


def _take_over(core: Any, old: Any, new: Any, undo: list[Callable[[], None]]) -> None:
    """Give modules, buffers and configs what differs between the two sizes."""
    for (name, before), (_, after) in zip(old.named_modules(), new.named_modules(), strict=True):
        module = core.get_submodule(name)
        for key, value in vars(after).items():
            if isinstance(value, int | float | tuple | list) and vars(before)[key] != value:
                _set(module, key, value, undo)
        for key, buffer in after.named_buffers(recurse=False):
            if buffer.shape != before.get_buffer(key).shape:
                _set(module, key, _counted(f"{name}.{key}", module.get_buffer(key), buffer.shape), undo)
        if "config" in vars(after):
            _update_config(module.config, before.config, after.config, undo)


def _counted(name: str, buffer: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the places 0, 1, ... of positions in another number; ValueError for a buffer that holds something else."""
    if not torch.equal(buffer.flatten(), torch.arange(buffer.numel(), device=buffer.device)):
        raise ValueError(f"{name} depends on the image size and is no count of patches.")
    return torch.arange(shape.numel(), device=buffer.device, dtype=buffer.dtype).view(shape)


def _update_config(config: Any, old: Any, new: Any, undo: list[Callable[[], None]]) -> None:
    for key, value in vars(new).items():
        if key in new.sub_configs:
            if value is not None:
                _update_config(getattr(config, key), getattr(old, key), value, undo)
        elif isinstance(value, int | float | tuple | list) and vars(old).get(key) != value:
            _set(config, key, value, undo)


def _set(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


# ---- the processor --------------------------------------------------------------------------------------------------


def _scale_sizes(core: Any, processor: Any, size: int, undo: list[Callable[[], None]]) -> None:
    """Scale every size of the image and the video processor as much as the side of a crop.

    Some processors have sizes of their own, `images_kwargs`, which win over the image processor's.
    """
    own, defaults = processor.image_processor, dict(getattr(processor, "images_kwargs", {}))
    sizes = {name: getattr(own, name, None) for name in SIZES} | {k: v for k, v in defaults.items() if k in SIZES}
    crop = next((edge for edge in (_edge(sizes[name]) for name in ("max_image_size", "crop_size", "size")) if edge), 0)
    if not crop:
        raise ValueError(f"its {type(own).__name__} has no size of a crop, since pictures keep sizes of their own.")
    if winning := {name: _scaled(value, size, crop) for name, value in defaults.items() if name in SIZES}:
        processor.images_kwargs = {**defaults, **winning}
    holders = (own, getattr(processor, "video_processor", None), core.config, core.base_model.config)
    for holder in {id(holder): holder for holder in holders if holder is not None}.values():
        for name in SIZES:
            value = getattr(holder, name, None)
            if value is not None and _edge(value):
                _set(holder, name, _scaled(value, size, crop), undo)
    settings = getattr(
        processor, "_video_settings", None
    )  # of a video processor that cannot be built without torchvision
    if settings:
        scaled = {
            name: _scaled(value, size, crop) for name, value in settings.items() if name in SIZES and _edge(value)
        }
        processor._video_settings = {**settings, **scaled}
    if hasattr(core.config, "image_seq_length"):
        _set(core.config, "image_seq_length", round(core.config.image_seq_length * (size / crop) ** 2), undo)


def _edge(size: Any) -> int:
    """Return the side of a crop that a size speaks of, 0 where it speaks of none."""
    if size is None or isinstance(size, int):
        return size or 0
    if isinstance(size, list | tuple):
        return int(size[0][0]) if size else 0
    edges = dict(size)
    return int(next((edges[name] for name in ("height", "longest_edge", "shortest_edge") if name in edges), 0))


def _scaled(value: Any, size: int, crop: int) -> Any:
    if isinstance(value, int):
        return round(value * size / crop)
    if isinstance(value, list | tuple):
        return type(value)(_scaled(item, size, crop) for item in value)
    scaled = {name: _scaled(edge, size, crop) for name, edge in dict(value).items()}
    return scaled if isinstance(value, Mapping) else type(value)(**scaled)


def _check(core: Any, processor: Any, size: int) -> None:
    """Take one picture all the way to image tokens, and compare with the placeholders in the text."""
    picture = Image.linear_gradient("L").resize((size, size)).convert("RGB")
    images = [picture] * frames_together(core.custom_connector)
    question = [*({"type": "image"} for _ in images), {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "."}]
    batch = Collator(processor)([{"messages": messages, "images": images}])
    found = tuple(batch["pixel_values"].shape[-2:])
    if found != (size, size):
        raise ValueError(f"its image processor makes crops of {found} pixels.")
    features_of = core.base_model.get_image_features
    known = inspect.signature(features_of).parameters
    dtype = next(core.get_submodule(core.stock_parts().paths["vision"][0]).parameters()).dtype
    inputs = {
        name: x.to(core.device, dtype if x.is_floating_point() else None) for name, x in batch.items() if name in known
    }
    with torch.no_grad(), core.asking({"input_ids": batch["input_ids"].to(core.device)}):
        features = features_of(**inputs, return_dict=True).pooler_output
    tokens = sum(math.prod(image.shape[:-1]) for image in features)
    placeholders = int((batch["input_ids"] == core.placeholder_token_id).sum())
    if tokens != placeholders:
        raise ValueError(f"its processor writes {placeholders} placeholders for {tokens} image tokens.")
