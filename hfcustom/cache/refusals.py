"""Why the features of a model's images cannot be cached, in words with the cure; nothing where they can."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from hfcustom.base import CustomVLM
from hfcustom.cache.features import METHOD, VIDEO_METHOD, modules_below
from hfcustom.connectors import frames_together, takes_pictures, takes_question, works_before_projector
from hfcustom.parts import find_parts, unwrap
from hfcustom.processors import VideosAsImages
from hfcustom.videos import VideoFrames
from hfcustom.wrapping import WrappedVLM


def why_not_cached(model: Any) -> str:
    """Return why image features of a model, wrapped or not, would be wrong or useless when cached, "" where they are right."""
    core = unwrap(model)
    if why := next(_general(model, core), ""):
        return why
    return next(_tower(model, core), "") if why_tower_only(model) else ""


def why_tower_only(model: Any) -> str:
    """Return why what is cached ends at the vision tower, "" where the connector's output is."""
    return next(_above(model, unwrap(model)), "")


def why_no_videos(core: Any, processor: Any, tower_only: str = "") -> str:
    """Return why features of videos cannot be kept, though those of images can; "" where they can."""
    if tower_only:
        return f"what the vision tower makes is kept, since {tower_only}"
    if not hasattr(type(core.get_submodule(core.inner_path())), VIDEO_METHOD):
        return f"{type(core).__name__} has no {VIDEO_METHOD}() that they could be handed in at"
    if isinstance(processor, VideosAsImages):
        return f"{type(processor).__name__} puts frames of videos among the images"
    return ""


def video_token_id(core: Any) -> int:
    """Return the id in input_ids that stands for one token of a video."""
    return int(core.video_token_id if isinstance(core, VideoFrames) else core.config.video_token_id)


def _general(model: Any, core: Any) -> Iterator[str]:
    name = type(core).__name__
    if not isinstance(core, CustomVLM) or isinstance(core, WrappedVLM):
        yield f"{name} has no seam where features could be handed in; load the model with a family's custom class"
        return
    if core.no_feature_cache:
        yield f"in this family {core.no_feature_cache}"
    if not hasattr(type(core.get_submodule(core.inner_path())), METHOD):
        yield f"{name} has no {METHOD}() that they could be handed in at"
    if any("_orig_mod" in module._modules for module in (model, core)):
        yield "the model is compiled: torch.compile would keep one batch's features"
    if trained := _trained(model, ("vision",)):
        yield (
            f"{trained} is trained, and the features depend on it: freeze the vision tower (--freeze vision, or --freeze "
            "vision connector, which caches more), or train LoRA on the language model alone"
        )
    if dropped := _random(core, tower=True):
        yield f"{dropped} drops values at random in training: set its dropout to 0"
    if moving := _moving(core):
        yield f"{moving} changes while training: it is a BatchNorm"


def _tower(model: Any, core: Any) -> Iterator[str]:
    """Yield why the tower's output cannot be cached either, with why that is asked."""
    why = f"{next(_above(model, core))}, so only what the vision tower makes could be cached, but"
    if core.no_tower_cache:
        yield f"{why} in this family {core.no_tower_cache}"
    paths = core.stock_parts().paths
    inside = any(
        method == "_at_connector_input" and path.startswith(paths["vision"][0] + ".")
        for path, _, method, _ in core.seam_hooks()
    )
    changed = type(core).transform_vision_features is not CustomVLM.transform_vision_features
    if inside and (changed or works_before_projector(core.custom_connector)):
        yield f"{why} in this family vision features are changed inside of it"
    if not paths["connector"] or paths["connector"][0].startswith(paths["vision"][0] + "."):
        yield f"{why} in this family the connector is a part of it"


def _above(model: Any, core: Any) -> Iterator[str]:
    """Yield why what leaves the connector cannot be cached, though what leaves the tower perhaps can."""
    name = type(core).__name__
    if trained := _trained(model, ("vision", "connector")):
        yield f"{trained} is trained"
    if core.no_connector_cache:
        yield core.no_connector_cache
    if type(core).transform_vision_features is not CustomVLM.transform_vision_features:
        yield f"{name} overrides transform_vision_features, which would no longer run"
    if takes_pictures(core.custom_connector):
        yield f"connector={core.config.connector!r} looks at the pictures"
    if takes_question(core.custom_connector):
        yield f"connector={core.config.connector!r} looks at what a row asks, so an image is another one in each row"
    if frames_together(core.custom_connector) > 1:
        yield f"connector={core.config.connector!r} takes neighbouring images together"
    if dropped := _random(core):
        yield f"{dropped} drops values at random in training"
    if looks := [item.loss.name for item in core.losses() if _looks_at_vision(item.loss)]:
        yield f"the loss {looks[0]} looks at vision_features, which are not computed"


def _trained(model: nn.Module, below_parts: tuple[str, ...]) -> str:
    """Return the first trained parameter of parts, a custom connector counting as one of the connector."""
    parts = find_parts(model)
    for name, parameter in model.named_parameters():
        below = parts.part_of(name) in below_parts
        below = below or ("connector" in below_parts and "custom_connector." in name)
        if below and parameter.requires_grad:
            return name
    return ""


def _random(core: Any, *, tower: bool = False) -> str:
    """Return the first module below the language model that draws random numbers in training."""
    for path, part in modules_below(core, tower=tower):
        for name, module in part.named_modules():
            shares = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else _shares(module)
            if any(shares):
                return f"{path}.{name}".rstrip(".")
    return ""


def _shares(module: nn.Module) -> list[float]:
    """Return what a module keeps under a name of dropout, as attention that calls torch's function does."""
    return [
        value for name, value in vars(module).items() if isinstance(value, float) and name.lower().startswith(NAMES)
    ]


NAMES = ("attention_dropout", "attn_drop", "drop", "dropout")


def _moving(core: Any) -> str:
    found = (
        f"{path}.{name}".rstrip(".")
        for path, part in modules_below(core)
        for name, module in part.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    return next(found, "")


def _looks_at_vision(loss: Any) -> bool:
    function = inspect.unwrap(loss.function)
    return loss.is_term and isinstance(function, FunctionType) and _mentions(function.__code__, "vision_features")


def _mentions(code: CodeType, name: str) -> bool:
    """Whether a function's code, or that of a function inside it, reads an attribute of that name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_mentions(found, name) for found in inner)


def reads_pixels(core: Any) -> bool:
    """Whether anything but the vision tower may look at the pixels: then they are made, features cached or not.

    A frozen model beside this one sees the same batch; a user's own forward or term could look at anything in it.
    """
    methods = (type(core).forward, type(core).loss_context, type(core).stock_inputs, type(core).loss_counts)
    own = not all(map(_ours, methods))
    terms = any(item.loss.is_term and not _ours(item.loss.function) for item in core.losses())
    return bool(core.companions) or own or terms or takes_pictures(core.custom_connector)


def _ours(function: Any) -> bool:
    return bool(function.__module__.partition(".")[0] == "hfcustom")
