"""The decoder, a Llama: embeddings (B, T, D) -> hidden states (B, T, D).

Blocks of causal attention with rotary positions, groups of query heads that share a key and a value head, and a gated MLP,
each behind an RMSNorm. Papers: https://arxiv.org/abs/2104.09864 (rotary), 2305.13245 (grouped queries), 2302.13971 (Llama).
Compared in tests with transformers' LlamaForCausalLM. Keys and values of earlier tokens are kept in a transformers Cache.
`config` is a LlamaConfig. Letters: B rows, T tokens, S tokens with those of the cache, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (B, 1, T, D/heads) each
Mask = torch.Tensor | None  # True where a token may look, (B or 1, 1, T, S); None: at all up to itself


def rotations(position_ids: torch.Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Return by how much the pairs (i, i + width / 2) of a head turn at each position: positions (B, T)."""
    speeds = 1.0 / theta ** (torch.arange(0, width, 2, device=position_ids.device) / width)  # (width / 2,)
    angles = position_ids[:, None, :, None] * speeds  # (B, 1, T, width / 2)
    angles = torch.cat([angles, angles], -1)  # (B, 1, T, width)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn queries or keys (B, heads, T, D/heads) by their positions."""
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


def causal_mask(x: torch.Tensor, seen: int, real: torch.Tensor | None, position_ids: torch.Tensor | None) -> Mask:
    """Return where the tokens x (B, T, D) that follow `seen` others may look.

    `real` (B, S) is 0 at padding. Without it, positions (B, T) that start again at 0 begin another text.
    """
    keys = torch.arange(seen + x.shape[1], device=x.device)  # (S,)
    queries = keys[seen:, None]  # (T, 1)
    mask = (keys <= queries)[None]  # (1, T, S)
    if real is not None:
        mask = mask & real[:, None].bool()  # (B, T, S)
    elif position_ids is not None and not seen:
        text = (position_ids == 0).cumsum(-1)  # (B, T)
        mask = mask & (text[:, None] == text[..., None])  # (B, T, T)
    elif not seen or len(queries) == 1:
        return None
    return (mask | (keys == queries))[:, None]  # padding sees itself: the softmax of nothing is NaN


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class CausalAttention(nn.Module):
    """Let each token look at itself and those before it."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width, self.attention_dropout = layer, config.head_dim, config.attention_dropout
        heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.out_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, rotation: Rotation, mask: Mask, past_key_values: Cache | None) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, heads or groups, T, D/heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
            used = past_key_values.get_seq_length(self.layer) if mask is None else mask.shape[-1]
            k, v = k[:, :, :used], v[:, :, :used]  # (B, groups, S, D/heads); a cache of fixed size has empty places
        causal, dropout = mask is None and q.shape[2] > 1, self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=True)  # like q
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, D)


class GatedMLP(nn.Module):
    """Change each token by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = CausalAttention(config, layer)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: torch.Tensor, rotation: Rotation, mask: Mask, past_key_values: Cache | None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rotation, mask, past_key_values)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """The whole language model, up to the head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_width, self.theta = config.head_dim, config.rope_parameters["rope_theta"]
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = attention_mask
        if mask is None or mask.ndim == 2:  # generate() makes a whole one for a cache of fixed size
            mask = causal_mask(x, seen, mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]  # (1, T)
        rotation = rotations(position_ids, self.head_width, self.theta, x.dtype)
        for block in self.blocks:
            x = block(x, rotation, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)
