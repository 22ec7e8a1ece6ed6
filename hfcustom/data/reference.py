"""cache_reference(): what the reference says about every answer, found once before a long preference training.

rows -> the same rows with a column more: of a pair `chosen_reference_log_probs` and `rejected_reference_log_probs`, of any
other row `reference_log_probs`, each one number, log p of the answer's supervised tokens. With it a step runs one forward
pass instead of two, and no second model has to be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, send_to_device
from rich.progress import track

from hfcustom.base import CustomVLM
from hfcustom.console import out
from hfcustom.data.checks import kind_of
from hfcustom.data.collate import Collator
from hfcustom.data.findings import SHOWN, Finding
from hfcustom.data.messages import Example
from hfcustom.data.row_forms import SIDES
from hfcustom.data.sources import RowsWithColumns, as_examples
from hfcustom.data.steps import Attempts, StepCollator, TooManyBadRows
from hfcustom.losses import frozen_pass
from hfcustom.naming import unknown
from hfcustom.parts import unwrap
from hfcustom.train import choose_precision, process_state
from hfcustom.train_config import TrainConfig

COLUMN = "reference_log_probs"


def cache_reference(
    model: Any,
    processor: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 8,
    precision: Literal["fp32", "bf16"] | None = None,
    train_on: Literal["assistant", "last"] = "assistant",
    allowed_tokens: Sequence[str] = (),
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_share: float = TrainConfig.max_bad_share,
    exclude: str | None = None,
) -> RowsWithColumns:
    """Return the rows with the reference's log-probabilities of their answers, which `fit` gives to the losses that ask.

    The reference is the model given to `set_reference`, else this one without its adapter, else this one as it is now. It
    runs where it is (`model.to("cuda")` first), in the precision that `fit` would choose: give both the same, and the same options
    of rows. Several processes share the work. With on_bad_row="skip" a row that cannot be used is named, has NaN in the
    columns, and is bad for `fit` too, which leaves it out; so is one that `exclude` lists. Raises TypeError for a model that is
    not custom, ValueError for no rows, RowError for a row that cannot be used, TooManyBadRows for more than the share.
    """
    core = unwrap(model)
    if not isinstance(core, CustomVLM):
        raise TypeError(
            f"cache_reference() wants a custom model; load the {type(core).__name__} with its custom class."
        )
    examples = as_examples(rows)
    if not len(examples) or batch_size < 1:
        raise ValueError(f"{len(examples)} rows in batches of {batch_size}: give at least one row and batch_size=1.")
    _check_options(on_bad_row, max_bad_share)
    low = choose_precision(model, TrainConfig(precision=precision)) == "bf16"
    state = process_state()
    collate = Collator(processor, train_on=train_on, allowed_tokens=allowed_tokens, head_size=core.head_size())
    attempts = Attempts(examples, skip_bad_rows=on_bad_row == "skip", exclude=exclude)
    steps = StepCollator(collate, batch_size, skip_bad_rows=attempts.skip_bad_rows, kind=kind_of(attempts.first()))
    own = range(0, len(examples), batch_size)[state.process_index :: state.num_processes]
    quiet = not (out.is_terminal and state.is_main_process)
    found: dict[int, dict[str, float]] = {}
    bad: dict[int, Finding] = {}
    for start in track(own, "caching the reference", console=out, transient=True, disable=quiet):
        rows_at = {at: attempts[at] for at in range(start, min(start + batch_size, len(examples)))}
        step = steps(list(rows_at.values()))
        named = {found.row: found for found in step.skipped}
        bad |= {
            at: row if isinstance(row, Finding) else named[row.name]
            for at, row in rows_at.items()
            if isinstance(row, Finding) or row.name in named
        }
        used = {at: row for at, row in rows_at.items() if at not in bad}
        for batch in step.batches:
            log_probs = _reference_log_probs(core, batch, low).tolist()
            found |= dict(zip(used, _by_name(list(used.values()), log_probs), strict=True))
    if state.num_processes > 1:
        found, bad = (
            {at: value for part in gather_object([own]) for at, value in part.items()} for own in (found, bad)
        )
    _say_bad(bad, set(attempts.excluded), len(examples), max_bad_share)
    names = dict.fromkeys(name for values in found.values() for name in values)
    columns = {name: [math.nan if at in bad else found[at][name] for at in range(len(examples))] for name in names}
    return RowsWithColumns(examples, columns, bad)


def _check_options(on_bad_row: str, max_bad_share: float) -> None:
    if on_bad_row not in ("error", "skip"):
        raise ValueError(unknown("on_bad_row", on_bad_row, ("error", "skip")))
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share={max_bad_share} must be in [0, 1].")


def _say_bad(bad: Mapping[int, Finding], excluded: Collection[int], num_rows: int, max_share: float) -> None:
    """Name the rows that were left out, in order; TooManyBadRows for more than the share, those excluded aside."""
    left_out = [found.reason for at, found in sorted(bad.items()) if at not in excluded]
    for reason in left_out if process_state().is_main_process else ():
        out.print(f"left out: {reason}", markup=False)
    if len(left_out) > max_share * num_rows or len(bad) == num_rows:
        first = "\n  ".join(left_out[:SHOWN])
        raise TooManyBadRows(
            f"{len(left_out)} of {num_rows} rows cannot be used, more than max_bad_share={max_share} allows. The first are\n  "
            f"{first}"
        )


def _reference_log_probs(core: CustomVLM, batch: Mapping[str, torch.Tensor], low: bool) -> torch.Tensor:
    """Return log p of each row of a batch, (R,)."""
    other = core.companions.get("reference")
    with frozen_pass(core if other is None else other, with_adapter=other is not None) as seen:
        batch = send_to_device(dict(batch), seen.device)
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=low):
            return seen.loss_context(core.stock_inputs(batch), batch["labels"]).row_log_probs


def _by_name(examples: Sequence[Example], log_probs: Sequence[float]) -> list[dict[str, float]]:
    """Return the columns of each row; of a pair, the collator makes two rows of the batch."""
    names = [
        name
        for example in examples
        for name in ([COLUMN] if example.rejected is None else [f"{side}_{COLUMN}" for side in SIDES])
    ]
    width = len(names) // len(examples)
    pairs = list(zip(names, log_probs, strict=True))
    return [dict(pairs[at : at + width]) for at in range(0, len(pairs), width)]
