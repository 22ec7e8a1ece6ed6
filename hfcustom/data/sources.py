"""Rows from where people keep them: files, folders, and names on the hub.

load_rows() returns a sequence of Examples (hfcustom/data/messages.py), read one at a time; the name of the file and the
line, or of the row, goes with each into every message about it. Kinds of files are in hfcustom/data/row_files.py, sources
without a length in hfcustom/data/streams.py, several sources with weights in hfcustom/data/mixtures.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from hfcustom.data.downloads import make_downloads
from hfcustom.data.findings import Finding
from hfcustom.data.fingerprint import files_fingerprint, rows_fingerprint
from hfcustom.data.images import Fetch
from hfcustom.data.messages import Example, read_row
from hfcustom.data.parquet import ParquetRows, leave_encoded
from hfcustom.data.row_files import KINDS, FileRows, RowFile, card_patterns, files_of_folder
from hfcustom.data.turns import RowError
from hfcustom.data.video_frames import VIDEO_DEFAULTS, VideoOptions
from hfcustom.data.webdataset import IMAGES
from hfcustom.exits import ConfigError, MissingError
from hfcustom.naming import unknown

logger = logging.get_logger("hfcustom")


class Examples(Sequence[Example]):
    """Rows of any sequence (a list, a `datasets.Dataset`) as checked Examples; image paths are read below `root`, URLs by `fetch`."""

    def __init__(
        self,
        rows: Sequence[Any],
        name: str = "row",
        root: str | Path | None = None,
        video: VideoOptions = VIDEO_DEFAULTS,
        *,
        fingerprint: Callable[[], str] | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self.rows = rows
        self.name = name
        self.root = None if root is None else Path(root)
        self.video = video
        self.fetch = fetch
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row = self.rows[index]
        if isinstance(row, Example):
            return row
        return read_row(row, self.name_of(index), self.root, self.video, self.fetch)

    def name_of(self, index: int) -> str:
        """Return what messages call a row: its file and line, or its source and place."""
        return self.rows.name_of(index) if isinstance(self.rows, FileRows) else f"{self.name} {index}"

    def fingerprint(self) -> str:
        """Return what tells these rows from others, for a run that is resumed; empty where nothing cheap does."""
        if self._fingerprint is not None:
            return self._fingerprint()
        return rows_fingerprint(self.rows) if isinstance(self.rows, list | tuple) else ""


class RowsWithColumns(Examples):
    """Rows read when asked for, with columns added; `columns` holds these, by name, to be stored beside the rows.

    Rows in `bad` raise what was found there as RowError, as rows that cannot be used do; their values count for nothing.
    """

    def __init__(
        self, rows: Sequence[Any], columns: Mapping[str, Sequence[Any]], bad: Mapping[int, Finding] | None = None
    ) -> None:
        self.rows: Examples = as_examples(rows)
        self.columns = dict(columns)
        self.bad = dict(bad or {})
        for name, values in self.columns.items():
            if len(values) != len(self.rows):
                raise ConfigError(
                    f"The column {name!r} has {len(values)} values for {len(self.rows)} rows; give one a row."
                )

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if (found := self.bad.get(range(len(self))[index])) is not None:
            raise RowError(found.reason, found.code)
        example = self.rows[index]
        own = {name: values[index] for name, values in self.columns.items()}
        return replace(example, columns={**example.columns, **own})

    def name_of(self, index: int) -> str:
        """Return what messages call a row."""
        return self.rows.name_of(index)

    def fingerprint(self) -> str:
        """Return what tells the rows from others."""
        return self.rows.fingerprint()


def as_examples(rows: Sequence[Any]) -> Examples:
    """Return rows of any sequence as checked Examples; TypeError for a stream."""
    if not isinstance(rows, Examples) and not hasattr(rows, "__len__"):
        raise TypeError(
            f"rows is a {type(rows).__name__}, which has no length; only fit() takes streams. Load the rows without streaming."
        )
    return rows if isinstance(rows, Examples) else Examples(rows)


def load_rows(
    source: str | Path | Mapping[str, float],
    split: str | None = None,
    *,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    max_frames: int = VIDEO_DEFAULTS.max_frames,
    frame_method: str = VIDEO_DEFAULTS.method,
    video_as_images: bool = False,
    image_root: str | Path | None = None,
    image_hosts: Sequence[str] = (),
    image_downloads: str | Path | None = None,
) -> Any:
    """Return the rows of a file, a folder, a data set's name on the hub, or a mixture {source: weight} of them.

    A file is .jsonl, .json with one list, .csv, .parquet or .tar (WebDataset); a folder holds such files, or images with
    metadata, or is what `datasets` saved or can read. `split` is for sources that have several, "train" where none is given.
    Image paths are read below the file's (or folder's) own folder only, or below `image_root` where that is given; those at URLs are fetched
    from `image_hosts` only (hfcustom/data/hosts.py) and kept in `image_downloads`, by default hfcustom/images in HF_HOME. With `streaming` rows come in the order of the files,
    shuffled within `shuffle_buffer` of them, and nothing is read ahead of need; fit() then wants max_steps. Of a video
    `max_frames` frames are seen, chosen by `frame_method` (`hfcustom frames`), as images if `video_as_images`. Raises FileNotFoundError for a path that does not exist and
    ValueError for an unknown split or host, a split of a source that has none, or a source without rows.
    """
    from hfcustom.data import mixtures, streams

    place = Place(None if image_root is None else check_root(image_root), make_downloads(image_hosts, image_downloads))
    video = VideoOptions(max_frames, frame_method, video_as_images)
    if shuffle_buffer < 0 or (shuffle_buffer and not streaming):
        raise ConfigError(
            f"shuffle_buffer={shuffle_buffer} is for streaming=True, where it must not be negative; other rows are shuffled whole."
        )
    if isinstance(source, Mapping):
        weights = mixtures.check_weights(source)
        names = mixtures.short_names(weights)
        weights = {names[each]: weight for each, weight in weights.items()}
        if streaming:
            parts = {
                name: place.give(streams.open_stream(each, split, shuffle_buffer, video))
                for each, name in names.items()
            }
            return streams.StreamMixture(parts, weights)
        sources = {name: place.give(load_source(each, split, video)) for each, name in names.items()}
        return mixtures.Mixture(sources, weights)
    if streaming:
        return place.give(streams.open_stream(str(source), split, shuffle_buffer, video))
    return place.give(load_source(str(source), split, video))


def check_root(image_root: str | Path) -> Path:
    """Return the folder below which images are read; FileNotFoundError where there is none."""
    root = Path(image_root).expanduser()
    if not root.is_dir():
        raise MissingError(f"image_root={str(image_root)!r} is no folder; give the one that holds the images.")
    return root


class Place(NamedTuple):
    """Where images are, if not below the folder of their rows, and what fetches those at URLs."""

    root: Path | None
    fetch: Fetch | None

    def give(self, rows: Any) -> Any:
        """Return rows that read their images and videos from here."""
        if self.root is not None:
            rows.root = self.root
        rows.fetch = self.fetch
        return rows


def load_source(source: str, split: str | None, video: VideoOptions) -> Examples:
    """Return the rows of one source; errors as `load_rows`."""
    files = find_files(source, split)
    examples = _load_dataset(source, split, video) if files is None else _load_files(source, files, video)
    if not len(examples):
        raise ConfigError(f"{source} has no rows.")
    return examples


def find_files(source: str, split: str | None) -> list[RowFile] | None:
    """Return the files of a source that are read here; None where `datasets` reads it."""
    path = Path(source)
    if path.suffix in KINDS and not path.is_dir():
        if not path.is_file():
            raise MissingError(f"There is no file {source}.")
        no_split(source, split)
        return [RowFile(path, path.parent, path.name)]
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"{source} is no {', '.join(KINDS)} file; give one, or the folder that holds it, which `datasets` can read."
        )
    if not path.is_dir() or (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return None
    return files_of_folder(Path(os.path.abspath(path)), split)  # `datasets` gives absolute paths of its files


def no_split(source: str, split: str | None) -> None:
    """Raise ValueError where a split is given for a source that has none."""
    if split is not None:
        raise ConfigError(f"{source} has no splits, so split={split!r} has no effect; leave it out.")


def _load_files(source: str, files: Sequence[RowFile], video: VideoOptions) -> Examples:
    root = files[0].root
    rows = _read_parquet(files) if all(file.path.suffix == ".parquet" for file in files) else None
    rows = FileRows([file.open() for file in files]) if rows is None else rows
    return Examples(rows, source, root, video, fingerprint=lambda: files_fingerprint([f.path for f in files], root))


def _read_parquet(files: Sequence[RowFile]) -> FileRows | None:
    """Return Parquet files through the Arrow cache of `datasets`, in any order quick; None where one is damaged."""
    import datasets

    parts = [file.open() for file in files]
    if any(not isinstance(part, ParquetRows) or part.damage for part in parts):
        return None
    if any(
        character in str(file.path) for file in files for character in "*?["
    ):  # `datasets` would take it for a pattern
        return None
    try:
        names = [str(file.path) for file in files]
        rows = datasets.load_dataset("parquet", data_files={"train": names}, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        logger.warning(
            f"{files[0].label}: {str(error.__cause__ or error).splitlines()[0]} Reading one row group after the other, which "
            "is slower and leaves out none but the damaged."
        )
        return None
    leave_encoded(rows.info.features)
    return FileRows([DatasetPart(rows, part) for part in _with_offsets(parts)])


def _with_offsets(parts: Sequence[ParquetRows]) -> list[tuple[int, ParquetRows]]:
    starts = [sum(len(part) for part in parts[:at]) for at in range(len(parts))]
    return list(zip(starts, parts, strict=True))


class DatasetPart(Sequence[Any]):
    """The rows of one file in a data set of several files."""

    def __init__(self, rows: Any, part: tuple[int, ParquetRows]) -> None:
        self.rows = rows
        self.first, file = part
        self.length, self.label = len(file), file.label

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.first + index]

    def name_of(self, index: int) -> str:
        """Return the file and the number of a row in it."""
        return f"{self.label} row {index}"


def _load_dataset(source: str, split: str | None, video: VideoOptions) -> Examples:
    rows, name, root = open_dataset(source, split)
    path = Path(source)

    def fingerprint() -> str:
        if path.is_dir():
            return files_fingerprint(_data_files(path), path)
        return str(rows._fingerprint)  # of a name on the hub: its commit and files

    return Examples(rows, name, root, video, fingerprint=fingerprint)


def _data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold rows: no pictures, and nothing that `datasets` keeps there for itself."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix[1:].lower() not in IMAGES]
    return [path for path in files if not path.name.startswith((".", "cache-", "tmp"))]


def open_dataset(source: str, split: str | None, streaming: bool = False) -> tuple[Any, str, Path]:
    """Return the rows of what `datasets` saved, can read or finds on the hub, what messages call one, and their folder.

    Images and other files in them stay encoded, as bytes or a path.
    """
    import datasets

    path, chosen = Path(source), split or "train"
    name, root = f"{source} {chosen} row", path
    if (path / "dataset_info.json").is_file():
        no_split(source, split)
        rows, name = datasets.load_from_disk(source), f"{path.name} row"
    elif (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(source)
        if chosen not in splits:
            raise ConfigError(f"{source}: {unknown('split', chosen, splits)}")
        rows, name = splits[chosen], f"{path.name} {chosen} row"
    elif path.is_dir():
        card_patterns(path)
        rows = _load(source, chosen, streaming)
    else:
        root = Path(datasets.config.HF_CACHE_HOME)  # where `datasets` puts the images that it downloads as files
        try:
            rows = _load(source, chosen, streaming)
        except OSError as error:
            raise MissingError(
                f"{source} is no folder here, and the hub gave no data set of that name: {error}"
            ) from error
    if rows.info.features is not None:
        leave_encoded(rows.info.features)
    return rows, name, root


def _load(source: str, split: str, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(source, split=split, **({"streaming": True} if streaming else {}))
