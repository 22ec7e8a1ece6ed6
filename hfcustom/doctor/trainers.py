"""A check of what trains the model: whether it calls the class's own forward and loss.

transformers.Trainer and trl's SFTTrainer take a step with the forward counted; of trl's DPOTrainer the code is looked at.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfcustom.data.collate import Collator
from hfcustom.doctor.finding import Failed, check
from hfcustom.doctor.patient import Patient
from hfcustom.trl_adapter import honour_model, why_bypassed

ROWS = 2


@check(
    expected="transformers.Trainer calls the class's forward and loss, and trl's SFTTrainer does under hfcustom.honour_model",
    why="A trainer with a loss or a forward of its own trains another model than the one that was written, and says nothing.",
    cure="Override methods on the class, replace none on the instance; with trl call hfcustom.honour_model(trainer).",
)
def trainers(patient: Patient) -> str:
    """Take a step with each trainer that is installed."""
    from transformers import Trainer

    said = ["Trainer " + _step(patient, Trainer, _arguments(patient.folder / "trainer"))]
    if find_spec("trl") is None:
        return f"{said[0]}; trl is not installed"
    said += _of_trl(patient)
    return "; ".join(said)


def _of_trl(patient: Patient) -> list[str]:
    import trl

    version = importlib.metadata.version("trl")
    more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False, "bf16": False}
    options = _arguments(patient.folder / "sft", trl.SFTConfig, **more)
    trainer = _build(patient, patient.model(), trl.SFTTrainer, options)
    bypass = why_bypassed(trainer)
    alone = "calls neither forward nor loss by itself" if bypass else "calls forward and loss by itself"
    said = [f"trl {version} SFTTrainer {alone}"]
    if bypass:
        said.append("under honour_model it " + _step(patient, trl.SFTTrainer, options, honours=True))
    if "compute_loss" in vars(trl.DPOTrainer):
        said.append("DPOTrainer computes a loss of its own: for the class's use hfcustom's loss 'dpo' with fit()")
    return said


def _arguments(folder: Path, kind: Any = None, **more: Any) -> Any:
    from transformers import TrainingArguments

    return (kind or TrainingArguments)(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=ROWS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **more,
    )


def _build(patient: Patient, model: Any, kind: Any, arguments: Any) -> Any:
    from datasets import Dataset

    rows = [_as_blocks(patient.row(1, seed)) for seed in range(ROWS)]
    takes = inspect.signature(kind.__init__).parameters
    processing = {"processing_class": patient.processor} if kind.__module__.startswith("trl") else {}
    assert "data_collator" in takes
    collate = Collator(patient.processor)
    return kind(model, arguments, data_collator=collate, train_dataset=Dataset.from_list(rows), **processing)


def _as_blocks(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in which every content is a list of blocks, since a column of a data set has one type."""
    texts = [message["content"] for message in row["messages"]]
    contents = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in texts]
    pairs = zip(row["messages"], contents, strict=True)
    return {**row, "messages": [{**message, "content": content} for message, content in pairs]}


def _step(patient: Patient, kind: Any, arguments: Any, honours: bool = False) -> str:
    """Train one step; return what was called, or raise Failed."""
    calls: list[int] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return patient.model_class.forward(self, *args, **kwargs)

    base = patient.model()
    model = patient.variant(base, {"forward": forward})
    model.loss_values = {}
    trainer = _build(patient, model, kind, arguments)
    if honours:
        honour_model(trainer)
    if reasons := why_bypassed(trainer):
        raise Failed(f"{kind.__name__}: {'; '.join(reasons)}")
    trainer.train()
    wanted = {item.loss.name for item in model.losses()}
    if not calls or set(model.loss_values) != wanted:
        seen = ", ".join(model.loss_values) or "none"
        raise Failed(f"{kind.__name__} called forward {len(calls)} times and evaluated {seen} of {', '.join(wanted)}")
    return f"calls forward and evaluates {', '.join(sorted(wanted))}"
