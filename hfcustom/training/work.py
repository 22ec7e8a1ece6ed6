"""MFU: the arithmetic of the steps that were done, as a share of what the device can do in that time.

The first step runs under a dispatch mode that sees each matrix product, convolution and attention with its shapes, and puts it
down to a quantity that it grows with (QUANTITIES). From then on hooks on the tower and the language model note these quantities,
and a step's arithmetic is each of them times what one has cost, forward and backward: nothing is asked of the device.

What counts: a multiply-add is two. A frozen part has no gradient of its weights, and one that nothing before it learns for has none
of its inputs: neither runs, neither counts. What gradient checkpointing runs again does not count, nor the first look of a term
across rows. Attention is the full square of what the kernel was given, causal or not, and its backward twice its forward. Padding is
work that was done (`useful_tokens` has its share). Element-wise work and kernels that torch has no formula for do not count.
Letters: B rows, T text tokens, N patches of an image, M supervised tokens.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper
from transformers.utils import logging

from hfcustom import seams
from hfcustom.losses import IGNORE
from hfcustom.parts import find_parts, unwrap
from hfcustom.train_config import TrainConfig
from hfcustom.training.step_plan import is_blank

logger = logging.get_logger("hfcustom")
aten = torch.ops.aten
QUANTITIES = (
    "positions",  # B * T: the layers of the language model
    "pairs",  # B * T * T, of packed rows the sum of their squares: its attention
    "across",  # T * all N: its attention to images
    "patches",  # all N: tower and connector
    "squares",  # N * N of each image: the tower's attention
    "joint",  # (all N) * (all N): that of a tower to which the images are one row
    "supervised",  # M: head and loss
)
SIZES = ("grid_thw", "image_grid_thw", "tgt_sizes", "target_sizes", "image_sizes")  # how towers are told of them
MOST_COUNTED = 8  # steps, where images come late, or out of a cache


# ---- formulas -------------------------------------------------------------------------------------------------------


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # that the kernel makes the scores again is recomputation


def _product(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]  # (M, K) and (E, K, N), of which each row meets one


def _transposed(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[0]  # (M, K) and (N, K)


def _packed(left: Sequence[int], _: Any, shape: Sequence[int], *__: Any, **___: Any) -> int:
    return _transposed(left, shape)


def _convolution_backward(out: Any, image: Any, weight: Any, *rest: Any, **_: Any) -> int:
    transposed, wanted = rest[-4], rest[-1]  # torch's own formula takes the groups of a depthwise one for one
    places = image if transposed else out  # (B, C, ...)
    return 2 * places[0] * math.prod(places[2:]) * math.prod(weight) * sum(wanted[:2])


def _attention_kernels() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    for stem, end in (("cudnn", ""), ("efficient", ""), ("flash", ""), ("flash", "_for_cpu")):
        name = f"_scaled_dot_product_{stem}_attention{end}"
        found[getattr(aten, name)], found[getattr(aten, f"{name}_backward")] = _attention, _attention_backward
    return found


ATTENTION = _attention_kernels()
OWN = {
    **ATTENTION,
    aten._grouped_mm: _product,
    aten.convolution_backward: _convolution_backward,
}  # what torch counts otherwise, or not at all
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **{key: shape_wrapper(own) for key, own in OWN.items()}}
BY_NAME = {  # of bitsandbytes, which may not be installed
    f"bitsandbytes::{name}": shape_wrapper(formula)
    for name, formula in (("gemm_4bit", _packed), ("int8_linear_matmul", _transposed), ("int8_scaled_mm", _transposed))
}
LEFT = {aten.addmm: 1, aten.baddbmm: 1}  # where the first factor stands


# ---- counting a step ------------------------------------------------------------------------------------------------


@dataclass
class Operation:
    """One product that ran: its cost, in which part of the model, and its sizes."""

    flop: int
    part: str  # "image", "text" or ""
    kind: str  # "attention", "batched" or "product"
    sizes: tuple[int, ...]  # queries and keys; rows, inner size and columns; those of both factors


class Count(TorchDispatchMode):
    """Sees each operation of a forward and its backward."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.operations: list[Operation] = []
        self.spans: list[tuple[int, int, str]] = []  # numbers of the autograd nodes that a part has made
        self.open: list[int] = []
        self.depth = 0  # of modules that run

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), None
        if isinstance(func, torch._ops.OpOverload):
            formula = FORMULAS.get(func._overloadpacket) or BY_NAME.get(func._schema.name)
        if formula is None:
            return out
        node = torch._C._current_autograd_node()
        again = node is not None and (self.depth > 0 or torch.is_grad_enabled())  # a layer that is run again
        if self.work.active and not again:
            flop = formula(*args, **(kwargs or {}), out_val=out)
            self._note(func._overloadpacket, flop, args, self._part(node))
        return out

    def _note(self, packet: Any, flop: int, args: Any, part: str) -> None:
        kind = "attention" if packet in ATTENTION else "batched" if packet in (aten.bmm, aten.baddbmm) else "product"
        behind = kind == "attention" and packet.__name__.endswith("backward")  # the gradient stands before
        at = 1 if behind else LEFT.get(packet, 0)
        left, right = (tuple(value.shape) for value in args[at : at + 2])
        by_kind = {
            "attention": (left[-2], right[-2]),
            "batched": (*left[-2:], right[-1]),
            "product": (math.prod(left[:-1]), left[-1], *right),
        }
        self.operations.append(Operation(flop, part, kind, by_kind[kind]))

    def _part(self, node: Any) -> str:
        if node is None:
            return self.work.inside[-1]
        number = node._sequence_nr()
        around = [(last - first, part) for first, last, part in self.spans if first <= number < last]
        return min(around, default=(0, ""))[1]  # the innermost

    def begin(self, part: str) -> None:
        """Open the span of a part."""
        self.spans.append((torch._C._autograd._get_sequence_nr(), 2**63, part))
        self.open.append(len(self.spans) - 1)

    def end(self) -> None:
        """Close the span opened last."""
        at = self.open.pop()
        first, _, part = self.spans[at]
        self.spans[at] = (first, torch._C._autograd._get_sequence_nr(), part)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count while the block runs."""

        def enter(*_: Any) -> None:
            self.depth += 1

        def leave(*_: Any) -> None:
            self.depth -= 1

        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(enter),
                register_module_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self)
            yield


# ---- the steps of a run ---------------------------------------------------------------------------------------------


class Work:
    """Knows what the steps of a run cost, on this rank."""

    def __init__(self, model: nn.Module, rate: float = math.inf) -> None:
        self.core: Any = unwrap(model)
        self.rate = rate  # of the device, operations a second
        self.costs: dict[bool, dict[str, float]] = {}  # of one of each quantity, in steps with images and without
        self.seen: Counter[str] = Counter()  # quantities of the step that runs
        self.texts: set[tuple[int, int]] = set()  # (B, T) of the language model's calls in it
        self.lengths: set[int] = set()  # patches of its images
        self.in_one_row = False  # whether the tower sees its images so
        self.inside = [""]  # the parts that run, the innermost last
        self.active = False
        self.runs = True  # rather than having been left out, every row of it
        self.counted = 0  # steps
        self.count: Count | None = None
        self.flop = 0.0  # of the last step
        self.blind = False  # where nothing can be said

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the parts of the model while a run lasts."""
        with ExitStack() as stack:
            for model in (self.core, *self.core.companions.values()):
                for remove in self._watch(model):
                    stack.callback(remove)
            yield

    def _watch(self, model: Any) -> Iterator[Callable[[], None]]:
        seams.install(model)  # its hooks say where packed rows end, and go first
        modules, paths = dict(model.named_modules()), find_parts(model).paths
        notes = {"vision": self._note_images, "language": self._note_text}
        for part in ("vision", "connector", "new", "language"):
            kind = "text" if part == "language" else "image"
            roots = [modules[path] for path in paths.get(part, ()) if path in modules]
            inner = [child for root in roots for child in root.children()]  # some towers are entered by a method
            for module in dict.fromkeys([*roots, *inner] if part == "vision" else roots):
                enter = self._entering(kind, notes.get(part))
                yield module.register_forward_pre_hook(enter, with_kwargs=True).remove
                yield module.register_forward_hook(self._leaving, always_call=True).remove

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Forget what was seen of a step, of which these micro-batches run now: an attempt without memory is no part of it."""
        self.seen, self.texts, self.lengths, self.active = Counter(), set(), set(), False
        self.runs = bool(batches)
        self.seen["supervised"] = sum(
            int((batch["labels"][:, 1:] != IGNORE).sum())
            for batch in batches
            if "labels" in batch and not is_blank(batch)
        )
        if self.count is not None:
            self.count.operations.clear()

    @contextmanager
    def step(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Follow one step over micro-batches; `flop` then has its cost."""
        self.begin(batches)
        shown = any(name.startswith("pixel_values") for batch in batches for name in batch)
        if self.blind:
            yield
            return
        known = self.costs.get(shown, {})
        late = shown and "patches" not in known and self.counted < MOST_COUNTED  # its images may come out of a cache
        self.flop = 0.0
        if known and not late:
            yield
            self.flop = sum(known.get(name, 0.0) * amount for name, amount in self.seen.items())
            return
        self.count = Count(self)
        try:
            with self.count.running():
                yield
            self.flop = float(sum(operation.flop for operation in self.count.operations))
            if self.runs:
                self._learn(shown)
        finally:
            self.count = None

    def _learn(self, shown: bool) -> None:
        """Divide what the step has cost by what it was about."""
        assert self.count is not None
        if not self.seen["positions"]:
            self.blind = True
            logger.warning_once(
                f"No mfu: the language model of {type(self.core).__name__} was not called where it was looked for, as under FSDP of "
                "version 1; fsdp_version: 2 helps there."
            )
            return
        totals: Counter[str] = Counter()
        to_images = [each for each in self.count.operations if each.kind == "attention" and len(set(each.sizes)) > 1]
        across = any(each.part == "text" for each in to_images)
        for operation in self.count.operations:
            quantity = self._quantity(operation, across)
            totals[quantity if self.seen[quantity] else "positions"] += operation.flop
        self.costs[shown] = {name: totals[name] / amount for name, amount in self.seen.items() if amount}
        self.counted += 1

    def _quantity(self, operation: Operation, across: bool) -> str:
        """Return what an operation's cost grows with."""
        sizes, widths = operation.sizes, {width for _, width in self.texts}
        square = operation.kind != "product"  # a "batched" one may be attention written out
        if operation.part == "image":
            if not square or not any(sizes.count(length) > 1 for length in self.lengths):
                return "patches"
            return "joint" if self.in_one_row else "squares"
        if operation.kind == "attention":
            return "across" if len(set(sizes)) > 1 and self.seen["patches"] else "pairs"
        if square and any(sizes.count(width) > 1 for width in widths):
            return "pairs"
        whole = any(rows * width in sizes for rows, width in self.texts)
        if operation.part == "text":
            return "patches" if across and not whole else "positions"
        return "positions" if whole else "supervised"

    # ---- hooks

    def _entering(self, kind: str, note: Callable[[Any, Any], None] | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.active |= torch.is_grad_enabled()  # what runs without before that is a first look at the step
            if note is not None and self.active and kind not in self.inside:
                note(args, kwargs)
            self.inside.append(kind)
            if self.count is not None:
                self.count.begin(kind)

        return enter

    def _leaving(self, *_: Any) -> None:
        self.inside.pop()
        if self.count is not None:
            self.count.end()

    def _note_text(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        found = next((value for value in given if isinstance(value, torch.Tensor)), None)
        if found is None:
            return
        rows, width = found.shape[:2]  # (B, T)
        packed = kwargs.get("row_lengths")
        self.texts.add((rows, width))
        self.seen["positions"] += rows * width
        self.seen["pairs"] += rows * width**2 if packed is None else sum(length**2 for length in packed)
        self.seen["across"] += width * self.seen["patches"]

    def _note_images(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        pixels = next((value for value in given if value.is_floating_point() or value.dtype == torch.uint8), None)
        if pixels is None or pixels.ndim < 2:
            return
        sizes = next((kwargs[name] for name in SIZES if kwargs.get(name) is not None), None)
        lengths = _patches(pixels, sizes, self._patch_size() if pixels.ndim > 3 else 1)
        self.in_one_row |= "image_sizes" in kwargs
        self.lengths |= {*lengths, sum(lengths)} if self.in_one_row else set(lengths)
        self.seen["patches"] += sum(lengths)
        self.seen["squares"] += sum(length**2 for length in lengths)
        self.seen["joint"] += sum(lengths) ** 2

    def _patch_size(self) -> int:
        vision = getattr(self.core.config, "vision_config", None)  # a tower that quantises pictures has none
        size = getattr(vision, "patch_size", 1)
        return size[-1] if isinstance(size, list | tuple) else int(size)


def _patches(pixels: torch.Tensor, sizes: Any, patch_size: int) -> list[int]:
    """Return the patches of each image that a tower is given: (..., C, H, W), or (N, D) with their sizes."""
    if sizes is not None:
        rows = torch.as_tensor(sizes).tolist()
        if pixels.ndim > 3:  # sizes in pixels
            return [(height // patch_size) * (width // patch_size) for height, width in rows]
        return [height * width for *frames, height, width in rows for _ in range(frames[0] if frames else 1)]
    if pixels.ndim > 3:
        height, width = pixels.shape[-2:]
        return [(height // patch_size) * (width // patch_size)] * math.prod(pixels.shape[:-3])
    return [pixels.shape[-2]] * math.prod(pixels.shape[:-2])


@contextmanager
def watching_work(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> Iterator[Work | None]:
    """Give a run its Work where it is to log mfu, and say what that is a share of."""
    on_gpu, compiled = accelerator.device.type != "cpu", unwrap(model)._compiled_call_impl is not None
    if not (on_gpu and not compiled if config.mfu is None else config.mfu):
        yield None
        return
    if compiled:
        raise ValueError("mfu=True: what a compiled model does cannot be counted; leave it out.")
    rate = device_rate(accelerator.device, config.precision or "fp32")
    accelerator.print(
        f"mfu: share of {rate / 1e12:.4g} TFLOP/s, what a matrix product in {config.precision} reaches here"
    )
    work = Work(model, rate)
    with work.watching():
        yield work


# ---- the device -----------------------------------------------------------------------------------------------------


@functools.cache
def device_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second of a large matrix product in a run's precision, measured in a fraction of a second.

    Measured, since a data sheet knows nothing of power limits, slower memory and shared cores.
    """
    on_cpu = device.type == "cpu"
    size, seconds = (768, 0.1) if on_cpu else (8192, 0.3)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    with torch.no_grad():
        left, right = torch.ones(size, size, **options), torch.ones(size, size, **options)
        out, best, began = left @ right, 0.0, _now(device)
        while (now := _now(device)) - began < seconds:
            torch.mm(left, right, out=out)
            best = max(best, 2.0 * size**3 / (_now(device) - now))
    return best


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
