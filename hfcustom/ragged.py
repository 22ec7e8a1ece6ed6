"""RaggedImages: the connector seam of families whose images become different numbers of tokens.

get_image_features gives one tensor an image there, (N_i, D), already split; the connector runs on all images of one grid
together, and the processor (hfcustom/processors.py, MatchedProcessor) writes as many placeholders.
Letters: P images of one grid, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from hfcustom.connectors import Grid, frames_together, grid_out, reduce_tokens
from hfcustom.seam_hooks import SeamHooks


class RaggedImages(SeamHooks):
    """Mixin between CustomVLM and a stock class whose `get_image_features` returns a sequence of (N_i, D)."""

    no_pictures = "images have sizes of their own and reach the tower as patches"
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
        found = [*super().seam_methods(), (self.inner_path(), "get_image_features", "_at_image_features")]
        inner = self.get_submodule(self.inner_path())
        if frames_together(self.custom_connector) > 1 and hasattr(inner, "get_video_features"):
            found.append((self.inner_path(), "get_video_features", "_at_video_features"))
        return found

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, return_dict: Any = None, **kwargs: Any) -> Any:
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        self.image_inputs = {**inputs, **inputs.get("kwargs", {})}
        try:
            outputs = stock(*args, **kwargs, return_dict=True)
            features = list(outputs.pooler_output)
            if self.custom_connector is not None:
                features = self._reduce(features, self.image_grids(self.image_inputs))
                outputs.pooler_output = tuple(features)
                self._check_placeholders(sum(map(len, features)), len(features), list(map(len, features)))
        finally:
            self.image_inputs = None
        if self._pass is not None and self._pass.records:
            self._pass.image_features = torch.cat(features)[None]  # (1, tokens of all images, D)
        return outputs.to_tuple() if return_dict is False else outputs

    def _at_video_features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"connector={self.config.connector!r} takes frames together, but {type(self).__name__} has a path of its own for "
            "videos, which no connector sees. Give the frames as images of one size."
        )

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)

    def _reduce(self, features: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[torch.Tensor]:
        reduced: dict[int, torch.Tensor] = {}
        frames = frames_together(self.custom_connector)
        clips = [range(first, min(first + frames, len(grids))) for first in range(0, len(grids), frames)]
        for clip in clips:
            if {grids[image] for image in clip} != {grids[clip[0]]}:
                raise ValueError(
                    f"connector={self.config.connector!r} takes {frames} neighbouring images together, which must have one "
                    f"size; the tokens of some lie {' and '.join(str(grids[image]) for image in clip)}."
                )
        for grid in dict.fromkeys(grids):
            at = [image for clip in clips if grids[clip[0]] == grid for image in clip]
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


def match_connector(model: Any, processor: Any) -> Any:
    """Give a MatchedProcessor the model's connector; return the processor."""
    connector = model.config.connector
    if connector is not None:
        connector = {"name": connector} if isinstance(connector, str) else dict(connector)
        connector["hidden_size"] = model.config.get_text_config().hidden_size
    processor.connector = connector
    return processor


def _untouched() -> Callable[..., Any]:
    from hfcustom.base import CustomVLM

    return CustomVLM.transform_vision_features
