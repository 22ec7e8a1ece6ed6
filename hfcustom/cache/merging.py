"""How a processor's outputs for images alone make its output for all of them, found by trial.

outputs by row, [[{"pixel_values": ..., ...}, ...] a row] -> {"pixel_values": ..., ...}. An output is an array, a tensor, a
list of them or of numbers; nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

Output = dict[str, Any]
Rows = Sequence[Sequence[Any]]  # of one output, nested as the images are


def merge(way: str, name: str, rows: Sequence[Sequence[Output]]) -> Any:
    """Put one output of all images together."""
    values = [[output[name] for output in row] for row in rows]
    first = next(chain.from_iterable(values))
    if isinstance(first, torch.Tensor):
        arrays = [[value.numpy() for value in row] for row in values]
        return torch.from_numpy(np.ascontiguousarray(WAYS[way](arrays)))
    return WAYS[way](values)


def find_merges(process: Callable[[Any], Output], rows: Sequence[Sequence[Any]]) -> dict[str, str] | None:
    """Return the way in which each output of `process(rows)` comes from those of its images alone, None when one has none."""
    try:
        together = process(rows)
        alone = [[process([[image]]) for image in row] for row in rows]
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # the caller's own call says what is wrong
        return None
    if any(output.keys() != together.keys() for row in alone for output in row):
        return None
    found = {name: _way(name, alone, value) for name, value in together.items()}
    return None if None in found.values() else {name: way for name, way in found.items() if way is not None}


def _way(name: str, alone: Sequence[Sequence[Output]], together: Any) -> str | None:
    for way in WAYS:
        try:
            if same(merge(way, name, alone), together):
                return way
        except (LookupError, TypeError, ValueError, AttributeError):  # this way is not for such values
            continue
    return None


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal bit for bit, types included."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray | np.generic) and isinstance(second, np.ndarray | np.generic):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return type(first) is type(second) and bool(first == second)


def crops_of(pixels: Any) -> int:
    """Return the crops in the pixels of one image, (1, P, 3, H, W), (P, 3, H, W) or a list; 0 where they are no pictures."""
    if isinstance(pixels, list | tuple):
        return sum(1 if item.ndim == 3 else crops_of(item) for item in pixels)
    return int(pixels.shape[pixels.ndim - 4]) if pixels.ndim in (4, 5) and pixels.shape[-3] == 3 else 0


# ---- the ways -------------------------------------------------------------------------------------------------------


def _alike(rows: Rows) -> Any:
    first, *others = chain.from_iterable(rows)
    if not all(same(first, other) for other in others):
        raise ValueError("images differ")
    return first


def _joined(rows: Rows) -> Any:
    """One image after another."""
    values = list(chain.from_iterable(rows))
    return list(chain.from_iterable(values)) if isinstance(values[0], list | tuple) else np.concatenate(values)


def _padded(rows: Rows) -> Any:
    """One image after another, each filled up with zeros to the largest."""
    values = list(chain.from_iterable(rows))
    if isinstance(values[0], list | tuple):
        return _to_largest(list(chain.from_iterable(values)))
    return np.concatenate(_to_largest(values, skip=1))


def _nested(rows: Rows) -> Any:
    """Rows of images, filled up with zeros to the longest row and the largest image: (1, n, ...) each -> (B, N, ...)."""
    first = next(chain.from_iterable(rows))
    if isinstance(first, list | tuple):
        return [[item for value in row for item in value[0]] for row in rows]
    images = iter(_to_largest([value for row in rows for value in row], skip=2))
    joined = [np.concatenate([next(images) for _ in row], 1) if row else None for row in rows]
    shape = next(row.shape for row in joined if row is not None)
    empty = np.zeros((1, 0, *shape[2:]), first.dtype)
    return np.concatenate(_to_largest([empty if row is None else row for row in joined]))


def _counted(rows: Rows) -> Any:
    """A number a row: of its images."""
    return [sum(int(np.asarray(value).item()) for value in row) for row in rows]


def _counted_with_images(rows: Rows) -> Any:
    """A number a row that has images."""
    return _counted([row for row in rows if row])


def _marked(rows: Rows) -> Any:
    """As nested, (1, n, tiles) each, but where there is no image the first of its tiles is 1 (Mllama's masks)."""
    filled = _nested(rows)  # (B, N, tiles)
    for row, values in zip(filled, rows, strict=True):
        row[sum(value.shape[1] for value in values) :, ..., 0] = 1
    return filled


def _in_a_line(rows: Rows) -> Any:
    """Patches of all images in one sequence of patches, (1, C, p, n) each; the last dimension grows."""
    return np.concatenate(list(chain.from_iterable(rows)), -1)


def _to_largest(arrays: Sequence[Any], skip: int = 0) -> list[Any]:
    """Fill arrays up with zeros, at the end of each dimension but the first `skip`."""
    if isinstance(arrays[0], torch.Tensor):
        return [torch.from_numpy(filled) for filled in _to_largest([array.numpy() for array in arrays], skip)]
    largest = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
    filled = []
    for array in arrays:
        shape = [size if at < skip else top for at, (size, top) in enumerate(zip(array.shape, largest, strict=True))]
        if list(array.shape) == shape:
            filled.append(array)
            continue
        filled.append(np.zeros(shape, array.dtype))
        filled[-1][tuple(map(slice, array.shape))] = array
    return filled


WAYS: dict[str, Callable[[Rows], Any]] = {
    "alike": _alike,
    "counted": _counted,
    "counted with images": _counted_with_images,
    "in a line": _in_a_line,
    "joined": _joined,
    "marked": _marked,
    "nested": _nested,
    "padded": _padded,
}
