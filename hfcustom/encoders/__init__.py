"""The contrastive encoders: one file each, found by file name and imported when asked for.

`load_encoder("clip")` imports hfcustom/encoders/clip.py, which registers its classes with the Auto classes.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from hfcustom.naming import unknown


def encoder_names() -> list[str]:
    """Return the names of all encoders, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_encoder(name: str) -> ModuleType:
    """Import an encoder by name; ValueError suggests the nearest."""
    if name not in encoder_names():
        raise ValueError(unknown("encoder", name, encoder_names()))
    return importlib.import_module(f"hfcustom.encoders.{name}")
