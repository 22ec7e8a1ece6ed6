"""What is wrong with a row, in the form of bad_rows.jsonl: one line of JSON a finding.

{"row": "train.jsonl, line 7", "field": "image 0", "code": "missing", "severity": "error", "reason": ...}. An error is what
training refuses; a warning is what it takes, and a person may want to know. `hfcustom preflight` and training write such
lines, and `exclude` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hfcustom.data.images import ImageError, notes_of
from hfcustom.data.messages import Example
from hfcustom.data.turns import RowError
from hfcustom.exits import ConfigError, MissingError
from hfcustom.naming import printable

EXCLUDED = "excluded"  # code of a row that was left out beforehand
SHOWN = 3  # rows in a message


@dataclass(frozen=True)
class Finding:
    """A row that cannot be used, or that a person should look at; the reason begins with the row's name."""

    row: str  # what messages call it: its file and line
    reason: str
    code: str = "form"  # the reason in one word
    severity: Literal["error", "warning"] = "error"
    field: str = ""  # the part of the row: "image 0", "message 2, block 1"; nothing for all of it

    @classmethod
    def of(cls, error: RowError, row: str) -> Finding:
        """Return the finding that an error is about a row."""
        return cls(row, str(error), code_of(error), field=_field(str(error), row))

    def to_json(self, **more: Any) -> str:
        """Return a line of JSON."""
        return json.dumps({**asdict(self), **more})


def code_of(error: RowError) -> str:
    """Return the reason of an error in one word; of an image, the image loader's."""
    cause = error.__cause__
    if isinstance(cause, ImageError):
        return cause.code
    return "missing" if isinstance(cause, FileNotFoundError) else error.code


def _field(reason: str, row: str) -> str:
    """Return what stands between a row's name and the colon: messages begin "train.jsonl, line 7, image 0: "."""
    name = printable(row)
    if not reason.startswith(f"{name}, "):
        return ""
    return reason.removeprefix(f"{name}, ").partition(":")[0]


def image_notes(example: Example) -> list[Finding]:
    """Return a warning for what the loader left out of each image, such as further frames."""
    return [
        Finding(example.name, f"{example.name}, image {at}: {note.text}.", note.code, "warning", f"image {at}")
        for at, image in enumerate(example.images)
        for note in notes_of(image)
    ]


# ---- rows that are left out beforehand ------------------------------------------------------------------------------


def read_excluded(path: str) -> dict[str, str]:
    """Return {row: reason} of the rows that a bad_rows.jsonl names as errors of the training rows.

    Raises FileNotFoundError for a missing file and ValueError for a line of another form.
    """
    if not Path(path).is_file():
        raise MissingError(f"exclude={path}: there is no such file; `hfcustom preflight` writes one.")
    excluded = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, Mapping) or not isinstance(found.get("row"), str):
            raise ConfigError(f'{path}, line {number}: {line[:80]!r} is no {{"row": ..., "reason": ...}}.')
        if found.get("severity", "error") == "error" and found.get("set", "train") == "train":
            excluded[found["row"]] = str(found.get("reason", ""))
    return excluded


def find_excluded(path: str, names: Sequence[str]) -> dict[int, str]:
    """Return {index: reason} of the rows to leave out; ValueError when a listed one is none of these rows, or all are."""
    excluded = read_excluded(path)
    places: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        places.setdefault(name, []).append(at)
    if strange := [row for row in excluded if row not in places]:
        raise ConfigError(
            f"exclude={path}: {len(strange)} of its {len(excluded)} rows are none of the data ({', '.join(strange[:SHOWN])}), "
            f"whose first row is {names[0]}; was the list made of another file?"
        )
    if twice := [row for row in excluded if len(places[row]) > 1]:
        raise ConfigError(
            f"exclude={path} names {twice[0]}, which {len(places[twice[0]])} rows of the data are called; give their files "
            "different names."
        )
    if len(excluded) == len(names):
        raise ConfigError(f"exclude={path} names all {len(names)} rows, so there is nothing to train on.")
    return {places[row][0]: reason for row, reason in excluded.items()}
