"""hfcustom.json: what a saved folder says of itself beside its weights, for people and for a later version.

model, training runs -> {"origin", "training": [run, ...], "relies_on": {...}}

No stock reader looks at the file. `origin` is the checkpoint that the weights began as, `training` what fit() did to them since,
`relies_on` what hfcustom/sentinel.py compares. Nothing in it tells where on a machine something lay, or when it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from transformers.utils import cached_file, logging

from hfcustom.files import write_text
from hfcustom.naming import printable
from hfcustom.parts import count_parameters, find_parts, is_adapter, unwrap, wrapped_by_peft
from hfcustom.train_config import TrainConfig

if TYPE_CHECKING:
    from hfcustom.data.feed import Feed

logger = logging.get_logger("hfcustom")

FILE = "hfcustom.json"
LARGEST = 2**23  # bytes of a record that is read
PACKAGES = ("transformers", "torch", "peft", "bitsandbytes", "hfcustom")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
LOCAL = frozenset(  # options that say where, not what; and those that stand elsewhere in the record
    "output_dir resume overwrite trackers num_workers keep_checkpoints log_steps save_steps eval_steps cache_images "
    "cache_features max_cache_gb image_root push_to_hub hub_revision hub_public eval_data eval_split eval_rows max_new_tokens "
    "image_hosts image_downloads "
    "model custom data split loss connector merge stages lora lora_parts lora_rank lora_alpha lora_kind lora_experts "
    "lora_dropout train_full load_in precision sources max_steps epochs batch_size".split()
)


# ---- the file -------------------------------------------------------------------------------------------------------


def read_record(source: Any, **hub: Any) -> dict[str, Any]:
    """Return the record of a folder or hub id, an empty one where there is none; one that is damaged is said to be."""
    path = _find(source, hub)
    if path is None:
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has over {LARGEST} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"origin": dict | None, "training": list, "relies_on": dict}
        if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"it is not a mapping with {', '.join(kinds)}")
        if not all(isinstance(run, dict) for run in content["training"]):
            raise ValueError("its training is not a list of mappings")
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(f"{source}: {FILE} cannot be used ({printable(str(error), 200)}); the model is loaded without.")
        return {}
    return content


def _find(source: Any, hub: Mapping[str, Any]) -> Path | None:
    if Path(str(source)).is_dir():
        path = Path(str(source)) / (hub.get("subfolder") or "") / FILE
        return path if path.is_file() else None
    found = cached_file(
        str(source),
        FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a folder's record, whole or not at all."""
    write_text(folder / FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


# ---- what may be told -----------------------------------------------------------------------------------------------


def public(value: Any) -> Any:
    """Return a value as it may be told: of a path the last part, of what looks like a token nothing."""
    if isinstance(value, Mapping):
        return {public(str(key)): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, int | float | bool | None):
        return value
    text = SECRET.sub("hf_...", str(value))
    if is_path(text):
        file, separator, name = text.partition(":") if ".py:" in text else (text, "", "")
        return (PureWindowsPath(file) if "\\" in file else PurePosixPath(file)).name + separator + name
    return text


def is_path(text: str) -> bool:
    """Whether a text names a place on this machine rather than on the hub."""
    if "\n" in text or "://" in text or len(text) > 1000:
        return False
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("./", "../", "~")):
        return True
    return ".py:" in text or (("/" in text or "\\" in text) and os.path.exists(text))


def is_hub_name(value: Any) -> bool:
    """Whether a value can be the name of a repository."""
    return isinstance(value, str) and HUB_NAME.fullmatch(value) is not None


@cache
def versions() -> dict[str, str]:
    """Return the versions of what a model is made with."""
    from hfcustom import __version__

    found = {"python": ".".join(platform.python_version_tuple()[:2]), "hfcustom": __version__}
    for name in PACKAGES[:-1]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def origin_of(source: Any, record: Mapping[str, Any], **hub: Any) -> dict[str, Any] | None:
    """Return what weights began as: a name on the hub with its commit, else what the folder's own record says, else its name.

    None is at random.
    """
    if not Path(str(source)).is_dir():
        places = {name: hub[name] for name in ("cache_dir", "revision") if name in hub}
        config = try_to_load_from_cache(str(source), "config.json", **places)
        commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", config) if isinstance(config, str) else None
        return {"name": str(source), "commit": commit and commit.group(1), "hub": True}
    if record:
        origin: dict[str, Any] | None = record["origin"]
        return origin
    return {"name": public(str(Path(str(source)).resolve())), "commit": None, "hub": False}


# ---- a run ----------------------------------------------------------------------------------------------------------


def run_of(model: Any, config: TrainConfig, feed: Feed) -> dict[str, Any]:
    """Return what a training run is about to do to a model, in plain JSON values."""
    core = unwrap(model)
    return {
        "origin": core.origin,
        "parts": trained_parts(model),
        "lora": lora_facts(model),
        "quantization": quantization_facts(core),
        "data": data_facts(config, feed),
        "loss": public(core.config.loss),
        "connector": public(core.config.connector),
        "rows_per_step": config.batch_size,
        "processes": feed.accelerator.num_processes,
        "precision": config.precision,
        "settings": settings_of(config),
        "versions": versions(),
        "steps": 0,
        "evaluation": {},
        "results": [],
    }


def begin_run(model: Any, run: dict[str, Any], resumed: bool) -> dict[str, Any]:
    """Put a run at the end of a model's runs, in the place of the one that it resumes, and return it."""
    core = unwrap(model)
    runs = list(core.training_runs)
    if resumed and runs and all(runs[-1].get(key) == run[key] for key in ("data", "parts", "settings")):
        runs.pop()
    core.training_runs = [*runs, run]
    return run


def trained_parts(model: Any) -> list[dict[str, Any]]:
    """Return for each part how many parameters it has and how they are trained: in full, by LoRA, not at all."""
    part_map = find_parts(model)
    counts: dict[str, dict[str, int]] = {part: dict.fromkeys(COUNTED, 0) for part in part_map.present()}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # peft's frozen copy
        own, added = counts[part_map.part_of(name)], ".lora_" in name
        own["parameters"] += 0 if added else count_parameters(parameter)
        if parameter.requires_grad:
            own["lora" if added else "full"] += count_parameters(parameter)
    return [{"part": part, **found} for part, found in counts.items()]


def lora_facts(model: Any) -> dict[str, Any] | None:
    """Return rank, scale and scope of a model's adapter, None where it has none."""
    if not wrapped_by_peft(model):
        return None
    name, part_map = model.active_adapter, find_parts(model)
    config = model.peft_config[name]
    scopes: dict[tuple[str, int, float], int] = {}
    for path, module in unwrap(model).named_modules():
        if is_adapter(module) and name in module.r:
            scope = (part_map.part_of(path.replace(".base_layer", "")), module.r[name], module.lora_alpha[name])
            scopes[scope] = scopes.get(scope, 0) + 1
    return {
        "kind": "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA",
        "scopes": [
            {"part": part, "rank": rank, "alpha": alpha, "matrices": count}
            for (part, rank, alpha), count in scopes.items()
        ],
        "dropout": config.lora_dropout,
        "trained_in_full": sorted(config.modules_to_save or ()),
    }


def quantization_facts(core: Any) -> dict[str, Any] | None:
    """Return how weights are held while training, None for plain ones."""
    from hfcustom.adapt import linear_table

    config = core.config.to_dict().get("quantization_config")
    if not config:
        return None
    bits = 8 if config.get("load_in_8bit") else 4 if config.get("load_in_4bit") else None
    counts: dict[str, int] = {}
    for row in (row for row in linear_table(core) if ".lora_" not in row.name):
        counts[f"{row.part}: {row.kind}"] = counts.get(f"{row.part}: {row.kind}", 0) + row.count
    method = config.get("quant_method")
    return {"method": method.value if isinstance(method, Enum) else method, "bits": bits, "matrices": counts}


def data_facts(config: TrainConfig, feed: Feed) -> dict[str, Any]:
    """Return sources with weights, rows, split and fingerprint of what a run trains on."""
    options, own = vars(config), feed.fingerprint
    weights = feed.weights or {options.get("data") or "rows in memory": 1.0}
    return {
        "sources": [{"name": public(name), "weight": weight} for name, weight in weights.items()],
        "hub": [name for name in weights if "/" in name and is_hub_name(name) and not is_path(name)],
        "rows": feed.num_rows,
        "split": options.get("split"),
        "fingerprint": hashlib.sha256(own.encode()).hexdigest()[:16] if re.search("[0-9a-f]{16}", own) else None,
    }


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a run that differ from their defaults, those aside that say where and not what."""
    found = {}
    for item in dataclasses.fields(config):
        default = item.default_factory() if callable(item.default_factory) else item.default
        value = getattr(config, item.name)
        if item.name not in LOCAL and value != default:
            found[item.name] = public(value)
    return found


COUNTED = ("parameters", "full", "lora")
