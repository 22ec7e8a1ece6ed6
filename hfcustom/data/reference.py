"""cache_reference(): what the reference says about every answer, found once before a long preference training.

rows -> the same rows with a column more: of a pair `chosen_reference_log_probs` and `rejected_reference_log_probs`, of any
other row `reference_log_probs`, each one number, log p of the answer's supervised tokens. With it a step runs one forward
pass instead of two, and no second model has to be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, send_to_device
from rich.progress import track

from hfcustom.base import CustomVLM
from hfcustom.console import out
from hfcustom.data.collate import Collator
from hfcustom.data.messages import Example
from hfcustom.data.row_forms import SIDES
from hfcustom.data.sources import RowsWithColumns, as_examples
from hfcustom.losses import frozen_pass
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
) -> RowsWithColumns:
    """Return the rows with the reference's log-probabilities of their answers, which `fit` gives to the losses that ask.

    The reference is the model given to `set_reference`, else this one without its adapter, else this one as it is now. It
    runs where it is (`model.to("cuda")` first), in the precision that `fit` would choose: give both the same, and the same `train_on`
    and `allowed_tokens`. Several processes share the work. Raises TypeError for a model that is not custom, ValueError for no rows, RowError for a row
    that cannot be used.
    """
    core = unwrap(model)
    if not isinstance(core, CustomVLM):
        raise TypeError(
            f"cache_reference() wants a custom model; load the {type(core).__name__} with its custom class."
        )
    examples = as_examples(rows)
    if not len(examples) or batch_size < 1:
        raise ValueError(f"{len(examples)} rows in batches of {batch_size}: give at least one row and batch_size=1.")
    low = choose_precision(model, TrainConfig(precision=precision)) == "bf16"
    state = process_state()
    collate = Collator(processor, train_on=train_on, allowed_tokens=allowed_tokens, head_size=core.head_size())
    starts = range(0, len(examples), batch_size)
    own = starts[state.process_index :: state.num_processes]
    quiet = not (out.is_terminal and state.is_main_process)
    found: dict[int, dict[str, float]] = {}
    for start in track(own, "caching the reference", console=out, transient=True, disable=quiet):
        chunk = [examples[at] for at in range(start, min(start + batch_size, len(examples)))]
        log_probs = _reference_log_probs(core, collate(chunk), low).tolist()
        found |= {start + at: values for at, values in enumerate(_by_name(chunk, log_probs))}
    if state.num_processes > 1:
        found = {at: values for part in gather_object([found]) for at, values in part.items()}
    names = dict.fromkeys(name for values in found.values() for name in values)
    return RowsWithColumns(examples, {name: [found[at][name] for at in range(len(examples))] for name in names})


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
