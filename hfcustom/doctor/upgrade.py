"""The check of what a checkpoint relies on in transformers (hfcustom/sentinel.py)."""

from __future__ import annotations

import torch

from hfcustom import sentinel
from hfcustom.doctor.finding import Failed, Skipped, check
from hfcustom.doctor.patient import Patient
from hfcustom.record import read_record


@check(
    expected="the stock methods, modules and config fields that the checkpoint relies on are as when it was saved",
    why="A method that another version has renamed is overridden in vain, and one whose code has changed may mean another thing.",
    cure="Compare each with the code of this version and change the class, or install the version that the finding names; "
    "saving the model again records what there is now.",
)
def upgrade(patient: Patient) -> str:
    """Compare with what hfcustom.json recorded."""
    if patient.checkpoint is None:
        raise Skipped("the target is a class, not a checkpoint that was saved")
    record = read_record(patient.checkpoint)
    then = record.get("relies_on")
    if not then:
        raise Skipped(
            "the checkpoint has no hfcustom.json: it was saved by the stock class, or by an earlier hfcustom"
        )
    if then.get("stock_class") != patient.model_class.stock_class().__name__:
        raise Skipped(f"it was saved as a {then.get('stock_class')}")
    with torch.device("meta"):  # of the checkpoint's own make: the small copy may have another language model
        core = patient.model_class(patient.model_class.config_class.from_pretrained(patient.checkpoint))
    drifts = sentinel.all_drifts(core, record)
    if drifts:
        raise Failed(sentinel.message(patient.model_class, then, drifts, patient.checkpoint, most=len(drifts)))
    return f"{len(then['methods'])} methods, {len(then['modules'])} modules and {len(then['config'])} config fields, all as then"
