"""linear: one matrix, LLaVA's first projector."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    """Multiply each token by one matrix, which starts as the identity: exactly "no connector" until it is trained.

    LLaVA has this product in the projector's place, D_vision -> D; here it follows the family's own projector.
    Source: LLaVA, https://arxiv.org/abs/2304.08485, section 4.1.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)  # (P, N, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return the number of tokens, which stays."""
        return num_tokens
