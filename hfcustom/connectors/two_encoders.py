"""two_encoders: a second vision tower looks at the same crops, and its features join the first tower's.

    connector = describe_tower("facebook/dinov2-base", processor)         # a plain mapping, for config.connector
    model = CustomLlava....from_pretrained("llava-hf/llava-1.5-7b-hf", connector=connector)
    model.custom_connector.load_tower("facebook/dinov2-base")             # from here on the weights travel with the model

(P, patches, D_vision) -> the same shape, before the family's projector: the number of image tokens stays.
Letters: P crops, N patches of the first tower, N2 of the second, D and D2 their widths.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfcustom.connectors.attention import CrossAttention, check_heads
from hfcustom.connectors.grids import Grid
from hfcustom.naming import unknown

FUSIONS = ("concat", "cross_attend")
MAX_EXTRA_TOKENS = 16  # class and register tokens before the patches
Channels = float | Sequence[float]


class TwoEncoders(nn.Module):
    """Join the features of a second vision tower to the first's, patch by patch or by attention.

    `tower` is any vision config of transformers as a mapping with its model_type; the tower is built from it, is saved with
    the model, and has random weights until `load_tower` or a checkpoint of this model gives it some. It is frozen and in
    eval mode unless `trainable`. It sees the crops that the first tower sees, resized to its own image_size where that
    differs. They are normalised as the processor does it: where the second tower was trained with another mean and
    deviation, name both (`processor_mean`, `processor_std`, `tower_mean`, `tower_std`; a number, or one a channel).

    fusion="concat" brings the second tower's grid to the first's by bilinear interpolation, puts the channels side by side
    and maps them to D_vision with one matrix, which starts as "the first tower alone" (Apollo joins so,
    https://arxiv.org/abs/2412.10360). fusion="cross_attend" lets each patch attend to all patches of the second tower and
    adds what it finds, with an output that starts at zero (Mini-Gemini, https://arxiv.org/abs/2403.18814, where a patch
    sees only its own window). So the start is exactly no connector. BRAVE, https://arxiv.org/abs/2404.07204, puts the
    towers' tokens one after another and resamples them, which changes their number; that is not offered here.
    """

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
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(unknown("fusion of connector 'two_encoders':", fusion, FUSIONS))
        self.trainable = trainable
        config = _tower_config(tower)
        self.tower: Any = AutoModel.from_config(config)
        _check_inputs(self.tower)
        self.tower.requires_grad_(trainable)
        self.hidden_size, self.tower_width = hidden_size, _width(config)
        if fusion == "concat":
            self.proj = nn.Linear(hidden_size + self.tower_width, hidden_size)
            nn.init.eye_(self.proj.weight)  # (D, D + D2): the identity, then zeros
            nn.init.zeros_(self.proj.bias)
        else:
            check_heads("two_encoders", hidden_size, num_heads)
            self.norm = nn.LayerNorm(hidden_size)
            self.norm_tower = nn.LayerNorm(self.tower_width)
            self.attention = CrossAttention(hidden_size, num_heads, self.tower_width)
            nn.init.zeros_(self.attention.o_proj.weight)
            nn.init.zeros_(self.attention.o_proj.bias)
        self.fusion = fusion
        self.scale, self.shift = _renormalization(processor_mean, processor_std, tower_mean, tower_std)
        self.train(self.training)

    def train(self, mode: bool = True) -> TwoEncoders:
        """Set the mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if not self.trainable:
            self.tower.eval()
        return self

    def load_tower(self, source: str, **options: Any) -> None:
        """Copy the second tower's weights from a checkpoint, a folder or hub id; `options` go to from_pretrained.

        Raises ValueError when the checkpoint lacks a tensor of the tower, RuntimeError when one has another shape.
        """
        from hfcustom.loading import report_in_error  # which needs the connectors itself

        with report_in_error():
            loaded, info = type(self.tower).from_pretrained(
                source, config=self.tower.config, output_loading_info=True, **options
            )
        if info["missing_keys"]:
            raise ValueError(
                f"{source} has no tensor for {sorted(info['missing_keys'])[0]!r} of {type(self.tower).__name__}. Make the "
                f"connector with describe_tower({source!r})."
            )
        self.tower.load_state_dict(loaded.state_dict())

    def forward(self, features: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        if features.shape[-1] != self.hidden_size:
            raise ValueError(
                f"two_encoders was built for vision features {self.hidden_size} wide and got {features.shape[-1]}: the "
                "family's vision_width() has to say the latter."
            )
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            second, grid = self.second_features(pixel_values)  # (P, N2, D2)
        second = second.to(features.dtype)
        if self.fusion == "cross_attend":
            return features + self.attention(self.norm(features), self.norm_tower(second))
        wanted = _grid_like(features.shape[1], pixel_values.shape[-2:])
        if grid != wanted:
            image = second.transpose(1, 2).unflatten(2, grid).float()  # (P, D2, rows, columns)
            image = nn.functional.interpolate(image, wanted, mode="bilinear", align_corners=False, antialias=True)
            second = image.flatten(2).transpose(1, 2).to(features.dtype)  # (P, N, D2)
        return self.proj(torch.cat([features, second], -1))  # (P, N, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return the number of tokens, which stays."""
        return num_tokens

    def second_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Run the second tower: (P, 3, H, W) -> its patches (P, N2, D2) and how they lie."""
        dtype = next(self.tower.parameters()).dtype
        pictures = self._resized(pixel_values.float())
        channel = (slice(None), None, None)  # (3, 1, 1)
        scale, shift = (torch.tensor(x, device=pictures.device)[channel] for x in (self.scale, self.shift))
        output = self.tower(pixel_values=(pictures * scale + shift).to(dtype)).last_hidden_state
        if output.ndim == 4:  # a convolutional tower: (P, D2, rows, columns)
            return self._of_width(output.flatten(2).transpose(1, 2)), (output.shape[2], output.shape[3])
        rows, columns = (side // patch for side, patch in zip(pictures.shape[-2:], self._patch_size(), strict=True))
        extra = output.shape[1] - rows * columns
        if not 0 <= extra <= MAX_EXTRA_TOKENS:
            raise ValueError(
                f"The second tower, {type(self.tower).__name__}, makes {output.shape[1]} tokens of a picture of {rows} x "
                f"{columns} patches, which is no grid that the first tower's patches can be matched with."
            )
        return self._of_width(output[:, extra:]), (rows, columns)

    def _of_width(self, second: torch.Tensor) -> torch.Tensor:
        if second.shape[-1] != self.tower_width:
            raise ValueError(
                f"The second tower, {type(self.tower).__name__}, makes features {second.shape[-1]} wide, which its config, "
                f"with {self.tower_width}, does not say; choose another tower."
            )
        return second

    def _patch_size(self) -> tuple[int, int]:
        return _pair(getattr(self.tower.config, "patch_size", 1))

    def _resized(self, pictures: torch.Tensor) -> torch.Tensor:
        """Bring pictures to the tower's image_size; ValueError when that would change their proportions."""
        size = getattr(self.tower.config, "image_size", None)
        if size is None or pictures.shape[-2:] == _pair(size):
            return pictures
        (height, width), given = _pair(size), tuple(pictures.shape[-2:])
        if height * given[1] != width * given[0]:
            raise ValueError(
                f"The second tower, {type(self.tower).__name__}, sees pictures of {height} x {width} pixels; crops of "
                f"{given[0]} x {given[1]} have other proportions and cannot be matched with its patches. Give the tower an "
                "image_size of the crops' proportions."
            )
        return nn.functional.interpolate(
            pictures, (height, width), mode="bicubic", align_corners=False, antialias=True
        )


def describe_tower(source: str, processor: Any = None, **options: Any) -> dict[str, Any]:
    """Return the connector's mapping for a checkpoint's vision tower; only configs are read.

    With the model's processor the mapping says how to get from its normalisation of pixels to the tower's. `options` are
    TwoEncoders' (fusion, trainable, num_heads).
    """
    config = AutoConfig.from_pretrained(source)
    tower = getattr(config, "vision_config", config).to_diff_dict()
    described = {"name": "two_encoders", "tower": {**tower, "model_type": _vision_type(config)}, **options}
    if processor is None:
        return described
    own, theirs = processor.image_processor, AutoImageProcessor.from_pretrained(source)
    for name, images in (("processor", own), ("tower", theirs)):
        described |= {f"{name}_mean": list(images.image_mean), f"{name}_std": list(images.image_std)}
    return described


def _vision_type(config: PretrainedConfig) -> str:
    return str(getattr(config, "vision_config", config).model_type)


def _tower_config(tower: Mapping[str, Any] | None) -> PretrainedConfig:
    """Build the tower's config; of a model of pictures and text, its vision part."""
    values = {key: value for key, value in (tower or {}).items() if key not in ("dtype", "torch_dtype")}
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"two_encoders tower={tower!r} names no model_type; write {{'model_type': 'dinov2', ...}}, or let "
            "describe_tower(checkpoint) do it."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(unknown("model_type of the second tower:", model_type, CONFIG_MAPPING.keys()))
    config = AutoConfig.for_model(model_type, **values)
    return getattr(config, "vision_config", config)


def _check_inputs(tower: nn.Module) -> None:
    """A tower that cannot work from pixel_values alone cannot be the second one."""
    inputs = inspect.signature(tower.forward).parameters.values()
    needed = [x.name for x in inputs if x.default is x.empty and x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]
    if extra := [name for name in needed if name != "pixel_values"]:
        raise ValueError(
            f"The second tower, {type(tower).__name__}, wants {', '.join(extra)} beside pixel_values, which two_encoders "
            "cannot give it; choose a tower of pictures of one size."
        )


def _width(config: Any) -> int:
    sizes = getattr(config, "hidden_sizes", None)  # of a convolutional tower, one a stage
    return int(sizes[-1] if sizes else config.hidden_size)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _grid_like(num_tokens: int, picture: Sequence[int]) -> Grid:
    """Return the rows and columns of a tower's patches, which lie in the picture's proportions."""
    rows = round(math.sqrt(num_tokens * picture[0] / picture[1]))
    if not rows or num_tokens % rows or rows * picture[1] != num_tokens // rows * picture[0]:
        raise ValueError(
            f"{num_tokens} patches of a crop of {picture[0]} x {picture[1]} pixels are no grid that the second tower's can "
            "be brought to; use fusion='cross_attend'."
        )
    return rows, num_tokens // rows


def _renormalization(*given: Channels | None) -> tuple[list[float], list[float]]:
    """Return the factor and summand, one a channel, that turn the processor's pixels into the tower's."""
    known = [value for value in given if value is not None]
    if not known:
        return [1.0] * 3, [0.0] * 3
    if len(known) < len(given):
        raise ValueError(
            "two_encoders needs processor_mean, processor_std, tower_mean and tower_std together, or none of them."
        )
    channels = [list(value) if isinstance(value, Sequence) else [value] * 3 for value in known]
    means_and_stds = list(zip(*channels, strict=True))  # a channel: of the processor, of the tower
    scale = [std / tower_std for _, std, _, tower_std in means_and_stds]
    return scale, [(mean - tower_mean) / tower_std for mean, _, tower_mean, tower_std in means_and_stds]
