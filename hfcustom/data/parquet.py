"""Rows of Parquet files, one row group at a time, so that a damaged group costs its own rows only.

Sound files are read through `datasets` instead, whose Arrow files on disk serve rows in any order quickly
(hfcustom/data/sources.py); this reader is for damaged ones, and for streams, which read in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hfcustom.data.turns import RowError

CACHED_GROUPS = 4
MEDIA = ("Audio", "Image", "Mesh", "Nifti", "Pdf", "Video")  # features of `datasets` that decode files


class ParquetRows(Sequence[Any]):
    """The rows of a Parquet file, or of some of its row groups; a file without a readable footer is one bad row."""

    def __init__(self, path: Path, label: str | None = None, groups: Sequence[int] | None = None) -> None:
        self.path = path
        self.label = label or path.name
        sizes, self.damage = group_sizes(path)
        first_rows = [0, *accumulate(sizes)]
        self.groups = list(range(len(sizes)) if groups is None else groups)
        self.first_rows = [first_rows[group] for group in self.groups]  # in the file
        self.ends = list(accumulate(sizes[group] for group in self.groups))  # in this sequence
        self.tables: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return 1 if self.damage else (self.ends or [0])[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Return which of the groups a row lies in, and where in it."""
        at = bisect_right(self.ends, index)
        return at, index - (self.ends[at - 1] if at else 0)

    def name_of(self, index: int) -> str:
        """Return the file and the number of a row in it."""
        if self.damage:
            return self.label
        at, offset = self._place(index)
        return f"{self.label} row {self.first_rows[at] + offset}"

    def __getitem__(self, index: Any) -> Any:
        if self.damage:
            raise RowError(
                f"{self.label}: {self.damage}; the file is cut or no Parquet, so none of its rows can be read. Write it again."
            )
        if not 0 <= index < len(self):
            raise IndexError(index)
        at, offset = self._place(index)
        try:
            table = self._table(self.groups[at])
            return _plain(table.slice(offset, 1))
        except RowError:
            raise
        except Exception as error:  # pyarrow raises errors of many kinds for damaged pages, not all of them its own
            raise RowError(
                f"{self.name_of(index)}: row group {self.groups[at]} cannot be read ({_first_line(error)}); write the file "
                "again, or leave its rows out."
            ) from error

    def _table(self, group: int) -> Any:
        import pyarrow.parquet as pq

        if group not in self.tables:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                self.tables[group] = file.read_row_group(group)
            while len(self.tables) > CACHED_GROUPS:
                self.tables.popitem(last=False)
        self.tables.move_to_end(group)
        return self.tables[group]


def group_sizes(path: Path) -> tuple[list[int], str]:
    """Return the rows of each group of a file, and what is wrong where its footer cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return [file.metadata.row_group(at).num_rows for at in range(file.metadata.num_row_groups)], ""
    except (pa.ArrowException, OSError, ValueError) as error:
        return [], _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _plain(table: Any) -> dict[str, Any]:
    """Return the one row of a table, with what `datasets` stored as JSON parsed and files left as bytes or paths."""
    import datasets

    (row,) = table.to_pylist()
    if b"huggingface" not in (table.schema.metadata or {}):
        return dict(row)
    features = datasets.Features.from_arrow_schema(table.schema)
    leave_encoded(features)
    return dict(features.decode_example(row))


def leave_encoded(feature: Any) -> None:
    """Have `datasets` hand over bytes or a path: decoding itself, it fetches URLs, opens any path and runs gs."""
    import datasets

    if type(feature).__name__ in MEDIA:
        feature.decode = False
    elif isinstance(feature, Mapping):
        for inner in feature.values():
            leave_encoded(inner)
    elif isinstance(feature, datasets.List | datasets.LargeList):
        leave_encoded(feature.feature)
