"""What there is to export: a checkpoint in full, or an adapter with its base; which class it is of, and in which dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import cached_file

from hfcustom import adapt, encoders, families
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.loading import check_source
from hfcustom.registry import REGISTERED

DTYPES = ("float32", "bfloat16", "float16")
MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk or on the hub, looked at but not loaded."""

    checkpoint: str
    base: str | None  # of an adapter: where its full-precision weights are
    model_class: Any
    config: Any  # of the custom class
    dtype: str  # of the full-precision weights: "auto" where their config does not say

    @property
    def is_adapter(self) -> bool:
        """Whether weights come from a base, changed by an adapter."""
        return self.base is not None

    @property
    def is_encoder(self) -> bool:
        """Whether it is a contrastive encoder."""
        return issubclass(self.model_class, CustomDualEncoder)

    def load(self) -> Any:
        """Return the model in eval mode, in full precision; of an adapter, the peft.PeftModel."""
        if self.base is None:
            return self.model_class.from_pretrained(self.checkpoint, dtype=self.dtype).eval()
        model_class = self.model_class
        return adapt.load_adapter(self.checkpoint, self.base, model_class=model_class, dtype=self.dtype)

    def processor(self) -> Any:
        """Return the checkpoint's processor, else the base's; None where neither folder has one."""
        for folder in (self.checkpoint, self.base):
            if folder and any(has(folder, name) for name in ("processor_config.json", "preprocessor_config.json")):
                return self.model_class.processor_class.from_pretrained(folder)
        return None


def has(folder: str, name: str) -> bool:
    """Whether a folder or hub id has a file."""
    return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False) is not None


def find_source(checkpoint: str, base: str | None = None) -> Source:
    """Look at a checkpoint; ValueError or FileNotFoundError says what it lacks and where it is."""
    check_source(checkpoint)
    if checkpoint in (*families.family_names(), *encoders.encoder_names()) and not Path(checkpoint).is_dir():
        raise ValueError(
            f"{checkpoint} is the name of a family; name the folder of a checkpoint, or its hub id (owner/name)."
        )
    _refuse_run(checkpoint)
    is_adapter = has(checkpoint, "adapter_config.json")
    if base is not None and not is_adapter:
        raise ValueError(f"--base {base} has no effect: {checkpoint} has no adapter_config.json, so it is no adapter.")
    base = _base_of(checkpoint, base) if is_adapter else None
    described = checkpoint if has(checkpoint, "config.json") else base
    if described is None:
        raise ValueError(
            f"{checkpoint} has neither config.json nor adapter_config.json: it is no checkpoint, or a hub id that cannot be reached."
        )
    model_class = class_of(described)
    config = model_class.config_class.from_pretrained(described)
    stored = PretrainedConfig.get_config_dict(base or checkpoint)[0]
    if "quantization_config" in stored:
        cure = (
            "Pass the weights that were quantised as --base."
            if is_adapter
            else "What rounding took cannot be had back; export the checkpoint that was quantised, or its adapter."
        )
        raise ValueError(f"{base or checkpoint} holds quantised weights, and an export has full precision. {cure}")
    dtype = str(stored.get("dtype") or stored.get("torch_dtype") or "auto")
    return Source(checkpoint, base, model_class, config, dtype if dtype in DTYPES else "auto")


def _refuse_run(checkpoint: str) -> None:
    """ValueError for the folder of a run, or of a training step, which holds the checkpoint as model/."""
    folder = Path(checkpoint)
    files = ("config.json", "adapter_config.json")
    if not any((folder / name).is_file() for name in files) and any(
        (folder / "model" / name).is_file() for name in files
    ):
        raise ValueError(f"{checkpoint} is the folder of a run or a step; the checkpoint in it is {folder / 'model'}.")


def _base_of(adapter: str, base: str | None) -> str:
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in MERGEABLE:
        raise ValueError(
            f"{adapter} is a {kind} adapter, which cannot be merged into weights; {', '.join(MERGEABLE)} can."
        )
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which base it was trained on; name its folder or hub id: --base ...")
    if not Path(base).is_dir() and (base.count("/") > 1 or base.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"The base of {adapter} was {base}, which is not there; pass its present place: --base ..."
        )
    return str(base)


def class_of(checkpoint: str) -> Any:
    """Return the custom class of a checkpoint, of a vision-language model or of a contrastive encoder."""
    name = str(PretrainedConfig.get_config_dict(checkpoint)[0].get("model_type", ""))
    registered = REGISTERED.get(name)
    if name.removeprefix("custom_") in encoders.encoder_names():
        return encoders.class_of(checkpoint)
    return families.class_of(checkpoint) if registered is None else registered


def check_dtype(dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a name; ValueError for one that weights are not published in."""
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}; choose {', '.join(DTYPES)}, or leave it out for that of the weights.")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen
