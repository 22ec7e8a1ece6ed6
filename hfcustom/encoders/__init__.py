"""The contrastive encoders: one file each, found by file name and imported when asked for.

`load_encoder("clip")` imports hfcustom/encoders/clip.py, which registers its classes with the Auto classes.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hfcustom.naming import unknown

if TYPE_CHECKING:
    from hfcustom.dual_encoder import CustomDualEncoder


def encoder_names() -> list[str]:
    """Return the names of all encoders, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_encoder(name: str) -> ModuleType:
    """Import an encoder by name; ValueError suggests the nearest."""
    if name not in encoder_names():
        raise ValueError(unknown("encoder", name, encoder_names()))
    return importlib.import_module(f"hfcustom.encoders.{name}")


def class_of(checkpoint: str, **hub: Any) -> type[CustomDualEncoder]:
    """Return the custom class of an encoder's checkpoint, from its config.json; `hub` goes to the config's download.

    Raises ValueError for a model_type that is no encoder's, naming them, FileNotFoundError for a missing folder.
    """
    from transformers import PretrainedConfig

    from hfcustom.loading import check_source
    from hfcustom.registry import REGISTERED

    check_source(checkpoint)
    model_type = PretrainedConfig.get_config_dict(checkpoint, **hub)[0].get("model_type", "")
    name = model_type.removeprefix("custom_")
    if name in encoder_names():
        load_encoder(name)
        return REGISTERED[f"custom_{name}"]
    if model_type not in REGISTERED:
        cure = "Is it a class of your own? Name its file: --custom my_file.py:MyModel."
        raise ValueError(f"{checkpoint}: {unknown('model_type of an encoder:', model_type, encoder_names(), cure)}")
    return REGISTERED[model_type]
