"""The families: one file each, found by file name and imported when asked for.

`load_family("internvl")` imports hfcustom/families/internvl.py, which registers its classes with the Auto classes. A
transformers release that lacks one family does no harm to the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hfcustom.exits import ConfigError, MissingError
from hfcustom.naming import unknown

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM


HELPERS = ("published", "tiny")  # modules of this folder that are no family


def family_names() -> list[str]:
    """Return the names of all families, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in HELPERS)


def load_family(name: str) -> ModuleType:
    """Import a family by name; ValueError suggests the nearest, ImportError says what this transformers lacks."""
    if name not in family_names():
        raise ConfigError(unknown("family", name, family_names()))
    try:
        return importlib.import_module(f"hfcustom.families.{name}")
    except ImportError as error:
        import transformers

        raise ImportError(
            f"The family {name!r} cannot be used with transformers {transformers.__version__}: {error}"
        ) from error


def missing_packages(name: str) -> list[str]:
    """Return what a family's processor needs and this machine lacks: its module's REQUIRES, names of packages."""
    from transformers.utils import is_torchvision_available

    def is_there(package: str) -> bool:
        return (
            is_torchvision_available() if package == "torchvision" else importlib.util.find_spec(package) is not None
        )

    return [package for package in getattr(load_family(name), "REQUIRES", ()) if not is_there(package)]


def class_of(checkpoint: str, **hub: Any) -> type[CustomVLM]:
    """Return the custom class of a checkpoint's family, from its config.json; `hub` goes to the config's download.

    A family may read more than its own model_type: its module's `reads(config)` says which. It is asked about a config whose
    vision tower has its name (Pixtral, published as a llava), and about one whose model_type is no family's.
    Raises ValueError for one that nobody reads, naming the families, FileNotFoundError for a missing folder.
    """
    from transformers import PretrainedConfig

    from hfcustom.encoders import encoder_names
    from hfcustom.loading import check_source
    from hfcustom.registry import REGISTERED

    check_source(checkpoint)
    config = PretrainedConfig.get_config_dict(checkpoint, **hub)[0]
    if not config:  # of a folder; for a hub id transformers raises
        below = [str(path.parent) for path in sorted(Path(checkpoint).glob("*/config.json"))]
        raise MissingError(f"{checkpoint} holds no config.json.{f' Do you mean {below[0]}?' if below else ''}")
    model_type, tower = config.get("model_type", ""), (config.get("vision_config") or {}).get("model_type", "")
    name = model_type.removeprefix("custom_")
    if reads(tower, config):
        name = tower
    near = [family for family in family_names() if name == family or name.startswith(f"{family}_")]
    if not near and model_type not in REGISTERED:
        near = [family for family in family_names() if reads(family, config)]
    if near:  # the longest: llava_next is not llava; qwen2_5_omni_thinker is a part of qwen2_5_omni
        family = max(near, key=len)
        load_family(family)
        config_class: Any = REGISTERED[f"custom_{family}"].config_class
        model_type = config_class.model_type if name in (family, *config_class.kin()) else model_type
    if name in encoder_names():
        raise ConfigError(
            f"{checkpoint} is a contrastive encoder ({name}), no vision-language model: recipes/finetune_encoder.py trains "
            "it, and hfcustom.encoders.class_of finds its class."
        )
    if model_type not in REGISTERED:
        cure = "Is it a class of your own? Name its file: --custom my_file.py:MyModel."
        raise ConfigError(f"{checkpoint}: {unknown('model_type', model_type, family_names(), cure)}")
    return REGISTERED[model_type]


def reads(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a family says that it reads a config.json of another model_type; False where it cannot be imported."""
    if name not in family_names():
        return False
    with suppress(ImportError):  # what this transformers lacks cannot be loaded from it either
        module = load_family(name)
        return hasattr(module, "reads") and bool(module.reads(config))
    return False
