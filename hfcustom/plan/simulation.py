"""Simulation: PyTorch code run with tensors that have shapes but no values, and a ledger of the bytes that they would take.

Numbers that decide (token ids, masks, positions: everything that is not floating point) are real, so that code which looks at
them takes its real path; floating-point tensors are torch's FakeTensors, of any size. A model of 72 billion weights takes a
training step in a minute, on a laptop, and the ledger sees every allocation that PyTorch's dispatcher sees, autograd's and
the optimiser's included. What a kernel allocates inside itself is not seen, but for a sum's copy.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hfcustom.losses import chunked
from hfcustom.training import offload

aten = torch.ops.aten

REAL_FACTORIES = {  # small floating-point tensors whose values code may read: grids, positions
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.logspace.default,
}
INDEXING = {
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}
COMPARED = {aten.allclose.default, aten.equal.default}
ASSUMED = {
    "aten::_is_all_true": True,
    "aten::all": True,
    "aten::any": False,
    "aten::isnan": False,
}  # of unknown values
CHOOSERS = {"aten::argmax", "aten::argmin", "aten::argsort", "aten::max", "aten::min", "aten::sort", "aten::topk"}


ELSEWHERE = "offloaded"  # what lies in the CPU's memory, and counts for no peak


class Ledger:
    """Bytes of the tensors that are alive, by what they are for, and the most that there were at once."""

    def __init__(self) -> None:
        self.alive: Counter[str] = Counter()
        self.making = "activations"  # what new tensors are, until they are marked
        self.forget_peak()

    def forget_peak(self) -> None:
        """Measure from here on."""
        self.peak = self._total()
        self.at_peak = self._here()
        self.most = dict(self.alive)  # of each kind by itself

    def _total(self) -> int:
        return sum(self.alive.values()) - self.alive[ELSEWHERE]

    def _here(self) -> dict[str, int]:
        return {kind: size for kind, size in self.alive.items() if kind != ELSEWHERE}

    def add(self, tensor: torch.Tensor, kind: str | None = None) -> list[Any]:
        """Count a tensor's memory, once, until it is freed."""
        kind = kind or self.making
        storage = tensor.untyped_storage()
        entry = vars(storage).get("_entry")
        if entry is None or entry[2] is not self:  # bitsandbytes keeps its code books from one plan to the next
            entry = [storage.nbytes(), kind, self]
            vars(storage)["_entry"] = entry
            weakref.finalize(storage, self._free, entry)
            self._grow(kind, entry[0])
        return entry

    def add_for_a_moment(self, size: int, kind: str = "activations") -> None:
        """Count what a kernel allocates inside itself."""
        self._grow(kind, size)
        self.alive[kind] -= size

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Say what a tensor is for."""
        entry = self.add(tensor, kind)
        if entry[1] != kind:
            self.alive[entry[1]] -= entry[0]
            entry[1] = kind
            self._grow(kind, entry[0])

    def _grow(self, kind: str, size: int) -> None:
        self.alive[kind] += size
        self.most[kind] = max(self.most.get(kind, 0), self.alive[kind])
        if self._total() > self.peak:
            self.peak, self.at_peak = self._total(), self._here()

    def _free(self, entry: list[Any]) -> None:
        self.alive[entry[1]] -= entry[0]


class Simulation(TorchDispatchMode):
    """Run each operation for real where all it takes is real, else for its shapes alone; count what comes out."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # what is asked most
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = torch.device("cpu")  # transformers builds what it loads there
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors:
            out = self._make(func, args, kwargs)
        elif not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            out = func(*args, **kwargs)
        else:
            out = self._follow_shapes(func, args, kwargs)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.ledger.add(leaf)
        if func._schema.name == "aten::sum" and args[0].dtype in (torch.bool, torch.uint8, torch.int32):
            self.ledger.add_for_a_moment(8 * args[0].numel())  # the kernel counts in a copy of 64 bits
        return out

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in REAL_FACTORIES:
            return func(*args, **kwargs)
        with self.shapes:
            out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and not out.dtype.is_floating_point:
            return func(*args, **kwargs)
        return out

    def _follow_shapes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        if func in COMPARED:
            return True
        if func is aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func in INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        given = (args, kwargs)
        shaped = pytree.tree_map_only(torch.Tensor, self.without_values, given)
        with self.shapes:
            if func is aten._grouped_mm.default:
                out = _grouped_mm(*shaped[0], **shaped[1])
            else:
                out = func(*shaped[0], **shaped[1])
        if func._schema.is_mutable:  # what is written into stays the tensor that the caller holds
            pairs = zip(pytree.tree_leaves(given), pytree.tree_leaves(shaped), strict=True)
            own = {id(new): old for old, new in pairs if isinstance(old, torch.Tensor)}
            out = pytree.tree_map(lambda leaf: own.get(id(leaf), leaf), out)
        if name in ASSUMED and not args[0].dtype.is_floating_point and isinstance(out, torch.Tensor):
            return torch.full(out.shape, ASSUMED[name])
        if name in CHOOSERS:
            out = pytree.tree_map_only(FakeTensor, lambda leaf: _chosen(leaf, _choices(func, args, kwargs)), out)
        return out

    def without_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor's shape, a FakeTensor."""
        return tensor if isinstance(tensor, FakeTensor) else self.shapes.from_tensor(tensor, static_shapes=True)


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """Do as the operator in the dtypes that its kernels know; its shape function (torch 2.13) knows bfloat16 alone."""
    out: torch.Tensor = aten._grouped_mm.default(first.bfloat16(), second.bfloat16(), *rest, **more)
    return out.to(first.dtype)


def _without_masks(indices: list[Any]) -> list[Any]:
    """Return indices with the positions of a mask in its place: how many there are is known from its values."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero().unbind(1) if is_mask and not isinstance(index, FakeTensor) else [index]
    return found


def _choices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return among how many a chooser chooses: experts of a router, tokens of a sequence."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    dim = given.get("dim", -1 if func._schema.name != "aten::argmax" else None)
    return int(args[0].numel() if dim is None or not args[0].ndim else args[0].shape[dim])


def _chosen(leaf: torch.Tensor, choices: int) -> torch.Tensor:
    """Return choices, real ones, as even as can be: the tokens of a batch go to all experts alike."""
    if leaf.dtype != torch.int64:
        return leaf
    return (torch.arange(leaf.numel()) % max(choices, 1)).view(leaf.shape)


@contextmanager
def simulate() -> Iterator[Ledger]:
    """Let what runs inside have shapes in place of values; yields the ledger."""
    ledger = Ledger()

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        """Stand in for offload.to_cpu(): what is copied is no longer on the planned GPU."""
        ledger.making = ELSEWHERE
        try:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        finally:
            ledger.making = "activations"

    with (
        mock.patch.object(offload, "to_cpu", to_cpu),
        mock.patch.object(offload, "has_effect", lambda device: True),
        mock.patch.object(offload, "is_plain", lambda tensor: tensor.layout is torch.strided),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(chunked, "_linear_loss", _linear_loss),
        mock.patch.object(chunked, "CPU_BLOCK", 2**31),
        Simulation(ledger),
    ):
        yield ledger


LINEAR_LOSS, CHUNKS = chunked._linear_loss, chunked.chunks
CHUNKS_RUN = 3  # each takes the memory of the one before


def _linear_loss(*args: Any) -> Any:
    """Evaluate the first chunks of a loss: all of them are alike, and there may be thousands."""
    with mock.patch.object(chunked, "chunks", lambda *sizes: islice(CHUNKS(*sizes), CHUNKS_RUN)):
        return LINEAR_LOSS(*args)


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for nn.Module._apply, which swaps a FakeTensor only where nothing else refers to it."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                new = fn(parameter)
                if new is not parameter:
                    parameter.data = new
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
