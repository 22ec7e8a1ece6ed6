"""Rows -> what preflight notes of each, in processes of their own, kept in a file that an interrupted scan goes on from.

An SQLite file holds a line a row, image and finding, written a chunk of rows at a time: memory stays that of a chunk, what
is done survives Ctrl-C (all but the last second a crash), and duplicates are found by its indices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import signal
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from hfcustom.data.checks import check_row, count_characters, find_warnings, kind_of
from hfcustom.data.findings import Finding
from hfcustom.data.messages import Example
from hfcustom.data.sources import Examples, load_rows
from hfcustom.data.turns import RowError, without_weights
from hfcustom.data.video_frames import VIDEO_DEFAULTS
from hfcustom.options import json_if_it_looks_so

CHUNK = 32  # rows that are handed to a process, and written, at once
COMMIT_S = 1.0  # waiting for the disk after each chunk would take longer than reading rows of text
TRAIN, EVAL = "train", "eval"
Place = tuple[str, int]  # which set, which row


@dataclass(frozen=True)
class ScanOptions:
    """What is scanned, and as which run would read it; without a model or a family only what needs none."""

    data: str
    split: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    model: str | None = None
    family: str | None = None
    max_length: int | None = None
    min_pixels: int = 16
    train_on: str = "assistant"
    allowed_tokens: tuple[str, ...] = ()
    captions: bool = False  # rows of an image and its text, for a contrastive encoder
    max_frames: int = VIDEO_DEFAULTS.max_frames
    frame_method: str = VIDEO_DEFAULTS.method
    video_as_images: bool = False
    image_root: str | None = None
    image_hosts: tuple[str, ...] = ()
    image_downloads: str | None = None

    def load_sets(self) -> dict[str, Examples]:
        """Return the rows to train on and, where there are some, those held out; errors as `load_rows`."""
        videos: dict[str, Any] = {
            "max_frames": self.max_frames,
            "frame_method": self.frame_method,
            "video_as_images": self.video_as_images,
            "image_root": self.image_root,
            "image_hosts": self.image_hosts,
            "image_downloads": self.image_downloads,
        }
        sets = {TRAIN: load_rows(json_if_it_looks_so(self.data), self.split, **videos)}
        if self.eval_data is not None:
            sets[EVAL] = load_rows(json_if_it_looks_so(self.eval_data), self.eval_split, **videos)
        return sets


@dataclass
class RowFacts:
    """What one row is, and what is wrong with it; numbers of tokens are of the processor, None without one."""

    place: Place
    name: str
    kind: str | None = None  # None for a row that cannot be read
    digest: str = ""  # of texts and pixels
    characters: int = 0
    images: list[tuple[str, int, int]] = field(default_factory=list)  # digest of the pixels, width, height
    tokens: int | None = None
    labels: int | None = None
    tiles: int | None = None
    findings: list[Finding] = field(default_factory=list)


# ---- one row --------------------------------------------------------------------------------------------------------


class RowReader:
    """Read rows of the sets as training does, each image once, and note what they are; `collate` is None without a model."""

    def __init__(self, options: ScanOptions) -> None:
        self.sets = options.load_sets()
        self.collate = None
        self.check: Callable[[Example], object] = partial(
            check_row, train_on=options.train_on, min_pixels=options.min_pixels
        )
        if options.captions:
            from hfcustom.data.captions import check_caption

            self.check = partial(check_caption, min_pixels=options.min_pixels)
        if options.model or options.family:
            from hfcustom.data import token_checks

            make = token_checks.CaptionReader if options.captions else token_checks.TokenReader
            self.collate = make(options)

    def __call__(self, place: Place) -> RowFacts:
        rows, at = self.sets[place[0]], place[1]
        facts = RowFacts(place, rows.name_of(at))
        try:
            self._read(rows, at, facts)
        except RowError as error:
            facts.findings.append(Finding.of(error, facts.name))
        except Exception as error:  # a row that crashes a reader is what a scan is to find; it is an error of that row
            reason = f"{facts.name}: reading it raises {type(error).__name__}: {error}"
            facts.findings.append(Finding(facts.name, reason[:2000], "crash"))
        return facts

    def _read(self, rows: Examples, at: int, facts: RowFacts) -> None:
        example: Example = rows[at]
        facts.kind, facts.characters = kind_of(example), count_characters(example)
        facts.images = [(_digest(image.tobytes(), image.size), *image.size) for image in example.images]
        videos = [[_digest(frame.tobytes(), frame.size) for frame in video] for video in example.videos]
        facts.digest = _digest(_content(example), [facts.images, videos])
        facts.findings += find_warnings(example)
        self.check(example)
        if self.collate is not None:
            self.collate(example, facts)


def _content(example: Example) -> bytes:
    sides = [without_weights(side) for side in (example.messages, example.rejected or [])]
    return json.dumps([sides, example.preferred], sort_keys=True).encode()


def _digest(data: bytes, more: object) -> str:
    return hashlib.sha256(data + repr(more).encode()).hexdigest()[:32]


# ---- many rows, in processes ----------------------------------------------------------------------------------------

_task: Callable[[Any], Any]  # of a scanning process


def _start_process(make_task: Callable[[], Callable[[Any], Any]]) -> None:
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the first one says when to stop
    logging.getLogger("hfcustom").setLevel(logging.ERROR)  # what readers warn of are findings here
    try:
        _task = make_task()
    except (
        Exception
    ) as error:  # raised to the caller with the first chunk; here it would say no more than "broken pool"
        _task = partial(_raise, error)


def _raise(error: Exception, item: Any) -> Any:
    raise error


def _run_chunk(chunk: Sequence[Any]) -> list[Any]:
    return [_task(item) for item in chunk]


def run_chunks(
    make_task: Callable[[], Callable[[Any], Any]],
    chunks: Iterable[Sequence[Any]],
    workers: int,
    killed: Callable[[Any], Any],
) -> Iterator[list[Any]]:
    """Yield what the task makes of each chunk; 0 workers run it here, others in fresh processes, each with its own task.

    The process of an item may be killed (by the system, for its memory): then the chunks under way are tried again item by
    item, and `killed(item)` stands for one that kills its process again.
    """
    if workers == 0:
        task = make_task()
        yield from ([task(item) for item in chunk] for chunk in chunks)
        return
    pending = iter(chunks)
    broken = True
    while broken:
        given: deque[Sequence[Any]] = deque()
        pool = _pool(workers, make_task)
        try:
            for results in _run_in(pool, pending, given, 2 * workers):
                yield results
                given.popleft()
            broken = False
        except BrokenProcessPool:
            for chunk in given:
                yield _one_by_one(make_task, chunk, killed)
        finally:
            pool.shutdown(cancel_futures=True)


def _run_in(
    pool: ProcessPoolExecutor, chunks: Iterator[Sequence[Any]], given: deque[Sequence[Any]], ahead: int
) -> Iterator[list[Any]]:
    """Yield the results of chunks in order, with `ahead` of them under way; `given` are those not yet yielded."""
    futures: deque[Future[list[Any]]] = deque()
    for chunk in chunks:
        given.append(chunk)
        futures.append(pool.submit(_run_chunk, chunk))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _pool(workers: int, make_task: Callable[[], Callable[[Any], Any]]) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads (tokenizers, torch) may hang
    return ProcessPoolExecutor(workers, spawn, _start_process, (make_task,))


def _one_by_one(
    make_task: Callable[[], Callable[[Any], Any]], chunk: Sequence[Any], killed: Callable[[Any], Any]
) -> list[Any]:
    results = []
    pool = _pool(1, make_task)
    for item in chunk:
        try:
            results += pool.submit(_run_chunk, [item]).result()
        except BrokenProcessPool:
            results.append(killed(item))
            pool.shutdown()
            pool = _pool(1, make_task)
    pool.shutdown()
    return results


# ---- what is known so far -------------------------------------------------------------------------------------------

TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS rows (part TEXT, at INTEGER, name TEXT, kind TEXT, digest TEXT, characters INTEGER, images INTEGER,
    tokens INTEGER, labels INTEGER, tiles INTEGER, PRIMARY KEY (part, at));
CREATE TABLE IF NOT EXISTS images (digest TEXT, part TEXT, at INTEGER, number INTEGER, width INTEGER, height INTEGER);
CREATE TABLE IF NOT EXISTS findings (part TEXT, at INTEGER, row TEXT, reason TEXT, code TEXT, severity TEXT, field TEXT);
CREATE INDEX IF NOT EXISTS by_image ON images (digest, part, at, number);
CREATE INDEX IF NOT EXISTS by_row ON rows (digest, part, at);
"""


class ScanState:
    """The file of a scan: `add` writes a chunk of rows at once or not at all, for good within COMMIT_S."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = sqlite3.connect(path)
        self.db.executescript(TABLES)
        self.committed = monotonic()

    def describe(self, facts: dict[str, Any]) -> list[str]:
        """Take down what is scanned; return in words how a scan that has begun differs."""
        stored = dict(self.db.execute("SELECT name, value FROM facts"))
        if not stored:
            with self.db:
                self.db.executemany("INSERT INTO facts VALUES (?, ?)", [(k, json.dumps(v)) for k, v in facts.items()])
            return []
        given = {name: json.dumps(value) for name, value in facts.items()}
        return [
            f"{name} was {stored.get(name)} and is {given.get(name)}"
            for name in sorted(stored.keys() | given.keys())
            if stored.get(name) != given.get(name)
        ]

    def missing(self, sizes: dict[str, int]) -> Iterator[list[Place]]:
        """Yield chunks of the rows that are not known yet."""
        for part, size in sizes.items():
            places = self.db.execute("SELECT at FROM rows WHERE part = ?", (part,))
            unknown = np.ones(size, dtype=bool)
            unknown[np.fromiter((at for (at,) in places), dtype=np.int64)] = False
            left = np.flatnonzero(unknown)
            for first in range(0, len(left), CHUNK):
                yield [(part, at) for at in left[first : first + CHUNK].tolist()]

    def add(self, rows: Sequence[RowFacts]) -> None:
        """Write rows."""
        try:
            for row in rows:
                self._add(row)
        except BaseException:  # Ctrl-C between a row and its findings
            self.db.rollback()
            raise
        if monotonic() - self.committed > COMMIT_S:
            self._commit()

    def _add(self, row: RowFacts) -> None:
        numbers = (row.characters, len(row.images), row.tokens, row.labels, row.tiles)
        self.db.execute(
            f"INSERT INTO rows VALUES ({', '.join('?' * 10)})",
            (*row.place, row.name, row.kind, row.digest, *numbers),
        )
        images = [(digest, *row.place, at, w, h) for at, (digest, w, h) in enumerate(row.images)]
        self.db.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", images)
        self.add_findings((row.place, finding) for finding in row.findings)

    def _commit(self) -> None:
        self.db.commit()
        self.committed = monotonic()

    def add_findings(self, findings: Iterable[tuple[Place, Finding]]) -> None:
        """Write findings, as part of the caller's transaction."""
        lines = ((*place, f.row, f.reason, f.code, f.severity, f.field) for place, f in findings)
        self.db.executemany("INSERT INTO findings VALUES (?, ?, ?, ?, ?, ?, ?)", lines)

    def count(self) -> int:
        """Return how many rows are known."""
        return int(self.db.execute("SELECT count(*) FROM rows").fetchone()[0])

    def close(self, *, delete: bool) -> None:
        """Close the file; one that is of no more use goes."""
        self._commit()
        self.db.close()
        if delete:
            self.path.unlink(missing_ok=True)
