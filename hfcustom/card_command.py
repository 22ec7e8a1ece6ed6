"""hfcustom card and hfcustom push: print the change card of a target, or upload a saved folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import cached_file

from hfcustom.card import card_facts, merge_card, write_card
from hfcustom.custom_model import CustomModel
from hfcustom.encoders import class_of as encoder_class_of
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.families import class_of, family_names, load_family
from hfcustom.hub import choose_files, push_folder, reason
from hfcustom.loading import check_source
from hfcustom.naming import load_class, no_target
from hfcustom.record import origin_of, read_record
from hfcustom.registry import REGISTERED

EXIT_USAGE, EXIT_FAILED = 2, 1


def show_card(options: argparse.Namespace) -> int:
    """Print a card as `hfcustom card` was asked to, or write it into the folder; return 0, or 2 for what is no target."""
    try:
        if options.write and not Path(options.target).is_dir():
            raise ValueError(f"--write puts the card into a folder, and {options.target} is none.")
        custom = _checked(load_class(options.custom)) if options.custom else None
        facts = facts_of(options.target, custom)
    except (FileNotFoundError, ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        print(f"hfcustom card: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.json:
        print(json.dumps(facts, indent=2, default=_plain))
    elif not options.write:
        print(merge_card(None, facts), end="")
    elif not write_card(Path(options.target), facts):
        print(
            f"{options.target}/README.md is your own and stays; without --write the card is printed.", file=sys.stderr
        )
        return EXIT_FAILED
    return 0


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def facts_of(target: str, custom: Any = None) -> dict[str, Any]:
    """Return what a card says of a family, a class in a file, or a checkpoint, whose weights are not read."""
    if ".py:" in target:
        return _facts_of_class(_checked(load_class(target)))
    if target in (*family_names(), *encoder_names()):
        (load_family if target in family_names() else load_encoder)(target)
        return _facts_of_class(REGISTERED[f"custom_{target}"])
    if not target.endswith(".py"):
        check_source(target)
    if not Path(target).is_dir() and ("/" not in target or target.endswith(".py")):
        raise ValueError(no_target(target, [*family_names(), *encoder_names()]))
    model_class: Any = custom or class_of_checkpoint(target)
    record = read_record(target)
    with torch.device("meta"):
        core = model_class(model_class.config_class.from_pretrained(target))
    core.training_runs, core.origin = record.get("training", []), origin_of(target, record)
    adapter = cached_file(target, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    return card_facts(core, adapter=adapter is not None)


def class_of_checkpoint(target: str) -> Any:
    """Return the class of a checkpoint, an encoder's too; ValueError for one that nobody knows."""
    model_type = PretrainedConfig.get_config_dict(target)[0].get("model_type", "")
    return encoder_class_of(target) if model_type.removeprefix("custom_") in encoder_names() else class_of(target)


def _checked(model_class: Any) -> Any:
    if not issubclass(model_class, CustomModel):
        raise TypeError(
            f"{model_class.__name__} is no custom model: a subclass of a family or an encoder of hfcustom."
        )
    return model_class


def _facts_of_class(model_class: Any) -> dict[str, Any]:
    """Return the facts of a class with the sizes of the first checkpoint that its family names."""
    module = sys.modules[next(cls.__module__ for cls in model_class.__mro__ if cls.__module__.startswith("hfcustom."))]
    own: tuple[str, dict[str, Any]] = (
        f"{model_class.config_class.__name__}'s defaults",
        {},
    )  # of a class that inherits no family
    name, sizes = next(iter(vars(module).get("CHECKPOINTS", {}).items()), own)
    with torch.device("meta"):
        facts = card_facts(model_class(model_class.config_class(**sizes)))
    return {**facts, "sizes_of": name}


def push(options: argparse.Namespace) -> int:
    """Upload a folder as `hfcustom push` was asked to; return 0, 1 where the hub refused, 2 for what cannot be uploaded."""
    folder = Path(options.folder)
    try:
        chosen = choose_files(folder)
        if options.dry_run:
            print("\n".join(chosen.files))
        else:
            commit = push_folder(folder, options.name, private=not options.public, revision=options.revision)
            print(f"{len(chosen.files)} files are at {commit.commit_url}")
    except ValueError as error:
        print(f"hfcustom push: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Exception as error:  # whatever the network and the hub raise
        print(f"hfcustom push: nothing was committed ({reason(error)}). Try again.", file=sys.stderr)
        return EXIT_FAILED
    if chosen.left:
        print(f"Not uploaded: {', '.join(chosen.left)}", file=sys.stderr)
    return 0
