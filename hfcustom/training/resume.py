"""May a run go on from a checkpoint: is it the same run, and what of its options may have changed since?

Options that a config's `may_change` lists take effect, and are named. Any other one is refused unless
`allow_change` names it: the rest of the run would not be that of one run. So are other rows, and another base under an adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfcustom.distributed.sharding import whole
from hfcustom.exits import CheckpointError, ConfigError
from hfcustom.train_config import TrainConfig

FORMAT = 1  # of a checkpoint; a later one may be unreadable for this version


def check_format(state: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError for a checkpoint that a later version has written."""
    if state.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {state['format']}, written by hfcustom {state.get('version')}; this version reads up to "
            f"{FORMAT}. Resume with that version."
        )


# ---- which rows are left --------------------------------------------------------------------------------------------

ROWS = {"rows": "data"}  # what a difference in the order of rows is called by allow_change, where not by its own name
NEVER = ("processes", "num_workers")  # of a stream, whose positions belong to processes


def check_order(then: Mapping[str, Any], now: Mapping[str, Any], allowed: list[str], folder: Path) -> None:
    """Raise ConfigError where the rows that are left would be others."""
    now = {
        name: value for name, value in now.items() if name != "data" or "data" in then
    }  # written before checkpoints knew
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    differ = [name for name in differ if ROWS.get(name, name) not in allowed or name in NEVER]
    if not differ:
        return
    names = " ".join(dict.fromkeys(ROWS.get(name, name) for name in differ))
    accept = "" if set(differ) & set(NEVER) else f", accept other rows with --allow-change {names}"
    if differ == ["data"]:
        raise ConfigError(
            f"{folder} was trained on other data: files, rows or weights have changed since, so that the rows already seen would "
            f"be others. Put them back as they were{accept}, or start afresh with --overwrite."
        )
    raise ConfigError(
        f"{folder} was trained with {_chosen(then, differ)}, this run has {_chosen(now, differ)}: the rows already seen would be "
        f"others. Resume with those values{accept}, or start afresh with --overwrite."
    )


def _chosen(order: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: order[name] for name in names if name in order}


# ---- options --------------------------------------------------------------------------------------------------------


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return a run's options as JSON has them."""
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return json.loads(json.dumps({name: getattr(config, name) for name in names}, default=str))


def changed_options(then: Mapping[str, Any], config: TrainConfig, folder: Path) -> str:
    """Return in words what has changed since a checkpoint, empty for nothing; ConfigError for what must not."""
    now = options_of(config)
    safe = config.may_change | set(config.allow_change)
    differ = [name for name in now if name in then and then[name] != now[name] and name not in UNTRAINED]
    words = [f"  {name}: {then[name]!r} -> {now[name]!r}" for name in differ]
    if refused := [name for name in differ if name not in safe]:
        raise ConfigError(
            "\n".join([f"These options have changed since {folder}:", *words])
            + f"\n{', '.join(refused)}: what is left of the run would be that of another. Resume with the value it had, "
            f"accept the change with --allow-change {' '.join(refused)}, or start afresh with --overwrite."
        )
    return "\n".join(["Changed since then, and in effect from here:", *words]) if words else ""


UNTRAINED = {"resume", "overwrite", "output_dir", "allow_change"}  # how a run is started


# ---- the base under an adapter --------------------------------------------------------------------------------------

BASE_FILE, TENSORS, VALUES = "base_fingerprint.json", 16, 65536
OF_PEFT = ("lora_", "base_layer", "original_module", "modules_to_save")  # names that the base alone has not


def base_fingerprint(model: nn.Module, names: list[str] | None = None) -> dict[str, str]:
    """Return hashes of some weights that stay as loaded: none that is quantised, and each rounded to what 16 bits hold.

    So a base is known again in another precision, and with its linear layers on 8 or 4 bits.
    """
    weights = {name: p for name, p in model.named_parameters() if names is None or name in names}
    if names is None:
        weights = {name: p for name, p in weights.items() if not p.requires_grad and _stays_whole(model, name)}
        order = sorted(weights, key=lambda name: (-weights[name].ndim, name))  # embeddings tell more than norms
        weights = {name: weights[name] for name in order[:TENSORS]}
    return {name: _digest(p) for name, p in weights.items()}


def _stays_whole(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, nn.Linear) and not any(word in name for word in OF_PEFT)


def _digest(weight: torch.Tensor) -> str:
    flat = whole(weight.detach()).flatten()
    values = flat[:: max(1, flat.numel() // VALUES)].to("cpu", torch.bfloat16)
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + values.view(torch.int16).numpy().tobytes()).hexdigest()[
        :16
    ]


def check_base(model: nn.Module, folder: Path) -> None:
    """Raise CheckpointError where an adapter was trained on other weights than the model has."""
    if not (folder / BASE_FILE).is_file():
        return  # of another tool, or an earlier version
    then = json.loads((folder / BASE_FILE).read_text())
    now = base_fingerprint(model, list(then))
    if differ := [name for name in then if name in now and now[name] != then[name]]:
        raise CheckpointError(
            f"The adapter {folder} was trained on other weights: {differ[0]} and {len(differ) - 1} more of {len(then)} that were "
            "compared differ. Load the base that it was trained on."
        )
