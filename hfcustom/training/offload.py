"""Activations in the CPU's memory: what forward keeps for backward leaves the GPU meanwhile, and comes back when it is needed.

torch's hooks on saved tensors (torch.autograd.graph.saved_tensors_hooks), as its save_on_cpu, which would take weights along and
copy a tensor once for each operation that keeps it. Values come back bit for bit, with the strides that they had.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import logging

from hfcustom.exits import ConfigError
from hfcustom.train_config import TrainConfig

logger = logging.get_logger("hfcustom")
MIN_BYTES = 2**16  # a smaller tensor stays: the copies would take longer than what it saves is worth
COPIES = "_hfcustom_copies"  # of a storage, by the view of it that was copied


def offloading(core: nn.Module, config: TrainConfig) -> AbstractContextManager[Any]:
    """Return what a forward runs in: one that keeps its activations on the CPU where the run asks for that on a GPU."""
    if not config.offload_activations:
        return nullcontext()
    return Offloaded(core, MIN_BYTES) if has_effect(next(core.parameters()).device) else nullcontext()


def check_offloading(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ConfigError where ranks share weights: what they gather for a moment would be copied as if it were activations."""
    kind = accelerator.distributed_type
    if config.offload_activations and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            f"offload_activations=True does not go with {kind.value}, whose gathered weights it would copy along. Leave it out; "
            "--gradient-checkpointing keeps less to begin with."
        )


def has_effect(device: torch.device) -> bool:
    """Whether there is other memory than that of a device to go to; a warning says once that there is not."""
    if device.type == "cpu":
        logger.warning_once("offload_activations has no effect on a CPU, where activations are in its memory anyway.")
    return device.type != "cpu"


class Offloaded(saved_tensors_hooks):
    """Keep what operations inside save for the backward pass in the CPU's memory: all but weights, buffers and small tensors."""

    def __init__(self, model: nn.Module, min_bytes: int) -> None:
        self.min_bytes = min_bytes
        storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.kept = {storage._cdata: storage for storage in storages}  # an address is theirs while they are held
        self.moved = 0  # bytes
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not self._goes(tensor):
            return tensor
        storage = tensor.untyped_storage()
        copies = vars(storage).setdefault(COPIES, {})  # they end with the storage, whose place another may take
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        copy = copies[view]() if view in copies else None
        if copy is None:
            copy = to_cpu(tensor)
            copies[view] = weakref.ref(copy)
            self.moved += copy.numel() * copy.element_size()
        return copy, tensor.shape, tensor.stride(), tensor.device

    def _goes(self, tensor: torch.Tensor) -> bool:
        if tensor.numel() * tensor.element_size() < self.min_bytes or not is_plain(tensor):
            return False
        repeats = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return not repeats and tensor.untyped_storage()._cdata not in self.kept

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        copy, shape, strides, device = packed
        tensor = torch.empty_strided(shape, strides, dtype=copy.dtype, device=device)
        return tensor.copy_(copy, non_blocking=True)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of torch's own with its values in one piece of memory."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into memory that a GPU copies from and to by itself, in the order of what it computes."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)
