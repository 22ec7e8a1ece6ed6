"""Tensors spread over files that the ranks write side by side, and read back on any number of ranks, sharded or not.

{name: shard} on each of N ranks -> stem-00001-of-0000M.safetensors ... in a folder -> {name: shard} on each of K ranks

Each file holds whole tensors, and each tensor is in one file: what N ranks wrote is read like what one process wrote, and
transformers loads it. Shards are gathered a tensor at a time, as exact copies, to the rank that writes it, which holds a file
of at most FILE_BYTES; to read, a rank takes its own rows of each tensor and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from hfcustom.commit import every_rank, flush_file, sha256
from hfcustom.distributed.sharding import whole_state

FILE_BYTES = 2**31


# ---- writing --------------------------------------------------------------------------------------------------------


def plan_files(tensors: Mapping[str, torch.Tensor], stem: str, ranks: int) -> dict[str, list[str]]:
    """Return which tensors go into which file, the same on each rank: as many files as ranks or more, about equally large."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    count = max(1, min(len(sizes), max(ranks, math.ceil(total / FILE_BYTES))))
    parts: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name, size in sizes.items():  # in order, so that a layer's tensors stay together
        parts[min(count - 1, before * count // max(total, 1))].append(name)
        before += size
    filled = [part for part in parts if part]
    return {f"{stem}-{at + 1:05d}-of-{len(filled):05d}.safetensors": part for at, part in enumerate(filled)}


def write_spread(
    tensors: Mapping[str, torch.Tensor], folder: Path, stem: str, accelerator: Accelerator
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Write tensors of all ranks, shards or not; return the names by file, and the SHA-256 of the files that this rank wrote.

    Every rank has to call it, and all fail where one does. The files are on disk when it returns.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    files = plan_files(tensors, stem, ranks)
    order, digests, failed = list(files), dict[str, str](), None
    for start in range(0, len(order), ranks):
        own: dict[str, torch.Tensor] = {}
        for writer, file in enumerate(
            order[start : start + ranks]
        ):  # all is sent around first, then all write at once
            own |= whole_state({name: tensors[name] for name in files[file]}, writer == rank)
        path = folder / order[min(start + rank, len(order) - 1)]
        try:
            if own and failed is None:
                digests[path.name] = _write(own, path)
        except Exception as error:  # the others wait for this rank's shards of what is left
            failed = error
    with every_rank(accelerator):
        if failed is not None:
            raise failed
    return files, digests


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    flush_file(path)
    return sha256(path)


# ---- reading --------------------------------------------------------------------------------------------------------


class Spread:
    """The tensors of safetensors files, read where they are asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.homes: dict[str, Any] = {}
        for file in files:
            opened: Any = safe_open(file, framework="pt")
            self.homes |= dict.fromkeys(opened.keys(), opened)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self.homes[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor whole."""
        tensor: torch.Tensor = self.homes[name].get_tensor(name)
        return tensor

    def read_like(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor as `like` is, which has its shape: whole, or this rank's shard of it on the shard's device."""
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor

        if not isinstance(like, DTensor):
            return self.read(name)
        mesh, placements = like.device_mesh, like.placements
        cut = [(at, place.dim) for at, place in enumerate(placements) if isinstance(place, Shard)]
        device = like.to_local().device
        if len(cut) != 1:  # several dimensions of a mesh: torch knows how
            return distribute_tensor(self.read(name).to(device), mesh, placements, src_data_rank=None)
        ((axis, dim),) = cut
        size = math.ceil(like.shape[dim] / mesh.size(axis))  # as torch.chunk cuts
        start = min(like.shape[dim], size * mesh.get_local_rank(axis))
        stop = min(like.shape[dim], start + size)
        rows = (*[slice(None)] * dim, slice(start, stop))
        local = self.homes[name].get_slice(name)[rows].to(device)
        return DTensor.from_local(local, mesh, placements, shape=like.shape, stride=like.stride())
