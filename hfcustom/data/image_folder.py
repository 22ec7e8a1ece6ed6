"""A folder of images with `metadata.jsonl`, `.csv` or `.parquet`: each row names its file and says what belongs to it.

{"file_name": "0001.png", "text": "A cat."} -> {"images": ["0001.png"], "text": "A cat."}; names are relative to the metadata,
https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hfcustom.data.images import is_url
from hfcustom.data.turns import RowError
from hfcustom.data.webdataset import VIDEOS

NAMES = (
    "file_name",
    "file_names",
    "image_file_name",
    "image_file_names",
    "images_file_names",
    "video_file_name",
    "videos_file_names",
)


class MetadataRows(Sequence[Any]):
    """The rows of a metadata file, with the files that they name as images and videos below `root`."""

    def __init__(self, rows: Any, folder: Path, root: Path) -> None:
        self.rows = rows
        self.prefix = folder.relative_to(root)

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Return the file and line of a row."""
        name: str = self.rows.name_of(index)
        return name

    def __getitem__(self, index: Any) -> Any:
        row, name = self.rows[index], self.name_of(index)
        names = [key for key in NAMES if row.get(key) is not None]
        if not names:
            found = ", ".join(row) or "nothing"
            raise RowError(f"{name}: no file_name (columns: {found}); metadata names the file of each row.")
        row = dict(row)
        for key in names:
            value = row.pop(key)
            for file in value if isinstance(value, list | tuple) else [value]:
                self._add(row, file, f"{name}, {key}")
        return row

    def _add(self, row: dict[str, Any], file: Any, place: str) -> None:
        if isinstance(file, Mapping):  # as `datasets` stores an image
            file = file.get("path")
        if not isinstance(file, str) or not file:
            raise RowError(f"{place} is {file!r:.40}; it must be the name of a file.")
        media = "videos" if file.rpartition(".")[2].lower() in VIDEOS else "images"
        listed = row.get(media) or []
        if not isinstance(listed, list):
            raise RowError(f"{place}: the row has {media!r} too, which is no list; drop the column that is not meant.")
        path = file if is_url(file) else str(PurePosixPath(self.prefix.as_posix(), file))
        row[media] = [*listed, path]
