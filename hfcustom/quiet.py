"""Libraries keep what they print to themselves: quiet() while small models are tried out, without_bars() while training has a bar."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what models, trainers and libraries print to themselves; one thread, which a tiny model is fastest with."""
    threads, level = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        torch.set_num_threads(threads)


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers draw no progress bar of its own, which would tear apart that of training."""
    before = logging.set_tqdm_hook(lambda _, args, options: logging.EmptyTqdm(*args, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
