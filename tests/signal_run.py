"""What tests/test_signals.py interrupts: a run that, after its second step, waits for a line on its standard input.

python tests/signal_run.py FOLDER NUM_WORKERS
"""

from __future__ import annotations

import select
import sys
from pathlib import Path
from typing import Any

from conftest import Family
from torch import nn
from training import add_dropout, train

from hfcustom.families import load_family
from hfcustom.train import TrainResult

WAITING = "waiting for a line"


def run(folder: Path, wait: bool = False, **options: Any) -> tuple[TrainResult, nn.Module]:
    """Train with dropout for five steps."""
    family = Family("internvl", load_family("internvl"))
    model = family.model()
    add_dropout(model, 0.3)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        if wait and step == 2:
            print(WAITING, flush=True)
            while not select.select([sys.stdin], [], [], 0.05)[0]:
                pass  # Python handles signals here: one that comes just before a blocking read would go unseen
            sys.stdin.readline()
        return {}

    return train(model, family, folder, max_steps=5, evaluate=evaluate, eval_steps=1, **options), model


if __name__ == "__main__":
    run(Path(sys.argv[1]), wait=True, num_workers=int(sys.argv[2]))[0].exit_if_interrupted()
