"""The state of an optimizer, written and read: tensors to safetensors, all else to JSON, by the names of the parameters.

optimizer -> optimizer.safetensors, optimizer.json. Whichever way it is held (bitsandbytes in 8 bits, DeepSpeed in pieces, FSDP in
shards), what is written is that of one process, and each of them reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hfcustom.commit import write_json
from hfcustom.distributed import zero
from hfcustom.distributed.spread import Spread
from hfcustom.exits import CheckpointError

Content = tuple[dict[str, torch.Tensor], dict[str, Any]]


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, content: Content | None = None) -> None:
    """Write an optimizer's state: tensors to safetensors, the rest to JSON."""
    tensors, rest = content or optimizer_content(optimizer)
    tensors = {path: tensor.clone().contiguous() for path, tensor in tensors.items()}  # bitsandbytes shares some
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", rest)


def optimizer_content(optimizer: torch.optim.Optimizer) -> Content:
    """Return the tensors of an optimizer's state, as they are held, and what JSON can say."""
    if (shared := zero.inside(optimizer)) is not None:
        gathered, groups = zero.optimizer_content(shared)
        return gathered, {"kind": _kind(optimizer), "param_groups": groups, "state": {}}
    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for index, state in content["state"].items():
        for name, value in state.items():
            inner = value if isinstance(value, dict) else {"": value}  # bitsandbytes nests what is quantised
            for key, part in inner.items():
                path = f"{index}.{name}" + (f"/{key}" if key else "")
                if torch.is_tensor(part):
                    tensors[path] = part.detach()
                else:
                    rest[path] = part
    return tensors, {"kind": _kind(optimizer), "param_groups": content["param_groups"], "state": rest}


def _kind(optimizer: Any) -> str:
    while (inner := getattr(optimizer, "optimizer", None)) is not None:  # wrappers have the real one inside
        optimizer = inner
    return type(optimizer).__name__


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what `save_optimizer` wrote; learning rates and decay stay those of the present config."""
    saved = json.loads((folder / "optimizer.json").read_text())
    if saved.get("kind", _kind(optimizer)) != _kind(optimizer):
        raise CheckpointError(
            f"{folder} holds the state of {saved['kind']}, which {_kind(optimizer)} cannot go on with; resume with that optimizer."
        )
    shared = zero.inside(optimizer)
    present = optimizer.state_dict()["param_groups"] if shared is None else zero.named_groups(shared)
    then = _names_by_index(saved["param_groups"])
    now = {name: index for index, name in _names_by_index(present).items()}
    if differing := sorted(now.keys() ^ set(then.values())):
        raise CheckpointError(
            f"{folder}: the trained parameters have changed since this checkpoint ({differing[0]} first of "
            f"{len(differing)}); freeze and LoRA as then."
        )
    spread = Spread(sorted(folder.glob("optimizer*.safetensors")))
    if shared is not None:
        numbers = {name: number for number, name in then.items()}

        def of(name: str, key: str) -> torch.Tensor | None:
            path = f"{numbers[name]}.{key}"
            return spread.read(path) if path in spread.homes else None

        zero.load_state(shared, of)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key in (*spread.homes, *saved["state"]):
        number, _, name = key.partition(".")
        outer, _, inner = name.partition("/")
        index = now[then[int(number)]]
        value = saved["state"][key] if key in saved["state"] else _of_parameter(spread, key, parameters[index])
        own = state.setdefault(index, {})
        if inner:
            own.setdefault(outer, {})[inner] = value
        else:
            own[outer] = value
    optimizer.load_state_dict({"state": state, "param_groups": present})


def _of_parameter(spread: Spread, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the state, this rank's shard of one that is sharded as its parameter is."""
    return spread.read_like(key, parameter) if spread.shape(key) == parameter.shape else spread.read(key)


def _names_by_index(groups: list[dict[str, Any]]) -> dict[int, str]:
    """A state_dict numbers parameters through its groups, whose order follows the config's weight decay."""
    numbers = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names", map(str, group["params"]))]
    return dict(zip(numbers, names, strict=True))
