"""Rows of text files: JSONL and CSV line by line, JSON as one list.

Each is a sequence of mappings, parsed when asked for; a line that cannot be parsed is a RowError that names it and costs no
other line. Blank lines are no rows and do not shift the numbers of lines; a byte order mark and CRLF mean nothing.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcustom.data.turns import RowError

WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how UTF-32 begins too, or with two zeros


class JsonlRows(Sequence[Any]):
    """The lines of a JSONL file."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or path.name
        self.lines, self.starts = (
            array("q"),
            array("q"),
        )  # numbers and byte offsets: 16 bytes a row, shared after a fork
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                skipped = 0
                if number == 1:
                    _refuse_wide(line, path)
                    skipped = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
                if line[skipped:].strip():
                    self.lines.append(number)
                    self.starts.append(offset + skipped)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def name_of(self, index: int) -> str:
        """Return the file and line of a row."""
        return f"{self.label}, line {self.lines[index]}"

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        return parse_object(line, self.name_of(index))


def _refuse_wide(line: bytes, path: Path) -> None:
    if line.startswith(WIDE) or line[:4] == codecs.BOM_UTF32_BE:
        raise ValueError(f"{path} is UTF-16 or UTF-32, not UTF-8; save it as UTF-8.")


def parse_object(line: bytes, name: str) -> dict[str, Any]:
    """Return the object that a line of JSON holds; RowError names the line and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"{name}: {error.msg} (column {error.colno}); a line holds one row as JSON.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested without end
        raise RowError(f"{name}: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"{name}: {type(row).__name__}, not an object with 'messages'.")
    return row


class JsonRows(Sequence[Any]):
    """The items of a JSON file that holds one list."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or path.name
        content = path.read_bytes()
        _refuse_wide(content[:4], path)
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}. One row a line belongs into a .jsonl file.") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path}: the top level is {type(rows).__name__}, not a list of rows.")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Return the file and place of a row."""
        return f"{self.label} row {index}"

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


class CsvRows(Sequence[Any]):
    """The records of a CSV file with a header; a cell that is a JSON list or object is parsed, an empty one is missing."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or path.name
        self.records: list[tuple[int, dict[str, Any] | str]] = []  # (last line, its cells, or what is wrong with it)
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{path}: the header names {twice[0]!r} twice; rename one.")
            for cells in _records(reader):
                if cells:
                    self.records.append((reader.line_num, _record(header, cells)))

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, index: int) -> str:
        """Return the file and the last line of a record."""
        return f"{self.label}, line {self.records[index][0]}"

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index][1]
        if isinstance(record, str):
            raise RowError(f"{self.name_of(index)}: {record}")
        return {key: _cell(value, f"{self.name_of(index)}, column {key!r}") for key, value in record.items()}


def _records(reader: Iterator[list[str]]) -> Iterator[list[str] | str]:
    """Yield the cells of each record, or what is wrong with it."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield str(error)


def _record(header: Sequence[str], cells: list[str] | str) -> dict[str, Any] | str:
    if isinstance(cells, str):
        return cells
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header names {len(header)} columns; quote cells that hold commas."
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
        return "not UTF-8; save the file as UTF-8."
    return {key: value for key, value in zip(header, cells, strict=True) if value}


def _cell(value: str, place: str) -> Any:
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed: Any = json.loads(value)
    except (ValueError, RecursionError):
        return value  # a text that begins with a bracket
    return parsed if isinstance(parsed, list | Mapping) else value
