"""Recipes, found by enumeration: help at once, mistakes named, nothing at import; and finetune.py in all its ways."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPES, ROOT, Family, chat_row
from kinds import family_of_each_kind  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfcustom.data.turns import RowError
from hfcustom.exits import exit_codes
from hfcustom.options import ConfigError, read
from hfcustom.parts import find_parts

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(RECIPES / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", NAMES)
def test_help_answers_before_anything_heavy_is_imported(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "peft"}


@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_flag_is_an_error_before_anything_heavy_is_imported(name: str) -> None:
    done = script(name, "--outptu-dir", "x")
    assert done.returncode in (2, 3)
    assert f"{name}.py: " in done.stderr
    if "hfcustom.options" in (RECIPES / f"{name}.py").read_text():
        assert "Unknown flag --outptu-dir. Did you mean --output-dir?" in done.stderr
    assert "| torch\n" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_trains_ends_with_the_exit_codes(name: str) -> None:
    text = (RECIPES / f"{name}.py").read_text()
    assert ("hfcustom.fit(" in text) == text.endswith("    with exit_codes():\n        main(CONFIG)\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_gives_the_command(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((RECIPES / f"{name}.py").read_text()))
    assert docstring is not None
    assert re.search(rf"^    (accelerate launch|python) recipes/{name}\.py", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_importing_does_nothing_but_define(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    module = __import__(name)
    assert callable(module.main)
    assert not list(tmp_path.iterdir())


# ---- finetune.py ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(family: Family, tmp_path: Path) -> Path:
    """A folder of the stock class as the hub lays it out, and rows beside it."""
    return stock_checkpoint(family, tmp_path)


def stock_checkpoint(family: Family, folder: Path) -> Path:
    family.model(family.stock_class).save_pretrained(folder / "stock")
    family.processor.save_pretrained(folder / "stock")
    lines = []
    for at, images in enumerate([1, 2, 0, 1]):
        row = chat_row(images, at)
        for number, image in enumerate(row["images"]):
            image.save(folder / f"{at}-{number}.png")
        row["images"] = [f"{at}-{number}.png" for number in range(images)]
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def finetune(folder: Path, *arguments: str) -> Path:
    import finetune as recipe

    fixed = [
        "--model",
        str(folder / "stock"),
        "--data",
        str(folder / "rows.jsonl"),
        "--output-dir",
        str(folder / "out"),
    ]
    small = ["--max-steps", "2", "--batch-size", "2", "--log-steps", "1"]
    recipe.main(read(recipe.FinetuneConfig, recipe.__doc__, [*fixed, *small, *arguments]))
    return folder / "out"


def changed_parts(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    parts = find_parts(model)
    return {parts.part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_stock_checkpoint_is_trained_and_loads_through_auto(family: Family, checkpoint: Path) -> None:
    rates = ["--connector-lr", "1e-3"] if "connector" in family.parts else []
    out = finetune(checkpoint, "--freeze", "vision", *rates, "--eval-data", str(checkpoint / "rows.jsonl"))
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    before = AutoModelForImageTextToText.from_pretrained(checkpoint / "stock").state_dict()
    assert changed_parts(model, before) >= {"connector", "language"} & set(family.parts)
    assert "vision" not in changed_parts(model, before)
    assert AutoProcessor.from_pretrained(out / "model").chat_template
    assert len(losses(out)) == 2


def test_only_the_attention_of_a_part_can_be_trained(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    out = finetune(folder, "--freeze", "connector", "head", "--attention-only", "vision", "language")
    before = AutoModelForImageTextToText.from_pretrained(folder / "stock").state_dict()
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".attention." in name or ".self_attn." in name for name in moved)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_lora_on_quantised_weights_merges_into_full_precision(
    checkpoint: Path, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finetune(checkpoint, "--lora", "--load-in", bits, "--merge", "--connector", "average_pool", "--lr", "1e-2")
    assert ("Linear8bitLt" if bits == "8bit" else "Linear4bit") in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(out / "merged")
    before = AutoModelForImageTextToText.from_pretrained(checkpoint / "stock").state_dict()
    assert changed_parts(merged, before) == {"language"}
    assert {tensor.dtype for tensor in merged.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert merged.config.connector == "average_pool"


def test_resume_goes_on_with_the_same_losses(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    whole = losses(finetune(folder, "--max-steps", "4", "--save-steps", "2", "--keep-checkpoints", "9"))
    for last in ("checkpoints/step-000004/manifest.json", "model/config.json"):
        (folder / "out" / last).unlink()
    assert losses(finetune(folder, "--max-steps", "4", "--resume")) == whole


def test_a_class_and_a_loss_of_the_users_own(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    (folder / "mine_for_finetune.py").write_text(
        "import hfcustom\n"
        "from hfcustom.families.internvl import CustomInternVLForConditionalGeneration\n"
        "def harder(logits, targets, power: float = 2.0):\n"
        "    return (logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]) ** power\n"
        "@hfcustom.register\n"
        "class FinetunedReader(CustomInternVLForConditionalGeneration):\n"
        "    def transform_hidden_states(self, hidden_states):\n"
        "        return 2 * hidden_states\n"
    )
    file = folder / "mine_for_finetune.py"
    loss = json.dumps({f"{file}:harder": {"weight": 0.5, "power": 1.5}, "z_loss": 1e-4})
    out = finetune(folder, "--custom", f"{file}:FinetunedReader", "--loss", loss)
    model: Any = AutoModelForImageTextToText.from_pretrained(out / "model")
    assert type(model).__name__ == "FinetunedReader"
    assert model.config.loss == {"harder": {"weight": 0.5, "power": 1.5}, "z_loss": 1e-4}


STAGES = [
    {"name": "align", "train": ["connector"], "lr": 1e-2, "max_steps": 2},
    {"name": "instruct", "train": ["connector", "language"], "last_layers": {"language": 1}},
    {"name": "adapt", "lora": True, "lora_rank": {"vision": 2, "language": 4}, "lora_parts": ["vision", "language"]},
    {"name": "polish", "train": ["head"], "batch_size": 4},
]


def staged(folder: Path, *arguments: str, stages: Any = None) -> Path:
    return finetune(folder, *arguments, "--stages", *map(json.dumps, STAGES if stages is None else stages))


def test_stages_train_what_they_say_one_on_the_other(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    out = staged(folder)
    models = [folder / "stock", *(out / f"{path}" for path in ("1-align/model", "2-instruct/model", "3-adapt/merged"))]
    models.append(out / "4-polish/model")
    loaded = [AutoModelForImageTextToText.from_pretrained(path) for path in models]
    changes = [changed_parts(after, before.state_dict()) for before, after in zip(loaded, loaded[1:], strict=False)]
    assert changes == [{"connector"}, {"connector", "language"}, {"vision", "language"}, {"head"}]
    first, second = (model.model.language_model.layers for model in loaded[1:3])
    moved = [not torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight) for a, b in zip(first, second, strict=True)]
    assert moved == [False, True]


def test_an_interrupted_stage_is_resumed_and_the_end_is_the_same(internvl: Family, tmp_path: Path) -> None:
    folder, whole = stock_checkpoint(internvl, tmp_path), tmp_path / "whole"
    stages = STAGES[:2]
    staged(folder, "--output-dir", str(whole), stages=stages)
    out = staged(folder, "--save-steps", "1", "--keep-checkpoints", "9", stages=stages)
    for last in ("checkpoints/step-000002/manifest.json", "model/config.json"):
        (out / "2-instruct" / last).unlink()  # as if it had been stopped after one step
    staged(folder, "--save-steps", "1", "--keep-checkpoints", "9", "--resume", stages=stages)
    once, again = (load_file(path / "2-instruct/model/model.safetensors") for path in (whole, out))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def test_every_mistake_in_a_stage_is_named_before_the_first_one_runs(tmp_path: Path) -> None:
    import finetune as recipe

    stages: list[Any] = [
        {"name": "a", "trian": ["connector"]},
        {"name": "b", "lr": "fast"},
        {"name": "a", "freeze": ["vision"], "train": ["head"]},
        {"lr": 1e-3},
        {"name": "e", "output_dir": "x"},
    ]
    with pytest.raises(ConfigError) as caught:
        read(recipe.FinetuneConfig, None, ["--model", "m", "--data", "d", "--stages", *map(json.dumps, stages)])
    said = str(caught.value)
    for part in (
        "two stages are called 'a'",
        "stage 'a': Unknown key 'trian'. Did you mean 'train'?",
        "stage 'b': lr='fast': input should be a valid number",
        "stage 'a': freeze=['vision'] and train=['head'] exclude each other",
        "stage 4: name=None must be a word",
        "stage 'e': output_dir is for all stages; set it beside `stages`",
    ):
        assert part in said, said


@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_data_of_a_later_stage_that_are_not_there_are_told_before_the_first_one_runs(
    internvl: Family, tmp_path: Path, option: str
) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    stages = [STAGES[0], {**STAGES[1], option: str(tmp_path / "absent.jsonl")}]
    with pytest.raises(ConfigError, match=r"^stage 'instruct': .*absent\.jsonl"):
        staged(folder, stages=stages)
    assert not (folder / "out").exists()


MISTAKES = {
    "freeze": (["--freeze", "visoin"], "Unknown part 'visoin'.*Did you mean 'vision'"),
    "lora parts": (["--lora", "--lora-parts", "langauge"], "Unknown part 'langauge'.*'language'"),
    "loss": (["--loss", "focall"], "Unknown loss 'focall'. Did you mean 'focal'"),
    "connector": (["--connector", "average_pol"], "Unknown connector 'average_pol'. Did you mean 'average_pool'"),
    "custom form": (["--custom", "MyModel"], "'MyModel' is not of the form path/to/file.py:Name"),
    "custom file": (["--custom", "nowhere.py:MyModel"], "there is no file .*nowhere.py"),
    "lora rank": (
        ["--lora", "--lora-rank", '{"vision": 4}'],
        "rank={'vision': 4} names vision, but language get LoRA",
    ),
    "last layers": (["--last-layers", '{"language": 9}'], "keep_last=9: the part 'language' has 2 layers"),
    "vision lr": (["--freeze", "vision", "--vision-lr", "1e-5"], "vision_lr=1e-05 has no effect"),
    "epochs of a stream": (["--streaming", "--epochs", "2"], "epochs=2.0 has no effect beside max_steps="),
    "nothing left": (["--freeze", "vision", "connector", "language", "head"], "leaves nothing to train"),
    "no teacher": (["--teacher", "stock"], "teacher=stock has no effect"),
    "data": (["--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    "held-out data": (["--eval-data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    "exclude": (["--exclude", "nowhere.jsonl"], "exclude=nowhere.jsonl: there is no such file"),
    "tracker": (["--trackers", "tensorbord"], "Unknown tracker 'tensorbord'. Did you mean 'tensorboard'"),
    "occupied": (["--batch-size", "3", "--micro-batch-size", "2"], "batch_size=3 rows cannot be shared"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_values_are_named(mistake: str, internvl: Family, tmp_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    folder = stock_checkpoint(internvl, tmp_path)
    with pytest.raises(ConfigError, match=message):  # exit code 3, and no traceback
        finetune(folder, *arguments)


CONTRADICTIONS = {
    "quantised without lora": (["--load-in", "8bit"], "load_in=8bit needs --lora"),
    "merge without lora": (["--merge"], "merge has no effect without --lora"),
    "freeze with lora": (["--lora", "--freeze", "vision"], "freeze has no effect with --lora"),
    "train with lora": (["--lora", "--train", "vision"], "train has no effect with --lora"),
    "train and freeze": (["--train", "head", "--freeze", "vision"], "exclude each other"),
    "last layers with lora": (["--lora", "--last-layers", '{"vision": 1}'], "last_layers has no effect with --lora"),
    "no new token": (["--eval-data", "d", "--max-new-tokens", "0"], "max_new_tokens=0 must be positive"),
    "dropout": (["--lora", "--lora-dropout", "1.5"], r"lora_dropout=1.5 must be in \[0, 1\)"),
    "kind without lora": (["--lora-kind", "dora"], "lora_kind has no effect without --lora"),
    "attention with lora": (["--lora", "--attention-only", "vision"], "attention_only has no effect with --lora"),
    "attention of a frozen part": (["--freeze", "vision", "--attention-only", "vision"], "name a part twice"),
    "full without lora": (["--train-full", "connector"], "train_full has no effect without --lora"),
    "eval steps": (["--eval-steps", "5"], "eval_steps has no effect without --eval-data"),
    "bits": (["--load-in", "3bit"], "'3bit'.*'8bit' or '4bit'"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_options_without_effect_are_errors(contradiction: str) -> None:
    import finetune as recipe

    arguments, message = CONTRADICTIONS[contradiction]
    with pytest.raises(ConfigError, match=message):
        read(recipe.FinetuneConfig, None, ["--model", "m", "--data", "d", *arguments])


def test_a_checkpoint_of_no_family_is_named(tmp_path: Path, internvl: Family) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    config = json.loads((folder / "stock" / "config.json").read_text())
    (folder / "stock" / "config.json").write_text(json.dumps({**config, "model_type": "intern_vll"}))
    with pytest.raises(ValueError, match="Unknown model_type 'intern_vll'. Did you mean 'internvl'"):
        finetune(folder)


def test_the_seed_is_that_of_new_weights_too(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    first, again, other = (
        load_file(finetune(folder, "--lora", "--overwrite", "--seed", seed) / "model/adapter_model.safetensors")
        for seed in ("0", "0", "1")
    )
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in first.items())


def test_held_out_rows_may_be_a_mixture_with_a_score_for_each_source(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text())
    mixture = json.dumps({str(folder / "rows.jsonl"): 0.5, str(folder / "more.jsonl"): 0.5})
    out = finetune(folder, "--eval-data", mixture, "--eval-steps", "1", "--max-new-tokens", "2", "--eval-rows", "4")
    names = {"exact_match", "exact_match/rows.jsonl", "exact_match/more.jsonl"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry.keys() - {"step"} for entry in lines if "exact_match" in entry] == [names] * 2
    assert "exact_match/more.jsonl" in capsys.readouterr().out.replace("\n", "")


def test_rows_that_cannot_be_scored_are_refused_before_training(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    (folder / "judged.jsonl").write_text('{"prompt": "Is it?", "completion": "No.", "label": false}')
    with pytest.raises(RowError, match="label is False"):
        finetune(folder, "--eval-data", str(folder / "judged.jsonl"))
    assert not (folder / "out").exists()


def test_a_bad_row_ends_with_its_name_and_a_code_of_its_own(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('\n{"messages": [{"role": "user", "content": "no answer"}]}')
    with pytest.raises(SystemExit, match="4"), exit_codes():
        finetune(folder, "--max-steps", "3")
    assert f"{Path(sys.argv[0]).name}: rows.jsonl, line 5: no assistant turn" in capsys.readouterr().err
    finetune(folder, "--on-bad-row", "skip", "--max-bad-share", "0.5")
