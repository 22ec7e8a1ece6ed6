"""hfcustom plan: read the options, measure, try changes, and print one screen or JSON."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

from hfcustom.exits import EXIT_CONFIG
from hfcustom.options import ConfigError
from hfcustom.plan.config import Recipe, read_plan

if TYPE_CHECKING:
    from hfcustom.plan.report import Plan

EXIT_USAGE = 2


def run_plan(argv: Sequence[str], description: str) -> int:
    """Plan as the command line asks; return 0, 1 where the GPU that was named is too small, 2 or 3 for a mistake."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        config, recipe = read_plan(argv, description)
    except ConfigError as error:
        print(f"hfcustom plan: {error}", file=sys.stderr)
        return EXIT_CONFIG
    with _on_cpu(), TemporaryDirectory(prefix="hfcustom-plan-") as folder:
        try:
            return _plan(config, recipe, Path(folder))
        except (OSError, ImportError, ValueError, AttributeError) as error:
            print(f"hfcustom plan: {error}", file=sys.stderr)
            return EXIT_USAGE


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Leave this machine's GPUs, where there are some, to others; and training's start-up facts unsaid."""
    from hfcustom.console import out

    quiet, loggers = out.quiet, [logging.getLogger(name) for name in ("hfcustom", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        out.quiet = True
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            out.quiet = quiet
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _plan(config: Any, recipe: Recipe, folder: Path) -> int:
    """Plan each stage of a recipe that has some; return the exit code."""
    import json

    from hfcustom.plan.published import settle_model
    from hfcustom.plan.report import show, to_json

    model = settle_model(config, folder)
    plans = {name: _plan_one(stage, recipe, model) for name, stage in recipe.stages(config).items()}
    if config.json:
        found = {name: to_json(plan) for name, plan in plans.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=2))
    else:
        for name, plan in plans.items():
            show(plan, f"stage {name}" if len(plans) > 1 else "")
    return int(any(plan.fits is False for plan in plans.values()))


def _plan_one(config: Any, recipe: Recipe, model: str) -> Plan:
    from hfcustom.plan.advice import advise
    from hfcustom.plan.measure import Measured, measure
    from hfcustom.plan.report import Plan, progress
    from hfcustom.plan.sharding import check_sharding, share_of

    with progress(config.json) as tell:

        def measured_with(changed: Any) -> Measured:
            return measure(changed, recipe.build, recipe.batches)

        tell("the run as it is")
        measured = measured_with(config)
        check_sharding(measured, config.shard)
        plan = Plan(config, model, measured, share_of(measured, config.gpus, config.shard))
        if not plan.fits if config.advice == "auto" else config.advice == "always":
            plan.advice = advise(config, measured, measured_with, tell)
    return plan
