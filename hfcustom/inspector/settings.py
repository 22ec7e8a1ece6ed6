"""The settings of an image processor as they are in effect, and which of them are its own rather than every processor's."""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ImagesKwargs

from hfcustom.inspector.record import plain


def own_settings(processor: Any) -> dict[str, Any]:
    """Return what the image processor takes beyond the settings that all have, with the values in effect.

    A default of the processor (`images_kwargs`) wins over the image processor's own value: that is how InternVL is cut into
    tiles while its image processor says that it is not.
    """
    inner = processor.image_processor
    names = [name for name in type(inner).valid_kwargs.__annotations__ if name not in ImagesKwargs.__annotations__]
    values = {name: getattr(inner, name, None) for name in names}
    return values | {name: value for name, value in defaults_of(processor).items() if name in values}


def defaults_of(processor: Any) -> dict[str, Any]:
    """Return the processor's own defaults for images, which a call may override."""
    found: Any = getattr(processor, "images_kwargs", None) or {}
    return dict(found)


def shown_settings(processor: Any) -> dict[str, Any]:
    """Return the settings of images as they are in effect, as JSON can hold them."""
    inner = processor.image_processor
    values = {**{name: getattr(inner, name, None) for name in ImagesKwargs.__annotations__}, **own_settings(processor)}
    values |= {name: value for name, value in defaults_of(processor).items() if name in values}
    shown = {name: plain(name, value) if name != "image_grid_pinpoints" else value for name, value in values.items()}
    return {name: value for name, value in sorted(shown.items()) if value is not None}
