"""The vision tower, a ViT as SigLIP has it: pixels (P, C, H, W) -> patches (P, N, D).

Patches with learned positions, then blocks of attention and MLP, each behind a LayerNorm, and a LayerNorm at the end.
Papers: https://arxiv.org/abs/2010.11929, https://arxiv.org/abs/2303.15343. Compared in tests with transformers' SiglipVisionModel.
`config` is a SiglipVisionConfig. Letters: P images, C channels, H W pixels, N patches, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class PatchEmbedding(nn.Module):
    """Cut an image into squares, make a vector of each and add the one of its place."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.image_size = config.hidden_size, config.image_size
        self.conv = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, num_patches, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values are {tuple(pixels.shape)}; this tower takes (images, channels, {self.image_size}, "
                f"{self.image_size}). Set the image processor's size."
            )
        patches = self.conv(pixels.to(self.conv.weight.dtype))  # (P, D, rows, columns)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding  # (P, N, D)


class Attention(nn.Module):
    """Let each patch look at every patch."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))  # (P, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (P, heads, N, D/heads) each
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (P, heads, N, D/heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (P, N, D)


class MLP(nn.Module):
    """Change each patch by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(GradientCheckpointingLayer):
    """One layer; an nn.Module that can recompute itself in the backward pass."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionTransformer(nn.Module):
    """The whole tower."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embedding(pixels)  # (P, N, D)
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x)
