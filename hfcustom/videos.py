"""VideoFrames: the seams on the frames of videos, in families whose stock class has `get_video_features`.

frames -> vision tower -> [vision features] -> projector -> (F, N, D) a video -> [connector] -> (F, M, D) a video -> its
placeholders, of which the processor writes as many. A connector sees a frame as it sees a crop; one that takes frames
together gets those of one video. Losses look at images only, so nothing of a video is recorded.
Letters: B rows, T text tokens, V videos, F frames of each, N tokens of a frame in, M out, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfcustom import seams
from hfcustom.connectors import Grid, count_tokens_out, of_each, reduce_tokens
from hfcustom.seam_hooks import SeamHooks


class VideoFrames(SeamHooks):
    """Mixin before CustomVLM, and before RaggedImages where images are ragged."""

    video_inputs: Mapping[str, Any] | None = None  # arguments of get_video_features while it runs, for hooks below it

    @property
    def video_token_id(self) -> int:
        """The id in input_ids that stands for one token of a video; some families write the image's."""
        return int(self.config.video_token_id)

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for get_video_features, which forward() and generate() call."""
        return [*super().seam_methods(), (self.inner_path(), "get_video_features", "_at_video_features")]

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin_pass(module, args, kwargs)
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        if given.get("pixel_values_videos") is not None:
            assert self._pass is not None
            ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
            self._pass.video_mask = seams.find_placeholders(self, ids, embeds, self.video_token_id)

    def _at_video_features(self, stock: Callable[..., Any], *args: Any, return_dict: Any = None, **kwargs: Any) -> Any:
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        self.video_inputs = {**inputs.pop("kwargs", {}), **inputs}
        passed, self._pass = self._pass, None
        try:
            outputs = self._video_outputs(stock, args, kwargs)
        finally:
            self._pass, self.video_inputs = passed, None
        if passed is not None and self.custom_connector is not None:
            tokens = [video[..., 0].numel() for video in outputs.pooler_output]
            self._check_placeholders(
                sum(tokens), len(tokens), self.clip_lengths(tokens), mask=passed.video_mask, kind="video"
            )
        return outputs.to_tuple() if return_dict is False else outputs

    def _video_outputs(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the stock method; `pooler_output` holds what the connector makes of each video, or each frame."""
        return stock(*args, **kwargs, return_dict=True)

    def clip_lengths(self, tokens: list[int]) -> list[int]:
        """Return the tokens of each frame where the model is not told which frames are of one video, else nothing."""
        return []

    def question_of(self, lengths: Sequence[int], token: int | None = None) -> dict[str, torch.Tensor]:
        """Return what a connector is told of the question of each crop's row, or of each video's while videos are read."""
        if token is None and self.video_inputs is not None:
            token = self.video_token_id
        return super().question_of(lengths, token)

    def reduce_videos(
        self, frames: torch.Tensor, grid: Grid | None, besides_frame: int = 0, besides_video: int = 0
    ) -> torch.Tensor:
        """Run the connector on videos of as many frames each, one after the other: (V * F, N, D) -> (V * F, M, D).

        `besides_frame` and `besides_video` are tokens of a frame and of a video that the connector does not make.
        """
        assert self.video_inputs is not None, "get_video_features is running"
        videos = len(self.video_inputs["pixel_values_videos"])
        places = torch.arange(len(frames)).chunk(videos)  # (F,) each
        tokens = count_tokens_out(self.custom_connector, frames.shape[1], grid) + besides_frame
        question = self.question_of([len(at) * tokens + besides_video for at in places])
        told = of_each(question, [video for video, at in enumerate(places) for _ in at]) | self.pictures_of_tokens(
            frames
        )
        return torch.cat(
            [
                reduce_tokens(
                    self.custom_connector, frames[at], grid, self.config.connector, of_each(told, at.tolist())
                )
                for at in places
            ]
        )
