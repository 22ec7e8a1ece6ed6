"""What is to be served: a class with its tiny or its own config, built without weights, and the inner model that a server builds.

a class in a file, a family, or a checkpoint -> Served
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hfcustom.base import CustomVLM
from hfcustom.custom_model import CustomModel
from hfcustom.doctor.patient import family_class_of
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.export.departures import stock_config
from hfcustom.export.source import class_of, has
from hfcustom.families import family_names, load_family, missing_packages
from hfcustom.loading import check_source
from hfcustom.naming import load_class, no_target
from hfcustom.origins import is_users
from hfcustom.registry import REGISTERED


@dataclass(frozen=True)
class Served:
    """A model class as a server meets it; models are on the meta device."""

    model_class: Any
    config: Any
    processor: Any = None  # None where there is none to try
    checkpoint: Path | None = None

    @cached_property
    def model(self) -> Any:
        """The whole model."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))

    @property
    def is_outer(self) -> bool:
        """Whether the class holds the inner model that a server builds, rather than being it."""
        return self.model.base_model is not self.model

    @property
    def inner(self) -> Any:
        """The inner model as the whole one holds it."""
        return self.model.base_model

    @cached_property
    def alone(self) -> Any:
        """The inner model as AutoModel builds it, by itself; None for a class that has none."""
        if not self.is_outer:
            return None if isinstance(self.model, CustomModel) else self.model
        with torch.device("meta"):
            return type(self.inner)(self._inner_config())

    @cached_property
    def stock(self) -> Any:
        """The stock parent of the whole model; None where the class customises none."""
        if not isinstance(self.model, CustomModel):
            return None
        with torch.device("meta"):
            return self.model_class.stock_class()(stock_config(self.model_class, self.config))

    def _inner_config(self) -> Any:
        config = copy.deepcopy(self.config)
        custom = isinstance(self.model, CustomModel) and not is_users(type(self.inner))
        return stock_config(self.model_class, config) if custom else config

    @cached_property
    def auto_class(self) -> Any:
        """The class that AutoModel has for the stock config; None where there is none."""
        config = stock_config(self.model_class, self.config) if isinstance(self.model, CustomModel) else self.config
        return MODEL_MAPPING.get(type(config), None)

    @cached_property
    def decoder(self) -> nn.Module:
        """The language model of the inner model."""
        model = self.alone if self.alone is not None else self.inner
        decoder: nn.Module = model.get_decoder()
        return decoder

    def own_modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules of the decoder that are of the user's classes, the decoder and what is inside."""
        return [(name, module) for name, module in self.decoder.named_modules() if is_users(type(module))]

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The checkpoint's config.json, nothing for a class."""
        return {} if self.checkpoint is None else PretrainedConfig.get_config_dict(self.checkpoint)[0]

    @property
    def is_native(self) -> bool:
        """Whether the checkpoint's model_type is one that transformers has itself."""
        return self.stored.get("model_type") in CONFIG_MAPPING_NAMES


def find_target(target: str) -> Served:
    """Return what a target means; ValueError, TypeError, ImportError or FileNotFoundError says what it should be."""
    if ".py:" in target:
        return of_class(load_class(target))
    if target in family_names():
        load_family(target)
        return of_class(REGISTERED[f"custom_{target}"])
    if target in encoder_names():
        load_encoder(target)
        return of_class(REGISTERED[f"custom_{target}"])
    if Path(target).is_dir() or ("/" in target and not target.endswith(".py")):
        check_source(target)
        model_class = class_of(target)
        config = _checked(model_class).config_class.from_pretrained(target)
        there = any(has(target, name) for name in ("processor_config.json", "preprocessor_config.json"))
        processor = model_class.processor_class.from_pretrained(target) if there else None
        return Served(model_class, config, processor, Path(target))
    raise ValueError(no_target(target, family_names()))


def of_class(model_class: Any) -> Served:
    """Return a class with the family's tiny config, or its config class's defaults where it is of no family."""
    model_class = _checked(model_class)
    if not issubclass(model_class, CustomVLM):
        return Served(model_class, model_class.config_class())
    family = family_class_of(model_class)
    name = family.__module__.rpartition(".")[2]
    if missing := missing_packages(name):
        raise ImportError(f"The family {name!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    module = sys.modules[family.__module__]
    config = model_class.config_class.adopt(module.tiny_config())
    processor = model_class(config).match_processor(module.tiny_processor())
    return Served(model_class, config, processor)


def _checked(model_class: Any) -> Any:
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(f"{model_class!r} is no model class of transformers: a subclass of PreTrainedModel.")
    if issubclass(model_class, CustomDualEncoder):
        raise TypeError(
            f"{model_class.__name__} is a contrastive encoder, which generates nothing; `hfcustom export` writes it for its "
            "stock class."
        )
    if model_class.config_class is None:
        raise TypeError(
            f"{model_class.__name__} names no config_class, so that nothing can build it from a config.json."
        )
    return model_class
