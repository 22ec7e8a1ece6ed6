"""Exit codes of a run, in one place, and the errors that lead to them.

    code  what happened                                           what to do
    0     done
    3     config: an option, a folder or a change at resume       correct what the message names
    4     data: a row, or too many of them, cannot be used        look at bad_rows.jsonl
    5     numeric: a loss or gradient is NaN, infinite, a spike   look at the rows; --resume with a lower rate
    6     checkpoint: it cannot be written or does not fit        free space, or resume as the run was begun
    7     preempted: stopped by a signal, saved                   start again with --resume
    8     a rank or a data-loading process died or hangs          look at its row or node, then --resume
    9     upload: the model is saved, but not on the hub          the command that the message names

A recipe wraps its work in `exit_codes`; a bug stays a traceback with exit code 1. Nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_DONE = 0
EXIT_CONFIG = 3
EXIT_DATA = 4
EXIT_NUMERIC = 5
EXIT_CHECKPOINT = 6
EXIT_PREEMPTED = 7
EXIT_RANK = 8
EXIT_UPLOAD = 9


class RunError(Exception):
    """What ends a run for a reason that the user can do something about."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """One or more options that cannot be used, all in one message."""

    exit_code = EXIT_CONFIG


class MissingError(ConfigError, FileNotFoundError):
    """A file or folder that an option names and that is not there."""


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that does not fit the run."""

    exit_code = EXIT_CHECKPOINT


class SaveError(CheckpointError, OSError):
    """A checkpoint that cannot be written; those before it are as they were."""


class RankError(RunError, RuntimeError):
    """Another process of a run has died or does not answer."""

    exit_code = EXIT_RANK


class WorkerError(RunError, RuntimeError):
    """A data-loading process has died or hangs."""

    exit_code = EXIT_RANK


class UploadError(RunError, RuntimeError):
    """A trained model that did not reach the hub; it is saved, and the message names the command to try again."""

    exit_code = EXIT_UPLOAD


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error that a user can do something about into its message and its exit code."""
    try:
        yield
    except RunError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from error
