"""ShardStore: tensors by key in a folder of safetensors files, memory-mapped, for many processes at once.

A process writes files of its own, each whole at once (written aside, then renamed), and reads everybody's. A file that cannot be
read, or an entry whose checksum is wrong, is said and counts as missing, so that its content is computed anew.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
import weakref
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

logger = logging.get_logger("hfcustom")
SHARD_BYTES = 2**26  # a file is written when so much waits for it
MAX_WAIT_S = 60.0  # or when the last was written so long ago: other processes read it
SUFFIX = ".safetensors"
Entry = tuple[dict[str, torch.Tensor], Any]  # tensors by name, and what JSON holds beside them


class ShardStore:
    """Entries by key below `folder`; nothing is written any more when the files below `root` hold `max_bytes`.

    A copy in another process, forked or pickled, begins with nothing to write.
    """

    def __init__(self, root: Path, folder: str, max_bytes: float) -> None:
        self.root, self.folder, self.max_bytes = root, root / folder, max_bytes
        self.full = False
        self._files: dict[str, Any] = {}  # name -> open file, None for one that cannot be read
        self._index: dict[str, list[str]] = {}  # key -> names of the files that hold it
        self._checked: set[str] = set()
        self._scanned = -1  # the folder's time of change
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._waiting: dict[str, Entry] = {}
        self._waiting_bytes = 0
        self._written_at = time.monotonic()
        Finalize(self, _flush, (weakref.ref(self),), exitpriority=10)  # at the end of a loading process too

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "folder": self.folder.name, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: str) -> Entry | None:
        """Return an entry, None when there is none that can be read; its tensors are views of a file, not to be changed."""
        self._notice_fork()
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._index:
            self._scan()
        while names := self._index.get(key):
            entry = self._read(key, names[-1])
            if entry is not None:
                return entry
        return None

    def about(self, key: str) -> Any:
        """Return what stands beside an entry's tensors, which are not read; None when there is none."""
        self._notice_fork()
        if key in self._waiting:
            return self._waiting[key][1]
        if key not in self._index:
            self._scan()
        names = self._index.get(key)
        try:
            return json.loads(self._files[names[-1]][1][key])[1] if names else None
        except ValueError:  # get() says so
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor], about: Any = None) -> None:
        """Keep an entry, written with others when there are enough of them."""
        self._notice_fork()
        if self.full or key in self._waiting or key in self._index:
            return
        self._waiting[key] = ({name: tensor.contiguous() for name, tensor in tensors.items()}, about)
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting_bytes >= SHARD_BYTES or time.monotonic() - self._written_at > MAX_WAIT_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits, unless that would exceed `max_bytes` or the disk."""
        if self._pid != os.getpid() or not self._waiting:
            return
        waiting, size = self._waiting, self._waiting_bytes
        self._waiting, self._waiting_bytes, self._written_at = {}, 0, time.monotonic()
        if size_of(self.root) + size > self.max_bytes:
            self._fill_up(f"max_cache_gb={self.max_bytes / 1e9:g} is reached")
            return
        try:
            self._write(waiting)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._fill_up("the disk is full")

    def _fill_up(self, why: str) -> None:
        self.full = True
        logger.warning(
            f"The cache {self.root} holds {in_words(size_of(self.root))} and takes no more: {why}. What it does not hold is "
            "computed each time; raise max_cache_gb, or delete what other runs left there."
        )

    def _write(self, entries: dict[str, Entry]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        aside = self.folder / f".{name}.part"
        tensors = {f"{key}/{part}": value for key, (parts, _) in entries.items() for part, value in parts.items()}
        about = {
            key: json.dumps([{part: checksum(value) for part, value in parts.items()}, about])
            for key, (parts, about) in entries.items()
        }
        try:
            save_file(tensors, aside, metadata=about)
            aside.replace(self.folder / (name + SUFFIX))
        finally:
            aside.unlink(missing_ok=True)

    def _scan(self) -> None:
        """Open the files that have come since; a look at the folder's time tells whether there are any."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed == self._scanned:
            return
        self._scanned = changed
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            if path.name not in self._files:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            keys = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            self._files[path.name] = None
            logger.warning(
                f"The cache file {path} cannot be read ({error}); what it held is computed anew. Delete it."
            )
            return
        self._files[path.name] = (file, keys)
        for key in keys:
            self._index.setdefault(key, []).append(path.name)

    def _read(self, key: str, name: str) -> Entry | None:
        file, keys = self._files[name]
        try:
            sums, about = json.loads(keys[key])
            tensors = {part: file.get_tensor(f"{key}/{part}") for part in sums}
        except (ValueError, OSError, SafetensorError):
            self._forget(key, name)
            return None
        if key not in self._checked:
            if any(checksum(tensor) != sums[part] for part, tensor in tensors.items()):
                self._forget(key, name)
                return None
            self._checked.add(key)
        return tensors, about

    def _forget(self, key: str, name: str) -> None:
        self._index[key].remove(name)
        if not self._index[key]:
            del self._index[key]
        logger.warning(f"The cache file {self.folder / name} is damaged at {key}; the entry is computed anew.")

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def count(self) -> int:
        """Return the number of entries."""
        self._scan()
        return len(self._index.keys() | self._waiting.keys())


def _flush(store: weakref.ref[ShardStore]) -> None:
    alive = store()
    if alive is not None:
        alive.flush()


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bytes read as 64-bit integers, which any changed bit changes."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    aligned = flat[:whole] if flat.storage_offset() % 8 == 0 and flat.data_ptr() % 8 == 0 else flat[:whole].clone()
    return int(aligned.view(torch.int64).sum()) + int(flat[whole:].sum(dtype=torch.int64))


def in_words(size: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def size_of(folder: Path) -> int:
    """Return the bytes of all cache files below a folder."""
    sizes = []
    for path in folder.rglob("*" + SUFFIX):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # another process deletes it
            continue
    return sum(sizes)
