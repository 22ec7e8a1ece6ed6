"""What a run may compare, in words and without importing torch: variants, groups."""

from __future__ import annotations

OBJECTIVES = ("cross_entropy", "focal", "label_smoothing", "dpo")

GROUPS: dict[str, tuple[bool, str]] = {
    f"{way}-{objective}": (way == "lora", objective)
    for way in ("full", "lora")
    for objective in OBJECTIVES
    if (way, objective) != ("full", "dpo")  # the reference is the model with its adapter off
}

ABOUT: dict[str, str] = {
    "stock": "transformers' forward with labels",
    "trainer": "transformers.Trainer",
    "trl": "trl as shipped, on this device",
    "trl_good": "trl, supervised rows only (its path on Triton)",
    "ours": "hfcustom, padded rows",
    "ours_packed": "hfcustom, packed rows",
    "ours_cached": "hfcustom, packed rows, frozen features read",
}
