"""Reading a loss config: `"focal"` or {"cross_entropy": 1.0, "z_loss": {"weight": 1e-4, "warmup_steps": 200}}.

A weight may be scheduled: it grows linearly from 0 over `warmup_steps`, and then goes linearly to `final_weight` over
`decay_steps`. Every other entry is an option of the loss's function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hfcustom.exits import ConfigError
from hfcustom.losses.contract import LOSSES, SCHEDULE, Loss, token_loss
from hfcustom.naming import load_object, unknown


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with the weight, its schedule, and the options that a config gave it."""

    loss: Loss
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    decay_steps: int = 0
    final_weight: float = 0.0

    @property
    def is_scheduled(self) -> bool:
        """Whether the weight depends on the step."""
        return bool(self.warmup_steps or self.decay_steps)

    @property
    def is_weighted(self) -> bool:
        """Whether what it adds to the total differs from its own value."""
        return self.weight != 1 or self.is_scheduled

    def weight_at(self, step: int | None) -> float:
        """Return the weight at an optimiser step, counted from 0; None is a step after every schedule."""
        if step is None:
            return self.final_weight if self.decay_steps else self.weight
        if step < self.warmup_steps:
            return self.weight * (step + 1) / self.warmup_steps
        if not self.decay_steps:
            return self.weight
        done = min((step - self.warmup_steps) / self.decay_steps, 1.0)
        return self.weight + (self.final_weight - self.weight) * done


def parse_losses(spec: str | Mapping[str, Any]) -> list[WeightedLoss]:
    """Read a config's `loss`, a name or a mapping of names to weights or options.

    Raises ValueError naming an unknown loss or option and the nearest known one.
    """
    entries = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    if "stock" in entries:
        raise ConfigError("The parent's own loss stands alone: loss='stock', without a weight and without others.")
    if not entries:
        raise ConfigError("The loss is empty; name at least one, for instance {'cross_entropy': 1.0}.")
    return [_parse_entry(name, value) for name, value in entries.items()]


def _parse_entry(name: str, value: Any) -> WeightedLoss:
    loss = find_loss(name)
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    schedule = {key: options.pop(key) for key in SCHEDULE if key in options}
    _check_schedule(name, schedule)
    known = loss.options()
    for option in options:
        if option not in known and not loss.takes_any_option:
            raise ConfigError(unknown(f"option of loss {name!r}:", option, [*SCHEDULE, *known]))
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ConfigError(
                f"Loss {name!r} needs its option {option!r}: {{{name!r}: {{'weight': 1.0, {option!r}: ...}}}}."
            )
    return WeightedLoss(loss, float(schedule.pop("weight", 1.0)), options, **schedule)


def _check_schedule(name: str, schedule: Mapping[str, Any]) -> None:
    for key, value in schedule.items():
        whole = key.endswith("_steps")
        right = isinstance(value, int) if whole else isinstance(value, int | float) and math.isfinite(value)
        if not right or isinstance(value, bool) or (whole and value < 0):
            allowed = "a whole number of steps" if whole else "a finite number"
            raise ConfigError(f"The {key.replace('_', ' ')} of loss {name!r} is {value!r}; it must be {allowed}.")
    if "final_weight" in schedule and not schedule.get("decay_steps"):
        raise ConfigError(f"The final weight of loss {name!r} has no effect without decay_steps, which lead to it.")


def known(spec: str | Mapping[str, Any] | None) -> list[Loss]:
    """Return those losses of a config that are registered; a model computes without the file of a loss it was trained on."""
    names = [spec] if isinstance(spec, str) else list(spec or ())
    return [LOSSES[name] for name in names if name in LOSSES]


def find_loss(name: str) -> Loss:
    """Return a registered loss; ValueError suggests the nearest. No file is imported: configs come with checkpoints."""
    if name in LOSSES:
        return LOSSES[name]
    cure = "Decorate your own with @hfcustom.token_loss or @hfcustom.term, and import its file first."
    raise ConfigError(unknown("loss", name, LOSSES, cure))


def loss_columns(losses: Iterable[WeightedLoss], given: Iterable[str]) -> list[str]:
    """Return the columns that the collator has to make for some losses out of rows that have the columns `given`."""
    given = list(given)
    has = set(given).union(name.partition("_")[2] for name in given if name.startswith(("chosen_", "rejected_")))
    wanted: dict[str, None] = {}
    for item in losses:
        wanted |= dict.fromkeys(item.loss.columns)
        wanted |= dict.fromkeys(name for name in item.loss.optional_columns if name in has)
    return [name for name in wanted if name != "preference"]  # the collator makes that one of every pair


def token_columns(losses: Iterable[WeightedLoss], given: Iterable[str]) -> list[str]:
    """Return those columns of the rows that are inputs of token losses, with an entry for each label token."""
    inputs = {name for item in losses for name in item.loss.inputs if name not in item.loss.columns}
    return [name for name in given if name in inputs]


def import_losses(spec: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Import the files of `file.py:function` names and return the spec with the functions' registered names.

    This runs the files: it is for a command line, never for a config out of a checkpoint. An undecorated function is
    registered as a token loss.
    """
    if isinstance(spec, str):
        return _import_loss(spec)
    return {_import_loss(name): value for name, value in spec.items()}


def _import_loss(name: str) -> str:
    if ".py:" not in name:
        return name
    function = load_object(name, kind="loss")
    registered = LOSSES.get(function.__name__)
    if registered is None or registered.function is not function:
        token_loss(function)
    return function.__name__
