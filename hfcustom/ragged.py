"""RaggedImages: the connector seam of families whose images become different numbers of tokens.

get_image_features gives one tensor an image there, (N_i, D), already split; the connector runs on all images of one grid
together, and the processor (hfcustom/processors.py, MatchedProcessor) writes as many placeholders.
Letters: P images of one grid, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcustom.connectors import (
    Grid,
    Told,
    count_tokens_out,
    frames_together,
    look_at,
    of_each,
    reduce_tokens,
    takes_lists,
    works_before_projector,
)
from hfcustom.connectors.grids import alike
from hfcustom.processors import match_connector
from hfcustom.seam_hooks import SeamHooks


class RaggedImages(SeamHooks):
    """Mixin between CustomVLM and a stock class whose `get_image_features` returns a sequence of (N_i, D)."""

    no_tower_cache = "images have sizes of their own and reach the tower as patches"
    no_resizing = "takes pictures of any size as they are: set the size in the processor alone"
    image_inputs: Mapping[str, Any] | None = None  # arguments of get_image_features while it runs, for hooks below it

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return the rows and columns of each image's tokens, from the arguments of get_image_features."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its image tokens lie: define image_grids()."
        )

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the picture of each image, (1, 3, H, W), or those of a video's frames, from those arguments."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what its images look like: define pictures_of_images()."
        )

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Leave the connector's own border alone: what passes it is not yet split by image. Pictures are in the inputs."""
        borders = ("_at_connector_input", "_at_connector_output", "_at_vision_input")
        return [hook for hook in super().seam_hooks() if hook[2] not in borders]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_image_features, which forward() and generate() call."""
        return [*super().seam_methods(), (self.inner_path(), "get_image_features", "_at_image_features")]

    def _at_image_features(self, stock: Callable[..., Any], *args: Any, return_dict: Any = None, **kwargs: Any) -> Any:
        outputs = self._features(stock, args, kwargs)
        features = list(outputs.pooler_output)
        if self._pass is not None and self.custom_connector is not None:
            self._check_placeholders(sum(map(len, features)), len(features), list(map(len, features)))
        if self._pass is not None and self._pass.records:
            self._pass.image_features = torch.cat(features)[None]  # (1, tokens of all images, D)
        return outputs.to_tuple() if return_dict is False else outputs

    def _features(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the stock method; `pooler_output` becomes what the connector makes of each image."""
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        self.image_inputs = {**inputs.pop("kwargs", {}), **inputs}
        try:
            outputs = stock(*args, **kwargs, return_dict=True)
            if self.custom_connector is not None:
                outputs.pooler_output = tuple(self._connect(list(outputs.pooler_output)))
        finally:
            self.image_inputs = None
        return outputs

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model."""
        return match_connector(self, processor)

    def _connect(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the connector on what get_image_features returned, one tensor an image."""
        assert self.image_inputs is not None, "get_image_features is running"
        grids = self.image_grids(self.image_inputs)
        pictures = self.pictures_of_images(self.image_inputs) if self.looks_behind_projector else None
        return self._reduce(features, grids, self.question_of(self.tokens_left(features, grids)), pictures)

    def tokens_left(self, features: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[int]:
        """Return how many tokens the connector leaves of each image, (N_i, D), or of a video's frames together."""
        sizes = [math.prod(grid) for grid in grids]
        counts = [count_tokens_out(self.custom_connector, *part) for part in zip(sizes, grids, strict=True)]
        return [len(image) // size * count for image, size, count in zip(features, sizes, counts, strict=True)]

    def _reduce(
        self,
        features: Sequence[torch.Tensor],
        grids: Sequence[Grid],
        told: Told | None = None,
        pictures: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Run the connector on all images that have the same grid; on a video's frames, which share theirs, together.

        `told` is what the connector asks for, an entry an image or video; `pictures` are (F * K, 3, H, W), K of each of
        its F frames, for one that looks at them.
        """
        crops = [
            image.unflatten(0, (-1, math.prod(grid))) for image, grid in zip(features, grids, strict=True)
        ]  # (F, N, D)
        if pictures is not None and not told and takes_lists(self.custom_connector):
            looked = look_at(self.custom_connector, crops, pictures, grids, self.config.connector)
            return [image.flatten(0, 1) for image in looked]
        if any(len(image) > 1 for image in crops):
            return [
                self._reduce_alike(
                    [image], grid, of_each(told or {}, [at] * len(image)), pictures and [pictures[at]]
                ).flatten(0, 1)
                for at, (image, grid) in enumerate(zip(crops, grids, strict=True))
            ]
        frames = frames_together(self.custom_connector)
        clips = [range(first, min(first + frames, len(grids))) for first in range(0, len(grids), frames)]
        for clip in clips:
            if {grids[image] for image in clip} != {grids[clip[0]]}:
                raise ValueError(
                    f"connector={self.config.connector!r} takes {frames} neighbouring images together, which must have one "
                    f"size; the tokens of some lie {' and '.join(str(grids[image]) for image in clip)}."
                )
        sizes = [pictures and pictures[clip[0]].shape for clip in clips]
        reduced: dict[int, torch.Tensor] = {}
        for places in alike([(grids[clip[0]], size) for clip, size in zip(clips, sizes, strict=True)]):
            at = [image for place in places for image in clips[place]]
            seen = None if pictures is None else [pictures[image] for image in at]
            left = self._reduce_alike([crops[image] for image in at], grids[at[0]], of_each(told or {}, at), seen)
            reduced.update(zip(at, left, strict=True))
        return [reduced[image] for image in range(len(features))]

    def _reduce_alike(
        self, crops: Sequence[torch.Tensor], grid: Grid, told: Told, pictures: Sequence[torch.Tensor] | None
    ) -> torch.Tensor:
        """Run the connector on images of one grid: (F, N, D) each, `told` an entry a frame -> (all F, M, D)."""
        told = told if pictures is None else {**told, "pixel_values": torch.cat(list(pictures))}
        return reduce_tokens(self.custom_connector, torch.cat(list(crops)), grid, self.config.connector, told)

    def transform_ragged(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Show the seam of vision features one image, or frame, after the other: (patches of all, D_vision) -> the same shape.

        `grids` are the rows and columns of patches of each.
        """
        images = [self._transformed(image[None]) for image in features.split([math.prod(grid) for grid in grids])]
        if works_before_projector(self.custom_connector):
            assert self.image_inputs is not None, "get_image_features is running"
            images = self._look_at_images(images, self.pictures_of_images(self.image_inputs), grids)
        features = torch.cat(images, 1)[0]
        if self._pass is not None and self._pass.records:
            self._pass.vision_features = features[None]  # (1, patches of all images, D_vision)
        return features

    def _look_at_images(
        self, images: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], grids: Sequence[Grid]
    ) -> list[torch.Tensor]:
        """Run a connector that works on vision features and pictures, on all images in one call: (1, N, D_vision) each."""
        each = [picture[None] for image in pictures for picture in image]  # (1, 3, H, W), a frame each
        return look_at(self.custom_connector, images, each, grids, self.config.connector)


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

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return each image without what pads it to the size of the largest."""
        side = self.config.vision_config.patch_size
        sizes = zip(inputs["pixel_values"], self._grids(inputs, 1), strict=True)
        return [picture[None, :, : rows * side, : columns * side] for picture, (rows, columns) in sizes]

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the projector."""
        projector = self.stock_parts().paths["connector"][0]
        return [*super().seam_hooks(), (projector, "register_forward_pre_hook", "_at_projector_input", {})]

    def _at_projector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.image_inputs is not None, "the projector ran outside of get_image_features"
        grids = self._grids(self.image_inputs, 1)
        features = self.transform_ragged(args[0].flatten(0, -2), grids)  # (patches of all images, D_vision)
        return (features.view_as(args[0]), *args[1:])
