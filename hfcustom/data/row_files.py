"""The files of a data set: which of a folder's belong to a split, and how each kind is read.

A file is .csv, .json (one list), .jsonl, .parquet or .tar (WebDataset); a folder holds such files of one kind, under the
names by which `datasets` tells splits, or images with metadata. Each is opened as a sequence of mappings with `name_of`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from hfcustom.data.image_folder import MetadataRows
from hfcustom.data.jsonl import CsvRows, JsonlRows, JsonRows
from hfcustom.data.parquet import ParquetRows, group_sizes
from hfcustom.data.webdataset import TarRows
from hfcustom.exits import ConfigError
from hfcustom.naming import unknown

IGNORED = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class RowFile:
    """One file of rows, or one row group of a Parquet file; image paths in it are read below `root`."""

    path: Path
    root: Path
    label: str  # what messages call the file
    group: int | None = None

    def open(self) -> Any:
        """Return the file's rows, a sequence with `name_of`."""
        if self.group is not None:
            return ParquetRows(self.path, self.label, [self.group])
        rows = KINDS[self.path.suffix](self.path, self.label)
        return MetadataRows(rows, self.path.parent, self.root) if self.path.name in METADATA else rows

    def shards(self) -> list[RowFile]:
        """Return what several processes can share: the row groups of a Parquet file, else the file."""
        if self.path.suffix != ".parquet" or self.path.name in METADATA:
            return [self]
        sizes, damage = group_sizes(self.path)
        if damage:
            return [self]
        return [RowFile(self.path, self.root, self.label, at) for at, size in enumerate(sizes) if size]


class FileRows(Sequence[Any]):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _place(self, index: int) -> tuple[Any, int]:
        at = bisect_right(self.ends, index)
        return self.parts[at], index - (self.ends[at - 1] if at else 0)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # IndexError beyond the end, negative ones from there
        part, offset = self._place(index)
        return part[offset]

    def name_of(self, index: int) -> str:
        """Return the file and place of a row."""
        part, offset = self._place(range(len(self))[index])
        name: str = part.name_of(offset)
        return name


def files_of_folder(folder: Path, split: str | None) -> list[RowFile] | None:
    """Return the files of a split, "train" where none is given; None for a folder that only `datasets` can read.

    Raises ValueError for a split that is not there and for files of several kinds, FileNotFoundError for no files.
    """
    if found := _metadata(folder, split):
        return found
    if card_patterns(folder):
        return None
    files = _split_files(folder, split)
    kinds = {path.suffix for path in files} & set(KINDS)
    kinds -= {".json"} if len(kinds) > 1 else set()  # settings beside the rows
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds rows in files of several kinds ({', '.join(sorted(kinds))}); give one file, or a folder of one kind."
        )
    chosen = [path for path in files if path.suffix in kinds]
    return [RowFile(path, folder, label_in(folder, path)) for path in chosen] or None


def label_in(folder: Path, path: Path) -> str:
    """Return what messages call a file of a folder."""
    return f"{folder.name}/{path.relative_to(folder).as_posix()}"


def _metadata(folder: Path, split: str | None) -> list[RowFile]:
    """Return the metadata of a folder of images; a split is a folder in it."""
    for place in (folder / (split or "train"), folder):
        found = [place / name for name in METADATA if (place / name).is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ConfigError(f"{place} holds {names}; keep one.")
        if found and place == folder and split not in (None, "train"):
            raise ConfigError(f"{folder} has its metadata beside the images, so there is no split {split!r}.")
        if found:
            return [RowFile(found[0], folder, label_in(folder, found[0]))]
    return []


def _split_files(folder: Path, split: str | None) -> list[Path]:
    from datasets.data_files import DataFilesDict, get_data_patterns

    chosen = split or "train"
    patterns = get_data_patterns(str(folder))
    if chosen not in patterns:
        raise ConfigError(f"{folder}: {unknown('split', chosen, map(str, patterns))}")
    found = DataFilesDict.from_patterns({chosen: patterns[chosen]}, base_path=str(folder))
    paths = [Path(name) for name in found[chosen]]
    return [path for path in paths if path.name not in IGNORED and path.is_file()]  # a pipe would never end


def card_patterns(folder: Path) -> list[str]:
    """Return the files that the folder's card (README.md) names; ValueError if one lies elsewhere: none is fetched."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return []
    try:
        settings = YAML(typ="safe", pure=True).load("\n".join(lines[1 : lines.index("---", 1)]))
    except YAMLError as error:
        raise ConfigError(f"{card}: its head is no YAML: {str(error).splitlines()[0]}") from error
    named = list(_strings(settings.get("configs"))) if isinstance(settings, dict) else []
    for name in named:
        path = PurePosixPath(name)
        if "://" in name or "::" in name or path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"{card} names {name!r} as data, which is not below the folder; nothing else is opened. Move the file there."
            )
    return named


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in _strings(item)]


KINDS: dict[str, Callable[..., Any]] = {
    ".csv": CsvRows,
    ".json": JsonRows,
    ".jsonl": JsonlRows,
    ".parquet": ParquetRows,
    ".tar": TarRows,
}
