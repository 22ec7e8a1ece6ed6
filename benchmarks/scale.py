"""Whether memory follows the number of rows: of a long stream, read and collated, and of a preflight over as many.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 1000000 --copies 0.5

Rows of text are made in a temporary folder, one in ten with one of 50 pictures; `copies` is the share of rows with the same
text. Each way runs in a process of its own. Prints a table: the resident memory after a tenth of the time, the most that it
grew by after that, and the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from hfcustom.options import parse


@dataclass(kw_only=True)
class ScaleConfig:
    """Sizes; each annotation is the flag's help."""

    rows: Annotated[int, "rows that are read"] = 200_000
    rounds: Annotated[int, "epochs of the streams"] = 1
    copies: Annotated[float, "share of the rows that are the same"] = 0.0
    shuffle_buffer: Annotated[int, "of the streams"] = 1000

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        rules = [
            (self.rows >= 100, f"rows={self.rows} must be at least 100"),
            (self.rounds > 0, f"rounds={self.rounds} must be positive"),
            (0 <= self.copies <= 1, f"copies={self.copies} must be in [0, 1]"),
            (self.shuffle_buffer >= 0, f"shuffle_buffer={self.shuffle_buffer} must not be negative"),
        ]
        return [message for holds, message in rules if not holds]


if __name__ == "__main__":
    CONFIG = parse(ScaleConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from hfcustom.console import show_table
from hfcustom.data.collate import Collator
from hfcustom.data.scan import ScanOptions, ScanState
from hfcustom.data.sources import load_rows
from hfcustom.data.streams import Share
from hfcustom.families import load_family
from hfcustom.preflight import add_findings_over_all, scan

PICTURES = 50
WATCH_S = 0.05


def make_rows(folder: Path, config: ScaleConfig) -> Path:
    """Write the rows and their pictures."""
    draw, pixels = random.Random(0), np.random.default_rng(0)
    for at in range(PICTURES):
        Image.fromarray(pixels.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{at}.png")
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for at in range(config.rows):
            own = [str(at), *(f"w{draw.randrange(5000)}" for _ in range(30))]
            text = "the same" if draw.random() < config.copies else " ".join(own)
            images = [f"{at // 10 % PICTURES}.png"] if at % 10 == 0 else []
            ask = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": "So it is."}]
            file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    return path


def stream(path: Path, config: ScaleConfig) -> None:
    """Read every row of every epoch."""
    cursor = load_rows(path, streaming=True, shuffle_buffer=config.shuffle_buffer).cursor(Share(), 0)
    for _ in range(config.rows * config.rounds):
        next(cursor)


def collated(path: Path, config: ScaleConfig) -> None:
    """Read a tenth of the rows and make batches of eight of them."""
    cursor = load_rows(path, streaming=True, shuffle_buffer=config.shuffle_buffer).cursor(Share(), 0)
    collate = Collator(load_family("smolvlm").tiny_processor())
    for _ in range(config.rows * config.rounds // 80):
        collate([next(cursor) for _ in range(8)])


def preflight(path: Path, config: ScaleConfig) -> None:
    """Scan every row in this process, then look for copies."""
    options = ScanOptions(str(path))
    state = ScanState(path.with_suffix(".part"))
    scan(options, options.load_sets(), state, 0)
    add_findings_over_all(state)
    state.close(delete=True)


WAYS: dict[str, Callable[[Path, ScaleConfig], None]] = {"collated": collated, "preflight": preflight, "stream": stream}


def measure(way: str, path: Path, config: ScaleConfig) -> tuple[float, float, float]:
    """Return the MiB held after a tenth of the time, the MiB more at the most after that, and the seconds."""
    process, started = psutil.Process(), time.monotonic()
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def look() -> None:
        seen.append((time.monotonic() - started, process.memory_info().rss / 2**20))

    def watch() -> None:
        while not done.wait(WATCH_S):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        WAYS[way](path, config)
    finally:
        done.set()
        watcher.join()
    look()
    seconds = seen[-1][0]
    late = [held for at, held in seen if at >= seconds / 10]
    return late[0], max(late) - late[0], seconds


def main(config: ScaleConfig) -> None:
    """Measure each way in a fresh process and print the table."""
    counts = {"collated": config.rows * config.rounds // 10, "stream": config.rows * config.rounds}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_rows(Path(folder), config)
        for way in WAYS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                held, growth, seconds = pool.submit(measure, way, path, config).result()
            lines.append((way, counts.get(way, config.rows), f"{held:.0f}", f"{growth:.1f}", f"{seconds:.1f}"))
    show_table(("what", "rows", "MiB after a tenth", "MiB more at most", "seconds"), lines)


if __name__ == "__main__":
    main(CONFIG)
