"""Weights without values: `from_pretrained` runs as it does in training, but no file of weights is read, nor fetched.

The class, its config, dtype, ties, quantisation and strict checks are those of the real call (transformers 5.20 to 5.23);
only the reading is left out. Quantised weights are made by bitsandbytes' own functions from weights without values, so that
their sizes are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import LoadStateDictInfo, build_glob_alternation
from transformers.quantizers.base import HfQuantizer

ASSUMED_DTYPE = "bfloat16"


@contextmanager
def without_weights() -> Iterator[None]:
    """Have `from_pretrained` build what it would load, inside `simulate()`."""
    preprocess = HfQuantizer.preprocess_model

    def preprocess_plain(quantizer: HfQuantizer, *args: Any, **kwargs: Any) -> Any:
        with (
            _disable_current_modes()
        ):  # its classes cannot hold a FakeTensor; on the meta device they are made as ever
            return preprocess(quantizer, *args, **kwargs)

    with ExitStack() as patches:
        for owner, name, value in (
            (modeling_utils, "_get_resolved_checkpoint_files", lambda *args, **kwargs: ([], None)),
            (modeling_utils, "_get_dtype", _get_dtype),
            (PreTrainedModel, "_load_pretrained_model", staticmethod(_fill)),
            (PreTrainedModel, "_finalize_model_loading", staticmethod(_finish)),
            (HfQuantizer, "preprocess_model", preprocess_plain),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


READ_DTYPE = modeling_utils._get_dtype


def _get_dtype(dtype: Any, files: Any, config: Any, *rest: Any, **more: Any) -> Any:
    """Decide on the dtype as from_pretrained does; a config without one stands for weights in 16 bits."""
    if dtype == "auto" and config.dtype is None:
        dtype = stored_dtype(Path(str(config.name_or_path))) or ASSUMED_DTYPE
    return READ_DTYPE(dtype, files, config, *rest, **more)


def stored_dtype(folder: Path) -> str | None:
    """Return the first floating-point dtype of a folder's safetensors; None where there are none."""
    from safetensors import safe_open

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found = [names.get(tensors.get_slice(key).get_dtype()) for key in tensors.keys()]
        if known := [name for name in found if name]:
            return known[0]
    return None


def _fill(model: Any, state_dict: Any, files: Any, load_config: Any) -> tuple[LoadStateDictInfo, None]:
    """Give parameters the dtype that loading would give them, and quantise those that it would."""
    if load_config.dtype_plan:
        alternation, groups, _ = build_glob_alternation(list(load_config.dtype_plan))
        for name, parameter in model.named_parameters():
            if match := alternation.search(name):
                parameter.data = parameter.data.to(load_config.dtype_plan[groups[str(match.lastgroup)]])
    if load_config.hf_quantizer is not None:
        for module in model.modules():
            _quantise(module, load_config.dtype)
    nothing: Any = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return LoadStateDictInfo(**nothing, conversion_errors={}, skipped_pp_keys=set()), None


def _finish(model: Any, load_config: Any, info: LoadStateDictInfo) -> LoadStateDictInfo:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # torch.tensor() makes those past the dispatcher
                make = torch.empty if buffer.is_floating_point() else torch.zeros
                module._buffers[name] = make(buffer.shape, dtype=buffer.dtype)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:  # likewise: CLIP's scale
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    return info


def _quantise(module: Any, dtype: torch.dtype) -> None:
    kind = type(module).__name__
    if kind not in ("Linear4bit", "Linear8bitLt"):
        return
    import bitsandbytes

    meant: Any = module.weight
    value = torch.empty(module.out_features, module.in_features, dtype=dtype)
    if kind == "Linear4bit":
        options = {name: getattr(meant, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        packed, state = bitsandbytes.functional.quantize_4bit(value, **options, quant_storage=meant.quant_storage)
        facts = {**options, "quant_storage": meant.quant_storage, "quant_state": state, "bnb_quantized": True}
        vars(module)["quant_state"] = state
    else:
        packed, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(value.half())
        facts = {"CB": packed, "SCB": scales, "has_fp16_weights": False}
    weight = nn.Parameter(packed, requires_grad=False)
    vars(weight).update(facts)
    module.weight = weight
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(module.out_features, dtype=module.bias.dtype), requires_grad=False)
