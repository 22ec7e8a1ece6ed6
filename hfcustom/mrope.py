"""MRopeImages: the seams of families whose images and videos have positions in time, height and width (M-RoPE).

pixels -> vision tower -> [vision features] -> its last step, which merges 2 x 2 patches -> [connector], a video frame by
frame -> placeholders (hfcustom/processors.py, GridProcessor) and positions follow the grid that the connector leaves.
Source: Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1; stock code: transformers/models/qwen2_vl.
Letters: P images and videos, B rows, T text tokens, D hidden; a grid is (frames, rows, columns) of patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging
from transformers.vision_utils import get_vision_window_index

from hfcustom import losses, patches
from hfcustom.connectors import Grid, grids_out, of_each, takes_lists
from hfcustom.ragged import RaggedImages
from hfcustom.videos import VideoFrames

logger = logging.get_logger("hfcustom")

GRIDS = ("image_grid_thw", "video_grid_thw")  # (P, 3) each


class MRopeImages(VideoFrames, RaggedImages):
    """Mixin between CustomVLM and a stock class that places tokens by `get_rope_index`, one grid an image or video."""

    position_input: ClassVar[str] = (
        "mm_token_type_ids"  # without it stock lays image tokens in a row, and says nothing
    )

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return the rows and columns of tokens of each image, or of each frame of a video, after the 2 x 2 merge."""
        merge = self.config.vision_config.spatial_merge_size
        return [(rows // merge, columns // merge) for _, rows, columns in _grids(inputs).tolist()]

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the picture of each image; of a video's frames, which are two pictures, the first."""
        name = "pixel_values" if inputs.get("pixel_values") is not None else "pixel_values_videos"
        vision: Any = self.config.vision_config
        grids = _grids(inputs).tolist()
        parts = inputs[name].split([frames * rows * columns for frames, rows, columns in grids])
        return [
            patches.from_merged(part, frames, (rows, columns), vision.patch_size, vision.spatial_merge_size)
            for part, (frames, rows, columns) in zip(parts, grids, strict=True)
        ]

    def patch_order(self, grids: torch.Tensor) -> torch.Tensor | None:
        """Return which token's patches reach the merger at each place, (tokens,); None where they come in image order."""
        return None

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the merger."""
        merger = self.stock_parts().paths["connector"][0]
        return [*super().seam_hooks(), (merger, "register_forward_pre_hook", "_at_merger_input", {})]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_rope_index too, which forward() and generate() call."""
        return [*super().seam_methods(), (self.inner_path(), "get_rope_index", "_at_rope_index")]

    def stock_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give rows packed into one the positions by which stock keeps them apart; all else as CustomVLM does."""
        call: dict[str, Any] = super().stock_inputs(inputs)  # type: ignore[misc]
        if losses.is_packed(call) and call["position_ids"].ndim == 2:
            starts = losses.row_starts(call["position_ids"])  # (B, T)
            if int(starts.sum()) > len(starts):
                call["position_ids"] = torch.cat([call["position_ids"][None], self._packed_positions(call, starts)])
        return call

    def place_tokens(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the positions of a batch's tokens in time, height and width, (3, B, T), as forward() finds them."""
        place: Any = self.base_model.compute_3d_position_ids
        asked = {name: batch.get(name) for name in inspect.signature(place).parameters}
        places: torch.Tensor | None = place(**asked)
        if places is None:  # no image
            return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        return places

    def _packed_positions(self, call: Mapping[str, Any], starts: torch.Tensor) -> torch.Tensor:
        """Return positions in time, height and width, (3, B, T), each packed row's own; starts (B, T)."""
        if all(call.get(name) is None for name in GRIDS):
            return call["position_ids"].expand(3, -1, -1)
        ends = [*starts.flatten().nonzero().flatten().tolist()[1:], starts.numel()]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        rows = {
            name: pad_sequence(call[name].flatten().split(lengths), batch_first=True)  # (R, longest row)
            for name in ("input_ids", "mm_token_type_ids")
            if name in call
        }
        mask = pad_sequence([starts.new_ones(length, dtype=torch.long) for length in lengths], batch_first=True)
        place: Any = self.base_model.compute_3d_position_ids
        asked = {name: call.get(name) for name in inspect.signature(place).parameters}
        places = place(**{**asked, **rows, "attention_mask": mask})  # (3, R, longest row)
        return places[:, mask.bool()].unflatten(1, starts.shape)  # (3, B, T)

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin_pass(module, args, kwargs)
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        if given.get("position_ids") is None and any(given.get(name) is not None for name in GRIDS):
            lacking = [name for name in ("input_ids", self.position_input) if given.get(name) is None]
            if lacking and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"{type(self).__name__} got images without {' and '.join(lacking)}, so they have no height and width: "
                    "their tokens lie in a row. Pass all that the processor returns, or position_ids."
                )

    def _at_merger_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.image_inputs is None:  # the tower is run by itself
            return args
        features, grids = args[0], _grids(self.image_inputs)  # (patches, D_vision), (P, 3)
        of_frames = [(rows, columns) for frames, rows, columns in grids.tolist() for _ in range(frames)]
        order = self.patch_order(grids)
        if order is None:
            return (self.transform_ragged(features, of_frames), *args[1:])
        order = order.to(features.device)
        merged = features.unflatten(0, (len(order), -1))  # (tokens, patches a token, D_vision)
        ordered = self.transform_ragged(merged[order.argsort()].flatten(0, 1), of_frames)  # (patches, D_vision)
        return (ordered.view_as(merged)[order].flatten(0, 1), *args[1:])

    def _look_at_images(
        self, images: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], grids: Sequence[Grid]
    ) -> list[torch.Tensor]:
        """Show the connector an image's patches row by row, and bring them back in the order that the merger wants."""
        merge = self.config.vision_config.spatial_merge_size
        rows = [patches.rows_of_merged(image, grid, merge) for image, grid in zip(images, grids, strict=True)]
        looked = super()._look_at_images(rows, pictures, grids)
        return [patches.merged_of_rows(image, grid, merge) for image, grid in zip(looked, grids, strict=True)]

    def _video_outputs(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Treat a video as images of one size."""
        return self._features(stock, args, kwargs)

    def _connect(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the connector on one video after the other: what takes frames together never takes those of two."""
        if self.video_inputs is None or takes_lists(self.custom_connector):
            return super()._connect(features)
        assert self.image_inputs is not None, "its arguments stand here too"
        grids = self.image_grids(self.image_inputs)
        told = self.question_of(self.tokens_left(features, grids))
        pictures = self.pictures_of_images(self.image_inputs) if self.looks_behind_projector else None
        parts = enumerate(zip(features, grids, strict=True))
        return [
            self._reduce([video], [grid], of_each(told, [at]), pictures and [pictures[at]])[0]
            for at, (video, grid) in parts
        ]

    def _at_rope_index(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        inputs = {**inputs.pop("kwargs", {}), **inputs}
        merge = self.config.vision_config.spatial_merge_size
        for name in GRIDS if self.custom_connector is not None else ():
            if inputs.get(name) is not None:
                inputs[name] = grids_out(self.custom_connector, inputs[name], merge)
        return stock(**inputs)


class WindowedImages(MRopeImages):
    """M-RoPE images whose tower sorts patches by windows of attention: the seams see them in image order.

    Source: Qwen2.5-VL, https://arxiv.org/abs/2502.13923, section 2.1.1.
    """

    def patch_order(self, grids: torch.Tensor) -> torch.Tensor:
        """Return the windows' order of tokens."""
        vision: Any = self.config.vision_config
        return get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)[0]


def _grids(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the (P, 3) grids among the arguments of get_image_features or get_video_features."""
    grids: torch.Tensor = next(inputs[name] for name in GRIDS if inputs.get(name) is not None)
    return grids
