"""hfcustom: subclass a Hugging Face vision-language model, change what it computes or optimises, and keep it right.

    import hfcustom
    from hfcustom.families.internvl import CustomInternVLForConditionalGeneration

Names below load their module when first used, so that importing the package, or asking a recipe for --help, is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CaptionCollator": "hfcustom.data.captions",
    "Collator": "hfcustom.data.collate",
    "CustomConfig": "hfcustom.configuration",
    "CustomDualEncoder": "hfcustom.dual_encoder",
    "CustomVLM": "hfcustom.base",
    "Examples": "hfcustom.data.sources",
    "LossCallback": "hfcustom.trainer_callback",
    "LossContext": "hfcustom.losses",
    "PackingCollator": "hfcustom.data.packing",
    "RowError": "hfcustom.data.messages",
    "TrainConfig": "hfcustom.train_config",
    "cache_reference": "hfcustom.data.reference",
    "character_accuracy": "hfcustom.evaluate",
    "check_quantization": "hfcustom.adapt",
    "connector": "hfcustom.connectors",
    "encoder_names": "hfcustom.encoders",
    "exact_match": "hfcustom.evaluate",
    "family_names": "hfcustom.families",
    "find_parts": "hfcustom.parts",
    "fit": "hfcustom.train",
    "freeze": "hfcustom.freezing",
    "generate_answers": "hfcustom.evaluate",
    "honour_model": "hfcustom.trl_adapter",
    "keep_samples": "hfcustom.runs.files",
    "linear_table": "hfcustom.adapt",
    "load_adapter": "hfcustom.adapt",
    "load_encoder": "hfcustom.encoders",
    "load_family": "hfcustom.families",
    "load_rows": "hfcustom.data.sources",
    "lora": "hfcustom.adapt",
    "merge_adapter": "hfcustom.adapt",
    "note_fault": "hfcustom.runs.files",
    "over_ranks": "hfcustom.distributed.shared_work",
    "pair_loss": "hfcustom.losses.pairs",
    "part_table": "hfcustom.parts",
    "quantization_config": "hfcustom.adapt",
    "register": "hfcustom.registry",
    "resize_images": "hfcustom.resize",
    "retrieval_recall": "hfcustom.retrieval",
    "row_seed": "hfcustom.randomness",
    "select_frames": "hfcustom.data.frames",
    "show_losses": "hfcustom.console",
    "show_parts": "hfcustom.console",
    "term": "hfcustom.losses",
    "token_loss": "hfcustom.losses",
    "train_only": "hfcustom.freezing",
    "why_bypassed": "hfcustom.trl_adapter",
    "wrap": "hfcustom.wrapping",
}

if TYPE_CHECKING:
    from hfcustom.adapt import (
        check_quantization,
        linear_table,
        load_adapter,
        lora,
        merge_adapter,
        quantization_config,
    )
    from hfcustom.base import CustomVLM
    from hfcustom.configuration import CustomConfig
    from hfcustom.connectors import connector
    from hfcustom.console import show_losses, show_parts
    from hfcustom.data.captions import CaptionCollator
    from hfcustom.data.collate import Collator
    from hfcustom.data.frames import select_frames
    from hfcustom.data.messages import RowError
    from hfcustom.data.packing import PackingCollator
    from hfcustom.data.reference import cache_reference
    from hfcustom.data.sources import Examples, load_rows
    from hfcustom.distributed.shared_work import over_ranks
    from hfcustom.dual_encoder import CustomDualEncoder
    from hfcustom.encoders import encoder_names, load_encoder
    from hfcustom.evaluate import character_accuracy, exact_match, generate_answers
    from hfcustom.families import family_names, load_family
    from hfcustom.freezing import freeze, train_only
    from hfcustom.losses import LossContext, term, token_loss
    from hfcustom.losses.pairs import pair_loss
    from hfcustom.parts import find_parts, part_table
    from hfcustom.randomness import row_seed
    from hfcustom.registry import register
    from hfcustom.resize import resize_images
    from hfcustom.retrieval import retrieval_recall
    from hfcustom.runs.files import keep_samples, note_fault
    from hfcustom.train import fit
    from hfcustom.train_config import TrainConfig
    from hfcustom.trainer_callback import LossCallback
    from hfcustom.trl_adapter import honour_model, why_bypassed
    from hfcustom.wrapping import wrap

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from hfcustom.naming import unknown

        raise AttributeError(unknown("name of hfcustom:", name, _HOME))
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
