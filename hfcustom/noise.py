"""NEFTune: uniform noise on text embeddings while training (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

(B, T, D) -> (B, T, D). Each number moves by up to alpha / sqrt(L * D), L the tokens of its row as the language model reads them,
padding left out and those of images counted, as in the authors' code. Image and video tokens themselves are features, not
embeddings of a vocabulary, and are left as they are; so is padding. L is of the row and not of the batch it stands in, so that
how strong the noise is does not depend on how a step is cut, padded or packed.
Where embeddings are scaled inside of the language model (PaliGemma), the noise is as well, as with a hook on the table.
"""

from __future__ import annotations

from typing import Any

import torch

from hfcustom.exits import ConfigError


def set_noise(core: Any, alpha: float) -> None:
    """Let a model be trained with noise; ConfigError for one without embeddings of text and images in one row."""
    if alpha and "_at_language_input" not in [method for _, _, method, _ in core.seam_hooks()]:
        raise ConfigError(
            f"neftune_alpha={alpha}: {type(core).__name__} has no seam at the embeddings of a language model, where the noise "
            "would be added; leave it out."
        )
    core.neftune_alpha = alpha or core.neftune_alpha  # that of one's own loop stays


def text_noise(
    embeddings: torch.Tensor,
    alpha: float,
    text: torch.Tensor,
    real: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Return noise for embeddings (B, T, D) where `text` (B, T) is true, and zeros elsewhere.

    `real` (B, T) is false at padding; `rows` (B, T) numbers the rows of data where several are packed into one.
    """
    shape, device = embeddings.shape[:2], embeddings.device
    real = torch.ones(shape, device=device) if real is None else real.to(device).float()  # (B, T)
    if rows is None:
        rows = torch.arange(shape[0], device=device)[:, None].expand(shape)  # (B, T)
    lengths = real.new_zeros(shape.numel()).index_add(0, rows.flatten(), real.flatten())  # (B T,), more than enough
    size = alpha / (lengths[rows] * embeddings.shape[-1]).clamp(min=1).sqrt()  # (B, T)
    size = size * real * text.to(device)
    drawn = torch.empty_like(embeddings, requires_grad=False).uniform_(-1, 1)  # (B, T, D)
    return drawn * size.to(embeddings.dtype)[..., None]  # (B, T, D)
