"""What is to be inspected: a family, a contrastive encoder, a checkpoint or a class of the user's -> Subject."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from hfcustom.base import CustomVLM
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.encoders import class_of as encoder_class_of
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.external import EXTERNAL, find_external
from hfcustom.families import class_of, family_names, load_family, missing_packages
from hfcustom.loading import check_source
from hfcustom.naming import load_object, no_target
from hfcustom.registry import REGISTERED


@dataclass
class Subject:
    """A class with the config and the processor that are looked at."""

    name: str  # as the user wrote it
    source: str  # where sizes and settings come from, in words
    model_class: Any
    family_class: Any  # the class of hfcustom that it is, or inherits
    config: Any
    processor: Any
    checkpoint: str  # whose sizes the config has
    placeholder: int | None  # the id that stands for an image token in the processor's texts, None for an encoder
    published: dict[str, dict[str, Any]]  # other checkpoints of it: {id: config values}

    @property
    def own_tokenizer(self) -> bool:
        """Whether the tokenizer is the checkpoint's, not one that was trained on the spot."""
        return self.checkpoint == self.name

    @property
    def module(self) -> ModuleType:
        """The family's file."""
        return sys.modules[self.family_class.__module__]

    @property
    def is_encoder(self) -> bool:
        """Whether it is a contrastive encoder, which makes a vector of an image and no tokens."""
        return issubclass(self.model_class, CustomDualEncoder)

    def skeleton(self, config: Any = None) -> Any:
        """Return the model on the meta device: every module, no weights."""
        with torch.device("meta"):
            return self.model_class(self.config if config is None else config)


def find_subject(target: str) -> Subject:
    """Return what a target means; ValueError, FileNotFoundError, ImportError, TypeError or OSError for what is none."""
    if ".py:" in target:
        return _of_class(target)
    if target in family_names() or target in encoder_names():
        return _of_family(target)
    if Path(target).is_dir() or ("/" in target and not target.endswith(".py")):
        return _of_checkpoint(target)
    if external := find_external(target):
        model = EXTERNAL[external]
        raise ValueError(
            f"{external} is not native to transformers, so there is no processor of it to run; `hfcustom families {external}` "
            f"says what can be done. The nearest family is {model.native or 'none'}."
        )
    raise ValueError(no_target(target, [*family_names(), *encoder_names()]))


def _of_family(name: str) -> Subject:
    module = load_encoder(name) if name in encoder_names() else load_family(name)
    model_class: Any = REGISTERED[f"custom_{name}"]
    _check_packages(model_class)
    checkpoint = next(iter(module.CHECKPOINTS))
    return Subject(
        name=name,
        source=f"sizes and image settings of {checkpoint}, a tokenizer trained on the spot",
        model_class=model_class,
        family_class=model_class,
        config=model_class.config_class(**module.CHECKPOINTS[checkpoint]),
        processor=_published_processor(module),
        checkpoint=checkpoint,
        placeholder=_placeholder(model_class, module.tiny_config()),
        published=module.CHECKPOINTS,
    )


def _of_class(target: str) -> Subject:
    model_class = load_object(target, "model")
    if not (isinstance(model_class, type) and issubclass(model_class, CustomVLM | CustomDualEncoder)):
        raise TypeError(f"{target} is {model_class!r}, no custom model: a subclass of a family of hfcustom.")
    family_class = _family_class(model_class)
    _check_packages(family_class)
    module = sys.modules[family_class.__module__]
    checkpoint, values = next(iter(module.CHECKPOINTS.items()))
    typed: Any = model_class
    subject = Subject(
        name=target,
        source=f"your class, with sizes and image settings of {checkpoint}, a tokenizer trained on the spot",
        model_class=model_class,
        family_class=family_class,
        config=typed.config_class(**values),
        processor=_published_processor(module),
        checkpoint=checkpoint,
        placeholder=_placeholder(family_class, module.tiny_config()),
        published={},
    )
    model = subject.skeleton()
    if not subject.is_encoder and model.config.connector is not None:
        subject.processor = model.match_processor(subject.processor)
    return subject


def _of_checkpoint(target: str) -> Subject:
    model_class = _class_of_checkpoint(target)
    family_class = _family_class(model_class)
    _check_packages(family_class)
    config = model_class.config_class.from_pretrained(target)
    processor = model_class.processor_class.from_pretrained(target)
    lacks_template = processor.chat_template is None and not issubclass(model_class, CustomDualEncoder)
    return Subject(
        name=target,
        source=f"config and processor of {target}"
        + (", without a chat template: a small one stands in" * lacks_template),
        model_class=model_class,
        family_class=family_class,
        config=config,
        processor=_with_template(processor, sys.modules[family_class.__module__]),
        checkpoint=target,
        placeholder=_placeholder(model_class, config),
        published={},
    )


def _placeholder(model_class: Any, config: Any) -> int | None:
    """Return the id of the image token that a config names; that of tiny configs is the one of tiny tokenizers."""
    if issubclass(model_class, CustomDualEncoder):
        return None
    with torch.device("meta"):
        return int(model_class(config).placeholder_token_id)


def _class_of_checkpoint(target: str) -> Any:
    check_source(target)
    try:
        model_type = str(PretrainedConfig.get_config_dict(target)[0].get("model_type", ""))
    except OSError as error:
        known = {id: name for name in family_names() for id in load_family(name).CHECKPOINTS}
        hint = f" Its published sizes need no network: hfcustom inspect {known[target]}" if target in known else ""
        raise OSError(f"{target} is neither a folder with a config.json nor reachable on the hub.{hint}") from error
    if model_type.removeprefix("custom_") in encoder_names():
        return encoder_class_of(target)
    return class_of(target)


def _family_class(model_class: type) -> Any:
    """Return the class of a file of hfcustom that a class is or inherits; TypeError for one of none."""
    for base in model_class.__mro__:
        if base.__module__.startswith(("hfcustom.families.", "hfcustom.encoders.")) and "config_class" in vars(base):
            return base
    raise TypeError(f"{model_class.__name__} inherits no family of hfcustom; subclass one of hfcustom.families.")


def _check_packages(family_class: Any) -> None:
    name = family_class.__module__.rpartition(".")[2]
    missing = missing_packages(name) if name in family_names() else []
    if missing:
        raise ImportError(f"The family {name!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _published_processor(module: Any) -> Any:
    """Return a file's processor with published settings, and the chat template of the tiny one where it has none."""
    return _with_template(module.published_processor(), module)


def _with_template(processor: Any, module: Any) -> Any:
    """Give a processor without a chat template (base checkpoints have none) the family's small one, so that rows can be read."""
    if processor.chat_template is None:
        processor.chat_template = module.tiny_processor().chat_template
    return processor
