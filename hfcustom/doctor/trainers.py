"""A check of what trains the model: whether it calls the class's own forward and loss.

transformers.Trainer and trl's SFTTrainer and DPOTrainer take a step each with the forward counted.
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
TRL_OPTIONS = {"gradient_checkpointing": False, "bf16": False}


@check(
    expected="transformers.Trainer calls the class's forward and loss; under hfcustom.honour_model trl's SFTTrainer does so "
    "too, and DPOTrainer calls the forward",
    why="A trainer with a loss or a forward of its own trains another model than the one that was written, and says nothing.",
    cure="Override methods on the class, replace none on the instance; with trl call hfcustom.honour_model(trainer).",
)
def trainers(patient: Patient) -> str:
    """Take a step with each trainer that is installed."""
    from transformers import Trainer

    said = ["Trainer " + _step(patient, Trainer, _arguments(patient.folder / "trainer"))]
    if find_spec("trl") is None:
        return f"{said[0]}; trl is not installed"
    said += [_of_sft(patient), _of_dpo(patient)]
    return "; ".join(said)


def _of_sft(patient: Patient) -> str:
    import trl

    version = importlib.metadata.version("trl")
    options = _arguments(
        patient.folder / "sft", trl.SFTConfig, **TRL_OPTIONS, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = _build(patient, patient.model(), trl.SFTTrainer, options)
    if not why_bypassed(trainer):
        return f"trl {version} SFTTrainer calls forward and loss by itself"
    honoured = _step(patient, trl.SFTTrainer, options, honours=True)
    return f"trl {version} SFTTrainer calls neither forward nor loss by itself, under honour_model it {honoured}"


def _of_dpo(patient: Patient) -> str:
    """Take a step over pairs; the loss is trl's, so what is looked for is the class's forward."""
    import trl

    options = _arguments(
        patient.folder / "dpo", trl.DPOConfig, **TRL_OPTIONS, max_length=None, router_aux_loss_coef=0.0
    )
    calls: list[int] = []
    model = patient.variant(patient.model(), {"forward": _counted(patient, calls)}, loss="cross_entropy")
    trainer = _build_dpo(patient, model, options)
    bypassed = bool(why_bypassed(trainer))
    if bypassed:
        honour_model(trainer)
    trainer.train()
    if not calls:
        raise Failed("DPOTrainer called forward 0 times, under honour_model")
    alone = "does not call forward by itself, under honour_model it does" if bypassed else "calls forward by itself"
    return f"DPOTrainer {alone}; its loss is its own"


def _build_dpo(patient: Patient, model: Any, options: Any) -> Any:
    import trl
    from datasets import Dataset

    pairs = _Pairs(Collator(patient.processor))
    rows = [_as_blocks(patient.row(1, seed)) for seed in range(ROWS)]
    columns = [{"prompt": r["messages"][:1], "chosen": r["messages"][1:], "rejected": r["messages"][1:]} for r in rows]
    data = [{**columns[at], "images": row["images"]} for at, row in enumerate(rows)]
    return trl.DPOTrainer(
        model,
        patient.model(),
        options,
        data_collator=pairs,
        train_dataset=Dataset.from_list(data),
        processing_class=patient.processor,
    )


class _Pairs:
    """Rows of pairs -> the batch that DPOTrainer wants: all chosen answers, all rejected ones, which tokens are theirs."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        whole = [
            {"messages": row["prompt"] + row[answer], "images": row["images"]}
            for answer in ("chosen", "rejected")
            for row in rows
        ]
        batch = dict(self.collate(whole))
        labels = batch.pop("labels")
        return {**batch, "completion_mask": (labels != -100).long()}


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


def _counted(patient: Patient, calls: list[int]) -> Any:
    """Return the class's forward, which adds to a list at each call."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return patient.model_class.forward(self, *args, **kwargs)

    return forward


def _step(patient: Patient, kind: Any, arguments: Any, honours: bool = False) -> str:
    """Train one step; return what was called, or raise Failed."""
    calls: list[int] = []
    model = patient.variant(patient.model(), {"forward": _counted(patient, calls)})
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
