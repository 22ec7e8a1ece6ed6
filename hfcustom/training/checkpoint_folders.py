"""The checkpoints of a run by their folders: which are whole, which is to be gone on from, which are damaged and set aside."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hfcustom.commit import damage

DAMAGED = "damaged-"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to the end, oldest first."""
    return [path for path in _step_folders(folder) if (path / "manifest.json").is_file()]


def last_good(folder: Path) -> str:
    """Say from where a run that has failed can go on."""
    newest = next(reversed(complete_checkpoints(folder)), None)
    if newest is None:
        return f"There is no checkpoint yet in {folder}; see --save-steps."
    return f"The last good checkpoint is {newest}; continue with --resume."


def set_damaged_aside(folder: Path) -> dict[Path, str]:
    """Rename checkpoints until the newest is one of which every file is as it was written; return why, by what they were called.

    Left where they are, they would count among the newest to keep, and a good one would be deleted for them.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_step_folders(folder)):
        if (reason := damage(path)) is None:
            break
        aside = path.with_name(DAMAGED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        damaged[path] = reason
    return damaged


def _step_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_number)


def step_number(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def to_go_back_to(folder: Path, before: int, now: int) -> Path | None:
    """Return the newest valid checkpoint of before a step, else the oldest of before `now`; None without any."""
    valid = [path for path in complete_checkpoints(folder) if damage(path) is None and step_number(path) < now]
    earlier = [path for path in valid if step_number(path) < before]
    return earlier[-1] if earlier else next(iter(valid), None)
