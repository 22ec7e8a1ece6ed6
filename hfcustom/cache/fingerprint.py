"""What a cached value depends on, as short digests: pixels, settings, weights, and code that is neither's nor ours.

Values of the same digest are interchangeable; anything that could change what is computed changes the digest.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.utils import is_torchvision_available

import hfcustom

if TYPE_CHECKING:
    from hfcustom.data.video_frames import Frames

DIGEST = "hfcustom_digest"  # attribute of an image: of the encoded bytes
LIBRARIES = ("accelerate", "bitsandbytes", "builtins", "hfcustom", "peft", "torch", "torchvision", "transformers")


def digest_of(value: Any) -> str:
    """Return the digest of what JSON can hold; other objects by their words."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def image_digest(image: Image.Image) -> str:
    """Return the digest of an image: of the bytes it was decoded from where they are known, else its mode, size and pixels."""
    if DIGEST in vars(image):
        return f"file{vars(image)[DIGEST]}"
    found = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    found.update(np.asarray(image).tobytes())
    return found.hexdigest()[:32]


def video_digest(frames: Frames) -> str:
    """Return the digest of the chosen frames of a video and of where they lie in it."""
    return digest_of([[image_digest(frame) for frame in frames], frames.fps, frames.indices, frames.total])


def versions() -> dict[str, str]:
    """Return the versions of all whose arithmetic a cached value comes from."""
    found = {
        "hfcustom": hfcustom.__version__,
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return found | ({"torchvision": metadata.version("torchvision")} if is_torchvision_available() else {})


def processor_digest(image_processor: Any, options: Mapping[str, Any]) -> str:
    """Return the digest of everything that changes the pixels which an image processor makes."""
    return digest_of(
        [image_processor.to_dict(), source_digest((type(image_processor),)), sorted(options.items()), versions()]
    )


def weights_digest(modules: Mapping[str, nn.Module | nn.Parameter]) -> str:
    """Return the digest of all parameters and buffers of modules by name, in their dtypes; looks at each byte once."""
    found = hashlib.sha256()
    for name, module in sorted(modules.items()):
        tensors = [("", module)] if isinstance(module, torch.Tensor) else _tensors(module)
        for own, tensor in tensors:
            found.update(f"{name} {own} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            data = tensor.detach().cpu().contiguous().flatten()
            found.update(data.view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@lru_cache(maxsize=64)
def source_digest(classes: tuple[type, ...]) -> str:
    """Return the digest of the files of classes, and of their bases, that are no library's: a user's own code.

    ValueError for a class whose source cannot be read: an edit of it would go unnoticed.
    """
    names, files = set(), set()
    for owner in {base for cls in classes for base in cls.__mro__}:
        names.add(f"{owner.__module__}.{owner.__qualname__}")
        if owner.__module__.partition(".")[0] not in LIBRARIES and owner.__module__ not in sys.builtin_module_names:
            files.add(_source(owner))
    return digest_of([sorted(names), sorted(files)])


def _source(owner: type) -> str:
    if (owner.__module__.partition(".")[0]) in sys.stdlib_module_names and owner.__module__ != "__main__":
        return ""
    try:
        file = inspect.getsourcefile(owner)
        text = Path(file).read_text() if file and Path(file).is_file() else inspect.getsource(owner)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"The source of {owner.__qualname__} cannot be read, so a change of it would go unnoticed: {error}. Put it into a file."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()
