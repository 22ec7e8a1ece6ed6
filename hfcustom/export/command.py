"""What `hfcustom export` prints: each stage as it begins, what was checked, or why the stock class cannot have it."""

from __future__ import annotations

import argparse
import sys
import time

from hfcustom.export.write import NotStock, export_checkpoint
from hfcustom.naming import load_object

EXIT_FAILED, EXIT_USAGE = 1, 2


def run_export(options: argparse.Namespace) -> int:
    """Export as asked; return 0, 1 where the export cannot be or went wrong, 2 for what is no checkpoint or no place."""
    start = time.perf_counter()

    def say(stage: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {stage}", flush=True)

    try:
        if options.custom:
            load_object(options.custom, "model")
        done = export_checkpoint(
            options.checkpoint,
            options.out,
            base=options.base,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            weights_only=options.weights_only,
            check=options.verify,
            say=say,
        )
    except (RuntimeError, ValueError, OSError, ImportError, AttributeError, TypeError) as error:
        print(f"hfcustom export: {error}\nNothing was written.", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, NotStock | RuntimeError) else EXIT_USAGE
    if options.weights_only and not done.dropped:
        say("--weights-only had nothing to leave out: the stock class computes the same")
    for item in done.dropped:
        say(f"left out, as --weights-only allows: {item}")
    say(f"checked: {done.verdict}" if done.verdict else "not checked: --no-verify")
    say(f"{done.folder} is a checkpoint of {done.stock_class}, of {done.num_tensors} tensors")
    return 0
