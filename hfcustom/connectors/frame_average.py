"""frame_average: neighbouring frames averaged, and what it means that a connector takes frames together.

A connector sees crops, (P, N, D). They are frames of one clip where every frame is one crop and the frames of a clip stand
next to each other, which the families deliver in this way:
- a row's images, with the family's multi-crop switched off, are its neighbouring crops in reading order;
- the frames of a video, in every family that reads videos: as images (InternVL, SmolVLM), or by a path of their own, where
  a frame is what the tower makes one of: two pictures in Qwen2-VL and its kin and in Nemotron Omni, one elsewhere;
- in families whose images have sizes of their own, a row's images, where neighbours of one clip have one size;
- in Llama 3.2, the same tile of a row's neighbouring images, which must be cut into the same tiles.
`frames` crops make a clip, from the first crop of a row or of a video on, so each has to hold a multiple of `frames`: a clip
of two rows or of two videos is an error. Where a video is read as images, its row's images count with its frames.

The contract wants as many tokens for each crop: a clip's tokens are dealt in order to the places of its frames, which the
text keeps. With frames=2 the first frame's places hold the first half of the averaged picture, the second's the other.
"""

from __future__ import annotations

import torch
from torch import nn


class FrameAverage(nn.Module):
    """Average each token over `frames` neighbouring crops: N tokens for a clip, ceil(N / frames) for each frame.

    Where frames does not divide N, the clip's last token is repeated in the places that are left. No parameters; frames=1
    is the identity. Source: NVILA, https://arxiv.org/abs/2412.04468, section 2 (temporal averaging).
    """

    def __init__(self, hidden_size: int, frames: int = 2) -> None:
        super().__init__()
        self.frames = check_frames("frame_average", frames)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        clips = as_clips("frame_average", features, self.frames).mean(1)  # (clips, N, D)
        missing = self.frames * self.num_tokens_out(features.shape[1]) - features.shape[1]
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1)], 1) if missing else clips
        return clips.reshape(len(features), -1, features.shape[2])  # (P, M, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return a frame's share of the clip's tokens."""
        return -(-num_tokens // self.frames)


def check_frames(name: str, frames: int) -> int:
    """Return the number of crops that make a clip; ValueError when it is none."""
    if frames < 1:
        raise ValueError(f"{name} frames={frames}; it must be at least 1.")
    return frames


def as_clips(name: str, features: torch.Tensor, frames: int) -> torch.Tensor:
    """Fold neighbouring crops into clips: (P, N, D) -> (P / frames, frames, N, D); ValueError when P is no multiple."""
    if len(features) % frames:
        raise ValueError(
            f"{name} frames={frames} takes {frames} neighbouring crops together, but {len(features)} came. Give each row a "
            "multiple of that many images (repeat a still one), one crop each: switch the processor's multi-crop off. Give "
            "each video a multiple of that many frames: choose how many the processor samples."
        )
    return features.unflatten(0, (-1, frames))
