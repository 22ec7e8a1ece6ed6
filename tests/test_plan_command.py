"""The command hfcustom plan: what it prints, its exit codes, its advice, shapes, shards, and what it says to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import RECIPES, ROOT, Family
from test_costliest import memory_for
from test_recipes import stock_checkpoint

from hfcustom.cli import main
from hfcustom.exits import exit_codes
from hfcustom.options import ConfigError, read
from hfcustom.plan.batches import shaped_batches
from hfcustom.plan.config import GPUS, load_recipe, read_plan
from hfcustom.plan.measure import measure
from hfcustom.plan.report import SIZES
from hfcustom.plan.sharding import share_of

MINE = """
import torch
from torch import nn
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration

class Gated(CustomInternVLForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return hidden_states + self.gate(hidden_states)
"""


@pytest.fixture
def folder(internvl: Family, tmp_path: Path) -> Path:
    return stock_checkpoint(internvl, tmp_path)


def options(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "stock"), "--data", str(folder / "rows.jsonl"), "--batch-size", "2", *more]


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) in (2, 3)
    said = capsys.readouterr()
    assert not said.out
    return said.err


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_needed_where_it_fits_and_what_is_exact(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = plan(capsys, *options(folder, "--advice", "never"))
    assert code == 0
    assert {part["part"] for part in found["parts"]} == {"vision", "connector", "language", "head"}
    assert found["batch"]["rows"] == 2
    assert found["peak"] == sum(found["at_peak"].values()) == found["per_gpu"]["peak"]
    assert found["per_gpu"]["needed"] > found["peak"]
    assert found["fits"] == {f"{size:g}": True for size in SIZES}
    assert main(["plan", *options(folder, "--advice", "never")]) == 0
    said = capsys.readouterr().out
    for words in ("vision", "peak: ", "141 GiB: fits", "are exact", "is an estimate", "trainable parameters, fp32"):
        assert words in said


def test_the_exit_code_says_whether_the_named_gpu_is_large_enough(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = plan(capsys, *options(folder, "--gpu", "H100"))
    assert (code, found["fits"], found["advice"]) == (0, {f"{GPUS['h100']:g}": True}, [])
    code, found = plan(capsys, *options(folder, "--memory", "0.5", "--lora", "--load-in", "4bit"))
    assert (code, found["fits"]) == (1, {"0.5": False})
    assert found["advice"]


def test_each_advice_is_what_a_plan_with_its_flags_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan(capsys, *options(folder, "--advice", "always"))
    advised = {item["flags"]: item for item in found["advice"]}
    together = "--gradient-checkpointing --offload-activations --micro-batch-size 1 --lora --load-in 4bit"
    assert set(advised) == {
        "--gradient-checkpointing",
        "--offload-activations",
        "--micro-batch-size 1",
        "--lora",
        "--lora --load-in 8bit",
        "--lora --load-in 4bit",
        together,
        *(f"--gpus {gpus} --shard fsdp" for gpus in (2, 4, 8)),
    }
    assert advised[together]["peak"] == min(item["peak"] for flags, item in advised.items() if "fsdp" not in flags)
    for flags in ("--gradient-checkpointing", "--lora --load-in 4bit", together):
        _, own = plan(capsys, *options(folder, *flags.split(), "--advice", "never"))
        assert own["peak"] == pytest.approx(advised[flags]["peak"], rel=1e-3), flags  # bitsandbytes keeps a code book


def test_stages_are_planned_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "run.json"
    stages = [{"name": "align", "train": ["connector"]}, {"name": "instruct", "gradient_checkpointing": True}]
    config.write_text(json.dumps({"stages": stages}))
    _, found = plan(capsys, *options(folder, "--config", str(config), "--advice", "never"))
    assert list(found) == ["align", "instruct"]
    trained = {name: {part["part"] for part in each["parts"] if part["optimizer"]} for name, each in found.items()}
    assert trained == {"align": {"connector"}, "instruct": {"vision", "connector", "language", "head"}}


def test_stages_may_each_name_the_data_that_they_train_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "staged.json"
    rows = {"data": str(folder / "rows.jsonl")}
    stages = [{"name": "align", **rows, "train": ["connector"]}, {"name": "instruct", **rows}]
    config.write_text(json.dumps({"model": str(folder / "stock"), "batch_size": 2, "stages": stages}))
    code, found = plan(capsys, "--config", str(config))
    assert code == 0 and list(found) == ["align", "instruct"]
    del stages[1]["data"]
    config.write_text(json.dumps({"model": str(folder / "stock"), "batch_size": 2, "stages": stages}))
    assert "stage 'instruct': data is missing: --data rows.jsonl" in refused(capsys, "--config", str(config))


def test_a_teacher_and_modules_of_ones_own_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine_to_plan.py").write_text(MINE)
    teacher = ["--teacher", str(folder / "stock"), "--loss", '{"cross_entropy": 1, "kl_distillation": 1}']
    code, found = plan(capsys, f"{folder}/mine_to_plan.py:Gated", *options(folder, *teacher, "--advice", "never"))
    parts = {part["part"]: part for part in found["parts"]}
    assert (code, found["class_name"]) == (0, "Gated")
    assert parts["new"]["weights"] == 4 * (64 * 64 + 64)
    stock = sum(part["weights"] for name, part in parts.items() if name not in ("new", "teacher"))
    assert parts["teacher"]["weights"] == stock
    assert parts["teacher"]["optimizer"] == 0


# ---- checkpoints that are not here ----------------------------------------------------------------------------------


def test_a_published_checkpoint_is_planned_from_its_sizes(
    internvl: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = internvl.module.tiny_config().to_dict()
    values = {name: tiny[name] for name in ("vision_config", "text_config", "tie_word_embeddings")}
    monkeypatch.setitem(internvl.module.CHECKPOINTS, "someone/Small-hf", values)
    shape = ["--tokens", "700", "--crops", "1", "--batch-size", "1", "--advice", "never", "--image-size", "28x28"]
    monkeypatch.setattr(internvl.module, "published_processor", internvl.module.tiny_processor)
    _, found = plan(capsys, "--model", "someone/Small-hf", *shape)
    assert found["model"].startswith("someone/Small-hf (its published sizes, in bfloat16")
    assert found["batch"] == {"rows": 1, "tokens": 700, "crops": 1, "supervised": found["batch"]["supervised"]}
    parameters = sum(parameter.numel() for parameter in internvl.model().parameters())
    assert found["trainable"] == parameters
    _, adapted = plan(capsys, "--model", "someone/Small-hf", *shape, "--lora")
    assert {part["dtypes"] for part in adapted["parts"]} == {"bfloat16", "bfloat16, float32"}


def test_every_family_has_a_batch_of_the_shape_that_is_asked_for(family: Family, tmp_path: Path) -> None:
    argv = ["--family", family.name, "--tokens", "900", "--crops", "1", "--batch-size", "2", "--image-size", "56x56"]
    config, _ = read_plan(argv, "")
    processor = family.processor
    model = family.model()
    shortest = len(processor.tokenizer)
    assert shortest
    (batch,) = shaped_batches(model, model.match_processor(processor), config)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 900)
    assert batch["attention_mask"].all()
    with torch.no_grad():
        model(**batch)


# ---- shards ---------------------------------------------------------------------------------------------------------


def test_shards_are_those_of_torch_and_their_sum(folder: Path) -> None:
    config, recipe = read_plan(options(folder, "--ema-decay", "0.9"), "")
    measured = measure(config, recipe.build, recipe.batches)
    model = recipe.build(config)[0]
    for gpus in (2, 3, 8):
        share = share_of(measured, gpus, "fsdp")
        first = [torch.chunk(parameter, gpus)[0] for parameter in model.parameters()]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        assert share.weights == buffers + sum(part.numel() * part.element_size() for part in first)
        assert share.gradients <= share.weights
        assert share.average == sum(part.numel() * 4 for part in first)
        zero = share_of(measured, gpus, "zero3")
        assert zero.optimizer == -(-measured.total("optimizer") // gpus)
        assert share_of(measured, gpus, "zero2").weights == measured.total("weights")
    one, two = share_of(measured, 1, "none"), share_of(measured, 2, "none")
    assert two.exchange == measured.total("gradients") == two.peak - one.peak
    assert one.peak == measured.peak


def test_ddp_keeps_buckets_as_large_as_the_gradients(tmp_path: Path) -> None:
    """What share_of() adds for DDP, as PyTorch does it with the options of make_accelerator().

    Without the copy that is sent to the other ranks at the start: the thread of gloo may be the one that gives it back,
    and the profiler sees what its own thread does.
    """
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from torch.nn.parallel import DistributedDataParallel
from test_plan import allocations, most
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
size = sum(p.numel() * p.element_size() for p in model.parameters())
with allocations() as sizes:
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, init_sync=False)
    wrapped(torch.ones(1, 256)).sum().backward()
print(sum(sizes) / size)
"""
    done = forked.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert float(done.stdout.split()[-1]) == pytest.approx(2, abs=0.15), done.stderr  # gradients, and buckets


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "h10"], "Unknown gpu 'h10'. Did you mean 'h100'?"),
        (["--memry", "4"], "Unknown flag --memry. Did you mean --memory?"),
        (["--tokens", "900"], "and tokens=900 exclude each other"),
        (["--shard", "fsdp"], "shard=fsdp has no effect with one GPU: --gpus 2"),
        (["--crops", "3"], "crops has no effect without tokens"),
        (["--image-size", "big"], "image_size='big' is no width x height; write 448x448"),
        (["--memory", "-3"], "memory=-3.0 must be positive"),
        (
            ["--gpus", "2", "--shard", "fsdp", "--offload-activations"],
            "offload_activations does not go with shard=fsdp, whose gathered weights it would copy along",
        ),
        (["--gpus", "3"], "batch_size=2 rows cannot be shared by 3 processes"),
        (["--load-in", "4bit"], "load_in=4bit needs --lora"),
        (
            ["--gpus", "2", "--shard", "fsdp", "--lora", "--load-in", "4bit"],
            "shard=fsdp cannot cut weights that bitsandbytes",
        ),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *options(folder), *argv)


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "data is missing: --data rows.jsonl, or --tokens 2048" in refused(capsys, "--family", "internvl")
    assert "model is missing" in refused(capsys, "--tokens", "900")
    assert "Unknown family 'intern'" in refused(capsys, "--family", "intern", "--tokens", "900")
    assert "Give a folder that holds its config.json" in refused(capsys, "--model", "no/such", "--tokens", "900")
    assert "There is no folder ./nothing" in refused(capsys, "--model", "./nothing", "--tokens", "900")
    assert "There is no recipe nowhere.py" in refused(capsys, "nowhere.py", "--tokens", "900")
    assert "a checkpoint is --model some/name" in refused(capsys, "some/name", "--tokens", "900")
    few = ["--model", str(folder / "stock"), "--tokens", "5", "--batch-size", "1"]
    assert "choose more tokens, fewer crops, or a smaller image_size" in refused(capsys, *few)
    (tmp_path / "no_recipe.py").write_text("print")
    assert "cannot be planned: a recipe has one config class" in refused(capsys, str(tmp_path / "no_recipe.py"))


def test_help_names_the_plans_own_options_without_importing_anything_heavy() -> None:
    script = "import sys\nfrom hfcustom.cli import main\ntry:\n    main(['plan', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "--shard none|fsdp|zero2|zero3" in done.stdout


# ---- out of memory --------------------------------------------------------------------------------------------------


def test_a_recipe_that_runs_out_of_memory_says_what_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(folder, "--try-costliest", "--lora", "--load-in", "4bit", "--gradient-checkpointing")
    argv += ["--output-dir", str(folder / "out")]
    recipe = RECIPES / "finetune.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *argv])
    import finetune

    with memory_for(10), pytest.raises(SystemExit) as stopped, exit_codes():
        finetune.main(read(finetune.FinetuneConfig, finetune.__doc__, argv))
    assert stopped.value.code == 3
    said = capsys.readouterr().err
    assert "The costliest batch, 2 x " in said
    assert "No step was taken." in said
    assert "what could be changed" in said
    assert "--micro-batch-size 1" in said.rpartition("what could be changed")[2]


def test_a_recipe_is_found_beside_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(None).path == RECIPES / "finetune.py"
    with pytest.raises(ConfigError, match="There is no recipe mine.py; check the path"):
        load_recipe("mine.py")
