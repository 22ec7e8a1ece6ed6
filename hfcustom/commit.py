"""Folders that are there whole or not at all: written beside their place, flushed to disk, listed, renamed.

    with atomic_folder(target) as partial: ...      # .target.partial -> fsync -> manifest.json -> rename -> fsync of the parent

Whatever ends a process, and a power cut too, leaves `target` as it was or as it was to become. A folder goes as it came: it
loses its name first, so that half of one never has it. `manifest.json` holds the SHA-256 of every other file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from hfcustom.card import keep_readme

MANIFEST = "manifest.json"


@contextlib.contextmanager
def atomic_folder(
    target: Path, accelerator: Accelerator | None = None, known: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, with a manifest, once the block ends without an error on any rank.

    `known` is filled in the block with the SHA-256 of files that this rank has written and flushed itself; rank 0 sees to all others.
    """
    main = accelerator is None or accelerator.is_main_process
    partial = target.with_name(f".{target.name}.partial")
    try:
        with every_rank(accelerator):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with every_rank(accelerator):
            yield partial
        with every_rank(accelerator):
            ranks = gather_object([dict(known)]) if known is not None and accelerator is not None else []
            if main:
                write_manifest(partial, {name: digest for own in ranks for name, digest in own.items()})
                put_in_place(partial, target)
    except Exception:
        if main:  # on a full disk it would take the room of what is tried next
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def every_rank(accelerator: Accelerator | None) -> Iterator[None]:
    """Wait for all ranks; where one has failed, all do, and none waits for it."""
    error = None
    try:
        yield
    except Exception as own:
        error = own
    if accelerator is not None and accelerator.num_processes > 1:
        failed = gather_object([f"rank {accelerator.process_index}: {error}"] if error else [])
        if failed and error is None:
            raise OSError(failed[0])
    if error is not None:
        raise error


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, hard-linked where the disk allows, never half-written under its name."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    keep_readme(target, partial)
    flush(partial)
    put_in_place(partial, target)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a folder that is on disk to `target`, and what was there away and then into nothing."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    flush_file(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that must not be met half deleted."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def sweep(parent: Path, name: str) -> None:
    """Delete what killed processes have left of folders whose names match `name`: half written, or half deleted."""
    for kind in ("partial", "old"):
        for leftover in parent.glob(f".{name}.{kind}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Share weights between two names; what people edit is a file of its own, so that the other one stays as it was."""
    if not source.endswith(".safetensors"):
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- what a folder holds --------------------------------------------------------------------------------------------


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the SHA-256 of every file, hashed here but for the `known` ones, and flush each to disk."""
    names, known = _files(folder), known or {}
    digests = {**_hash_all(folder, [name for name in names if name not in known]), **known}
    for found in digests.values():
        if isinstance(found, OSError):
            raise found
    write_json(folder / MANIFEST, {name: digests[name] for name in names})
    flush(folder)


def damage(folder: Path) -> str | None:
    """Return what is not as it was written, a file and what is wrong with it; None where everything is."""
    try:
        text = (folder / MANIFEST).read_text()
        digests = json.loads(text)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if not isinstance(digests, dict) or _as_json(digests) != text:
        return f"{MANIFEST} is not as it was written"
    present = set(_files(folder))
    if missing := sorted(digests.keys() - present):
        return f"{missing[0]} is missing, which {MANIFEST} lists"
    if added := sorted(present - digests.keys()):
        return f"{added[0]} is not among the files that {MANIFEST} lists"
    for name, found in _hash_all(folder, list(digests)).items():
        if isinstance(found, OSError):
            return f"{name} cannot be read ({found.strerror})"
        if found != digests[name]:
            return f"{name} is not what {MANIFEST} says"
    return None


def manifest_holds(folder: Path) -> bool:
    """Whether the files of a folder are those that the manifest names, unchanged."""
    return damage(folder) is None


def _files(folder: Path) -> list[str]:
    """Return everything below a folder that is no folder, but the manifest."""
    found = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return sorted(name for name in found if name != MANIFEST)


def _hash_all(folder: Path, names: list[str]) -> dict[str, str | OSError]:
    """Hash files side by side, which takes Python's lock from nobody; an error stands for what cannot be read."""

    def digest(name: str) -> str | OSError:
        try:
            return sha256(folder / name)
        except OSError as error:
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- onto the disk --------------------------------------------------------------------------------------------------


def flush(folder: Path) -> None:
    """Have every file and folder in a folder written to disk, itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush_file(path)
    flush_file(folder)


def flush_file(path: Path) -> None:
    """Have a file, or the names in a folder, written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, readable by people."""
    path.write_text(_as_json(content))


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
