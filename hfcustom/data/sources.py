"""Rows from where people keep them: a JSONL file, a folder of `datasets`, or a name on the hub.

Each is a sequence of Examples (hfcustom/data/messages.py), read one at a time; the name of the file and the line, or of
the row, goes with each into every message about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfcustom.data.messages import Example, RowError, read_row
from hfcustom.naming import unknown


class Examples(Sequence[Example]):
    """Rows of any sequence (a list, a `datasets.Dataset`) as checked Examples; image paths are read below `root`."""

    def __init__(self, rows: Sequence[Any], name: str = "row", root: str | Path | None = None) -> None:
        self.rows = rows
        self.name = name
        self.root = None if root is None else Path(root)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row = self.rows[index]
        return row if isinstance(row, Example) else read_row(row, self.name_of(index), self.root)

    def name_of(self, index: int) -> str:
        """Return what messages call a row: its file and line, or its source and place."""
        return self.rows.name_of(index) if isinstance(self.rows, JsonlRows) else f"{self.name} {index}"


class RowsWithColumns(Examples):
    """Rows read when asked for, with columns added; `columns` holds these, by name, to be stored beside the rows."""

    def __init__(self, rows: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
        self.rows: Examples = as_examples(rows)
        self.columns = dict(columns)
        for name, values in self.columns.items():
            if len(values) != len(self.rows):
                raise ValueError(
                    f"The column {name!r} has {len(values)} values for {len(self.rows)} rows; give one a row."
                )

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        example = self.rows[index]
        own = {name: values[index] for name, values in self.columns.items()}
        return replace(example, columns={**example.columns, **own})

    def name_of(self, index: int) -> str:
        """Return what messages call a row."""
        return self.rows.name_of(index)


def as_examples(rows: Sequence[Any]) -> Examples:
    """Return rows of any sequence as checked Examples."""
    return rows if isinstance(rows, Examples) else Examples(rows)


class JsonlRows(Sequence[Mapping[str, Any]]):
    """The lines of a JSONL file, parsed when asked for; blank lines are no rows. RowError names file and line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: list[tuple[int, int]] = []  # (line number, byte offset)
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append((number, offset))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def name_of(self, index: int) -> str:
        """Return the file and line of a row."""
        return f"{self.path.name}, line {self.starts[index][0]}"

    def __getitem__(self, index: Any) -> Any:
        number, offset = self.starts[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(
                f"{self.path.name}, line {number}: {error.msg} (column {error.colno}); a line holds one row as JSON."
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep, not UTF-8
            raise RowError(f"{self.path.name}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise RowError(f"{self.path.name}, line {number}: {type(row).__name__}, not an object with 'messages'.")
        return read_row(row, f"{self.path.name}, line {number}", self.path.parent)


def load_rows(source: str, split: str | None = None) -> Examples:
    """Return the rows of a file, of a folder that `datasets` saved or can read, or of a data set's name on the hub.

    A file is .jsonl, or .json with one list. `split` is for sources that have several, "train" where none is given. Image
    paths are read below the file's (or folder's) own folder only. Raises FileNotFoundError for a path that does not exist
    and ValueError for an unknown split, a split of a source that has none, or a source without rows.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {source}.")
        _no_split(source, split)
        rows = JsonlRows(path) if path.suffix == ".jsonl" else _read_list(path)
        examples = Examples(rows, f"{path.name} row", path.parent)
    else:
        examples = _load_dataset(source, path, split)
    if not len(examples):
        raise ValueError(f"{source} has no rows.")
    return examples


def _no_split(source: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"{source} has no splits, so split={split!r} has no effect; leave it out.")


def _read_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}. One row a line belongs into a .jsonl file.") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: the top level is {type(content).__name__}, not a list of rows.")
    return content


def _load_dataset(source: str, path: Path, split: str | None) -> Examples:
    import datasets

    if path.is_file():
        raise ValueError(f"{source} is no .jsonl file; give the folder that holds it, which `datasets` can read.")
    chosen = split or "train"
    name, root = f"{source} {chosen} row", path
    if (path / "dataset_info.json").is_file():
        _no_split(source, split)
        rows, name = datasets.load_from_disk(source), f"{path.name} row"
    elif (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(source)
        if chosen not in splits:
            raise ValueError(f"{source}: {unknown('split', chosen, splits)}")
        rows, name = splits[chosen], f"{path.name} {chosen} row"
    elif path.is_dir():
        rows = datasets.load_dataset(source, split=chosen)
    else:
        root = Path(datasets.config.HF_CACHE_HOME)  # where `datasets` puts the images that it downloads as files
        try:
            rows = datasets.load_dataset(source, split=chosen)
        except OSError as error:
            raise FileNotFoundError(
                f"{source} is no folder here, and the hub gave no data set of that name: {error}"
            ) from error
    _leave_images_encoded(rows.info.features)
    return Examples(rows, name, root)


def _leave_images_encoded(feature: Any) -> None:
    """Have `datasets` hand over bytes or a path: decoding itself, it fetches URLs, opens any path and runs gs."""
    import datasets

    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, Mapping):
        for inner in feature.values():
            _leave_images_encoded(inner)
    elif isinstance(feature, datasets.List | datasets.LargeList):
        _leave_images_encoded(feature.feature)
