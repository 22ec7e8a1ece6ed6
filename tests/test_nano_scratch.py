"""recipes/nano_scratch.py: a short run trains, saves, reloads, reads and reports; its own flags are checked."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig

from hfcustom.options import ConfigError, read


@pytest.fixture
def recipe() -> ModuleType:
    import nano_scratch

    return nano_scratch


def test_a_short_run_writes_what_it_says(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--max-steps 30 --batch-size 8 --warmup-steps 3 --log-steps 1 --train-rows 40 --held-out-rows 6 --width 32 --layers 1"
    config = read(recipe.NanoScratchConfig, None, [*small.split(), "--output-dir", str(tmp_path)])
    accuracy = recipe.main(config)
    printed = capsys.readouterr().out
    assert f"Digits read right: {accuracy:.3f}." in printed
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    assert {path.name for path in tmp_path.iterdir()} >= {"model", "metrics.jsonl", "result.html", "result.png"}
    assert f"{accuracy:.3f}" in (tmp_path / "result.html").read_text()
    saved = AutoConfig.from_pretrained(tmp_path / "model")
    assert (saved.model_type, saved.text_config.hidden_size, saved.text_config.num_hidden_layers) == (
        "custom_nano",
        32,
        1,
    )


def test_an_image_token_is_one_digit(recipe: ModuleType) -> None:
    from hfcustom.data.digits import CELL, SIDE

    processor = recipe.build_processor()
    model = recipe.build_model(processor, 32, 1)
    assert processor.image_seq_len == model.tokens_per_crop() == SIDE**2
    assert CELL == recipe.PATCH_SIZE * recipe.SCALE


@pytest.mark.parametrize("flags", ["--width 48", "--layers 0", "--threads 0", "--lr 0"])
def test_a_size_out_of_range_is_named(recipe: ModuleType, flags: str) -> None:
    name, value = flags.removeprefix("--").split()
    with pytest.raises(ConfigError, match=f"{name}={float(value):g}|{name}={value}"):
        read(recipe.NanoScratchConfig, None, flags.split())
