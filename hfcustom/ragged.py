"""RaggedImages: the connector seam of families whose images become different numbers of tokens.

get_image_features gives one tensor an image there, (N_i, D), already split; the connector runs on all images of one grid
together, and the processor (hfcustom/processors.py, MatchedProcessor) writes as many placeholders.
Letters: P images of one grid, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcustom.connectors import Grid, grid_out, reduce_tokens
from hfcustom.processors import match_connector
from hfcustom.seam_hooks import SeamHooks


class RaggedImages(SeamHooks):
    """Mixin between CustomVLM and a stock class whose `get_image_features` returns a sequence of (N_i, D)."""

    image_inputs: Mapping[str, Any] | None = None  # arguments of get_image_features while it runs, for hooks below it

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return the rows and columns of each image's tokens, from the arguments of get_image_features."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its image tokens lie: define image_grids()."
        )

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Leave the connector's own border alone: what passes it is not yet split by image."""
        borders = ("_at_connector_input", "_at_connector_output")
        return [hook for hook in super().seam_hooks() if hook[2] not in borders]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_image_features, which forward() and generate() call."""
        return [*super().seam_methods(), (self.inner_path(), "get_image_features", "_at_image_features")]

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, return_dict: Any = None, **kwargs: Any) -> Any:
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        self.image_inputs = {**inputs, **inputs.get("kwargs", {})}
        try:
            outputs = stock(*args, **kwargs, return_dict=True)
            features = list(outputs.pooler_output)
            if self.custom_connector is not None:
                features = self._connect(features)
                outputs.pooler_output = tuple(features)
                self._check_placeholders(sum(map(len, features)), len(features))
        finally:
            self.image_inputs = None
        if self._pass is not None and self._pass.records:
            self._pass.image_features = torch.cat(features)[None]  # (1, tokens of all images, D)
        return outputs.to_tuple() if return_dict is False else outputs

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)

    def _connect(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the connector on what get_image_features returned, one tensor an image."""
        assert self.image_inputs is not None, "get_image_features is running"
        return self._reduce(features, self.image_grids(self.image_inputs))

    def _reduce(self, features: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[torch.Tensor]:
        reduced: dict[int, torch.Tensor] = {}
        for grid in dict.fromkeys(grids):
            at = [image for image, other in enumerate(grids) if other == grid]
            stacked = torch.stack([features[image] for image in at])  # (P, N, D)
            reduced.update(
                zip(at, reduce_tokens(self.custom_connector, stacked, grid, self.config.connector), strict=True)
            )
        return [reduced[image] for image in range(len(features))]

    def transform_ragged(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Show transform_vision_features one image after the other: (sum of lengths, D_vision) -> the same shape."""
        if type(self).transform_vision_features is not _untouched():
            images = [self._vision_features(image[None])[0] for image in features.split(list(lengths))]
            features = torch.cat(images)
        if self._pass is not None and self._pass.records:
            self._pass.vision_features = features[None]  # (1, patches of all images, D_vision)
        return features


class VideosAsImages(RaggedImages):
    """Ragged images of a stock class whose `get_video_features` runs `get_image_features`: videos keep their tokens."""

    is_video: bool = False  # while get_video_features runs

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_video_features too."""
        return [*super().seam_methods(), (self.inner_path(), "get_video_features", "_at_video_features")]

    def _at_video_features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.is_video = True
        try:
            return stock(*args, **kwargs)
        finally:
            self.is_video = False

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if self.is_video else super()._at_image_features(stock, *args, **kwargs)


class SizedImages(RaggedImages):
    """Ragged images that come with their sizes in pixels; their patches reach the projector in one sequence.

    Source: Pixtral, https://arxiv.org/abs/2410.07073, section 2.
    """

    @property
    def merged_patches(self) -> int:
        """The patches a side that become one token."""
        return 1

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return each image's rows and columns of tokens."""
        return self._grids(inputs, self.merged_patches)

    def _grids(self, inputs: Mapping[str, Any], merged: int) -> list[Grid]:
        side = self.config.vision_config.patch_size * merged
        return [(height // side, width // side) for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()]

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the projector."""
        projector = self.stock_parts().paths["connector"][0]
        return [*super().seam_hooks(), (projector, "register_forward_pre_hook", "_at_projector_input", {})]

    def _at_projector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.image_inputs is not None, "the projector ran outside of get_image_features"
        lengths = [rows * columns for rows, columns in self._grids(self.image_inputs, 1)]
        features = self.transform_ragged(args[0].flatten(0, -2), lengths)  # (patches of all images, D_vision)
        return (features.view_as(args[0]), *args[1:])


class MRopeImages(RaggedImages):
    """Ragged images whose tokens have positions in time, height and width (M-RoPE): they follow the connector's grid.

    Source: Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1.
    """

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return each image's rows and columns after the family's own 2 x 2 merge; frames stand above each other."""
        merge = self.config.vision_config.spatial_merge_size
        return [
            (frames * rows // merge, columns // merge) for frames, rows, columns in inputs["image_grid_thw"].tolist()
        ]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_rope_index too, which forward() and generate() ask for positions."""
        return [*super().seam_methods(), (self.inner_path(), "get_rope_index", "_at_rope_index")]

    def _at_rope_index(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        given = inputs.get("image_grid_thw")
        if self.custom_connector is None or given is None:
            return stock(*args, **kwargs)
        merge = self.config.vision_config.spatial_merge_size
        grids = [
            (1, *(merge * side for side in grid_out(self.custom_connector, grid[0] * grid[1], grid)))
            for grid in self.image_grids({"image_grid_thw": given})
        ]
        named = {name: value for name, value in inputs.items() if name != "kwargs"} | inputs.get("kwargs", {})
        return stock(**{**named, "image_grid_thw": given.new_tensor(grids)})


def _untouched() -> Callable[..., Any]:
    from hfcustom.base import CustomVLM

    return CustomVLM.transform_vision_features
