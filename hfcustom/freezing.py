"""What is trained: parts frozen whole, or but for their attention or their last layers.

    freeze(model, "vision")                        train_only(model, ["connector"])
    freeze(model, "vision", keep="attention")      freeze(model, "language", keep_last=4)

Parts come from the part map (hfcustom/parts.py), layers from the longest stack in a part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from hfcustom.exits import ConfigError
from hfcustom.parts import check_parts, find_parts, is_inside, unwrap, without_wrappers


def freeze(
    model: nn.Module,
    parts: str | Iterable[str],
    *,
    keep: Literal["attention"] | None = None,
    keep_last: int | None = None,
) -> None:
    """Stop training the named parts, or all of them but their attention layers (keep="attention") or last layers (keep_last=n).

    A vision transformer adapts to a new resolution or task about as well through its attention alone, at a third of the
    trained weights (Touvron et al. 2022, https://arxiv.org/abs/2203.09795). An attention layer is a module whose class is
    called so, with its projections and its norms of queries and keys; the norm before it stays frozen. With keep_last=n the
    last n layers of the part's longest stack are trained, and what is defined behind it with them (a final norm). With both, the
    attention of the last n layers. Raises ValueError for an unknown part, a part without attention to keep, one that has no
    more than n layers, or when nothing would be left to train.
    """
    part_map = find_parts(model)
    frozen = check_parts(parts, part_map.present())
    if not frozen:
        raise ConfigError(f"freeze() names no part; this model has {', '.join(part_map.present())}.")
    if keep not in (None, "attention"):
        raise ConfigError(f"freeze() keep={keep!r}; choose 'attention', or leave it out to freeze all of a part.")
    attention = {part: attention_layers(model, part) for part in frozen if keep}
    last = {part: last_layers(model, part, keep_last) for part in frozen if keep_last is not None}
    for name, parameter in model.named_parameters():
        part = part_map.part_of(name)
        if part not in frozen:
            continue
        kept = (
            bool(keep or keep_last)
            and is_inside(name, attention.get(part, [name]))
            and is_inside(name, last.get(part, [name]))
        )
        if not kept:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"Freezing {', '.join(frozen)} leaves nothing to train in {type(unwrap(model)).__name__}.")


def attention_layers(model: nn.Module, part: str) -> list[str]:
    """Return the paths of a part's attention layers; ValueError when it has none."""
    part_map = find_parts(model)
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and part_map.find(name) == part
    ]
    if not found:
        paths = ", ".join(part_map.paths[part])
        raise ConfigError(
            f"The part {part!r} ({paths}) has no attention layer to keep; freeze it whole, or not at all."
        )
    return found


def train_only(model: nn.Module, parts: str | Iterable[str]) -> None:
    """Stop training every part but the named ones; ValueError for an unknown part, or for none."""
    present = find_parts(model).present()
    chosen = check_parts(parts, present)
    if not chosen:
        raise ConfigError(f"train_only() names no part; this model has {', '.join(present)}.")
    if rest := [part for part in present if part not in chosen]:
        freeze(model, rest)


def last_layers(model: nn.Module, part: str, count: int) -> list[str]:
    """Return the paths of the last `count` layers of a part, of each of its towers, and of what stands behind them there."""
    part_map = find_parts(model)
    kept = []
    if type(count) is not int:
        raise ConfigError(f"keep_last={count!r}; it takes a whole number of layers.")
    for home, path in _stacks(model, part):
        number = len(model.get_submodule(path))  # type: ignore[arg-type]
        if not 0 < count < number:
            raise ConfigError(
                f"keep_last={count}: the part {part!r} has {number} layers ({path}); choose 1 to {number - 1}, freeze it "
                "whole, or not at all."
            )
        kept += [f"{path}.{at}" for at in range(number - count, number)]
        kept += [name for name in _behind(model, path, home) if part_map.find(name) == part]
    return kept


def _behind(model: nn.Module, path: str, home: str) -> list[str]:
    """Return what is defined after a module beside it, and after each of its holders as far up as the part's module."""
    holder, _, own = path.rpartition(".")
    beside = [name for name, _ in model.get_submodule(holder).named_children()]
    behind = [f"{holder}.{name}".lstrip(".") for name in beside[beside.index(own) + 1 :]]
    inside = without_wrappers(holder) != home and is_inside(without_wrappers(holder), (home,))
    return [*behind, *_behind(model, holder, home)] if inside else behind


def _stacks(model: nn.Module, part: str) -> list[tuple[str, str]]:
    """Return each module of a part and the path of its longest list of layers; ValueError when there is none."""
    part_map = find_parts(model)
    found: dict[str, tuple[int, str]] = {}  # module of the part -> layers, path of the list
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and part_map.find(name) == part:
            home = next(path for path in part_map.paths[part] if is_inside(without_wrappers(name), (path,)))
            found[home] = max(found.get(home, (0, "")), (len(module), name))
    if not found:
        paths = ", ".join(part_map.paths[part])
        raise ConfigError(f"The part {part!r} ({paths}) has no stack of layers to keep the last of.")
    return [(home, path) for home, (_, path) in found.items()]
