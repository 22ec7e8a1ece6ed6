"""recipes/bare_loop.py, the loop to read, prints the losses that fit() logs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from accelerate.utils import set_seed
from training import curve

import hfcustom
from hfcustom.data.digits import digit_rows
from hfcustom.train import fit
from hfcustom.train_config import TrainConfig

STEPS, WARMUP_STEPS, ROWS = 6, 2, 80  # the schedule falls for four steps, the rows come round twice


@pytest.fixture
def bare_loop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe on a short schedule; imported here, where no list of losses has yet to be collected."""
    import bare_loop

    import quickstart

    hfcustom.term(count="image_tokens")(quickstart.feature_energy)  # a test before this one may have forgotten them
    hfcustom.connector(quickstart.MergeNeighbours)
    hfcustom.register(quickstart.DigitReader)
    monkeypatch.setattr(bare_loop, "STEPS", STEPS)
    monkeypatch.setattr(bare_loop, "WARMUP_STEPS", WARMUP_STEPS)
    return bare_loop


def test_the_bare_loop_and_fit_log_the_same_losses(
    bare_loop: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bare_loop.main(num_rows=ROWS, steps=STEPS)
    assert capsys.readouterr().out.count("cross_entropy") == 2  # the first step's line and the last's
    config = TrainConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        batch_size=bare_loop.BATCH_SIZE,
        micro_batch_size=bare_loop.MICRO_BATCH_SIZE,
        lr=bare_loop.PEAK_LR,
        min_lr_ratio=bare_loop.MIN_LR_RATIO,
        warmup_steps=WARMUP_STEPS,
        weight_decay=bare_loop.WEIGHT_DECAY,
        max_grad_norm=bare_loop.MAX_GRAD_NORM,
        log_steps=1,
    )
    set_seed(0)
    processor = bare_loop.build_processor()
    model = bare_loop.build_model(processor)
    result = fit(model, processor, digit_rows(ROWS), config)
    assert found == pytest.approx(curve(result), rel=1e-6)
    assert len(found) == STEPS and found[-1] < found[0]
    assert {"cross_entropy", "feature_energy"} <= result.history[0].keys()
