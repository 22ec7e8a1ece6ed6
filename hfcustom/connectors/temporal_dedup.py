"""temporal_dedup: a clip without the tokens that repeat the frame before."""

from __future__ import annotations

import math

import torch
from torch import nn

from hfcustom.connectors.frame_average import as_clips, check_frames
from hfcustom.connectors.token_pruning import check_ratio, highest, pick


class TemporalDedup(nn.Module):
    """Drop the tokens of a clip that are most like the token at the same place of the frame before.

    A clip is `frames` neighbouring crops (frame_average.py says when crops are frames). Its first frame is kept whole; of
    the others those tokens stay whose cosine similarity to the frame before is lowest, in their order, until the clip has
    frames * ceil(keep_ratio * N) tokens. So the number is known beforehand, which a threshold would leave open; the tokens
    are dealt in order to the places of the clip's frames. Scores are computed in float32, equal ones are settled by
    position; kept tokens have a gradient, the choice has none. No parameters; keep_ratio=1.0 is the identity.

    Source: LongVU, https://arxiv.org/abs/2410.17434, section 3 (spatial token compression, there with a threshold).
    """

    def __init__(self, hidden_size: int, frames: int = 2, keep_ratio: float = 0.75) -> None:
        super().__init__()
        self.frames = check_frames("temporal_dedup", frames)
        self.keep_ratio = check_ratio("temporal_dedup", keep_ratio)
        if frames * keep_ratio < 1:
            raise ValueError(
                f"temporal_dedup keep_ratio={keep_ratio} of {frames} frames does not hold the first frame, which is kept "
                f"whole; choose at least 1 / frames = {1 / frames:.3g}."
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        clips = as_clips("temporal_dedup", features, self.frames)  # (clips, frames, N, D)
        with torch.no_grad():
            frames = clips.float()
            change = 1 - nn.functional.cosine_similarity(frames[:, 1:], frames[:, :-1], -1)  # (clips, frames-1, N)
            first = torch.full_like(frames[:, :1, :, 0], torch.inf)  # (clips, 1, N)
            count = self.frames * self.num_tokens_out(features.shape[1])
            kept = highest(torch.cat([first, change], 1).flatten(1), count)  # (clips, frames*M)
        return pick(clips.flatten(1, 2), kept).reshape(len(features), -1, features.shape[2])  # (P, M, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return a frame's share of the clip's tokens."""
        return math.ceil(self.keep_ratio * num_tokens)
