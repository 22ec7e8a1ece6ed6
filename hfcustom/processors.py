"""What processors of custom models add to stock ones: working without torchvision, and following a connector.

A stock processor with a video processor refuses to be built, loaded or saved without torchvision. OptionalVideo leaves the
video processor out in that case, keeps its settings through a load and save, and says what to install when a video
comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available

from hfcustom.connectors import Grid, build_connector, count_tokens_out, frames_together, grid_out, grids_out


class OptionalVideo(ProcessorMixin):
    """Mixin before a stock processor whose __init__ takes (image_processor, tokenizer, video_processor, ...)."""

    video_processor_type: ClassVar[str]
    _video_settings: dict[str, Any] | None = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the sub-processors; the video processor is none of them while torchvision is missing."""
        attributes = super().get_attributes()
        if not is_torchvision_available():
            attributes.remove("video_processor")
        return attributes

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as stock does, keeping the video settings that this machine cannot use."""
        if not is_torchvision_available():  # args are the sub-processors that there are, in stock's order
            at = super().get_attributes().index("video_processor")
            args = [*args[:at], None, *args[at:]]
        others = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        result = super().from_args_and_dict(args, others, **kwargs)
        processor = result[0] if isinstance(result, tuple) else result
        processor._video_settings = processor_dict.get("video_processor")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialise; without torchvision the video processor is written as it was loaded, or with its image size."""
        output = super().to_dict()
        if "video_processor" not in output:
            size = {"size": dict(self.image_processor.size)} if self.image_processor.size else {}
            output["video_processor"] = self._video_settings or {
                "video_processor_type": self.video_processor_type,
                **size,
            }
        return output

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check inputs as stock does; ImportError when a video comes and torchvision is missing."""
        if videos is not None and not is_torchvision_available():
            raise ImportError("Videos need torchvision: pip install torchvision. Images work without it.")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)


class SingleBos(ProcessorMixin):
    """Mixin before a stock processor: texts that begin with BOS, as a chat template writes it, get no second one."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Process as stock does, with add_special_tokens=False, unless it is given, where the texts have their BOS."""
        texts, bos = [text] if isinstance(text, str) else text or [], self.tokenizer.bos_token
        given = "add_special_tokens" in {**kwargs, **kwargs.get("text_kwargs", {})}
        if not given and bos and texts and all(sample.startswith(bos) for sample in texts):
            kwargs["add_special_tokens"] = False
        return super().__call__(images=images, text=text, **kwargs)


class NeedsTorchvision(ProcessorMixin):
    """Mixin before a stock processor that is a mere placeholder without torchvision: says what to install."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # not __init__, whose signature transformers reads
        """Raise ImportError where torchvision is missing."""
        if not is_torchvision_available():
            raise ImportError(f"{cls.__name__} works with torchvision only: pip install torchvision")
        return super().__new__(cls)


class WithoutVideo(ProcessorMixin):
    """Mixin after a stock processor whose __init__ takes the video processor before the tokenizer: a missing one is left out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*(part for part in args if part is not None), **kwargs)


class PrefixProcessor(ProcessorMixin):
    """Mixin before the processor of a prefix-LM: token_type_ids are 0 in a prompt, which sees itself whole, else 1."""

    def mark_answers(self, batch: Mapping[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
        """Return the token_type_ids of a training batch, answers (B, T) True at label tokens -> (B, T).

        A row's prompt ends with its first label token, as a prompt to be generated from ends there: earlier answers that
        are not trained on are prompt, and what comes after is causal, since a question that prompts saw ahead would leak.
        Padding is 0, as tokenizers write it.
        """
        return (answers.cumsum(1) > 0).long() * batch["attention_mask"]


class NestedImages(ProcessorMixin):
    """Mixin before a stock processor that wants images nested by row: a flat list is dealt out to several texts."""

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Nest a flat list by the texts' placeholders; rows that are all without images are no images."""
        is_list, several = isinstance(images, list | tuple), isinstance(text, list | tuple) and len(text) > 1
        if is_list and not any(not isinstance(row, list | tuple) or row for row in images):
            images = None
        elif is_list and several and not any(isinstance(row, list | tuple) for row in images):
            counts = [sample.count(self.image_token) for sample in text]  # type: ignore[attr-defined]
            if sum(counts) == len(images):
                flat = iter(images)
                images = [[next(flat) for _ in range(count)] for count in counts]
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)


class ConnectedProcessor(ProcessorMixin):
    """Mixin that knows the model's connector.

    `connector` is what the model's config names, with its `hidden_size`; `model.match_processor(processor)` sets it, and
    it is saved with the processor.
    """

    connector: dict[str, Any] | None = None
    _built: tuple[dict[str, Any], torch.nn.Module] | None = None

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as stock does, keeping the connector."""
        others = {name: value for name, value in processor_dict.items() if name != "connector"}
        result = super().from_args_and_dict(args, others, **kwargs)
        (result[0] if isinstance(result, tuple) else result).connector = processor_dict.get("connector")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialise, with the connector where there is one."""
        output = super().to_dict()
        return output | ({} if self.connector is None else {"connector": self.connector})

    def connector_module(self) -> torch.nn.Module | None:
        """Return the connector without weights: it is only asked how many tokens it makes."""
        if self.connector is None:
            return None
        if self._built is None or self._built[0] != self.connector:
            options = {name: value for name, value in self.connector.items() if name != "hidden_size"}
            with torch.device("meta"):
                self._built = dict(self.connector), build_connector(options, self.connector["hidden_size"])
        return self._built[1]


class VideosAsImages(ConnectedProcessor):
    """Mixin before a stock processor that writes the frames of a video as images, which the model cannot tell from others."""

    crop_field: ClassVar[str]  # the attribute that holds the placeholders of one crop

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Any = (), videos_replacements: Any = (), *audio: Any, **kwargs: Any
    ) -> Any:
        """Replace as stock does; ValueError where a connector of frames would mix those of a video with other crops."""
        if len(videos_replacements) and self.connector is not None:
            self._check_clips(text, iter(images_replacements), iter(videos_replacements))
        return super().get_text_with_replacements(text, images_replacements, videos_replacements, *audio, **kwargs)

    def _check_clips(self, text: list[str], images: Iterator[str], videos: Iterator[str]) -> None:
        own: Any = self
        image, video, frames = own.image_token, own.video_token, frames_together(self.connector_module())
        marks = re.compile(f"{re.escape(image)}|{re.escape(video)}")
        for row, sample in enumerate(text):
            crops = 0
            for found in marks.findall(sample):
                written = next(videos if found == video else images, "")  # too few: stock says so
                first, crops = crops, crops + written.count(image) // getattr(self, self.crop_field)
                if found == video and (first % frames or crops % frames):
                    raise ValueError(
                        f"connector={self.connector!r} takes {frames} neighbouring crops together, but a video of row {row} is "
                        f"crops {first} to {crops - 1}, so some would be taken together with crops beside it. Give each video a "
                        f"multiple of {frames} frames (sample others, or repeat the last), and as many images before it."
                    )


class MatchedProcessor(ConnectedProcessor):
    """Mixin before a stock processor that counts an image's placeholders itself: the model's connector reduces them."""

    @property
    def placeholder_token(self) -> str:
        """The token in the expanded text that stands for one image token; some families' `image_token` is another."""
        token: str = self.image_token  # type: ignore[attr-defined]
        return token

    def image_grid(self, image_inputs: Mapping[str, Any], image_idx: int) -> Grid | None:
        """Return the rows and columns of an image's tokens, None for square crops."""
        return None

    def reduced_inputs(
        self, image_inputs: Mapping[str, Any], image_idx: int, module: Any, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Return inputs of one image whose tokens lie as `module` makes them, for stock to write it from.

        A family needs this where stock writes marks between the rows, or views of several grids; None lets each run of
        placeholders be cut to what the connector makes of it.
        """
        return None

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return what stock writes for an image, with as many placeholders as the connector makes tokens."""
        module, token = self.connector_module(), self.placeholder_token
        reduced = None if module is None else self.reduced_inputs(image_inputs, image_idx, module, **kwargs)
        if module is None or reduced is not None:
            inputs, at = (image_inputs, image_idx) if reduced is None else (reduced, 0)
            return str(super().replace_image_token(inputs, at, **kwargs))
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)
        grid = self.image_grid(image_inputs, image_idx)
        run = re.compile(f"(?:{re.escape(token)})+")
        return run.sub(lambda found: token * count_tokens_out(module, len(found[0]) // len(token), grid), text)


class SizedProcessor(NeedsTorchvision, MatchedProcessor):
    """Mixin before PixtralProcessor, which writes a mark after each row of an image and needs torchvision."""

    def reduced_inputs(
        self, image_inputs: Mapping[str, Any], image_idx: int, module: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the size in pixels of an image with as many rows and columns as the connector makes."""
        side = self.patch_size * self.spatial_merge_size  # type: ignore[attr-defined]
        rows, columns = (int(length) // side for length in image_inputs["image_sizes"][image_idx])
        return {"image_sizes": [[side * count for count in grid_out(module, rows * columns, (rows, columns))]]}


def check_one_kind(family: str, images: Any, videos: Any) -> None:
    """Refuse images beside videos in a call, where stock would lose some of them or mistake one for the other."""
    if images and videos:
        raise ValueError(
            f"{family} takes images or videos in one micro-batch, not both: set video_as_images=True, so that frames are images, or "
            "micro_batch_size=1 without packing where no row has both."
        )


class RaggedVideos(ProcessorMixin):
    """Mixin that marks a processor which takes videos of different numbers of frames in one call; others stack them."""


class GridProcessor(RaggedVideos, MatchedProcessor):
    """MatchedProcessor for images and videos that come with their grids, (P, 3) frames, rows and columns of patches."""

    def image_grid(self, image_inputs: Mapping[str, Any], image_idx: int) -> Grid:
        """Return the rows and columns of an image's tokens, after the merge of patches."""
        _, rows, columns = image_inputs["image_grid_thw"][image_idx]
        merge = self.image_processor.merge_size
        return int(rows) // merge, int(columns) // merge

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return what stock writes for a video of the size that the connector leaves."""
        module = self.connector_module()
        if module is not None:
            grid = torch.as_tensor(video_inputs["video_grid_thw"][video_idx])[None]
            left = grids_out(module, grid, self.video_processor.merge_size)[0].numpy()
            video_inputs = {**video_inputs, "video_grid_thw": {video_idx: left}}  # stock looks at this one only
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return text


def match_connector(model: Any, processor: Any) -> Any:
    """Give a processor the model's connector; return it. TypeError for one that cannot follow it."""
    if not isinstance(processor, ConnectedProcessor):
        raise TypeError(
            f"A {type(processor).__name__} cannot follow a connector; load the processor with "
            f"{model.processor_class.__name__}.from_pretrained, or AutoProcessor from a folder of this model."
        )
    connector = model.config.connector
    if connector is not None:
        connector = {"name": connector} if isinstance(connector, str) else dict(connector)
        connector["hidden_size"] = model.config.get_text_config().hidden_size
    processor.connector = connector
    return processor
