"""mlp: two layers, LLaVA 1.5's projector."""

from __future__ import annotations

import torch
from torch import nn


class MLP(nn.Module):
    """Pass each token through two layers with a GELU between.

    residual=True adds the result to the token and starts the second layer at zero: exactly "no connector" until it is
    trained. residual=False is LLaVA 1.5's own form with torch's random start, for training a connector anew; there it
    stands in the projector's place, here it follows the family's own.
    Source: LLaVA 1.5, https://arxiv.org/abs/2310.03744.
    """

    def __init__(self, hidden_size: int, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.up = nn.Linear(hidden_size, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)
        if residual:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mixed = self.down(nn.functional.gelu(self.up(features)))  # (P, N, D)
        return features + mixed if self.residual else mixed

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return the number of tokens, which stays."""
        return num_tokens
