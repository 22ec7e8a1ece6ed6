"""A checkpoint that is planned without being fetched: a folder with its config and a processor, and no weights.

The published sizes are in the families' CHECKPOINTS; the processor has the published image settings and the family's small
tokenizer, whose ids the config is given. A checkpoint that is here already, or whose config can be fetched, is used as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hfcustom.doctor.patient import family_class_of
from hfcustom.encoders import encoder_names
from hfcustom.families import family_names, load_family
from hfcustom.loading import check_source
from hfcustom.naming import load_object, unknown
from hfcustom.plan.config import PLANNED
from hfcustom.plan.weights import ASSUMED_DTYPE
from hfcustom.registry import REGISTERED


def settle_model(config: Any, folder: Path) -> str:
    """Point a plan's config to a folder or id that can be read; return in words what stands for the checkpoint.

    Raises ValueError for a family or a checkpoint that is not known, FileNotFoundError for a folder that is not there.
    """
    if config.family:
        if config.family in encoder_names():
            raise ValueError(
                f"family={config.family} is a contrastive encoder; plan it with recipes/finetune_encoder.py --model."
            )
        name, id = config.family, next(iter(load_family(config.family).CHECKPOINTS))
    elif config.model == PLANNED:
        name = family_class_of(load_object(config.custom, "custom model")).__module__.rpartition(".")[2]
        id = next(iter(load_family(name).CHECKPOINTS))
    else:
        check_source(config.model)
        if Path(config.model).is_dir() or _is_readable(config.model):
            return str(config.model)
        name, id = _find(config.model), config.model
    write_published(name, id, folder)
    config.model = str(folder)
    return f"{id} (its published sizes, in {ASSUMED_DTYPE}; tokens by a small tokenizer)"


def _is_readable(id: str) -> bool:
    """Whether the hub, or what was fetched of it, has a config under this name."""
    try:
        PretrainedConfig.get_config_dict(id)
    except OSError:  # no such name, or no connection
        return False
    return True


def _find(id: str) -> str:
    known = {checkpoint: name for name in family_names() for checkpoint in load_family(name).CHECKPOINTS}
    if id not in known:
        cure = "Give a folder that holds its config.json and processor, or --family."
        raise ValueError(
            f"{id} cannot be read from here, and its sizes are not known. {unknown('checkpoint', id, known, cure)}"
        )
    return known[id]


def write_published(name: str, id: str, folder: Path) -> None:
    """Write the config and the processor of a published checkpoint."""
    module = load_family(name)
    model_class: Any = REGISTERED[f"custom_{name}"]
    config = model_class.config_class(**module.CHECKPOINTS[id])
    take_token_ids(config, module.tiny_config())
    config.dtype, config.architectures = ASSUMED_DTYPE, [model_class.__name__]
    config.save_pretrained(folder)
    processor = module.published_processor()
    if processor.chat_template is None:
        processor.chat_template = module.tiny_processor().chat_template
    processor.save_pretrained(folder)


def take_token_ids(config: Any, tiny: Any) -> None:
    """Give a config, and those inside it, the ids of the special tokens of a small tokenizer."""
    for name, value in vars(tiny).items():
        if name.endswith(("token_id", "token_index")) and value is not None:
            setattr(config, name, value)
        elif isinstance(value, PretrainedConfig) and isinstance(vars(config).get(name), PretrainedConfig):
            take_token_ids(vars(config)[name], value)
