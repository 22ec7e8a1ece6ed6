"""What a rule is and what it finds: `@rule(...)` above a generator puts it into RULES."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from hfcustom.origins import Place

if TYPE_CHECKING:
    from hfcustom.serving.target import Served

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One line of a user's that a server does not run, or that stops it; `place` is None where it is nobody's line."""

    rule: str
    level: Level
    place: Place | None
    what: str
    why: str
    cure: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "place": None if self.place is None else str(self.place)}

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place is not None else ""
        return (
            f"{self.level:<9}{self.rule:<20}{where}{self.what}\n         why: {self.why}\n         cure: {self.cure}"
        )


Found = tuple[Place | None, str] | tuple[Place | None, str, Level]


@dataclass(frozen=True)
class Rule:
    """A generator of places, and what breaking it means."""

    look: Callable[[Served], Iterator[Found]]
    asks: str
    why: str
    cure: str

    @property
    def name(self) -> str:
        """What findings call it."""
        return self.look.__name__.replace("_", "-")

    def __call__(self, served: Served) -> list[Finding]:
        found = []
        for place, what, *level in self.look(served):
            stands: Level = level[0] if level else "error"
            found.append(Finding(self.name, stands, place, what, self.why, self.cure))
        return found


RULES: dict[str, Rule] = {}


def rule(*, asks: str, why: str, cure: str) -> Callable[[Callable[[Served], Iterator[Found]]], Any]:
    """Put a generator into RULES under its name, dashes for underscores."""

    def add(look: Callable[[Served], Iterator[Found]]) -> Callable[[Served], Iterator[Found]]:
        made = Rule(look, asks, why, cure)
        RULES[made.name] = made
        return look

    return add
