"""Values and slopes of token losses on a tile of logits, and the checks that keep a wrong function out.

logits (C, V) -> sums (K,), and in the logits' place dL/dlogits. The tile is worked through in slices that fit into a
CPU's cache, so that a function of the user's own, with all its temporaries, costs little more than cross entropy.
Letters: C tokens of a chunk, V vocabulary, K losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from hfcustom.losses.config import WeightedLoss
from hfcustom.losses.contract import NonFiniteError

if TYPE_CHECKING:
    from hfcustom.losses.chunked import Work

PROVEN: WeakKeyDictionary[Callable[..., Any], set[str]] = (
    WeakKeyDictionary()
)  # function -> options it was checked with


def token_values(
    tile: torch.Tensor, work: Work, sums: torch.Tensor, wants_slopes: bool, slice_elements: int
) -> torch.Tensor | None:
    """Add the losses of a tile (C, V) to `sums` (K,) and, where slopes are wanted, overwrite the tile with them.

    Returns factors (C,) by which the rows of the tile are still to be multiplied, or None.
    """
    inputs = {name: _whole_chunk(value) for name, value in work.inputs.items()}
    work = type(work)(work.targets, work.losses, work.scales, inputs)
    for item in work.losses:
        if len(tile) > 1 and not is_proven(item):
            _check_each_token_alone(item, tile, work)
    size = max(1, slice_elements // tile.shape[1]) if tile.device.type == "cpu" else len(tile)
    plain = len(work.losses) == 1 and work.losses[0].loss.name == "cross_entropy"
    factors = torch.empty_like(tile[:, 0]) if plain and wants_slopes else None  # (C,)
    for start in range(0, len(tile), size):
        rows = slice(start, start + size)
        if plain:
            _cross_entropy(
                tile[rows], work.targets[rows], sums, work.scales, None if factors is None else factors[rows]
            )
        else:
            _any_loss(tile[rows], work.part(rows), sums, wants_slopes)
    return factors


def _whole_chunk(value: Any) -> Any:
    """Let a teacher compute its logits for the whole chunk at once."""
    return value if isinstance(value, torch.Tensor) else value.evaluated()


def _cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor | None,
) -> None:
    """Cross entropy by its statistics, without a pass that normalises: slopes * sum / scale = exp(z - max) - sum * onehot."""
    wanted = targets[:, None]
    target_logits = logits.gather(1, wanted)[:, 0]  # (C,)
    top = logits.amax(-1, keepdim=True)  # (C, 1)
    totals = logits.sub_(top).exp_().sum(-1)  # (C,)
    values = totals.log() + top[:, 0] - target_logits  # (C,)
    sums.add_(values.sum())
    if factors is not None:
        logits.scatter_add_(1, wanted, -totals[:, None])
        torch.div(scales[0].to(totals), totals, out=factors)


def _any_loss(logits: torch.Tensor, work: Work, sums: torch.Tensor, wants_slopes: bool) -> None:
    """Evaluate whatever the user wrote on a slice of logits and put dL/dlogits in their place."""
    leaf = logits.detach().requires_grad_(wants_slopes)
    with torch.set_grad_enabled(wants_slopes):
        values = [_checked(item, leaf, work) for item in work.losses]
        own = torch.stack([value.sum() for value in values])  # (K,)
        if wants_slopes:
            logits.copy_(torch.autograd.grad(own @ work.scales.to(own), leaf)[0])
    sums.add_(own.detach())


def _checked(item: WeightedLoss, logits: torch.Tensor, work: Work) -> torch.Tensor:
    """Call a token loss and refuse what cannot be summed."""
    name, targets = item.loss.name, work.targets
    values = item.loss.function(logits, targets, **_own_inputs(item, work.inputs), **item.options)
    shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
    if shape != tuple(targets.shape):
        raise ValueError(
            f"Token loss {name!r} returned {shape} for {len(targets)} targets; it must return one value a target, "
            f"shape {tuple(targets.shape)}. Do not average (reduction='none'): hfcustom divides by the supervised tokens "
            "of the whole optimiser step."
        )
    if logits.requires_grad and not values.requires_grad:
        raise ValueError(
            f"Token loss {name!r} returned values without a gradient ({values.dtype}), so nothing would be learnt: "
            "compute them from the logits, without detach, argmax or a comparison alone."
        )
    return values


def _own_inputs(item: WeightedLoss, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in item.loss.inputs}


@torch.no_grad()
def _check_each_token_alone(item: WeightedLoss, tile: torch.Tensor, work: Work) -> None:
    """Refuse a function whose value for a token depends on the tokens beside it: it would depend on the batching."""
    few, tile = work.part(slice(0, 4)), tile[:4].clone()
    before = tile._version
    with torch.random.fork_rng(devices=[]):
        together, again = (_checked(item, tile, few) for _ in range(2))
        alone = [
            _checked(item, tile[at : at + 1], few.part(slice(at, at + 1))) for at in range(len(few.targets))
        ]  # (1,) each
    if tile._version != before:
        raise ValueError(
            f"Token loss {item.loss.name!r} changes the logits in place, which other losses read too; write "
            "`logits = logits / t`, not `logits /= t`."
        )
    check_finite(f"Token loss {item.loss.name!r}", together, "finite" if bool(tile.isfinite().all()) else "not finite")
    if not torch.equal(together, again):
        return  # it draws random numbers, so nothing can be told
    if not torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"Token loss {item.loss.name!r} is not one value a token: {len(together)} tokens together give {_shown(together)}, one by one "
            f"{_shown(torch.cat(alone))}. A mean, a sum or a normalisation over the tokens would change with every way to cut "
            "a batch. Return each token's own value; hfcustom divides."
        )
    mark_proven(item)


def is_proven(item: WeightedLoss) -> bool:
    """Whether a loss has been checked with these options."""
    return repr(sorted(item.options.items())) in PROVEN.get(item.loss.function, ())


def mark_proven(item: WeightedLoss) -> None:
    """Remember that a loss has been checked with these options."""
    PROVEN.setdefault(item.loss.function, set()).add(repr(sorted(item.options.items())))


def check_finite(what: str, values: torch.Tensor, logits: str = "finite") -> None:
    """Refuse a loss that is NaN or infinite the first time it is used; later ones are the training step's to find."""
    if not bool(values.isfinite().all()):
        bad = float(values.flatten()[~values.isfinite().flatten()][0])
        cure = "Clamp what can overflow." if logits == "finite" else "The model has diverged, or the batch holds NaN."
        raise NonFiniteError(f"{what} returned {bad} for logits that are {logits}. {cure}")


def _shown(values: torch.Tensor) -> list[float]:
    return [float(f"{float(value):.4g}") for value in values]
