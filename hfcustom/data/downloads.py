"""Downloads: pictures by address, fetched once and kept in a folder for all epochs, processes and later runs.

`pictures/` holds each picture under the hash of its bytes, `addresses/` for each address which of them it is. Files are
written whole or not at all, and only what the image loader can decode is kept. Nothing is deleted, since a run that is
resumed has to see what it saw before.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from hfcustom.data.hosts import Host, check_hosts, check_url, host_problems
from hfcustom.data.images import MAX_BYTES, ImageError, decode_image

MAX_FAILED = 10_000  # that a process remembers
HEX = re.compile("[0-9a-f]{64}")
logger = logging.get_logger("hfcustom")


@dataclass(frozen=True)
class Downloads:
    """Returns the bytes of a picture by its address, which must be at one of the hosts."""

    hosts: tuple[Host, ...]
    folder: Path
    failed: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)  # message and code

    def __call__(self, url: str) -> bytes:
        """Return the bytes of a picture, from the folder where it is there; ImageError where it cannot be had."""
        parsed, _ = check_url(url, self.hosts)
        key = hashlib.sha256(str(parsed).encode()).hexdigest()
        record = self.folder / "addresses" / key[:2] / f"{key}.json"
        with _using(self.folder):
            data = self._kept(record)
        if data is not None:
            return data
        if key in self.failed:  # a dead host costs its time once a process
            raise ImageError(*self.failed[key])
        try:
            return self._fetched(url, record, key)
        except ImageError as error:
            if len(self.failed) < MAX_FAILED:
                self.failed[key] = str(error), error.code
            raise

    def _kept(self, record: Path) -> bytes | None:
        try:
            digest = json.loads(_read(record).decode())["sha256"]
            data = _read(self._picture(digest)) if HEX.fullmatch(digest) else b""
        except FileNotFoundError:
            return None
        except (KeyError, RecursionError, TypeError, ValueError):
            digest, data = "", b""
        if hashlib.sha256(data).hexdigest() != digest:
            logger.warning(f"{record} or its picture is damaged; it is fetched again.")
            return None
        return data

    def _picture(self, digest: str) -> Path:
        return self.folder / "pictures" / digest[:2] / digest

    def _fetched(self, url: str, record: Path, key: str) -> bytes:
        """Fetch a picture and keep it; of several processes that want it one does, and the others wait."""
        from filelock import FileLock
        from huggingface_hub import constants

        from hfcustom.data.fetch import fetch

        if constants.HF_HUB_OFFLINE:
            raise ImageError(
                f"Image {url!r:.200} is not in {self.folder}, and HF_HUB_OFFLINE=1 forbids to fetch it; fetch the images "
                "beforehand with `hfcustom preflight`.",
                "fetch",
            )
        lock = self.folder / "locks" / f"{key[:3]}.lock"  # of 4096, so that their number is bounded
        with _using(self.folder):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if (data := self._kept(record)) is None:
                    data = fetch(url, self.hosts)
                    decode_image(io.BytesIO(data), f"image {url!r:.200}")
                    digest = hashlib.sha256(data).hexdigest()
                    _write(self._picture(digest), data)
                    _write(record, json.dumps({"url": url, "sha256": digest, "bytes": len(data)}).encode())
        return data


@contextmanager
def _using(folder: Path) -> Iterator[None]:
    """Raise RuntimeError for a folder that cannot be used: it is no fault of a row, so that none may be left out for it."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{folder}, where fetched images are kept, cannot be used: {error.strerror or error}. Free some space, or name "
            "another folder as image_downloads (--image-downloads)."
        ) from error


def _read(path: Path) -> bytes:
    """Return what is in a file of ours: nothing for one that is too large to be, FileNotFoundError for what is none."""
    if not path.is_file():  # a pipe would never end
        raise FileNotFoundError(path)
    return path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def make_downloads(image_hosts: Sequence[str], image_downloads: str | Path | None = None) -> Downloads | None:
    """Return what fetches from a list of hosts into a folder, None for no hosts; ValueError for a folder without hosts."""
    hosts = check_hosts(image_hosts)
    if problems := host_problems(image_hosts, None if image_downloads is None else str(image_downloads)):
        raise ValueError(f"{problems[0]}.")
    if not hosts:
        return None
    return Downloads(hosts, default_folder() if image_downloads is None else Path(image_downloads).expanduser())


def default_folder() -> Path:
    """Return where pictures are kept unless another folder is named: hfcustom/images in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfcustom" / "images"
