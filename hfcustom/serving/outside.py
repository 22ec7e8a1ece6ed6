"""Rules about what stands outside of the inner model, which is all that a server builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hfcustom.custom_model import CustomModel, named_tensors
from hfcustom.export.departures import TRAINING_ONLY
from hfcustom.origins import (
    Place,
    assignment_place,
    attribute_place,
    is_users,
    overrides,
    place_of,
)
from hfcustom.parts import find_head
from hfcustom.serving.finding import Found, rule
from hfcustom.serving.target import Served

BEFORE_SERVING = {
    "match_processor",
    "tokens_per_crop",
    "stock_tokens_per_crop",
    "make_connector",
    "resize_token_embeddings",
}
INSIDE = "Write a class of your own for the inner model, `class MyInner(TheModel)`, and hold it: `self.model = MyInner(config)`."


@rule(
    asks="what the model computes is in the inner model",
    why="The server builds AutoModel's class, which is the inner model, and has a head of its own. It never makes this class, "
    "so the method is not called, and the answers are those of the model without it.",
    cure=f"{INSIDE} Vision features and connectors belong into its get_image_features, changes of embeddings and hidden states "
    "into its forward.",
)
def inner_model(served: Served) -> Iterator[Found]:
    """Find methods of the outer class."""
    if not served.is_outer and served.alone is not None:
        return
    for name, owner in overrides(served.model_class, TRAINING_ONLY | BEFORE_SERVING).items():
        yield attribute_place(owner, name) or place_of(owner), f"{owner.__name__}.{name} is outside of the inner model"
    for name in getattr(served.model_class, "corrections", {}):
        if getattr(served.config, name):
            yield None, f"{name}=True of the config is done by {served.model_class.__name__}, not by its inner model"


@rule(
    asks="every tensor is the inner model's or the head's",
    why="The server has no module of this name, so loading the weights ends with `There is no module or parameter named ...`.",
    cure=f"{INSIDE} What only a loss asks for need not be served: `hfcustom export --weights-only` leaves it out.",
)
def outer_module(served: Served) -> Iterator[Found]:
    """Find modules that the outer class adds, with or without tensors."""
    model = served.model
    if not isinstance(model, CustomModel):
        return
    if model.config.connector is not None:
        place = attribute_place(served.model_class, "default_connector")
        yield place, f"the connector {model.config.connector!r} is held by {served.model_class.__name__} itself"
    prefix = model.base_model_prefix + "."
    tops = dict.fromkeys(
        _below(name, served) for name in model.new_tensor_names() if not _inside(name, prefix, served)
    )
    for name in tops:
        if name != "custom_connector":
            shown = type(dict(model.named_modules()).get(name, nn.Parameter())).__name__
            yield assignment_place(served.model_class, name), f"{name}, a {shown}, is no part of the inner model"


def _inside(name: str, prefix: str, served: Served) -> bool:
    return served.is_outer and name.startswith(prefix)


def _below(name: str, served: Served) -> str:
    stock = {path.partition(".")[0] for path in served.model.stock_tensor_names()}
    first = name.partition(".")[0]
    return name.rpartition(".")[0] or name if first in stock else first


@rule(
    asks="the inner model builds all of its parts itself",
    why="The server builds the inner model from the config alone; what the outer __init__ puts into it afterwards is not there: "
    "other modules compute, or their weights do not load.",
    cure="Build it in the __init__ of the inner model's own class.",
)
def built_inside(served: Served) -> Iterator[Found]:
    """Compare the inner model as the class holds it with the one that AutoModel builds."""
    if not served.is_outer:
        return
    prefix = served.model.base_model_prefix
    held, alone = dict(served.inner.named_modules()), dict(served.alone.named_modules())
    seen: list[str] = []
    for path in dict.fromkeys([*alone, *held]):
        known = any(path.startswith(parent + ".") for parent in seen)
        if path and not known and not _alike(held.get(path), alone.get(path)):
            seen.append(path)
            now, then = (type(group.get(path)).__name__ if path in group else "nothing" for group in (held, alone))
            yield (
                _place(served, f"{prefix}.{path}"),
                f"{prefix}.{path} is a {now}, and {then} in the inner model alone",
            )
    mine, theirs = (dict(named_tensors(model)) for model in (served.inner, served.alone))
    for name in dict.fromkeys([*theirs, *mine]):
        shapes = [tuple(group[name].shape) if name in group else "nothing" for group in (mine, theirs)]
        if shapes[0] != shapes[1] and not any(name.startswith(path + ".") for path in seen):
            yield (
                _place(served, f"{prefix}.{name}"),
                f"{prefix}.{name} is {shapes[0]}, and {shapes[1]} in the inner model alone",
            )


def _alike(held: nn.Module | None, alone: nn.Module | None) -> bool:
    """Whether two modules are of one class, or the first is what a family of hfcustom puts in the second's place."""
    if type(held) is type(alone):
        return True
    return alone is not None and isinstance(held, type(alone)) and not is_users(type(held))


def _place(served: Served, path: str) -> Place | None:
    return assignment_place(served.model_class, path) or place_of(served.model_class)


@rule(
    asks="the head is a Linear from the text config's hidden_size to its vocab_size",
    why="The server builds the head from the text config (vocab_size, hidden_size, logit_scale, final_logit_softcapping) and "
    "reads lm_head.weight and lm_head.bias; what else a head holds or does has no place there.",
    cure="Do it to the hidden states, at the end of the inner model's forward, or say it by the config's own fields.",
)
def head(served: Served) -> Iterator[Found]:
    """Find heads of another kind."""
    if not served.is_outer or served.stock is None:
        return
    mine, stock = (find_head(model) for model in (served.model, served.stock))
    if mine is None or stock is None or type(mine) is type(stock):
        return
    path = next(name for name, module in served.model.named_modules() if module is mine)
    what = f"the head {path} is a {type(mine).__name__}"
    yield _place(served, path), what


@rule(
    asks="AutoModel finds the inner model from config.json",
    why="Without `auto_map.AutoModel` in config.json, or with a model_type that transformers does not know, a server cannot find "
    "the class: it stops, or takes the stock class and leaves your code out.",
    cure="MyInner.register_for_auto_class('AutoModel') and MyConfig.register_for_auto_class() in its file, and `hfcustom bundle`; "
    "where nothing but losses is your own, `hfcustom export` restores the stock model_type.",
)
def auto_map(served: Served) -> Iterator[Found]:
    """Find what AutoModel could not follow."""
    if served.checkpoint is not None:
        named = (served.stored.get("auto_map") or {}).get("AutoModel")
        if not served.is_native and not named:
            kind = served.stored.get("model_type")
            yield None, f"{served.checkpoint}/config.json: model_type {kind!r} and no auto_map.AutoModel"
        return
    inner: Any = type(served.alone) if served.alone is not None else None
    if inner is not None and is_users(inner) and inner._auto_class != "AutoModel":
        yield place_of(inner), f"{inner.__name__} is not registered for AutoModel"
