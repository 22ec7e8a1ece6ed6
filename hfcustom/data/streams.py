"""Streams: rows without a length, in the order of their files, from where each process and loading process stopped.

Stream -> Cursor -> Example, one after the other, without end: what ends begins again, as the next epoch. Ranks share a stream
by `split_dataset_by_node` of `datasets`, loading processes the shards of their rank. With a shuffle buffer of n rows the
order of shards is drawn anew each epoch, and the rows come in windows of n, each permuted by (seed, rank, loading process,
epoch, first row): a buffer that needs nothing but numbers to be taken up again in its middle, where one that lets rows in and
out would have to be stored or lost.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfcustom.data.fingerprint import files_fingerprint
from hfcustom.data.images import Fetch
from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.data.mixtures import check_weights, drawn
from hfcustom.data.row_files import RowFile
from hfcustom.data.sources import find_files, open_dataset
from hfcustom.data.video_frames import VIDEO_DEFAULTS, VideoOptions
from hfcustom.randomness import row_random

State = dict[str, Any]  # of numbers, lists and mappings, for JSON


@dataclass(frozen=True)
class Share:
    """Which part of a stream is read here: by which rank and by which of its loading processes."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1

    @property
    def words(self) -> str:
        """Whose rows they are, for their names; nothing where one process reads all."""
        rank = f", rank {self.rank}" if self.world_size > 1 else ""
        return rank + (f", loading process {self.worker}" if self.num_workers > 1 else "")


class Stream:
    """The rows of a `datasets.IterableDataset`; image paths are read below `root`, URLs by `fetch`."""

    def __init__(
        self,
        data: Any,
        name: str = "row",
        root: Path | None = None,
        video: VideoOptions = VIDEO_DEFAULTS,
        *,
        shuffle_buffer: int = 0,
        files: Sequence[RowFile] = (),
    ) -> None:
        self.data = data
        self.name = name
        self.root = root
        self.video = video
        self.fetch: Fetch | None = None
        self.shuffle_buffer = shuffle_buffer
        self.files = files

    def cursor(self, share: Share, seed: int, moved: Callable[[], None] = lambda: None) -> Cursor:
        """Return a reader of a share, at its beginning, which calls `moved` for each row that it reads ahead."""
        return Cursor(self, share, seed, moved)

    def parts(self) -> dict[str, Stream]:
        """Return the streams that this one is made of, by name."""
        return {self.name: self}

    def fingerprint(self) -> str:
        """Return what tells these rows from others; of what is not read from files here nothing does."""
        own = files_fingerprint({file.path for file in self.files}, self.files[0].root) if self.files else ""
        return json.dumps([own, self.shuffle_buffer])

    def example(self, item: Mapping[str, Any], name: str) -> Example:
        """Return the row of an item; RowError names it."""
        if not self.files:
            return read_row(item, name, self.root, self.video, self.fetch)
        rows, at = item["rows"], item["at"]
        return read_row(rows[at], rows.name_of(at), self.root, self.video, self.fetch)


class StreamMixture:
    """Several streams with weights, each at its own pace: every loading process draws from its share of all of them."""

    def __init__(self, streams: Mapping[str, Stream], weights: Mapping[str, float]) -> None:
        self.streams = dict(streams)
        self.weights = check_weights(weights)

    def cursor(self, share: Share, seed: int, moved: Callable[[], None] = lambda: None) -> MixtureCursor:
        """Return a reader of a share, at its beginning, which calls `moved` for each row that it reads ahead."""
        return MixtureCursor(self, share, seed, moved)

    def parts(self) -> dict[str, Stream]:
        """Return the streams by name."""
        return self.streams

    def fingerprint(self) -> str:
        """Return what tells the sources, their weights and their order from others."""
        return json.dumps([[name, self.weights[name], part.fingerprint()] for name, part in self.streams.items()])


class Cursor:
    """Reads one share of a stream; `state` is where it stands."""

    def __init__(self, stream: Stream, share: Share, seed: int, moved: Callable[[], None]) -> None:
        from datasets.distributed import split_dataset_by_node

        self.stream = stream
        self.share = share
        self.seed = seed
        self.data = split_dataset_by_node(stream.data, rank=share.rank, world_size=share.world_size)
        self.size = max(stream.shuffle_buffer, 1)
        self.items: Iterator[Mapping[str, Any]] | None = None
        self.window: list[Mapping[str, Any]] = []
        self.order: list[int] = []
        self.epoch = 0
        self.first = 0  # rows of this epoch before the window
        self.start: State | None = None  # of the data set, where the window begins; None at the beginning of an epoch
        self.used = 0  # rows of the window
        self.moved = moved

    def state(self) -> State:
        """Return where the reader stands, after the last row that it gave."""
        return {"epoch": self.epoch, "first": self.first, "start": self.start, "used": self.used}

    def load(self, state: State) -> None:
        """Go to where another reader of the same share stood."""
        self.epoch, self.first, self.start = state["epoch"], state["first"], state["start"]
        self.items, self.window, self.used = None, [], 0
        if state["used"]:
            self._fill()
            self.used = state["used"]

    def __next__(self) -> Example:
        """Return the next row; RowError for one that cannot be used, after which the next can be asked for."""
        self.advance()
        return self.read()

    def advance(self) -> None:
        """Go to the next row, which `last_name` and `read` are then about."""
        if self.used >= len(self.window):
            self._advance()
        self.used += 1

    def read(self) -> Example:
        """Return the row; RowError for one that cannot be used."""
        at = self.order[self.used - 1]
        with row_random("row", *self._key(at)):
            return self.stream.example(self.window[at], self._name(at))

    def _key(self, at: int) -> tuple[int, ...]:
        """Return what a row of the window is known by among all that this share ever gives."""
        return (self.seed, self.share.rank, self.share.worker, self.epoch, self.first + at)

    def last_name(self) -> str:
        """Return what messages call the row that was read last."""
        at = self.order[self.used - 1]
        if self.stream.files:
            return str(self.window[at]["rows"].name_of(self.window[at]["at"]))
        return self._name(at)

    def _name(self, at: int) -> str:
        return f"{self.stream.name}{self.share.words} row {self.first + at}"

    def _advance(self) -> None:
        """Go to the next window, in the next epoch where this one has ended."""
        self.first += len(self.window)
        if self.window:
            self.start = self.data.state_dict()
        self._fill()
        if not self.window:
            if not self.first:
                raise ValueError(f"{self.stream.name}{self.share.words}: the stream has no rows.")
            self.epoch, self.first, self.start, self.items = self.epoch + 1, 0, None, None
            self._fill()

    def _fill(self) -> None:
        """Read the window that begins at `start`."""
        if self.items is None:
            shuffled = self.stream.shuffle_buffer > 0
            self.data.set_epoch((self.seed + 1) * 1_000_003 + self.epoch if shuffled else 0)  # 0: shards as they are
            self.data.load_state_dict(self.start)
            self.items = iter(self.data)
        self.window, self.used = [], 0
        while len(self.window) < self.size:
            with row_random("map", *self._key(len(self.window))):  # where functions of the data set's own draw
                item = next(self.items, None)
            if item is None:
                break
            self.window.append(item)
            self.moved()
        self.order = np.random.default_rng(self._key(0)).permutation(len(self.window)).tolist()


class MixtureCursor:
    """Reads one share of several streams."""

    def __init__(self, mixture: StreamMixture, share: Share, seed: int, moved: Callable[[], None]) -> None:
        self.cursors = {name: stream.cursor(share, seed, moved) for name, stream in mixture.streams.items()}
        self.weights = list(mixture.weights.values())
        self.seed = (seed, share.rank, share.worker)
        self.drawn = 0
        self.last = ""

    @property
    def epoch(self) -> int:
        """How often the source that ended most often has ended."""
        return max(cursor.epoch for cursor in self.cursors.values())

    def state(self) -> State:
        """Return where the reader stands."""
        return {"drawn": self.drawn, "parts": {name: cursor.state() for name, cursor in self.cursors.items()}}

    def load(self, state: State) -> None:
        """Go to where another reader of the same share stood."""
        self.drawn = state["drawn"]
        for name, cursor in self.cursors.items():
            cursor.load(state["parts"][name])

    def __next__(self) -> Example:
        """Return the next row; RowError for one that cannot be used."""
        self.advance()
        return self.read()

    def advance(self) -> None:
        """Go to the next row, which `last_name` and `read` are then about."""
        source, _ = drawn(self.weights, self.drawn, self.seed)
        self.drawn += 1
        self.last = list(self.cursors)[source]
        self.cursors[self.last].advance()

    def read(self) -> Example:
        """Return the row; RowError for one that cannot be used."""
        return replace(self.cursors[self.last].read(), source=self.last)

    def last_name(self) -> str:
        """Return what messages call the row that was read last."""
        return self.cursors[self.last].last_name()


def open_stream(source: str, split: str | None, shuffle_buffer: int, video: VideoOptions) -> Stream:
    """Return the rows of a file, a folder or a name on the hub as a stream; errors as `load_rows`."""
    import datasets

    files = find_files(source, split)
    if files is not None:
        shards = [shard for file in files for shard in file.shards()]
        data = datasets.IterableDataset.from_generator(file_rows, gen_kwargs={"shards": shards})
        return Stream(data, source, files[0].root, video, shuffle_buffer=shuffle_buffer, files=files)
    data, name, root = open_dataset(source, split, streaming=True)
    if isinstance(data, datasets.Dataset):  # that `datasets` saved: its rows lie open in memory-mapped files
        data = data.to_iterable_dataset(num_shards=max(1, min(SAVED_SHARDS, len(data))))
    return Stream(data, name.removesuffix(" row"), root, video, shuffle_buffer=shuffle_buffer)


SAVED_SHARDS = 64


def file_rows(shards: Sequence[RowFile]) -> Iterator[dict[str, Any]]:
    """Yield where each row of the files lies; it is read when its turn has come."""
    for shard in shards:
        rows = shard.open()
        for at in range(len(rows)):
            yield {"rows": rows, "at": at}


def first_row(stream: Stream | StreamMixture, skip_bad_rows: bool, tried: int = 1000) -> Example:
    """Return the first row, of the first `tried` the first that can be used if others are skipped; RowError for none."""
    first = copy.copy(next(iter(stream.parts().values())))
    first.shuffle_buffer = 0  # a look at one row fills no window
    cursor = first.cursor(Share(), 0)
    for at in range(tried):
        try:
            return next(cursor)
        except RowError:
            if not skip_bad_rows or at == tried - 1:
                raise
    raise AssertionError("unreachable")


def check_shards(stream: Stream | StreamMixture, world_size: int, num_workers: int) -> list[str]:
    """Return what is slow about sharing a stream so, in words; ValueError where a loading process would have nothing."""
    from datasets.distributed import split_dataset_by_node

    facts = []
    for name, part in stream.parts().items():
        shards = part.data.num_shards
        own = split_dataset_by_node(part.data, rank=world_size - 1, world_size=world_size).num_shards
        if num_workers > own:
            raise ValueError(
                f"num_workers={num_workers}, but {name} has {own} shards for each of {world_size} processes, so some would "
                f"have nothing to read. Set num_workers to at most {own}, or cut the data into at least "
                f"{num_workers * world_size} files."
            )
        if shards % world_size:
            facts.append(
                f"{name}: {shards} shards cannot be shared evenly by {world_size} processes, so each reads all and keeps one row "
                f"in {world_size}; cut the data into a multiple of {world_size} files for less reading."
            )
    return facts
