"""The resume matrix: workers x randomness x map/stream x full/LoRA x AdamW/8-bit x cut step; each cell exact, or it is a fault.

python tests/faults/matrix.py        # every cell, as `make faults` does
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kills import LOG, start, wait
from tiny_run import SOURCES, Run, end_of, newest, train

STEPS = 4  # of two epochs
AXES: dict[str, Sequence[Any]] = {
    "workers": (0, 2, 4),
    "source": (None, *SOURCES),
    "stream": (False, True),
    "lora": (False, True),
    "optimizer": ("adamw", "adamw_8bit"),
    "cut": tuple(range(1, STEPS)),
}
Cell = tuple[Any, ...]


def all_cells() -> list[Cell]:
    return list(itertools.product(*AXES.values()))


def covering_cells() -> list[Cell]:
    """Return few cells in which every two values of two axes meet: the best of some random ones, until no pair is left."""

    def pairs(cell: Cell) -> set[tuple[Any, ...]]:
        return {(i, j, cell[i], cell[j]) for i, j in itertools.combinations(range(len(cell)), 2)}

    cells, dice = all_cells(), random.Random(0)
    left = set().union(*map(pairs, cells))
    chosen = []
    while left:
        best = max(dice.sample(cells, 60), key=lambda cell: len(pairs(cell) & left))
        if gain := pairs(best) & left:
            chosen.append(best)
            left -= gain
    return chosen


def run_of(cell: Cell) -> Run:
    return Run(**dict(zip(list(AXES)[:-1], cell, strict=False)))


def unbroken(run: Run, folder: Path) -> dict[str, Any]:
    """Train a run with a checkpoint after each step; return how it ended."""
    train(run, folder, max_steps=STEPS, keep_checkpoints=STEPS)
    return end_of(folder)


def resumed(run: Run, folder: Path, cut: int, place: Path) -> dict[str, Any]:
    """Resume a copy of an unbroken run at a step; return how it ended."""
    shutil.copytree(folder, place)
    shutil.rmtree(place / "model")
    for step in range(cut + 1, STEPS + 1):
        shutil.rmtree(place / "checkpoints" / f"step-{step:06d}")
    train(run, place, max_steps=STEPS, keep_checkpoints=STEPS, resume=True)
    assert newest(place).name == f"step-{STEPS:06d}"
    return end_of(place)


def main() -> int:
    began, wrong, count = time.monotonic(), [], 0
    for run in dict.fromkeys(map(run_of, all_cells())):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def whole(run: Run = run, folder: Path = folder) -> None:
                expected = unbroken(run, folder / "unbroken")
                for cut in AXES["cut"]:
                    if resumed(run, folder / "unbroken", cut, folder / str(cut)) == expected:
                        (folder / f"{cut} is exact").touch()

            code = wait(start(whole, folder / LOG))
            exact = [cut for cut in AXES["cut"] if (folder / f"{cut} is exact").exists()]
            count += len(AXES["cut"])
            wrong += [f"{run.name}, cut at {cut}" for cut in AXES["cut"] if cut not in exact]
            if code:
                print((folder / LOG).read_text()[-2000:])
    print("".join(f"  differs: {text}\n" for text in wrong), end="")
    print(
        f"{count - len(wrong)} of {count} cells of the resume matrix are bit-equal ({time.monotonic() - began:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
