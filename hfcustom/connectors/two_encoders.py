"""two_encoders: a second vision tower looks at the same crops, and its features join the first tower's.

    connector = describe_tower("facebook/dinov2-base", processor)         # a plain mapping, for config.connector
    model = CustomLlava....from_pretrained("llava-hf/llava-1.5-7b-hf", connector=connector)
    model.custom_connector.load_tower("facebook/dinov2-base")             # from here on the weights travel with the model

(P, patches, D_vision) -> the same shape, before the family's projector: the number of image tokens stays.
Letters: P crops, H W their pixels, N patches of the first tower, N2 of the second, D and D2 their widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcustom.connectors.added_tower import AddedTower, Channels
from hfcustom.connectors.attention import CrossAttention, check_heads, start_at_zero
from hfcustom.connectors.grids import Grid, alike
from hfcustom.naming import unknown

FUSIONS = ("concat", "cross_attend")


class TwoEncoders(AddedTower):
    """Join the features of a second vision tower to the first's, patch by patch or by attention.

    `tower` is any vision config of transformers as a mapping with its model_type (added_tower.py). It is frozen and in
    eval mode unless `trainable`. Where it was trained with another mean and deviation than the processor's, name both
    (`processor_mean`, `processor_std`, `tower_mean`, `tower_std`).

    fusion="concat" brings the second tower's grid to the first's, that of each image, by bilinear interpolation, puts the channels side by side
    and maps them to D_vision with one matrix, which starts as "the first tower alone" (Apollo joins so,
    https://arxiv.org/abs/2412.10360). fusion="cross_attend" lets each patch attend to all patches of the second tower and
    adds what it finds in its own image, with an output that starts at zero (Mini-Gemini, https://arxiv.org/abs/2403.18814, where a patch
    sees only its own window). So the start is exactly no connector. Several towers' tokens resampled
    into fewer: multi_encoder_resampler.
    """

    takes_lists = True

    def __init__(
        self,
        hidden_size: int,
        tower: Mapping[str, Any] | None = None,
        fusion: str = "concat",
        trainable: bool = False,
        num_heads: int = 8,
        processor_mean: Channels | None = None,
        processor_std: Channels | None = None,
        tower_mean: Channels | None = None,
        tower_std: Channels | None = None,
    ) -> None:
        if fusion not in FUSIONS:
            raise ValueError(unknown("fusion of connector 'two_encoders':", fusion, FUSIONS))
        super().__init__("two_encoders", tower, trainable, processor_mean, processor_std, tower_mean, tower_std)
        self.hidden_size, self.fusion = hidden_size, fusion
        if fusion == "concat":
            self.proj = nn.Linear(hidden_size + self.tower_width, hidden_size)
            nn.init.eye_(self.proj.weight)  # (D, D + D2): the identity, then zeros
            nn.init.zeros_(self.proj.bias)
        else:
            check_heads("two_encoders", hidden_size, num_heads)
            self.norm = nn.LayerNorm(hidden_size)
            self.norm_tower = nn.LayerNorm(self.tower_width)
            self.attention = CrossAttention(hidden_size, num_heads, self.tower_width)
            start_at_zero(self.attention.o_proj)

    def forward(self, features: Any, pixel_values: Any, grid: Any = None) -> Any:
        """Join what the second tower sees: (P, N, D), (P, 3, H, W) and how the N lie -> (P, N, D); or lists of them."""
        if isinstance(features, torch.Tensor):
            return self._join([features], [pixel_values], [grid])[0]
        return self._join(features, pixel_values, grid)

    def _join(
        self, features: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], grids: Sequence[Grid | None]
    ) -> list[torch.Tensor]:
        for image in features:
            if image.shape[-1] != self.hidden_size:
                raise ValueError(
                    f"two_encoders was built for vision features {self.hidden_size} wide and got {image.shape[-1]}: the "
                    "family's vision_width() has to say the latter."
                )
        seconds = self.of_all(self.patches, pictures)  # (P, N2, D2) and a grid each
        fuse = self._concat if self.fusion == "concat" else self._cross_attend
        wanted = [
            grid or (_grid_like(image.shape[1], picture.shape[-2:]) if self.fusion == "concat" else None)
            for image, picture, grid in zip(features, pictures, grids, strict=True)
        ]
        kinds = [(x.shape[1], second[1], grid) for x, second, grid in zip(features, seconds, wanted, strict=True)]
        joined: dict[int, torch.Tensor] = {}
        for at in alike(kinds):
            first = torch.cat([features[image] for image in at])  # (P, N, D)
            second = torch.cat([seconds[image][0] for image in at]).to(first.dtype)  # (P, N2, D2)
            found = fuse(first, second, seconds[at[0]][1], wanted[at[0]])  # (P, N, D)
            joined.update(zip(at, found.split([len(features[image]) for image in at]), strict=True))
        return [joined[image] for image in range(len(features))]

    def _cross_attend(self, first: torch.Tensor, second: torch.Tensor, *grids: Grid | None) -> torch.Tensor:
        found: torch.Tensor = self.attention(self.norm(first), self.norm_tower(second))
        return first + found

    def _concat(self, first: torch.Tensor, second: torch.Tensor, grid: Grid, wanted: Grid | None) -> torch.Tensor:
        if wanted is not None and grid != wanted:
            image = second.transpose(1, 2).unflatten(2, grid).float()  # (P, D2, rows, columns)
            image = nn.functional.interpolate(image, wanted, mode="bilinear", align_corners=False, antialias=True)
            second = image.flatten(2).transpose(1, 2).to(first.dtype)  # (P, N, D2)
        joined: torch.Tensor = self.proj(torch.cat([first, second], -1))  # (P, N, D)
        return joined

    def num_tokens_out(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Return the number of tokens, which stays."""
        return num_tokens


def _grid_like(num_tokens: int, picture: Sequence[int]) -> Grid:
    """Return the rows and columns of a tower's patches, which lie in the picture's proportions."""
    rows = round(math.sqrt(num_tokens * picture[0] / picture[1]))
    if not rows or num_tokens % rows or rows * picture[1] != num_tokens // rows * picture[0]:
        raise ValueError(
            f"{num_tokens} patches of a crop of {picture[0]} x {picture[1]} pixels are no grid that the second tower's can "
            "be brought to; use fusion='cross_attend'."
        )
    return rows, num_tokens // rows
