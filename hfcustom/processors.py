"""Processors that load and work without torchvision: images always, videos once torchvision is there.

A stock processor with a video processor refuses to be built, loaded or saved without torchvision. This mixin leaves the
video processor out in that case, keeps its settings through a load and save, and says what to install when a video
comes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available


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
        result = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = result[0] if isinstance(result, tuple) else result
        processor._video_settings = processor_dict.get("video_processor")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialise; without torchvision the video processor is written as it was loaded, or with its image size."""
        output = super().to_dict()
        if "video_processor" not in output:
            default = {"video_processor_type": self.video_processor_type, "size": dict(self.image_processor.size)}
            output["video_processor"] = self._video_settings or default
        return output

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Check inputs as stock does; ImportError when a video comes and torchvision is missing."""
        if videos is not None and not is_torchvision_available():
            raise ImportError("Videos need torchvision: pip install torchvision. Images work without it.")
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)
