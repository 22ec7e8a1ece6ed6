"""A loss or a gradient that is no number ends the run before it is applied, with rows, the last good checkpoint and code 5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from training import short_config, uneven_rows, user_losses

import hfcustom
from hfcustom.exits import EXIT_NUMERIC, exit_codes
from hfcustom.losses import NonFiniteError
from hfcustom.train import fit


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_is_not_applied_and_the_rows_and_the_last_good_checkpoint_are_named(
    value: float, tmp_path: Path
) -> None:
    with user_losses():

        @hfcustom.token_loss
        def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return logits.logsumexp(-1) * (value if hfcustom_step[0] == 3 else 1.0)

        hfcustom_step = [0]
        model = tiny_run.FAMILY.model(loss="poisoned")

        def evaluate(model: Any, step: int) -> dict[str, float]:
            hfcustom_step[0] = step
            return {}

        config = short_config(tmp_path, max_steps=8, batch_size=4, micro_batch_size=2, save_steps=1, eval_steps=1)
        with pytest.raises(NonFiniteError) as error:
            fit(model, tiny_run.FAMILY.processor, uneven_rows(), config, evaluate=evaluate)
    text = str(error.value)
    assert "the step was not applied" in text and "Look at row " in text
    assert "The last good checkpoint is" in text and "step-000003; continue with --resume" in text
    assert error.value.exit_code == EXIT_NUMERIC == 5
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["loss"] for line in logged if "loss" in line)
    saved = load_file(tmp_path / "checkpoints" / "step-000003" / "model" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name].detach(), saved[name]) for name in saved if name in parameters)


def test_a_recipe_ends_with_the_code_and_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, exit_codes():
        raise NonFiniteError("The losses are nan.")
    assert exit_.value.code == 5 and capsys.readouterr().err.endswith(": The losses are nan.\n")


def test_a_bug_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes():
        raise ZeroDivisionError


def test_a_poisoned_row_is_named(tmp_path: Path) -> None:
    """A weight of its own that overflows in one row's loss."""
    rows = uneven_rows()
    rows[5]["messages"][-1]["weight"] = 3e38
    rows[5]["messages"][-1]["content"] = "a b c d e f"
    config = short_config(tmp_path, batch_size=8, micro_batch_size=1)
    with pytest.raises(NonFiniteError, match=r"Look at row 5\. There is no checkpoint yet"):
        fit(tiny_run.FAMILY.model(loss="weighted_cross_entropy"), tiny_run.FAMILY.processor, rows, config)
