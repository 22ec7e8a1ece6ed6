"""What a run leaves for people beside its checkpoints, all of it JSON and pictures, and the page made of it.

output_dir/
    metrics.jsonl   one line a log line, one an evaluation (hfcustom/console.py)
    run.json        model, parts, options, steps, seconds
    samples.jsonl   one line an evaluation: what the model answered to the first held-out rows
    samples/        their pictures, small, named by their content
    faults.jsonl    resumes, interruptions, errors, damaged checkpoints, what memory ran out for, and whatever else is told to note_fault()
    report.html     made of all these and of bad_rows.jsonl (hfcustom/runs/page.py)
A resumed run drops what was written after its checkpoint, so that its page is that of a run that was never interrupted, but for
its faults and its speed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers.utils import logging

from hfcustom.files import write_text, written_whole
from hfcustom.parts import class_of_model, part_table, unwrap
from hfcustom.record import SECRET
from hfcustom.train_config import TrainConfig

if TYPE_CHECKING:
    from hfcustom.evaluate import Answer

logger = logging.get_logger("hfcustom")

FAULTS = "faults.jsonl"
THUMBNAIL = 128  # pixels of the longer side of a sample's picture
LONGEST = 2000  # letters of a text that is kept
HOW = ("resume", "overwrite", "sources")  # options that say how a run was started, not what it is


class RunFiles:
    """The files of a run in its output_dir, written by its main process; a disk that refuses them does not end the run."""

    def __init__(self, config: TrainConfig, start: int, max_steps: int) -> None:
        self.folder = Path(config.output_dir)
        self.config = config
        self.start = start
        self.max_steps = max_steps
        self.began = time.monotonic()

    def begin(self, model: Any, losses: Sequence[str]) -> None:
        """Write run.json; drop what an earlier run left in the folder, or what the resumed one did after its checkpoint."""
        path, faults = self.folder / "run.json", self.folder / FAULTS
        earlier = read_object(path) if self.config.resume else {}
        if not self.config.resume:
            faults.unlink(missing_ok=True)
        elif earlier and self.start < self.max_steps:
            self._tell_damaged()
            self.fault("resumed", step=self.start, reached=_last_step(self.folder / "metrics.jsonl"))
        self.drop_samples(self.start)
        self.facts = {
            "model": class_of_model(unwrap(model)).__name__,
            "losses": list(losses),
            "steps": self.max_steps,
            "options": options_of(self.config),
            "changed": changed_options(self.config),
            "parts": [dataclasses.asdict(row) for row in part_table(model)],
        }
        self.spent = float(earlier.get("seconds") or 0.0)
        self._write_facts()

    def drop_samples(self, step: int) -> None:
        """Drop what the model said after a step to which the run goes back."""
        path = self.folder / "samples.jsonl"
        _write_lines(path, [entry for entry in read_lines(path) if step_of(entry) <= step])

    def fault(self, kind: str, **facts: Any) -> None:
        """Note something that went wrong, or was put right."""
        _add_fault(self.folder, kind, facts)

    def _tell_damaged(self) -> None:
        """Note checkpoints that were set aside since."""
        known = {entry.get("checkpoint") for entry in read_lines(self.folder / FAULTS)}
        for path in sorted(self.folder.glob("checkpoints/damaged-*")):
            if path.name not in known:
                self.fault("damaged", step=self.start, checkpoint=path.name)

    def end(self, step: int, error: BaseException | None) -> None:
        """Note how a run ended, unless it has reached its last step, and write the page."""
        if error is not None:
            message = SECRET.sub("hf_...", f"{type(error).__name__}: {error}")
            self.fault("stopped", step=step, error=message[:LONGEST])
        elif step < self.max_steps:
            self.fault("interrupted", step=step)
        self.write_page()

    def write_page(self) -> None:
        """Write the page as things stand."""
        self._write_facts()
        refresh_page(self.folder)

    def _write_facts(self) -> None:
        seconds = round(self.spent + time.monotonic() - self.began, 3)
        _write(self.folder / "run.json", json.dumps({**self.facts, "seconds": seconds}, indent=1) + "\n")


class MetricsFile:
    """metrics.jsonl; lines that a full disk refuses are written with a later one, and stand in checkpoints too."""

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
        self.path = folder / "metrics.jsonl"
        self.rewrite(history)

    def rewrite(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Have the file hold these lines and no others."""
        self.behind = True
        self.add_last(history)

    def add_last(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Add the newest of all lines, and those that could not be written before."""
        behind, self.behind = self.behind, True
        try:
            if behind:
                write_text(self.path, _as_lines(history))
            else:
                with self.path.open("a") as file:
                    file.write(_as_lines(history[-1:]))
            self.behind = False
        except OSError as error:
            logger.warning_once(
                f"{self.path}: {error.strerror}; the run goes on, and what is missing there is written with a later line."
            )


def refresh_page(folder: Path) -> None:
    """Make the page of a run again; a warning says so where it cannot be written."""
    from hfcustom.runs.page import write_run_page

    try:
        write_run_page(folder)
    except OSError as error:
        logger.warning_once(f"{folder / 'report.html'} could not be written ({error}); the run goes on without.")


def note_fault(output_dir: str | Path, kind: str, *, step: int, **facts: Any) -> None:
    """Note something that went wrong in a run, or was put right, for its page; every rank may call this, the first one writes.

    A `kind` that has a sentence of its own in hfcustom/runs/page.py is told by it, any other by `text` and the rest of `facts`,
    which have to be what JSON holds.
    """
    from hfcustom.train import process_state

    if process_state().is_main_process:
        _add_fault(Path(output_dir), kind, {"step": step, **facts})


def _add_fault(folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    told = {"kind": kind, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
    _write_lines(folder / FAULTS, [*read_lines(folder / FAULTS), told])


# ---- options --------------------------------------------------------------------------------------------------------


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return every option of a run as JSON holds it, tokens of the hub left out."""
    named = [field.name for field in dataclasses.fields(config) if field.name not in HOW]
    values = json.dumps({name: getattr(config, name) for name in named}, default=str)
    return dict(json.loads(SECRET.sub("hf_...", values)))


def changed_options(config: TrainConfig) -> list[str]:
    """Return the names of options that have not the default of the config's class, output_dir aside."""
    plain = options_of(type(config)())
    return [name for name, value in options_of(config).items() if name != "output_dir" and value != plain[name]]


# ---- samples --------------------------------------------------------------------------------------------------------


def keep_samples(output_dir: str | Path, step: int, answers: Sequence[Answer], count: int = 6) -> None:
    """Keep what the model answered to the first rows at a step, for the page of the run; every rank may call this.

    Call it in the `evaluate(model, step)` that fit() is given, with what generate_answers() has returned.
    """
    from hfcustom.train import process_state

    if not process_state().is_main_process:
        return
    folder = Path(output_dir)
    rows = [
        {
            "name": answer.example.name,
            "question": answer.question[:LONGEST],
            "truth": answer.truth[:LONGEST],
            "answer": answer.answer[:LONGEST],
            "images": [_keep_picture(folder, image) for image in answer.example.images[:2]],
        }
        for answer in answers[:count]
    ]
    path = folder / "samples.jsonl"
    others = [entry for entry in read_lines(path) if step_of(entry) != step]
    _write_lines(path, sorted([*others, {"step": step, "rows": rows}], key=step_of))
    refresh_page(folder)


def _keep_picture(folder: Path, image: Image.Image) -> str:
    """Write a small copy of a picture, once, and return its name."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    name = hashlib.sha256(buffer.getvalue()).hexdigest()[:16] + ".png"
    path = folder / "samples" / name
    if not path.exists():
        try:
            with written_whole(path) as partial:
                partial.write_bytes(buffer.getvalue())
        except OSError as error:
            logger.warning_once(f"{path} could not be written ({error}); the run goes on without.")
    return name


# ---- reading and writing --------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, an empty one where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the mappings in a JSONL file that can be read: the last line of a killed run may be half a one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def step_of(entry: Mapping[str, Any]) -> int:
    """Return the step of a line, 0 where it has none."""
    step = entry.get("step")
    return step if isinstance(step, int) else 0


def _last_step(path: Path) -> int:
    return max((step_of(entry) for entry in read_lines(path)), default=0)


def _write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    text = _as_lines(entries)
    if text or path.exists():
        _write(path, text)


def _as_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        logger.warning_once(f"{path} could not be written ({error}); the run goes on without.")
