"""What a model does with rows packed into one: none sees another's tokens, and their images are put together.

Attention is a call of torch's sdpa for each row, without a mask: query (1, heads, T, D/heads), key and value alike,
row_lengths [t, ...] that add up to T -> (1, T, heads, D/heads). It is registered with transformers' AttentionInterface as
"sdpa_by_row" and takes the place of "sdpa" in a language model the first time that it is given packed rows; whatever is not
packed it hands to "sdpa". Flash attention is told where rows end; elsewhere transformers' own block mask keeps rows apart,
and a mask that a model made itself is cut into blocks here.
Letters: B rows of a batch, T text tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

if TYPE_CHECKING:
    from hfcustom.seam_hooks import SeamHooks

BY_ROW = "sdpa_by_row"
CAUSAL_LAYERS = {"full_attention", "sliding_attention"}  # layers whose mask is causal, up to a window
ATTENTION_LAYERS = CAUSAL_LAYERS | {"chunked_attention"}  # layers that see other tokens through attention alone
LAYERS_WITHOUT_MIXING = {"mlp", "moe", "dense", "sparse"}  # some configs list these too


def sdpa_by_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row; a mask (B, 1, T, T) counts inside the rows only, an empty one is that of causal attention."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    ends = list(accumulate(row_lengths))
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))  # (1, heads, t, D/heads)
        masked = attention_mask is not None and attention_mask.numel()
        mask = attention_mask[..., start:end, start:end] if masked else None  # type: ignore[index]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])  # (1, t, heads, D/heads)
    return torch.cat(parts, 1), None  # (1, T, heads, D/heads)


AttentionInterface.register(BY_ROW, sdpa_by_row)
AttentionMaskInterface.register(BY_ROW, sdpa_mask)


def packed_row_ids(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return which row of data each position of a model's inputs belongs to, counted over the batch, (B, T).

    None where no rows are packed. Position ids of M-RoPE are read where those of the text come first, (4, B, T).
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    if positions.ndim == 3:
        if len(positions) != 4:
            return None
        positions = positions[0]
    from hfcustom.losses import row_starts  # not above: losses look at seams, which import this file

    starts = row_starts(positions)  # (B, T)
    if not torch.compiler.is_compiling() and int(starts.sum()) == len(starts):
        return None
    return starts.flatten().cumsum(0).view_as(starts) - 1


def keep_rows_apart(decoder: nn.Module, inputs: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Return the inputs of a language model such that no token sees another row of data; rows (B, T)."""
    kwargs = dict(inputs)
    config: Any = decoder.config if isinstance(decoder, PreTrainedModel) and _takes_kwargs(decoder) else None
    one = len(rows) == 1 and not torch.compiler.is_compiling()
    if one and config is not None:  # layers of attention and those that carry a state get it
        kwargs["row_lengths"] = torch.bincount(rows[0]).tolist()
    if config is not None and is_flash_attention_requested(config):
        return kwargs | (_flash_lengths(rows) if one else {})
    if "row_lengths" in kwargs and config._attn_implementation in ("sdpa", BY_ROW):
        config._attn_implementation = {"": BY_ROW}  # not that of configs within
        if kwargs.get("attention_mask") is None and _is_plainly_causal(decoder, max(kwargs["row_lengths"])):
            kwargs["attention_mask"] = rows.new_empty(1, 1, 0, 0, dtype=torch.bool)  # transformers then builds none
        return kwargs
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):
        kwargs["attention_mask"] = {name: _in_blocks(part, rows) for name, part in mask.items()}
    elif mask is not None:
        kwargs["attention_mask"] = _in_blocks(mask, rows)
    return kwargs


def why_not_packed(model: SeamHooks) -> str:
    """Say why rows cannot be packed for a model, in words; nothing if they can."""
    if model.no_packing:
        return model.no_packing
    kinds = set(vars(model.config.get_text_config()).get("layer_types") or ())
    others = sorted(kinds - ATTENTION_LAYERS - LAYERS_WITHOUT_MIXING) if not model.state_modules else []
    return f"its layers of {', '.join(others)} carry what they have read from one row into the next" if others else ""


def _takes_kwargs(decoder: nn.Module) -> bool:
    """Whether a language model hands on what it does not know, as those of transformers do, down to its attention."""
    kinds = [parameter.kind for parameter in inspect.signature(decoder.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def is_causal(decoder: nn.Module) -> bool:
    """Whether attention without a mask is causal in every layer."""
    return all(vars(module).get("is_causal", True) for module in decoder.modules())


def _is_plainly_causal(decoder: Any, longest: int) -> bool:
    """Whether causal attention is all there is to the mask of rows of up to so many tokens."""
    known = vars(decoder.config)
    window = known.get("sliding_window")
    others = set(known.get("layer_types") or ()) & ATTENTION_LAYERS - CAUSAL_LAYERS
    return not others and (window is None or window >= longest) and is_causal(decoder)


def _flash_lengths(rows: torch.Tensor) -> dict[str, Any]:
    """Return what flash attention's functions of rows of different lengths take, so that no layer has to find it."""
    lengths = torch.bincount(rows[0])  # (R,)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()  # (R + 1,)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _in_blocks(mask: torch.Tensor | BlockMask | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Hide other rows in a mask (B, 1, T, T) that is True, or 0, where a token may look."""
    if isinstance(mask, BlockMask):
        raise ValueError(
            "Rows packed into one cannot be kept apart with flex attention in this family, whose mask is made beforehand: "
            "load the model with attn_implementation='sdpa', or do not pack."
        )
    if mask is None or mask.ndim != 4:
        return mask
    same = (rows[:, None, :, None] == rows[:, None, None, :]).to(mask.device)  # (B, 1, T, T)
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


# ---- images ---------------------------------------------------------------------------------------------------------


def merge_crops(
    rows: Sequence[Mapping[str, torch.Tensor]], dims: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Join the image tensors of rows along the dimension that counts crops, padded with zeros to one size otherwise.

    `dims` names that dimension where it is not the first; what comes before it counts rows, and becomes one.
    """
    dims = dims or {}
    merged = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        dim = dims.get(name, 0)
        parts = [row[name] for row in rows if name in row]
        parts = [part.flatten(0, dim) for part in parts]  # (crops, ...)
        sides = [max(part.shape[at] for part in parts) for at in range(1, parts[0].ndim)]
        joined = torch.cat([_grown(part, sides) for part in parts])
        merged[name] = joined[(None,) * dim]
    return merged


def _grown(tensor: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Pad all dimensions but the first with zeros at their ends."""
    missing = [side - have for side, have in zip(sides, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [amount for side in reversed(missing) for amount in (0, side)]) if any(missing) else tensor
