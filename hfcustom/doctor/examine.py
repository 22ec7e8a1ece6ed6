"""From a target to its findings: a family, a checkpoint, or a class in a file of the user's -> Finding, ..."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from hfcustom.base import CustomVLM
from hfcustom.custom_model import check_registered
from hfcustom.doctor.finding import CHECKS, Finding
from hfcustom.doctor.patient import Patient, family_class_of
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.encoders import encoder_names
from hfcustom.families import class_of, family_names, load_family, missing_packages
from hfcustom.loading import check_source
from hfcustom.naming import load_object, no_target, unknown
from hfcustom.quiet import quiet
from hfcustom.registry import REGISTERED
from hfcustom.wrapping import WrappedVLM

SUBJECTS = ("identity", "upgrade", "travel", "learning", "batches", "generation", "numerics", "adapters", "trainers")
for subject in SUBJECTS:
    importlib.import_module(f"hfcustom.doctor.{subject}")

NO_ENCODERS = (
    "The doctor's checks are of models that answer in words. Of an encoder `hfcustom card` says what its class changes, `hfcustom "
    "bundle` and `hfcustom export` prove that what is saved computes the same elsewhere, and recipes/finetune_encoder.py scores it."
)
Target = str | type[CustomVLM]


def examine(target: Target, checks: Sequence[str] = ()) -> Iterator[Finding]:
    """Run checks on a small copy of a target, all of them unless some are named; yield each finding when it is there.

    ValueError for an unknown check; ValueError, TypeError, ImportError or FileNotFoundError for what is no target.
    """
    for name in checks:
        if name not in CHECKS:
            raise ValueError(unknown("check", name, CHECKS))
    model_class, settings = find_target(target)
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        with quiet():
            patient = _admit(model_class, Path(folder), settings, checkpoint_of(target))
        for name in checks or CHECKS:
            with quiet():
                finding = CHECKS[name](patient)
            yield finding


def checkpoint_of(target: Target) -> str | None:
    """Return the folder or hub id that a target is, None for a class or a family."""
    return target if isinstance(target, str) and ".py:" not in target and target not in family_names() else None


def _admit(model_class: type[CustomVLM], folder: Path, settings: dict[str, Any], checkpoint: str | None) -> Patient:
    """Return the patient; ValueError for a class that is not registered, or that cannot be built small."""
    try:
        patient = Patient(model_class, folder, settings, checkpoint)
        model = patient.model()
    except Exception as error:  # whatever a user's __init__ raises
        raise ValueError(
            f"{model_class.__name__} cannot be built with the sizes of its family's tiny config ({type(error).__name__}: "
            f"{error}). Read sizes from the config in __init__, and keep no number of one checkpoint in it."
        ) from error
    check_registered(model)
    return patient


def find_target(target: Target) -> tuple[type[CustomVLM], dict[str, Any]]:
    """Return the class that a target means, and what its checkpoint's config says of the class's own fields."""
    if isinstance(target, type):
        return _checked(target), {}
    if ".py:" in target:
        return _checked(load_object(target, "model")), {}
    if target in family_names():
        load_family(target)
        return _checked(REGISTERED[f"custom_{target}"]), {}
    if target in encoder_names():
        raise ValueError(f"{target!r} is a contrastive encoder. {NO_ENCODERS}")
    if Path(target).is_dir() or ("/" in target and not target.endswith(".py")):
        check_source(target)
        model_type = str(PretrainedConfig.get_config_dict(target)[0].get("model_type", ""))
        if model_type.removeprefix("custom_") in encoder_names():
            raise ValueError(f"{target} is a contrastive encoder, {model_type}. {NO_ENCODERS}")
        model_class = _checked(class_of(target))
        return model_class, own_settings(model_class, target)
    raise ValueError(no_target(target, family_names()))


def _checked(model_class: Any) -> type[CustomVLM]:
    if isinstance(model_class, nn.Module):
        kind: Any = type(model_class)
        wrapped = f" wrap() leaves {kind._own_class.__name__} as it is" if isinstance(model_class, WrappedVLM) else ""
        raise TypeError(
            f"What you named is a model that is built already, a {kind.__name__};{wrapped or ' name its class instead'}. The doctor "
            "builds small copies of a class that inherits a family of hfcustom.families."
        )
    if isinstance(model_class, type) and issubclass(model_class, CustomDualEncoder):
        raise TypeError(f"{model_class.__name__} is a contrastive encoder. {NO_ENCODERS}")
    if not (isinstance(model_class, type) and issubclass(model_class, CustomVLM)):
        raise TypeError(f"{model_class!r} is no custom vision-language model: a subclass of a family of hfcustom.")
    name = family_class_of(model_class).__module__.rpartition(".")[2]
    if missing := missing_packages(name):
        raise ImportError(f"The family {name!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return model_class


def own_settings(model_class: Any, checkpoint: str) -> dict[str, Any]:
    """Return connector, loss and the fields that a class adds to its stock parent's config, as a checkpoint has them."""
    stored = PretrainedConfig.get_config_dict(checkpoint)[0]
    own = model_class.config_class().to_dict().keys() - model_class.stock_class().config_class().to_dict().keys()
    return {name: stored[name] for name in sorted(own) if stored.get(name) is not None}
