"""register(): make the Auto classes know a custom model, or say exactly why they cannot.

One call covers config, model and processor: AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM and
AutoProcessor load the class's checkpoints in any process that has imported it; those of a contrastive encoder load
through AutoModel and AutoModelForZeroShotImageClassification.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from hfcustom.custom_model import CustomModel
from hfcustom.naming import snake_case

ModelClass = TypeVar("ModelClass", bound=type[CustomModel])

# transformers finds the classes of a bundle by its auto_map; told of them too, it would take the first bundle's for the next.
IN_BUNDLE = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
REGISTERED: dict[str, type[Any]] = {}  # model_type -> class


@overload
def register(model_class: ModelClass, *, model_type: str | None = None) -> ModelClass: ...


@overload
def register(*, model_type: str) -> Callable[[ModelClass], ModelClass]: ...


def register(model_class: Any = None, *, model_type: str | None = None) -> Any:
    """Register a custom class with the Auto classes; a decorator, bare or with a model_type.

    A class that inherits its config from an already registered one gets a config class of its own, whose model_type is
    the class's name in snake_case or `model_type`. Registering the same class again, also after its cell or file ran a
    second time, is harmless. Raises TypeError for a class that is not a custom model, ValueError for a model_type that
    is malformed, native to transformers, or taken by another class (both are named).
    """
    if model_class is None and model_type is not None:
        return partial(register, model_type=model_type)
    _check_class(model_class)
    own_config = model_type is not None or _inherits_config(model_class)
    name = model_type or _default_model_type(model_class) if own_config else model_class.config_class.model_type
    _check_model_type(name, model_class)
    if own_config:
        _make_config_class(model_class, name)
    config_class: Any = model_class.config_class
    if not IN_BUNDLE:
        AutoConfig.register(name, config_class, exist_ok=True)
        for auto_class in model_class.auto_classes:
            auto_class.register(config_class, model_class, exist_ok=True)
        AutoProcessor.register(config_class, model_class.processor_class, exist_ok=True)
    model_class.task_table[name] = model_class.__name__
    REGISTERED[name] = model_class
    return model_class


def _check_class(model_class: object) -> None:
    if not isinstance(model_class, type):
        raise TypeError(f"register() takes a class, not the {type(model_class).__name__} {model_class!r}.")
    if not (issubclass(model_class, CustomModel) and model_class.auto_classes):
        raise TypeError(
            f"{model_class.__qualname__} is not a custom model. Subclass one of hfcustom.families, for instance "
            "hfcustom.families.internvl.CustomInternVLForConditionalGeneration."
        )
    model_class.stock_class()


def _inherits_config(model_class: type[CustomModel]) -> bool:
    """Whether the config class is a registered parent's, so that saving under it would load the parent."""
    config_class: Any = model_class.config_class
    owner = REGISTERED.get(config_class.model_type)
    return owner is not None and _origin(owner) != _origin(model_class) and owner in model_class.__mro__


def _default_model_type(model_class: type[CustomModel]) -> str:
    return snake_case(_stem(model_class))


def _stem(model_class: type[CustomModel]) -> str:
    return model_class.__name__.removesuffix("ForConditionalGeneration").removesuffix("Model")


def _make_config_class(model_class: type[CustomModel], model_type: str) -> None:
    """Give the class a config class of its own, importable from the class's module."""
    name = _stem(model_class) + "Config"
    namespace = {"model_type": model_type, "__module__": model_class.__module__, "__qualname__": name}
    parent: Any = model_class.config_class
    config_class = type(name, (parent,), namespace)
    model_class.config_class = config_class
    setattr(sys.modules[model_class.__module__], name, config_class)


def _check_model_type(name: str, model_class: type[CustomModel]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"model_type={name!r} must be lower case letters, digits and underscores.")
    if name in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"model_type {name!r} of {_origin(model_class)} is native to transformers; registering would replace the "
            "native class for the whole process. Pass register(..., model_type='my_name')."
        )
    taken = REGISTERED.get(name)
    if taken is not None and _origin(taken) != _origin(model_class):
        raise ValueError(
            f"model_type {name!r} belongs to {_origin(taken)}; {_origin(model_class)} needs another: "
            "pass register(..., model_type='my_name')."
        )
    if taken is None and name in CONFIG_MAPPING and not IN_BUNDLE:
        raise ValueError(
            f"model_type {name!r} belongs to {_origin(CONFIG_MAPPING[name])}; {_origin(model_class)} needs another: "
            "pass register(..., model_type='my_name')."
        )


def _origin(some_class: type) -> str:
    return f"{some_class.__module__}.{some_class.__qualname__}"
