"""The rows of one optimiser step -> this rank's micro-batches of it, and the rows that were left out.

[Example, ...] -> StepBatches. A row that cannot be used is an error that names it, or, where the run is told to skip such
rows, is left out: every other row stays in its step, and the step is a row smaller. Nothing else is to be known about it,
since each loss is divided by what the whole step counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from hfcustom.data.checks import check_kind, kind_of
from hfcustom.data.collate import Batch
from hfcustom.data.findings import EXCLUDED, Finding, find_excluded, image_notes
from hfcustom.data.messages import Example, RowError
from hfcustom.data.packing import Cut, Packer
from hfcustom.data.sources import Examples

SHOWN = 3  # bad rows in an error message
STREAM_ROWS = 1000  # of a stream, too few to tell a share from
logger = logging.get_logger("hfcustom")


class TooManyBadRows(RowError):
    """More rows than `max_bad_share` allows cannot be used."""


@dataclass
class StepBatches:
    """What one rank trains on in one optimiser step."""

    batches: list[Batch]
    skipped: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)  # about rows that are used: frames that were dropped
    # of a stream: which loading process, where it stands after this, and how often the stream has ended for it
    position: tuple[int, dict[str, Any]] | None = None
    epoch: int = 0
    cut: Cut | None = None  # of packed rows


class Attempts(Sequence[Any]):
    """Rows of which a bad one is returned as a Finding instead of raised, so that a loading process goes on.

    Rows that `exclude` lists are not read; without `skip_bad_rows` every other bad one is raised.
    """

    def __init__(self, rows: Examples, *, skip_bad_rows: bool = True, exclude: str | None = None) -> None:
        self.rows = rows
        self.skip_bad_rows = skip_bad_rows
        names = [] if exclude is None else [rows.name_of(at) for at in range(len(rows))]
        self.excluded: Mapping[int, str] = {} if exclude is None else find_excluded(exclude, names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if index in self.excluded:
            return Finding(self.rows.name_of(index), self.excluded[index], EXCLUDED)
        try:
            return self.rows[index]
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            return Finding.of(error, self.rows.name_of(index))

    def first(self) -> Example:
        """Return the first row that can be used; RowError when there is none."""
        found: Example | None = next((row for row in self if isinstance(row, Example)), None)
        if found is None:
            raise TooManyBadRows(f"None of the {len(self)} rows can be read; the first says: {self[0].reason}")
        return found


class StepCollator:
    """Cut a rank's rows of a step into micro-batches and collate each; `skip_bad_rows` leaves out those it cannot.

    A `packer` cuts them by tokens instead of `micro_batch_size` rows. Rows of another `kind` than the run's first one (pairs
    among ordinary rows) are among those that cannot be collated.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], Batch],
        micro_batch_size: int,
        *,
        skip_bad_rows: bool = False,
        packer: Packer | None = None,
        kind: str | None = None,
    ) -> None:
        self.collate = collate
        self.micro_batch_size = micro_batch_size
        self.skip_bad_rows = skip_bad_rows
        self.packer = packer
        self.kind = kind

    def __call__(self, rows: Sequence[Any]) -> StepBatches:
        skipped = [row for row in rows if isinstance(row, Finding) and row.code != EXCLUDED]
        batches, cut = (self._cut(rows, skipped), None) if self.packer is None else self._pack(rows, skipped)
        bad = {finding.row for finding in skipped}
        used = [row for row in rows if isinstance(row, Example) and row.name not in bad]
        return StepBatches(batches, skipped, [note for row in used for note in image_notes(row)], cut=cut)

    def _pack(self, rows: Sequence[Any], skipped: list[Finding]) -> tuple[list[Batch], Cut]:
        assert self.packer is not None
        found = [(at, self._batch([row], skipped)) for at, row in enumerate(rows) if not isinstance(row, Finding)]
        singles = {at: single for at, single in found if single is not None}
        batches, cut = self.packer(self.collate, [rows[at] for at in singles], list(singles.values()))
        places = list(singles)
        for batch in batches:
            batch.places = [places[at] for at in batch.places]
        return batches, cut

    def _cut(self, rows: Sequence[Any], skipped: list[Finding]) -> list[Batch]:
        batches = []
        for first in range(0, len(rows), self.micro_batch_size):
            part = range(first, min(first + self.micro_batch_size, len(rows)))
            places = [at for at in part if not isinstance(rows[at], Finding)]
            if places and (batch := self._batch([rows[at] for at in places], skipped)) is not None:
                bad = {finding.row for finding in skipped}
                batch.places = [at for at in places if rows[at].name not in bad] if bad else places
                batches.append(batch)
        return batches

    def together(self, rows: Sequence[Example]) -> Batch:
        """Collate rows that can be used as one micro-batch."""
        if self.packer is None:
            return self.collate(rows)
        return self.packer.join(self.collate, rows, [self.collate([row]) for row in rows])

    def _batch(self, rows: list[Any], skipped: list[Finding]) -> Batch | None:
        """Collate rows; those that cannot be are found one by one and join `skipped`. None when no row is left."""
        try:
            self._check_kinds(rows)
            return self.collate(rows)
        except RowError:
            if not self.skip_bad_rows:
                raise
        usable = [row for row in rows if self._collates(row, skipped)]
        return self.collate(usable) if usable else None

    def _collates(self, row: Any, skipped: list[Finding]) -> bool:
        try:
            self._check_kinds([row])
            self.collate([row])
        except RowError as error:
            skipped.append(Finding.of(error, row.name))
            return False
        return True

    def _check_kinds(self, rows: Sequence[Example]) -> None:
        for row in rows if self.kind is not None else ():
            check_kind(row.name, kind_of(row), self.kind)


class BadRows:
    """The rows of a run that were left out, known to every rank; each is named once, and too many of them stop the run.

    `path` gets a line of JSON a row (hfcustom/data/findings.py). A resumed run knows the rows that stand there. Of a stream,
    which has no number of rows, the share is of those that were read, of at least STREAM_ROWS.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_rows: int | None,
        max_share: float,
        path: Path,
        *,
        rows_per_step: int = 0,
        resumed_at: int = 0,
    ) -> None:
        self.accelerator = accelerator
        self.num_rows = num_rows
        self.rows_per_step = rows_per_step
        self.steps = resumed_at
        self.max_share = max_share
        self.path = path
        self.reasons: dict[str, str] = {}  # by row
        self._told: set[tuple[str, str]] = set()
        lines: list[str] = []
        whole: list[str] = []
        if resumed_at and path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed run may have written half of one
            self.reasons = {row["row"]: row["reason"] for row in map(json.loads, whole)}
        accelerator.wait_for_everyone()  # before anyone deletes or adds
        if not accelerator.is_main_process:
            return
        if not resumed_at:
            path.unlink(missing_ok=True)
        elif len(whole) < len(lines):
            path.write_text("".join(whole))

    def tell(self, notes: Sequence[Finding]) -> None:
        """Say once what was left out of a row that is used."""
        for note in notes:
            if (note.row, note.field) not in self._told:
                self._told.add((note.row, note.field))
                logger.warning(note.reason)

    def take(self, skipped: Sequence[Finding]) -> None:
        """Add the rows that the ranks have left out of a step; every rank has to call it. TooManyBadRows ends the run."""
        self.steps += 1
        self.add(skipped)

    def add(self, skipped: Sequence[Finding]) -> None:
        """Do so for a step that was counted already."""
        everyone = gather_object(list(skipped)) if self.accelerator.num_processes > 1 else skipped
        new = {row.row: row for row in everyone if row.row not in self.reasons}
        if not new:
            return
        self.reasons |= {name: row.reason for name, row in new.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.writelines(row.to_json() + "\n" for row in new.values())
            for row in new.values():
                self.accelerator.print(f"left out: {row.reason}")
        read = self.steps * self.rows_per_step
        num_rows = max(read, STREAM_ROWS) if self.num_rows is None else self.num_rows
        if len(self.reasons) > self.max_share * num_rows or len(self.reasons) >= min(num_rows, self.num_rows or read):
            first = "\n  ".join(list(self.reasons.values())[:SHOWN])
            raise TooManyBadRows(
                f"{len(self.reasons)} of {num_rows} rows cannot be used, more than max_bad_share={self.max_share} "
                f"allows. They are listed in {self.path}; the first are\n  {first}"
            )


def agree_on_batches(batches: Sequence[Batch], accelerator: Accelerator) -> list[Batch]:
    """Return as many micro-batches on every rank as on the one that has most, or on none where none has any.

    A rank that has fewer, because rows were left out or its rows pack better, runs one of its own (else another rank's)
    once more, as a blank that counts for nothing: ranks wait for each other in every forward and backward.
    """
    batches = list(batches)
    if accelerator.num_processes == 1:
        return batches
    counts = gather_object([len(batches)])
    if not all(counts) and any(counts):
        spare = gather_object([smallest(batches)] if accelerator.process_index == counts.index(max(counts)) else [])
        batches = batches or [spare[0].blank_copy()]
    return batches + [smallest(batches).blank_copy() for _ in range(max(counts) - len(batches))] if batches else []


def smallest(batches: Sequence[Batch]) -> Batch:
    """Return the micro-batch that holds least."""
    return min(batches, key=lambda batch: sum(value.numel() for value in batch.values()))
