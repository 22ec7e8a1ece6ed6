"""Trackers of a run: TensorBoard, W&B, trackio. A resumed run goes on in the one that the tracker has, with each step once.

What a tracker knows the run by is in output_dir/trackers.json. Lines that were sent after the checkpoint and before the end of the
attempt before are made anew by a resumed run, equal but for speeds:
    tensorboard   purge_step hides the old ones, the new ones are written
    wandb         takes no step twice, so that the old ones stay and are not sent again
    trackio       would show both, so that the old ones stay and are not sent again
Other trackers of Accelerate begin a run of their own at each start. A run that goes back after a spike of the loss (spikes.py)
sends its steps again: TensorBoard and trackio show both, W&B keeps the old ones.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hfcustom.files import write_text
from hfcustom.runs.files import read_lines, read_object, step_of
from hfcustom.train_config import TrainConfig

PROJECT = "hfcustom"
FILE = "trackers.json"
GOES_ON = ("trackio", "wandb")  # with what they have; TensorBoard forgets and is told again

Line = tuple[int, frozenset[str]]  # a step and the names of its numbers


class Trackers:
    """The trackers of a run that begins, or goes on, at step `start`; every rank has one, the main process's are used."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, start: int) -> None:
        self.config = config
        self.accelerator = accelerator
        self.start = start
        self.names: dict[str, dict[str, str]] = {}
        self.sent: dict[str, set[Line]] = {}  # what a tracker has had from the attempt before

    def begin(self) -> None:
        """Start the trackers; call it before metrics.jsonl is cut to what the checkpoint knows."""
        if not self.config.trackers:
            return
        folder = Path(self.config.output_dir)
        earlier = read_object(folder / FILE) if self.config.resume else {}
        chosen = [str(tracker) for tracker in self.accelerator.log_with]  # "all" spelled out
        if self.accelerator.is_main_process:
            lines = {_line(entry) for entry in read_lines(folder / "metrics.jsonl")} if self.config.resume else set()
            self.names = {name: earlier.get(name) or _new_name(name, folder) for name in chosen}
            self.sent = {name: lines for name in GOES_ON if name in earlier}
            write_text(folder / FILE, json.dumps(self.names, indent=1) + "\n")
        self.accelerator.init_trackers(PROJECT, init_kwargs=self._options(chosen))
        for tracker in self.accelerator.trackers:
            if (
                tracker.name != "tensorboard" or tracker.name not in earlier
            ):  # it would list the options as another run
                tracker.store_init_configuration(_trackable(self.config))

    def _options(self, chosen: Sequence[str]) -> dict[str, dict[str, Any]]:
        known: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": self.start + 1 if self.start else 0}}
        known |= {name: {**self.names[name], "resume": "allow"} for name in GOES_ON if name in self.names}
        return {name: options for name, options in known.items() if name in chosen}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send named numbers of a step to those trackers that do not have them."""
        if not self.config.trackers:
            return
        for tracker in self.accelerator.trackers:
            if (step, frozenset(values)) not in self.sent.get(tracker.name, ()):
                tracker.log(dict(values), step=step)

    def end(self) -> None:
        """Let the trackers finish what they send; end_training() would part the processes too, before the model is published."""
        if self.config.trackers:
            for tracker in self.accelerator.trackers:
                tracker.finish()


def _new_name(tracker: str, folder: Path) -> dict[str, str]:
    """Return what a tracker is to know a new run by, as its init() calls it."""
    name, number = folder.resolve().name, secrets.token_hex(4)
    if tracker == "wandb":
        return {"id": os.environ.get("WANDB_RUN_ID", number), "name": os.environ.get("WANDB_NAME", name)}
    return {"name": f"{name}-{number}"}


def _line(entry: Mapping[str, Any]) -> Line:
    return step_of(entry), frozenset(entry) - {"step"}


def _trackable(config: TrainConfig) -> dict[str, Any]:
    values = {key: value for key, value in vars(config).items() if key != "sources"}
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
