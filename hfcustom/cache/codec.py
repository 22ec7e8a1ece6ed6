"""What an image processor made of an image <-> tensors for a cache, exactly: floats that are 256 levels a channel as bytes.

A processor's output is a mapping of arrays, lists of arrays and numbers. Normalised pixels take 256 values a channel, so
a byte says which (a quarter of float32); the values are those of the processor's own arithmetic, and each array is compared
bit for bit with what would be read before it is stored in that form. Other arrays are stored as they are.
Letters: P crops, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Lattice = np.ndarray  # (C, 256) float32: the value of each level


def lattices(settings: Mapping[str, Any]) -> list[Lattice]:
    """Return the values that levels 0 to 255 can become, (3, 256) each, in the arithmetic of each backend (5.23.0)."""
    scale = settings.get("rescale_factor") or 1.0
    mean, std = (_three(settings.get(name), default) for name, default in (("image_mean", 0.0), ("image_std", 1.0)))
    levels = np.arange(256, dtype=np.float64)
    by_numpy = np.broadcast_to((levels * scale).astype(np.float32), (3, 256))  # image_transforms.rescale
    normalised = (by_numpy - mean[:, None]) / std[:, None]  # image_transforms.normalize
    fused_mean, fused_std = (torch.tensor(values) * (1.0 / scale) for values in (mean, std))
    fused = (torch.arange(256.0) - fused_mean[:, None]) / fused_std[:, None]  # TorchvisionBackend
    by_torch = (torch.arange(256.0) * scale).expand(3, 256)
    unfused = (by_torch - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    found = [normalised, fused.numpy(), by_numpy, by_torch.numpy(), unfused.numpy()]
    return [np.ascontiguousarray(table, dtype=np.float32) for table in found if np.isfinite(table).all()]


def _three(values: Any, default: float) -> np.ndarray:
    values = default if values is None else values
    return np.broadcast_to(np.asarray(values, dtype=np.float32), (3,))


# ---- arrays ---------------------------------------------------------------------------------------------------------

# How channels lie in an array -> a view with them in front, (..., C, values): pictures, and patches in either order.
VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pictures": lambda array: array.reshape(*array.shape[:-2], -1),
    "channels_first": lambda array: array.reshape(*array.shape[:-1], 3, -1),
    "channels_last": lambda array: np.moveaxis(array.reshape(*array.shape[:-1], -1, 3), -1, -2),
}


def _views(array: np.ndarray) -> list[str]:
    found = ["pictures"] if array.ndim >= 3 and array.shape[-3] == 3 else []
    return found + (["channels_first", "channels_last"] if array.ndim >= 2 and array.shape[-1] % 3 == 0 else [])


def encode(array: np.ndarray, tables: list[Lattice]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return an array as a tensor and what reads it back."""
    array = array if array.flags.c_contiguous else array.copy()
    about = {"dtype": array.dtype.str, "shape": list(array.shape)}
    if _is_constant(array):
        return torch.from_numpy(array.reshape(-1)[:1].copy()), about | {"form": "constant"}
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1 and array.size and 0 <= array.min() and array.max() < 256:
        return torch.from_numpy(array.astype(np.uint8)), about | {"form": "bytes"}
    if array.dtype == np.float32:
        for at, table in enumerate(tables):
            for view in _views(array):
                codes = _codes(array, view, table)
                if codes is not None:
                    return torch.from_numpy(codes), about | {"form": "levels", "view": view, "table": at}
    return torch.from_numpy(np.ascontiguousarray(array)), about | {"form": "plain"}


def _is_constant(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    if not flat.size or np.signbit(flat[0]) or not (flat[:: flat.size // 97 + 1] == flat[0]).all():
        return False
    return bool((flat == flat[0]).all())


def _codes(array: np.ndarray, view: str, table: Lattice) -> np.ndarray | None:
    """Return the level of each value, None unless all are levels, bit for bit."""
    channels = VIEWS[view](array)  # (..., 3, values)
    if channels.ndim > 2 and len(channels) > 1 and _codes(array[:1], view, table) is None:
        return None  # told by the first crop
    low, step = table[:, :1], (table[:, -1:] - table[:, :1]) / 255
    if not step.all():
        return None
    guess = np.multiply(channels, 1 / step)
    guess -= low / step
    np.rint(guess, out=guess)
    codes = np.empty(array.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # a value that is no level shows below
        np.copyto(VIEWS[view](codes), guess, casting="unsafe")
    same = np.array_equal(look_up(codes, view, table).view(np.int32), array.view(np.int32))
    return codes if same else None


def decode(tensor: torch.Tensor, about: Mapping[str, Any], tables: list[Lattice]) -> np.ndarray:
    """Return the array that `encode` was given."""
    array, dtype, shape = tensor.numpy(), np.dtype(about["dtype"]), about["shape"]
    if about["form"] == "constant":
        return np.broadcast_to(array, shape)
    if about["form"] == "levels":
        return look_up(array, about["view"], tables[about["table"]])
    return array.astype(dtype).reshape(shape)  # a copy: what a file holds is not to be changed


def look_up(codes: np.ndarray, view: str, table: Lattice) -> np.ndarray:
    """Look levels up, two at a time where a channel's lie together and are even in number: uint8 -> float32."""
    values = np.empty(codes.shape, np.float32)
    given, out = VIEWS[view](codes), VIEWS[view](values)  # (..., 3, values)
    paired = view != "channels_last" and given.shape[-1] % 2 == 0 and codes.flags.c_contiguous
    if paired and codes.ctypes.data % 2 == 0:
        given, out = given.view(np.uint16), out.view(np.complex64)
    for channel, row in enumerate(_pairs(table) if out.dtype == np.complex64 else table):
        for at in np.ndindex(given.shape[:-2]):
            out[(*at, channel)] = row.take(given[(*at, channel)], mode="clip")
    return values


_PAIRS: dict[bytes, np.ndarray] = {}


def _pairs(table: Lattice) -> np.ndarray:
    """Return the values of two neighbouring levels, (3, 65536) complex64: half as many look-ups."""
    found = _PAIRS.get(table.tobytes())
    if found is None:
        pair = np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)  # in the order of this machine
        found = _PAIRS[table.tobytes()] = np.ascontiguousarray(table[:, pair].reshape(3, -1)).view(np.complex64)
    return found


# ---- nested outputs -------------------------------------------------------------------------------------------------


def pack(value: Any, tables: list[Lattice], tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON, arrays in it as encoded tensors in `tensors`; TypeError for what cannot be stored."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        return {"is": "bfloat16", "of": pack(value.view(torch.int16).numpy(), tables, tensors)}
    if isinstance(value, torch.Tensor):
        return {"is": "tensor", "of": pack(value.numpy(), tables, tensors)}
    if isinstance(value, np.ndarray | np.generic):
        name = str(len(tensors))
        tensors[name], about = encode(np.asarray(value), tables)
        return {"is": "array", "name": name, **about}
    if isinstance(value, list | tuple):
        if _alike(value):
            return {"is": "stack", "tuple": isinstance(value, tuple), "of": pack(np.stack(value), tables, tensors)}
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"is": kind, "of": [pack(item, tables, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def _alike(values: Any) -> bool:
    arrays = len(values) > 1 and all(isinstance(item, np.ndarray) for item in values)
    return arrays and len({(item.shape, item.dtype) for item in values}) == 1


def table_of(found: Any) -> int | None:
    """Return which table the levels of packed pictures are of, None where they are not all levels of one."""
    if not isinstance(found, dict):
        return None
    if found["is"] == "array":
        pictures = found["form"] == "levels" and found["view"] == "pictures"
        return int(found["table"]) if pictures else None
    if found["is"] in ("list", "tuple"):
        tables = {table_of(item) for item in found["of"]}
        return tables.pop() if len(tables) == 1 else None
    return table_of(found["of"]) if found["is"] in ("tensor", "stack") else None


def unpack(
    found: Any, tables: list[Lattice], tensors: Mapping[str, torch.Tensor] | None, *, as_levels: bool = False
) -> Any:
    """Return the value that `pack` was given; without tensors, ones in arrays of the same shapes that take no memory.

    `as_levels` leaves pictures of which table_of() knows the table as levels, uint8.
    """
    if not isinstance(found, dict):
        return found
    kind = found["is"]
    if kind == "array" and tensors is None:
        return np.broadcast_to(np.ones((), found["dtype"]), found["shape"])
    if kind == "array":
        assert tensors is not None
        if as_levels and table_of(found) is not None:
            return tensors[found["name"]].numpy()
        return decode(tensors[found["name"]], found, tables)
    if kind in ("tensor", "bfloat16"):
        array = unpack(found["of"], tables, tensors, as_levels=as_levels)
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor if kind == "tensor" else tensor.view(torch.bfloat16)
    if kind == "stack":
        items = list(unpack(found["of"], tables, tensors, as_levels=as_levels))
        return tuple(items) if found["tuple"] else items
    items = [unpack(item, tables, tensors, as_levels=as_levels) for item in found["of"]]
    return tuple(items) if kind == "tuple" else items
