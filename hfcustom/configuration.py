"""The two fields that every custom config adds to its stock parent: the connector and the loss.

    @dataclass ... CustomInternVLConfig(CustomConfig, InternVLConfig): model_type = "custom_internvl"

`connector` names a token-reduction module (hfcustom/connectors.py), `loss` the weighted terms (hfcustom/losses.py);
both are plain JSON, so that a saved folder says what the model computes and what it was trained on.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.conversion_mapping import (
    USER_REGISTERED_MAPPINGS,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


@dataclass(kw_only=True)
class CustomConfig(PretrainedConfig):
    """Mixin for a stock config: adds `connector` and `loss`, and loads a stock checkpoint's config without complaint."""

    connector: str | dict[str, Any] | None = None
    loss: str | dict[str, Any] | None = None

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        _inherit_key_conversion(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.connector, dict) and not isinstance(self.connector.get("name"), str):
            raise ValueError(f"connector={self.connector!r} has no name; write {{'name': 'average_pool', ...}}.")
        if not isinstance(self.loss, str | dict | None):
            raise ValueError(f"loss={self.loss!r} is no name and no mapping; write {{'cross_entropy': 1.0, ...}}.")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; a stock parent's is welcome, also inside that of a larger model (Qwen2.5-Omni's thinker).

        One of a stranger is a ValueError that names both.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        config_dict = own_config(config_dict, cls.kin())
        cls._check_kin(config_dict.get("model_type", cls.model_type), "This checkpoint")
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def adopt(cls, config: PretrainedConfig) -> CustomConfig:
        """Return a config of this class: the one given, or a parent's values under this class's model_type.

        Raises ValueError for a stranger's.
        """
        if isinstance(config, cls):
            return config
        cls._check_kin(config.model_type, f"This {type(config).__name__}")
        return cls(**{key: value for key, value in config.to_dict().items() if key != "model_type"})

    @classmethod
    def kin(cls) -> list[str]:
        """Return the model_types whose config.json this class reads: its own and its parents'."""
        types = [base.model_type for base in cls.__mro__ if issubclass(base, PretrainedConfig) and base.model_type]
        return list(dict.fromkeys(types))

    @classmethod
    def _check_kin(cls, model_type: str, what: str) -> None:
        if model_type not in cls.kin():
            raise ValueError(
                f"{what} has model_type {model_type!r}, but {cls.__name__} takes {', '.join(cls.kin())}. "
                "Use the class of that family."
            )


def own_config(config: dict[str, Any], kin: Container[str]) -> dict[str, Any]:
    """Return the part of a config.json that is of one of these model_types, all of it where none is."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part for part in parts if part.get("model_type", "") in kin), config)


def _inherit_key_conversion(config_class: type[PretrainedConfig]) -> None:
    """Give a new model_type its parent's checkpoint key conversion, both ways.

    transformers skips the conversion for any class outside its own package unless the model_type or the class's name is
    registered (conversion_mapping.get_model_conversion_mapping, 5.23.0); without it a subclass loads random weights.
    """
    model_type = config_class.model_type
    if model_type in CONFIG_MAPPING_NAMES:
        return  # native to transformers, which register() will refuse
    for base in config_class.__mro__[1:]:
        parent = base.__dict__.get("model_type")
        if parent and share_key_conversion(parent, model_type):
            return


def share_key_conversion(parent: str, name: str) -> bool:
    """Convert checkpoint keys for `name`, a model_type or a class's name, as for `parent`; False where it has no conversion."""
    conversion: Any = get_checkpoint_conversion_mapping(parent)
    if conversion is not None or name in USER_REGISTERED_MAPPINGS:  # None: not as an earlier class of this name
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    return conversion is not None
