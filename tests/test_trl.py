"""trl's SFTTrainer bypasses a custom model; with honour_model() it trains it as transformers.Trainer and fit() do."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import PartialState
from conftest import Family
from datasets import Dataset
from peft import LoraConfig
from test_distributed import two_ranks
from test_trainer import ROWS, STEPS, rows_in_order, trainer_options
from torch import nn
from training import TERMS, curve, relative_distance, train, uneven_rows, user_losses, weights
from transformers import Trainer, TrainingArguments

import hfcustom
from hfcustom.base import CustomVLM
from hfcustom.data.collate import Collator
from hfcustom.families import load_family

# trl 1.16's SFTConfig sets a name that transformers 5.23 is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

LOSSES_UNDER_TEST: list[Any] = ["cross_entropy", "focal", "margin", "stock", TERMS]  # all: tests/test_every_loss.py
CUTS = [1, 4]  # micro-batches of a step: 8 x 1, 2 x 4


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with user_losses():
        yield


def as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of blocks, since a column of a data set has one type."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


@cache
def dataset() -> Dataset:
    """Return the rows of a run in fit()'s order, as the data set that trl insists on."""
    rows = rows_in_order(uneven_rows())
    return Dataset.from_list([{**row, "messages": [*map(as_blocks, row["messages"])]} for row in rows])


def sft(
    model: Any, family: Family, folder: Path, accumulation: int = 1, kind: Any = trl.SFTTrainer, **options: Any
) -> Any:
    """Return trl's trainer as a user would build it, for the run that fit() and Trainer make."""
    given = {name: options.pop(name) for name in ("peft_config", "compute_loss_func", "callbacks") if name in options}
    arguments = {
        **trainer_options(folder, accumulation),
        "gradient_checkpointing": False,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **options,
    }
    return kind(
        model,
        trl.SFTConfig(**arguments),
        data_collator=Collator(family.processor),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(4)),
        processing_class=family.processor,
        **given,
    )


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def stock_trainer(model: Any, family: Family, folder: Path, accumulation: int = 1, **options: Any) -> Trainer:
    options = {**trainer_options(folder, accumulation), "train_sampling_strategy": "sequential", **options}
    collator = Collator(family.processor)
    held_out: Any = dataset().select(range(4))
    return Trainer(model, TrainingArguments(**options), collator, dataset(), held_out)  # type: ignore[arg-type]


# ---- the fact -------------------------------------------------------------------------------------------------------


def counting(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows at each call of the class's forward."""
    calls: list[int] = []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return calls


@pytest.mark.parametrize("honoured", [False, True])
def test_trl_alone_calls_neither_forward_nor_loss(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honoured: bool
) -> None:
    """When the first case fails, trl has changed: see whether honour_model() is still needed."""
    model = internvl.model(loss="z_loss")
    calls = counting(model, monkeypatch)
    trainer = sft(model, internvl, tmp_path)
    assert len(hfcustom.why_bypassed(trainer)) == 2
    if honoured:
        assert hfcustom.honour_model(trainer) is trainer
        assert hfcustom.why_bypassed(trainer) == []
    trainer.train()
    assert (len(calls), bool(model.loss_values)) == ((STEPS, True) if honoured else (0, False))
    stock = stock_trainer(internvl.model(loss="z_loss" if honoured else "cross_entropy"), internvl, tmp_path)
    stock.train()
    assert logged(trainer) == pytest.approx(logged(stock), rel=1e-5)


# ---- the same training as Trainer's and fit()'s -----------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", CUTS)
@pytest.mark.parametrize("loss", LOSSES_UNDER_TEST, ids=str)
def test_honoured_training_is_that_of_trainer(internvl: Family, tmp_path: Path, loss: Any, accumulation: int) -> None:
    ours, theirs = internvl.model(loss=loss), internvl.model(loss=loss)
    start = weights(ours)
    trainer = hfcustom.honour_model(sft(ours, internvl, tmp_path, accumulation))
    trainer.train()
    stock = stock_trainer(theirs, internvl, tmp_path, accumulation)
    hfcustom.LossCallback.add_to(stock)
    stock.train()
    assert logged(trainer) == logged(stock)
    assert logged(trainer, "grad_norm") == logged(stock, "grad_norm")
    assert relative_distance(weights(ours), weights(theirs), start) == 0


@pytest.mark.parametrize("accumulation", CUTS)
@pytest.mark.parametrize("loss", LOSSES_UNDER_TEST, ids=str)
def test_honoured_training_is_that_of_fit(internvl: Family, tmp_path: Path, loss: Any, accumulation: int) -> None:
    ours, theirs = internvl.model(loss=loss), internvl.model(loss=loss)
    start = weights(ours)
    trainer = hfcustom.honour_model(sft(ours, internvl, tmp_path / "trl", accumulation))
    trainer.train()
    options = {"micro_batch_size": ROWS // accumulation, "schedule": "constant", "weight_decay": 0.0}
    expected = curve(train(theirs, internvl, tmp_path / "fit", uneven_rows(), **options))
    assert logged(trainer) == pytest.approx(expected, rel=1e-5)
    assert relative_distance(weights(ours), weights(theirs), start) < 1e-4


def wrapped_by_us(model: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    return hfcustom.lora(model, "language", rank=2), {}


def wrapped_by_trl(model: Any) -> tuple[Any, dict[str, Any]]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".self_attn." in name]
    return model, {"peft_config": LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM")}


@pytest.mark.parametrize("wrap", [wrapped_by_us, wrapped_by_trl])
@pytest.mark.parametrize("accumulation", CUTS)
def test_lora(internvl: Family, tmp_path: Path, wrap: Any, accumulation: int) -> None:
    model, options = wrap(internvl.model(loss="focal"))
    trainer = hfcustom.honour_model(sft(model, internvl, tmp_path, accumulation, **options))
    theirs, start = copy.deepcopy(trainer.model), weights(trainer.model)
    trainer.train()
    stock = stock_trainer(theirs, internvl, tmp_path, accumulation)
    hfcustom.LossCallback.add_to(stock)
    stock.train()
    assert logged(trainer) == logged(stock)
    assert all(("lora_" in name) or ("modules_to_save" in name) for name in start)
    assert relative_distance(weights(trainer.model), weights(theirs), start) == 0


def test_a_deep_copy_runs_its_own_weights(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    hfcustom.honour_model(sft(model, internvl, tmp_path))
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.get_output_embeddings().weight)
    assert not twin(**internvl.batch([1])).logits.any()


def test_the_forward_put_back_is_a_hook_of_accelerates(internvl: Family, tmp_path: Path) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = add_hook_to_module(internvl.model(loss="z_loss"), ModelHook())
    hooked = model.forward
    trainer = hfcustom.honour_model(sft(model, internvl, tmp_path))
    assert model.forward is hooked
    assert hfcustom.why_bypassed(trainer) == []
    trainer.train()
    assert model.loss_values.keys() == {"z_loss"}


def test_mixed_precision_and_checkpointing_as_trl_has_them(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(loss="z_loss")
    trainer = sft(model, internvl, tmp_path, bf16=True, gradient_checkpointing=True)
    hfcustom.honour_model(trainer).train()
    assert hfcustom.why_bypassed(trainer) == []  # with accelerate's autocast around the forward
    stock = stock_trainer(internvl.model(loss="z_loss"), internvl, tmp_path, bf16=True, gradient_checkpointing=True)
    stock.train()
    assert logged(trainer) == pytest.approx(logged(stock), rel=1e-3)


# ---- two processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run this file in two processes; return each case's log, weights and evaluation."""
    folder = tmp_path_factory.mktemp("two")
    two_ranks(folder, "test_trl.py")
    return {name: torch.load(folder / f"{name}.pt") for name in CASES}


CASES: dict[str, dict[str, Any]] = {
    "trl": {"build": "sft", "loss": "cross_entropy"},
    "trl, several": {"build": "sft", "loss": {"cross_entropy": 1.0, "margin": 0.5}},
    "trainer, several": {"build": "stock_trainer", "loss": {"cross_entropy": 1.0, "margin": 0.5}},
    "trainer, a record on one rank": {"build": "stock_trainer", "loss": {"cross_entropy": 1.0, "noted": 0.01}},
    "each rank for itself": {"build": "sft", "loss": TERMS, "average_tokens_across_devices": False},
}


def run_case(family: Family, folder: Path, build: str, loss: Any, rows_at_once: int, **options: Any) -> dict[str, Any]:
    """Train in micro-batches of `rows_at_once` on each process, SGD; return what a test compares."""
    model = family.model(loss=loss)
    options |= {
        "per_device_train_batch_size": rows_at_once,
        "optim": "sgd",
        "per_device_eval_batch_size": rows_at_once,
    }
    if build == "sft":
        trainer = hfcustom.honour_model(sft(model, family, folder, 2, **options))
    else:
        trainer = stock_trainer(model, family, folder, 2, **options)
        hfcustom.LossCallback.add_to(trainer)
    start = weights(model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"log": log, "start": start, "end": weights(model), "eval_loss": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize("name", [name for name in CASES if "average_tokens_across_devices" not in CASES[name]])
def test_two_processes_train_as_one(
    internvl: Family, two_processes: dict[str, Any], tmp_path: Path, name: str
) -> None:
    alone, both = run_case(internvl, tmp_path, rows_at_once=4, **CASES[name]), two_processes[name]
    assert relative_distance(both["end"], alone["end"], alone["start"]) < 1e-4
    for key in ("loss", "grad_norm", *(key for key in alone["log"][0] if "margin" in key or "entropy" in key)):
        assert [e[key] for e in both["log"]] == pytest.approx([e[key] for e in alone["log"]], rel=1e-5), key
    if name.startswith("trl"):
        assert [e["num_tokens"] for e in both["log"]] == [e["num_tokens"] for e in alone["log"]]
    if "record" not in name:  # evaluation averages batches, of which a term of rows has its own mean
        assert both["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not isinstance(CASES[name]["loss"], str)])
def test_weighted_losses_sum_to_the_loss_in_two_processes(two_processes: dict[str, Any], name: str) -> None:
    for entry in two_processes[name]["log"]:
        assert any(f"{key}_weighted" in entry for key in CASES[name]["loss"])
        shares = [entry.get(f"{key}_weighted", entry[key]) for key in CASES[name]["loss"]]
        assert sum(shares) == pytest.approx(entry["loss"], rel=1e-5)


# ---- evaluation, log, saving ------------------------------------------------------------------------------------------


def test_evaluate_reports_the_custom_loss(internvl: Family, tmp_path: Path) -> None:
    evaluation = {"per_device_eval_batch_size": 2}
    found = {}
    for loss in ("z_loss", "cross_entropy"):
        trainer = hfcustom.honour_model(sft(internvl.model(loss=loss), internvl, tmp_path, **evaluation))
        stock = stock_trainer(internvl.model(loss=loss), internvl, tmp_path, **evaluation)
        found[loss] = trainer.evaluate()["eval_loss"]
        assert found[loss] == stock.evaluate()["eval_loss"]
    assert found["z_loss"] > 2 * found["cross_entropy"]


def test_log_lines_and_checkpoints(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(loss=TERMS)
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
    }
    trainer = hfcustom.honour_model(sft(model, internvl, tmp_path, 4, **options))
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [int(Collator(internvl.processor)(as_rows(step))["attention_mask"].sum()) for step in range(STEPS)]
    assert [entry["num_tokens"] for entry in lines] == [sum(seen[: step + 1]) for step in range(STEPS)]
    for entry in lines:
        assert sum(entry.get(f"{name}_weighted", entry[name]) for name in TERMS) == pytest.approx(
            entry["loss"], rel=1e-5
        )
        assert entry["z_loss_weighted"] == pytest.approx(1e-3 * entry["z_loss"], rel=1e-5)
    assert len(logged(trainer, "eval_loss")) == 2  # the second at the end
    again = type(model).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert relative_distance(weights(again), weights(model), weights(internvl.model())) == 0
    resumed = hfcustom.honour_model(sft(internvl.model(loss=TERMS), internvl, tmp_path, 4, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed)[-1] == pytest.approx(logged(trainer)[-1], rel=1e-5)


def as_rows(step: int) -> list[Any]:
    return [dataset()[at] for at in range(step * ROWS, (step + 1) * ROWS)]


def test_trl_s_own_collator(internvl: Family, tmp_path: Path) -> None:
    """Its labels cover prompts too; what it makes of a row is a batch that the model's own loss takes."""
    options = {**trainer_options(tmp_path, 1), "bf16": False, "max_length": None}
    trainer = trl.SFTTrainer(
        internvl.model(loss="z_loss"),
        trl.SFTConfig(**options),
        train_dataset=dataset(),
        processing_class=internvl.processor,
    )
    hfcustom.honour_model(trainer).train()
    assert len(logged(trainer, "z_loss")) == STEPS


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_a_stock_model_is_refused(internvl: Family, tmp_path: Path) -> None:
    trainer = sft(internvl.model(internvl.stock_class), internvl, tmp_path)
    with pytest.raises(TypeError, match="InternVLForConditionalGeneration is no custom model; load it with"):
        hfcustom.honour_model(trainer)


def test_a_transformers_trainer_needs_no_adapter(internvl: Family, tmp_path: Path) -> None:
    trainer = stock_trainer(internvl.model(), internvl, tmp_path)
    assert hfcustom.why_bypassed(trainer) == []
    with pytest.raises(TypeError, match="calls the model's own forward and loss as it is; leave honour_model"):
        hfcustom.honour_model(trainer)


@pytest.mark.parametrize("name", ["GRPOTrainer", "KTOTrainer", "RLOOTrainer", "RewardTrainer"])
def test_trl_s_other_trainers_say_what_to_do_instead(internvl: Family, tmp_path: Path, name: str) -> None:
    kind = getattr(trl, name)
    trainer = kind.__new__(kind)  # what it would be built with does not matter
    trainer.model, trainer.compute_loss_func, trainer.label_smoother = internvl.model(), None, None
    cure = "Use hfcustom's loss 'dpo' with fit" if name == "KTOTrainer" else ""
    with pytest.raises(TypeError, match=f"takes a trl SFTTrainer or DPOTrainer; {name} computes a .* loss.*{cure}"):
        hfcustom.honour_model(trainer)
    assert hfcustom.why_bypassed(trainer) == [
        f"compute_loss of trl's {name} computes a loss of its own from the inner model"
    ]


def test_a_trainer_of_trl_s_that_inherits_sft_is_refused(internvl: Family) -> None:
    from trl.experimental.gkd import GKDTrainer

    with pytest.raises(TypeError, match="GKDTrainer computes a loss of its own. Use fit"):
        hfcustom.honour_model(GKDTrainer.__new__(GKDTrainer))


def test_what_is_no_trainer_is_refused(internvl: Family) -> None:
    with pytest.raises(TypeError, match="takes a trl SFTTrainer or DPOTrainer, not a Custom"):
        hfcustom.honour_model(internvl.model())


class OwnLoss(trl.SFTTrainer):
    """What people write who want a loss of their own in trl."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_a_subclass_with_a_loss_of_its_own_is_refused(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="OwnLoss.compute_loss would be replaced; remove it, or"):
        hfcustom.honour_model(sft(internvl.model(), internvl, tmp_path, kind=OwnLoss))
    harmless = type("OwnName", (trl.SFTTrainer,), {})
    hfcustom.honour_model(sft(internvl.model(), internvl, tmp_path, kind=harmless))


def sums(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": sums}, "compute_loss_func=.*no effect.*@hfcustom.token_loss"),
        ({"label_smoothing_factor": 0.2}, r"label_smoothing_factor=0.2 .*\{'label_smoothing': \{'epsilon': 0.2\}\}"),
        ({"loss_type": "dft"}, "loss_type='dft' has no effect.*name the model's loss instead"),
    ],
    ids=["compute_loss_func", "label_smoothing_factor", "loss_type"],
)
def test_arguments_that_would_have_no_effect(
    internvl: Family, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hfcustom.honour_model(sft(internvl.model(), internvl, tmp_path, **options))


def test_a_trl_that_replaces_the_forward_in_another_way_is_an_error(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = internvl.model()
    trainer = sft(model, internvl, tmp_path)
    model.forward = lambda **inputs: CustomVLM.forward(model, **inputs)
    with pytest.raises(RuntimeError, match="forward is replaced on the instance by test_trl. This trl is newer"):
        hfcustom.honour_model(trainer)


def test_trainer_s_own_ways_around_the_model_are_named(internvl: Family, tmp_path: Path) -> None:
    trainer = stock_trainer(internvl.model(), internvl, tmp_path, label_smoothing_factor=0.1)
    assert hfcustom.why_bypassed(trainer) == ["label_smoothing_factor takes the labels away from the model"]
    trainer.label_smoother, trainer.compute_loss_func = None, sums
    assert hfcustom.why_bypassed(trainer) == ["compute_loss_func takes the labels away from the model"]


def test_honouring_twice_is_harmless(internvl: Family, tmp_path: Path) -> None:
    trainer = hfcustom.honour_model(hfcustom.honour_model(sft(internvl.model(), internvl, tmp_path)))
    assert sum(isinstance(callback, hfcustom.LossCallback) for callback in trainer.callback_handler.callbacks) == 1


def test_the_callback_notices_trl_without_the_adapter(internvl: Family, tmp_path: Path) -> None:
    trainer = sft(internvl.model(), internvl, tmp_path, callbacks=[hfcustom.LossCallback()])
    with pytest.raises(RuntimeError, match=r"did not compute the losses .* hfcustom.honour_model\(trainer\)"):
        trainer.train()


def main(folder: Path) -> None:
    """Run every case in this process, one of several, and keep what rank 0 has."""
    family = Family("internvl", load_family("internvl"))
    with user_losses():
        for name, case in CASES.items():
            found = run_case(family, folder / name, rows_at_once=2, **case)
            if PartialState().is_main_process:
                torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
