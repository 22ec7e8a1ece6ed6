"""What a custom class has or computes that its stock parent does not: modules, tensors, methods, settings.

(class, config) -> Departure, ...; found on the meta device, before any weight is read. `dropped_by_consent` are those that
leave the parent with all its tensors: it computes something else without them, but it is whole.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfcustom import parts
from hfcustom.connectors import find_connector
from hfcustom.custom_model import named_tensors
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.origins import (
    assignment_place,
    attribute_place,
    is_users,
    overrides,
    place_of,
    said,
    users_classes,
)

# What only training, loading and saving call; compute_logits is asked by losses, generation has the parent's head.
TRAINING_ONLY = frozenset(
    """_bound_scale _init_weights _start_losses check_loss compute_logits embed floating_point_ops from_pretrained head_size
    initialize_weights loss_context loss_counts loss_function loss_head loss_summaries losses make_collator
    overridden_seams pair_loss post_init push_to_hub save_pretrained set_reference set_teacher stock_class train
    unreached""".split()
)
OWN_FIELDS = ("connector", "loss")
SHOWN = 3


@dataclass(frozen=True)
class Departure:
    """One thing that the stock class is without."""

    kind: str
    name: str
    what: str
    declared: str
    dropped_by_consent: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.what}; declared in {self.declared}"


def find_departures(model_class: Any, config: Any) -> list[Departure]:
    """Return everything that keeps the stock class from computing what a custom class does with this config."""
    skeleton, stock = build_skeletons(model_class, config)
    changed = _changed(skeleton, stock)
    replaced = tuple(item.name + "." for item in changed if item.kind == "replaced module")
    added = [item for item in _added(skeleton) if not item.name.startswith(replaced)]
    structure = [*_connector(model_class, skeleton.config), *added, *changed]
    return [*structure, *_corrections(model_class, config), *_methods(model_class), *_processor(model_class)]


def build_skeletons(model_class: Any, config: Any) -> tuple[Any, Any]:
    """Return a model of the class and one of its stock parent without weights; ValueError where the class has no such parent."""
    stock_class = model_class.stock_class()
    if not stock_class.__module__.startswith("transformers.models."):
        raise ValueError(
            f"{model_class.__name__} customises {stock_class.__module__}.{stock_class.__name__}, which is no class of "
            "transformers: no server knows it. `hfcustom bundle` makes a folder that brings its code along."
        )
    with torch.device("meta"):
        return model_class(copy.deepcopy(config)), stock_class(stock_config(model_class, config))


def stock_config(model_class: Any, config: Any) -> Any:
    """Return the stock parent's config with the values of a custom one, its own fields left out."""
    stock_class = model_class.stock_class().config_class
    own = own_fields(model_class)
    left_out = {"model_type", "auto_map", "quantization_config", "architectures", *own}
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return stock_class(**{name: value for name, value in values.items() if not name.startswith("hfcustom")})


def own_fields(model_class: Any) -> set[str]:
    """Return the fields that a custom config class, in whichever style it is written, adds to its stock parent's."""
    stock_class = model_class.stock_class().config_class
    found = set[str]()
    for base in model_class.config_class.__mro__:
        if not issubclass(stock_class, base):
            found |= vars(base).get("__annotations__", {}).keys()
            found |= {name for name, value in vars(base).items() if not (name.startswith("_") or callable(value))}
            found |= set(inspect.signature(base.__init__).parameters if "__init__" in vars(base) else ())
    known = {*dir(stock_class), *inspect.signature(stock_class.__init__).parameters, "self", "args", "kwargs"}
    return {*OWN_FIELDS, *(found - known)}


# ---- structure ------------------------------------------------------------------------------------------------------


def _connector(model_class: Any, config: Any) -> list[Departure]:
    if config.connector is None:
        return []
    module = find_connector(config.connector)[0]
    place = attribute_place(model_class, "default_connector")
    named = f"default_connector at {place}" if place is not None else "the checkpoint's config.json"
    defined = said(place_of(module), module)
    what = f"{config.connector!r}, a {module.__name__} ({defined}) that decides how many image tokens there are"
    return [Departure("connector", "custom_connector", what, named, False)]


def _added(skeleton: Any) -> list[Departure]:
    tensors = {name: tensor for name, tensor in named_tensors(skeleton) if name in set(skeleton.new_tensor_names())}
    found = []
    for path in _tops(skeleton):
        if path == "custom_connector" or (path == "logit_bias" and isinstance(skeleton, CustomDualEncoder)):
            continue  # said by _connector; of the loss alone, the parent's logits have none
        inside = [(name, tensor) for name, tensor in tensors.items() if name == path or name.startswith(path + ".")]
        declared = said(assignment_place(type(skeleton), path), type(skeleton))
        what = f"{_class_at(skeleton, path)} with {_shapes(inside, path)}"
        found.append(Departure("added module", path, what, f"{declared}, {type(skeleton).__name__}", True))
    return found


def _tops(skeleton: Any) -> tuple[str, ...]:
    if isinstance(skeleton, CustomDualEncoder):
        return tuple(dict.fromkeys(name.partition(".")[0] for name in skeleton.new_tensor_names()))
    return parts.find_parts(skeleton).paths["new"]


def _changed(skeleton: Any, stock: Any) -> list[Departure]:
    """Return what stands in the place of stock modules, and stock tensors that are gone or have another shape."""
    mine, theirs = (dict(named_tensors(model)) for model in (skeleton, stock))
    modules, replaced = dict(skeleton.named_modules()), list[str]()
    for path, module in stock.named_modules():
        inside = any(path.startswith(parent + ".") for parent in replaced)
        if path and not inside and not _same(modules.get(path), module):
            replaced.append(path)
    model_class = type(skeleton)
    found = [_replaced(model_class, path, skeleton, stock, mine, theirs) for path in replaced]
    for name, tensor in theirs.items():
        if any(name == path or name.startswith(path + ".") for path in replaced):
            continue
        if name not in mine or mine[name].shape != tensor.shape:
            now = f"{tuple(mine[name].shape)}" if name in mine else "gone"
            declared = f"{said(assignment_place(model_class, name), model_class)}, {model_class.__name__}"
            kind = "reshaped tensor" if name in mine else "missing tensor"
            found.append(Departure(kind, name, f"{tuple(tensor.shape)} in the parent, here {now}", declared, False))
    return found


def _same(mine: nn.Module | None, theirs: nn.Module) -> bool:
    """Whether a module is the parent's, or what a family of hfcustom puts there: a subclass that computes the same."""
    return type(mine) is type(theirs) or (isinstance(mine, type(theirs)) and not is_users(type(mine)))


def _replaced(model_class: Any, path: str, skeleton: Any, stock: Any, mine: Any, theirs: Any) -> Departure:
    before = f"{_class_at(stock, path)} with {_shapes(_under(theirs, path), path)}"
    after = f"{_class_at(skeleton, path)} with {_shapes(_under(mine, path), path)}"
    declared = f"{said(assignment_place(model_class, path), model_class)}, {model_class.__name__}"
    whole = {name: t.shape for name, t in _under(theirs, path)} == {name: t.shape for name, t in _under(mine, path)}
    return Departure("replaced module", path, f"{after} in the place of {before}", declared, whole)


def _under(tensors: dict[str, torch.Tensor], path: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if name == path or name.startswith(path + ".")]


def _class_at(model: nn.Module, path: str) -> str:
    module = dict(model.named_modules()).get(path)
    if module is None:
        return "Parameter" if path in dict(model.named_parameters()) else "nothing"
    return type(module).__name__


def _shapes(tensors: list[tuple[str, torch.Tensor]], path: str) -> str:
    names = [f"{name.removeprefix(path).lstrip('.') or 'shape'} {tuple(tensor.shape)}" for name, tensor in tensors]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "no tensors"


# ---- what is computed -----------------------------------------------------------------------------------------------


def _corrections(model_class: Any, config: Any) -> list[Departure]:
    known = getattr(model_class, "corrections", {})  # of CustomVLM; an encoder has none
    on = [name for name in known if getattr(config, name)]
    where = "the checkpoint's config.json"
    return [Departure("correction", name, f"{known[name].partition('.')[0]}, in stock", where, True) for name in on]


def _methods(model_class: Any) -> list[Departure]:
    found = []
    for name, owner in overrides(model_class, TRAINING_ONLY).items():
        declared = said(attribute_place(owner, name) or place_of(owner), owner)
        what = f"overridden in {owner.__name__}, and the stock class does not call it"
        found.append(Departure("method", name, what, declared, True))
    return found


def _processor(model_class: Any) -> list[Departure]:
    processor_class = model_class.processor_class
    if not is_users(processor_class) or not users_classes(processor_class):
        return []
    names = ", ".join(overrides(processor_class)) or "nothing"
    what = f"a processor of your own (overrides {names}); the stock one stands in for it"
    return [
        Departure("processor", processor_class.__name__, what, said(place_of(processor_class), processor_class), True)
    ]
