"""Random generators: their state as tensors, and row_random(), which ties what is drawn to a row and not to a process.

While a row is read, and while rows are collated, the generators of torch (on the CPU), numpy and Python start from a seed
made of (the run's seed, the row's place in the run's order), and afterwards stand where they stood. So a random crop is the
same with 0, 1, 2 or 4 loading processes, in a resumed run too, and moves nothing of what dropout draws. A generator of one's own
(`numpy.random.default_rng()`, that of an augmentation library) starts the same way from `row_seed()`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROW_SEED: ContextVar[int | None] = ContextVar("hfcustom row seed", default=None)


@contextmanager
def row_random(*key: int | str) -> Iterator[None]:
    """Within, let random numbers follow from the key alone; outside nothing has moved."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    token = ROW_SEED.set(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPU
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])
    random.seed(seed)
    try:
        yield
    finally:
        ROW_SEED.reset(token)
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def row_seed() -> int:
    """Return the seed of the row that fit() is reading, for a generator of one's own; elsewhere one that Python's draws."""
    seed = ROW_SEED.get()
    return random.getrandbits(63) if seed is None else seed


def save_rng(path: Path) -> None:
    """Write the random state of this process."""
    save_file(rng_state(), path)


def load_rng(path: Path) -> None:
    """Restore what `save_rng` wrote."""
    set_rng_state(load_file(path))


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of the torch, CUDA, numpy and Python generators of this process as tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python_words": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda_{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def set_rng_state(tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, *words = tensors["python_words"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python_gauss"].tolist()), None)))
    if cuda := [name for name in tensors if name.startswith("cuda_")]:
        torch.cuda.set_rng_state_all([tensors[f"cuda_{at}"] for at in range(len(cuda))])
