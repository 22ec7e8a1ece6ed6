"""Sharded models (FSDP2): which modules are sharded by themselves, and whole tensors back from the shards.

Accelerate shards in fit() when a config of recipes/accelerate/ asks for it; `shard` does the same by hand, for a loop of one's
own. Blocks are the modules that transformers must not split over devices (`_no_split_modules`), vision and language alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfcustom.parts import unwrap


def block_classes(model: nn.Module) -> list[str]:
    """Return the class names of the blocks of a model that are there, for `fsdp_transformer_layer_cls_to_wrap`.

    Raises ValueError for a model none of whose modules says what must not be split.
    """
    named: set[str] = set()
    for module in unwrap(model).modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    found = sorted({type(module).__name__ for module in unwrap(model).modules()} & named)
    if not found:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no block to shard by itself: set _no_split_modules on the class, to the "
            "names of the classes of its layers."
        )
    return found


def name_blocks(model: nn.Module, accelerator: Any) -> None:
    """Tell Accelerate's FSDP which blocks there are, unless its config does: its own choice may name absent ones and fail."""
    if accelerator.distributed_type == "FSDP":
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = block_classes(model)


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Shard a model's parameters over a one-dimensional device mesh, in place: each block by itself, then the rest.

    `options` go to torch's fully_shard (mp_policy, offload_policy, reshard_after_forward). Make the optimizer afterwards.
    """
    from torch.distributed.fsdp import fully_shard

    core, names = unwrap(model), set(block_classes(model))
    blocks = [module for module in core.modules() if type(module).__name__ in names]
    for module in reversed(blocks):  # what is inside another goes first
        fully_shard(module, mesh=mesh, **options)
    fully_shard(core, mesh=mesh, **options)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a shard."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole, on the CPU; all ranks have to ask for the same one."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return state_dict() with whole tensors, on the CPU of every rank's first; the other ranks get an empty mapping.

    One tensor is gathered at a time, so that a rank never holds more than its shards and one whole tensor on its device.
    """
    from torch.distributed import get_rank

    first, state = get_rank() == 0, {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if first:
            state[name] = gathered
    return state
