"""recipes/finetune_encoder.py: a checkpoint on rows of one's own, LoRA, the small CLIP, and options without effect."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import picture
from encoder_cases import WORDS, Encoder, encoders
from test_sources import write_jsonl
from transformers import AutoModel, AutoProcessor

import hfcustom
from hfcustom.encoders import class_of
from hfcustom.families import class_of as family_of
from hfcustom.options import ConfigError, read

SMALL = "--max-steps 2 --batch-size 4 --micro-batch-size 2 --log-steps 1"


@pytest.fixture
def recipe() -> ModuleType:
    import finetune_encoder

    return finetune_encoder


@pytest.fixture(params=sorted(encoders()))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return encoders()[request.param]


@pytest.fixture
def folder(encoder: Encoder, tmp_path: Path) -> Path:
    """A folder of the stock class as the hub lays it out, and rows beside it."""
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "stock")
    encoder.processor.save_pretrained(tmp_path / "stock")
    rows = [{"image": f"{at}.png", "caption": text} for at, text in enumerate(WORDS)]
    for at in range(len(rows)):
        picture(at).save(tmp_path / f"{at}.png")
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    return tmp_path


def finetune(recipe: ModuleType, folder: Path, *flags: str) -> dict[str, float]:
    fixed = f"--model {folder / 'stock'} --data {folder / 'pairs.jsonl'} --output-dir {folder / 'out'} {SMALL}"
    found: dict[str, float] = recipe.main(read(recipe.FinetuneEncoderConfig, None, [*fixed.split(), *flags]))
    return found


def test_a_stock_checkpoint_is_trained_scored_and_loads_in_the_stock_class(
    recipe: ModuleType, encoder: Encoder, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = finetune(
        recipe, folder, "--freeze", "vision", "--eval-data", str(folder / "pairs.jsonl"), "--eval-steps", "1"
    )
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == sum("image_to_text_recall" in line for line in lines) == 2
    assert (
        set(recall) == {"image_to_text_recall", "text_to_image_recall"} and "held-out rows" in capsys.readouterr().out
    )
    stock, info = encoder.stock_class.from_pretrained(folder / "out" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = encoder.stock_class.from_pretrained(folder / "stock").state_dict()
    moved = {name.partition(".")[0] for name, p in stock.named_parameters() if not torch.equal(p, before[name])}
    assert "text_model" in moved and "vision_model" not in moved
    assert type(AutoModel.from_pretrained(folder / "out" / "model")) is encoder.model_class
    assert type(AutoProcessor.from_pretrained(folder / "out" / "model")) is encoder.model_class.processor_class


def test_lora_and_a_loss_that_is_named(recipe: ModuleType, encoder: Encoder, folder: Path) -> None:
    assert finetune(recipe, folder, "--lora", "--lora-rank", "2", "--loss", "contrastive") == {}
    merged = hfcustom.merge_adapter(folder / "out" / "model", folder / "stock")
    assert type(merged) is encoder.model_class and merged.config.loss == "contrastive"
    if "logit_bias" not in dict(encoder.model(encoder.stock_class).named_parameters()):
        with pytest.raises(ValueError, match="'logit_bias' is a bare Parameter.*or train without LoRA"):
            finetune(recipe, folder, "--overwrite", "--lora", "--loss", "sigmoid_contrastive")


def test_the_small_clip_learns_from_scans(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "TRAIN_ROWS", 16)
    config = read(
        recipe.FinetuneEncoderConfig, None, [*SMALL.split(), "--output-dir", str(tmp_path), "--eval-rows", "8"]
    )
    assert set(recipe.main(config)) == {"image_to_text_recall", "text_to_image_recall"}
    assert (config.lr, config.max_steps) == (recipe.OPTIONS["lr"], 2)  # a flag wins
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "half": ("--model m", "model='m' and data='': give both, or neither"),
        "adapter of nothing": ("--lora", "lora needs --model"),
        "frozen nothing": ("--freeze vision", "freeze has no effect without --model"),
        "both": ("--model m --data d --lora --freeze vision", "freeze has no effect with --lora"),
        "rank": ("--model m --data d --lora-rank 4", "lora_rank has no effect without --lora"),
        "eval": ("--model m --data d --eval-steps 4", "eval_steps has no effect without --eval-data"),
        "rows": ("--eval-rows 0", "eval_rows=0 must be positive"),
    }.values(),
)
def test_options_without_effect_are_errors(recipe: ModuleType, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(recipe.FinetuneEncoderConfig, None, flags.split())


def test_checkpoints_find_the_kind_of_class_that_reads_them(encoder: Encoder, folder: Path) -> None:
    assert class_of(str(folder / "stock")) is encoder.model_class
    with pytest.raises(ValueError, match=rf"is a contrastive encoder \({encoder.name}\).*recipes/finetune_encoder.py"):
        family_of(str(folder / "stock"))
    config = json.loads((folder / "stock" / "config.json").read_text())
    (folder / "stock" / "config.json").write_text(json.dumps({**config, "model_type": "clipp"}))
    with pytest.raises(ValueError, match="Unknown model_type of an encoder: 'clipp'. Did you mean 'clip'"):
        class_of(str(folder / "stock"))
