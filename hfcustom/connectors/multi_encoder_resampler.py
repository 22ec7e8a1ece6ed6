"""multi_encoder_resampler: several vision towers look at the same crops, and queries read all of them into few tokens.

    connector = describe_towers(["facebook/dinov2-base", "openai/clip-vit-base-patch16"], processor, num_queries=64)
    model = CustomLlava....from_pretrained("llava-hf/llava-1.5-7b-hf", connector=connector)
    model.custom_connector.load_towers(["facebook/dinov2-base", "openai/clip-vit-base-patch16"])

(P, N, D) behind the family's projector, and pictures (P * K, 3, H, W) -> (P, M, D).
Letters: P crops, K pictures of each, N tokens of the family's own tower, N_i of an added one, D_i their width, M queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcustom.connectors.added_tower import NORMS, AddedTower
from hfcustom.connectors.grids import Grid, alike
from hfcustom.connectors.perceiver_resampler import Resampler
from hfcustom.naming import unknown

TOWER_OPTIONS = ("tower", *NORMS)


class MultiEncoderResampler(Resampler):
    """Put the tokens of several towers one after another and read them into `num_queries`, by cross-attention.

    `towers` are those added to the family's own, each a mapping as describe_tower makes it: {"tower": {"model_type": ...}},
    and where its pixels are normalised otherwise, `processor_mean`, `processor_std`, `tower_mean`, `tower_std`. All that a
    tower makes is brought to the width of the language model by a matrix of its own, and stands behind the tokens of the
    family's projector; where these are of tiles put together, of each tile. Towers are frozen and in eval mode unless `trainable`. The blocks are perceiver_resampler's, and
    so is `start`: with "average" the added towers have no say at first, and the family's own tokens are averaged by regions.

    Source: BRAVE, https://arxiv.org/abs/2404.07204, section 3 (MEQ-Former). There each tower has a matrix alike, the
    resampler is a Q-Former of twelve layers that reads the words of the prompt beside the queries, and no tower is in the
    model before; here the family's tower is the first and keeps its projector, and the queries ask alone.
    """

    after_projector = True
    takes_lists = True

    def __init__(
        self,
        hidden_size: int,
        towers: Sequence[Mapping[str, Any]] = (),
        num_queries: int = 64,
        num_layers: int = 2,
        num_heads: int = 8,
        trainable: bool = False,
        start: str = "average",
    ) -> None:
        name = "multi_encoder_resampler"
        super().__init__(name, hidden_size, num_queries, num_layers, num_heads, start)
        _check_towers(name, towers)
        self.towers = nn.ModuleList(
            AddedTower(name, **{"tower": None, **options}, trainable=trainable) for options in towers
        )
        self.projs = nn.ModuleList(nn.Linear(tower.tower_width, hidden_size) for tower in self._towers())

    def _towers(self) -> list[AddedTower]:
        return [tower for tower in self.towers if isinstance(tower, AddedTower)]

    def load_towers(self, sources: Sequence[str], **options: Any) -> None:
        """Copy the towers' weights from checkpoints, one each, folders or hub ids; `options` go to from_pretrained.

        ValueError for another number of them; else as AddedTower.load_tower.
        """
        if len(sources) != len(self.towers):
            raise ValueError(
                f"{len(sources)} checkpoints for {len(self.towers)} added towers; name one each, in order."
            )
        for tower, source in zip(self._towers(), sources, strict=True):
            tower.load_tower(source, **options)

    def forward(self, features: Any, pixel_values: Any, grid: Any = None) -> Any:
        """Read (P, N, D), which lie in a grid, and pictures, (P * K, 3, H, W), into (P, M, D); or lists of them."""
        if isinstance(features, torch.Tensor):
            return self._read([features], [pixel_values], [grid])[0]
        return self._read(features, pixel_values, grid)

    def _read(
        self, features: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], grids: Sequence[Grid | None]
    ) -> list[torch.Tensor]:
        memory = [[image] for image in features]
        for tower, proj in zip(self._towers(), self.projs, strict=True):
            for tokens, seen in zip(memory, tower.of_all(tower.sequence, pictures), strict=True):
                crops = seen.unflatten(0, (len(tokens[0]), -1)).flatten(1, 2)  # (P, K * N_i, D_i)
                tokens.append(proj(crops.to(tokens[0].dtype)))  # (P, K * N_i, D)
        memories = [torch.cat(tokens, 1) for tokens in memory]  # (P, N + others, D) each
        read: dict[int, torch.Tensor] = {}
        for at in alike(
            [(x.shape[1], y.shape[1], grid) for x, y, grid in zip(features, memories, grids, strict=True)]
        ):
            own, all_tokens = (torch.cat([tokens[image] for image in at]) for tokens in (features, memories))
            found = self.read(own, grids[at[0]], all_tokens)  # (P, M, D)
            read.update(zip(at, found.split([len(features[image]) for image in at]), strict=True))
        return [read[image] for image in range(len(features))]


def _check_towers(name: str, towers: Any) -> None:
    """Raise ValueError for what is no list of mappings that describe a tower each."""
    what = "names no tower" if not towers else "" if isinstance(towers, list | tuple) else "is no list"
    if other := [options for options in towers if not isinstance(options, Mapping)]:
        what = what or f"holds {other[0]!r}, which is no mapping"
    if what:
        raise ValueError(
            f"{name} towers={towers!r} {what}; write [{{'tower': {{'model_type': 'dinov2', ...}}}}, ...], or let "
            "describe_towers([checkpoint, ...]) do it."
        )
    for options in towers:
        for option in options:
            if option not in TOWER_OPTIONS:
                cure = "For a tower's sizes write {'tower': {'model_type': ...}}."
                raise ValueError(unknown(f"option of a tower of {name}:", option, TOWER_OPTIONS, cure))
