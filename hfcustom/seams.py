"""Where the seams meet the stock graph: hooks at the borders of the parts, and what a running forward has produced.

images -> vision tower -> [vision features] -> connector -> [connector] -> placeholders -> [merged embeddings]
       -> language model -> [hidden states] -> head -> logits

Hooks sit on whole parts (found by hfcustom/parts.py), outside anything that gradient checkpointing recomputes, so the
stock forward runs unchanged between them. Letters: B rows, T text tokens, N image tokens, P crops, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfcustom.naming import check_shape
from hfcustom.packed import BY_ROW, is_causal

if TYPE_CHECKING:
    from hfcustom.custom_model import CustomModel
    from hfcustom.questions import Asked


@dataclass
class ForwardPass:
    """Tensors that the running forward has produced so far; None where the batch has no image."""

    records: bool = False  # keep the tensors below for the loss
    skips_head: bool = False  # nobody wants the logits
    ends_with_inner: bool = False  # the inner model was called directly and closes the pass itself
    asked_before: Asked | None = None  # what it closes with: what connectors may ask for around it
    image_mask: torch.Tensor | None = None  # (B, T) True at image placeholders
    video_mask: torch.Tensor | None = None  # (B, T) True at video placeholders, where a family tells them apart
    rows: torch.Tensor | None = None  # (B, T) which row of data a token belongs to, where several are packed into one
    crops: torch.Tensor | None = None  # (P,) which crops hold an image, in families that pad with empty ones
    vision_features: torch.Tensor | None = None  # (P, patches, D_vision)
    image_features: torch.Tensor | None = None  # (P, N, D)
    hidden_states: torch.Tensor | None = None  # (B, T, D)

    def tensors(self) -> dict[str, Any]:
        """Return what a LossContext takes."""
        names = ("image_mask", "vision_features", "image_features", "hidden_states")
        return {name: getattr(self, name) for name in names}


class Seam:
    """A hook that calls `owner.<method>`.

    It is an object rather than a bound method so that copying a part of the model (peft copies `modules_to_save`)
    does not copy the whole model along: only a copy that includes the owner moves the hook to the new owner.
    """

    def __init__(self, owner: CustomModel, method: str) -> None:
        self.owner = owner
        self.method = method

    def __call__(self, *args: Any) -> Any:
        return getattr(self.owner, self.method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Seam:
        return Seam(memo.get(id(self.owner), self.owner), self.method)


class MethodSeam(Seam):
    """Stands in for a method of a part: calls `owner.<method>(stock method, ...)`, and shows the stock signature."""

    def __init__(self, owner: CustomModel, method: str, path: str, name: str) -> None:
        super().__init__(owner, method)
        self.path, self.name = path, name
        self.__signature__ = inspect.signature(self.stock())

    def stock(self) -> Callable[..., Any]:
        """Return the part's own method."""
        part = self.owner.get_submodule(self.path)
        return partial(getattr(type(part), self.name), part)  # a bound method would be looked up anew by torch.compile

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.owner, self.method)(self.stock(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodSeam:
        copied = MethodSeam.__new__(MethodSeam)
        copied.__dict__.update(self.__dict__, owner=memo.get(id(self.owner), self.owner))
        return copied


def install(owner: CustomModel) -> None:
    """Put the owner's seams on its parts; a part that already carries its seam, or contains it, is left alone.

    Safe to call again: a user who replaces a part (`self.model.connector = MyConnector(...)`) gets the seam on the
    new one, and a part that peft has wrapped keeps the seam it has inside the wrapper.
    """
    for path, register, method, options in owner.seam_hooks():
        module = owner.get_submodule(path)
        if not (_carries(module, method) or any(_carries(inner, method) for inner in module.modules())):
            getattr(module, register)(Seam(owner, method), **options)
    for path, name, method in owner.seam_methods():
        part = owner.get_submodule(path)
        if name not in part.__dict__:
            part.__dict__[name] = MethodSeam(owner, method, path, name)


def _carries(module: nn.Module, method: str) -> bool:
    hooks: list[Callable[..., Any]] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(isinstance(hook, Seam) and hook.method == method for hook in hooks)


def check_kept(method: str, changed: Any, given: torch.Tensor) -> None:
    """Raise ValueError when a transform returned another shape than it got, or a dtype that what follows cannot take."""
    check_shape(method, changed, given.shape)
    if changed.dtype != given.dtype and not torch.is_autocast_enabled(given.device.type):
        found, expected = (str(dtype).removeprefix("torch.") for dtype in (changed.dtype, given.dtype))
        raise ValueError(f"{method} returned {found}; it got {expected}: end with .to(torch.{expected}).")


def find_placeholders(
    model: Any, input_ids: torch.Tensor | None, embeds: torch.Tensor | None, token: int | None = None
) -> torch.Tensor:
    """Return the (B, T) mask of a placeholder, by default the image's, from ids or, as stock does, from embeddings."""
    token = model.placeholder_token_id if token is None else token
    if input_ids is not None:
        return input_ids == token  # (B, T)
    assert embeds is not None, "the model got neither input_ids nor inputs_embeds"
    placeholder = model.get_input_embeddings()(torch.tensor(token, device=embeds.device))  # (D,)
    return (embeds == placeholder).all(-1)  # (B, T)


def needs_no_mask(inputs: Mapping[str, Any], text_config: Any, decoder: nn.Module) -> bool:
    """Whether causal attention alone keeps padding out: it stands on the right, where no real token looks.

    Without a mask torch attends causally at half the work. Asked on a CPU only: on a GPU the answer would take a wait.
    A sliding window is causal too, and stock builds its mask without this one. Tokens that see ahead do need it: those of
    one type (token_type_ids: a prompt, an image), and all of them in a decoder that leaves causality to the mask.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.device.type != "cpu":
        return False
    if text_config._attn_implementation not in ("sdpa", BY_ROW):
        return False
    if inputs.get("position_ids") is not None or inputs.get("token_type_ids") is not None:
        return False
    return is_causal(decoder) and bool((mask[:, 1:] <= mask[:, :-1]).all())
