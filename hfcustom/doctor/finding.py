"""What a check is and what it finds: `@check(...)` above a function puts it into CHECKS.

    (patient) -> what was measured, in words; raises Failed where that is not what was expected, Skipped where it does not apply

Calling CHECKS[name](patient) returns a Finding, whatever the model under examination does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hfcustom.doctor.patient import Patient

Status = Literal["ok", "failed", "skipped"]


class Failed(Exception):
    """A measurement that is not what was expected; `cure` where it is another than the check's."""

    def __init__(self, measured: str, cure: str = "") -> None:
        super().__init__(measured)
        self.cure = cure


class Skipped(Exception):
    """A check that does not apply, with the reason."""


@dataclass(frozen=True)
class Finding:
    """What one check found out about one model."""

    check: str
    status: Status
    measured: str  # the reason, where it was skipped
    expected: str
    why: str
    cure: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """A function that measures, and what its result means."""

    measure: Callable[[Patient], str]
    expected: str
    why: str
    cure: str

    @property
    def name(self) -> str:
        """What `--check` calls it."""
        return self.measure.__name__

    def __call__(self, patient: Patient) -> Finding:
        status: Status = "ok"
        cure, start = self.cure, time.perf_counter()
        try:
            measured = self.measure(patient)
        except Skipped as reason:
            status, measured = "skipped", str(reason)
        except Failed as failure:
            status, measured, cure = "failed", str(failure), failure.cure or cure
        except Exception as error:  # a user's class may raise anything; that it does is the finding
            status, measured = "failed", f"{type(error).__name__}: {error}"
        return Finding(self.name, status, measured, self.expected, self.why, cure, time.perf_counter() - start)


CHECKS: dict[str, Check] = {}


def check(*, expected: str, why: str, cure: str) -> Callable[[Callable[[Patient], str]], Callable[[Patient], str]]:
    """Put a function into CHECKS under its name."""

    def add(measure: Callable[[Patient], str]) -> Callable[[Patient], str]:
        CHECKS[measure.__name__] = Check(measure, expected, why, cure)
        return measure

    return add
