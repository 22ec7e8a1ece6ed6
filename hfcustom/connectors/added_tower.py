"""A vision tower of any kind added to a model's own, as the connectors of several encoders use it.

Letters: P crops, H W their pixels, N2 patches of the added tower, D2 their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hfcustom.connectors.grids import Grid, alike
from hfcustom.naming import unknown
from hfcustom.parts import without_wrappers

NORMS = ("processor_mean", "processor_std", "tower_mean", "tower_std")
MAX_EXTRA_TOKENS = 16  # class and register tokens before the patches
Channels = float | Sequence[float]
Seen = TypeVar("Seen")


class AddedTower(nn.Module):
    """A tower built from a vision config of transformers, which sees the crops that the model's own tower sees.

    Crops are resized to its image_size where that differs, whatever their proportions: a tower of squares sees a wide
    picture narrowed, as it was trained to where its own processor resizes so, and its grid of patches spans the whole
    picture again. So positions are those it knows, any tower can be added, and all pictures of a batch are one pass,
    whatever their sizes (Eagle, https://arxiv.org/abs/2408.15998, and Apollo, https://arxiv.org/abs/2412.10360, give each
    tower squares of its size, too, and bring the features to one grid). They are normalised as the processor does it: where the tower was trained with
    another mean and deviation, both are named (a number, or one a channel). Weights are random until `load_tower` or a
    checkpoint of the model gives it some. It is frozen and in eval mode unless `trainable`.
    """

    lacks_weights = False  # made for a checkpoint that has none for it; fit() refuses a frozen one

    def __init__(
        self,
        name: str,
        tower: Mapping[str, Any] | None,
        trainable: bool = False,
        processor_mean: Channels | None = None,
        processor_std: Channels | None = None,
        tower_mean: Channels | None = None,
        tower_std: Channels | None = None,
    ) -> None:
        super().__init__()
        self.trainable = trainable
        config = _tower_config(name, tower)
        self.tower: Any = AutoModel.from_config(config)
        _check_inputs(name, self.tower)
        self.tower.requires_grad_(trainable)
        self.tower_width = _width(config)
        self.scale, self.shift = _renormalization(name, processor_mean, processor_std, tower_mean, tower_std)
        self.tower.train(trainable)

    def train(self, mode: bool = True) -> AddedTower:
        """Set the mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if not self.trainable:
            self.tower.eval()
        return self

    def load_tower(self, source: str, **options: Any) -> None:
        """Copy the tower's weights from a checkpoint, a folder or hub id; `options` go to from_pretrained.

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
        self.lacks_weights = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Note that a checkpoint of the model, or an adapter, has weights for the tower."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(name.startswith(f"{prefix}tower.") for name in state_dict):
            self.lacks_weights = False

    def of_all(self, look: Callable[[torch.Tensor], Seen], pictures: Sequence[torch.Tensor]) -> list[Seen]:
        """Run `look`, one of the methods below, on pictures of any sizes, (P_i, 3, H_i, W_i) each: a result each.

        All that the tower sees in one size are one pass.
        """
        resized: list[torch.Tensor] = list(pictures)
        for at in alike([picture.shape[-2:] for picture in pictures]):
            together = self._resized(torch.cat([pictures[image] for image in at]).float())
            for image, part in zip(at, together.split([len(pictures[image]) for image in at]), strict=True):
                resized[image] = part
        found: dict[int, Seen] = {}
        for at in alike([picture.shape[-2:] for picture in resized]):
            seen = look(torch.cat([resized[image] for image in at]))
            found.update(zip(at, _split(seen, [len(resized[image]) for image in at]), strict=True))
        return [found[image] for image in range(len(resized))]

    def sequence(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower: (P, 3, H, W) -> all that it makes, class tokens included, (P, N2, D2)."""
        output = self._run(self._resized(pixel_values.float()))
        return self._of_width(output.flatten(2).transpose(1, 2) if output.ndim == 4 else output)

    def patches(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Run the tower: (P, 3, H, W) -> its patches (P, N2, D2) and how they lie."""
        pictures = self._resized(pixel_values.float())
        output = self._run(pictures)
        if output.ndim == 4:  # a convolutional tower: (P, D2, rows, columns)
            return self._of_width(output.flatten(2).transpose(1, 2)), (output.shape[2], output.shape[3])
        rows, columns = (side // patch for side, patch in zip(pictures.shape[-2:], self._patch_size(), strict=True))
        extra = output.shape[1] - rows * columns
        if not 0 <= extra <= MAX_EXTRA_TOKENS:
            raise ValueError(
                f"The added tower, {type(self.tower).__name__}, makes {output.shape[1]} tokens of a picture of {rows} x "
                f"{columns} patches, which is no grid that the first tower's patches can be matched with."
            )
        return self._of_width(output[:, extra:]), (rows, columns)

    def _run(self, pictures: torch.Tensor) -> torch.Tensor:
        channel = (slice(None), None, None)  # (3, 1, 1)
        scale, shift = (torch.tensor(x, device=pictures.device)[channel] for x in (self.scale, self.shift))
        dtype = next(self.tower.parameters()).dtype
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            output: torch.Tensor = self.tower(pixel_values=(pictures * scale + shift).to(dtype)).last_hidden_state
        return output

    def _of_width(self, second: torch.Tensor) -> torch.Tensor:
        if second.shape[-1] != self.tower_width:
            raise ValueError(
                f"The added tower, {type(self.tower).__name__}, makes features {second.shape[-1]} wide, which its config, "
                f"with {self.tower_width}, does not say; choose another tower."
            )
        return second

    def _patch_size(self) -> tuple[int, int]:
        return _pair(getattr(self.tower.config, "patch_size", 1))

    def _resized(self, pictures: torch.Tensor) -> torch.Tensor:
        """Bring pictures to the tower's image_size."""
        size = getattr(self.tower.config, "image_size", None)
        if size is None or pictures.shape[-2:] == _pair(size):
            return pictures
        return nn.functional.interpolate(pictures, _pair(size), mode="bicubic", align_corners=False, antialias=True)


def _split(seen: Any, counts: Sequence[int]) -> list[Any]:
    """Split what a tower made of pictures one after another, features or features and their grid."""
    if isinstance(seen, torch.Tensor):
        return list(seen.split(list(counts)))
    features, grid = seen
    return [(part, grid) for part in features.split(list(counts))]


def towers_without_weights(model: nn.Module) -> dict[str, AddedTower]:
    """Return the added towers that neither a checkpoint nor load_tower has given weights, by the call that would."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AddedTower) and module.lacks_weights and "original_module" not in name:
            holder, several, _ = without_wrappers(name).rpartition(".towers.")
            call = (
                f"{holder}.load_towers([checkpoint, ...])"
                if several
                else f"{without_wrappers(name)}.load_tower(checkpoint)"
            )
            found[f"model.{call}"] = module
    return found


def check_weights(model: nn.Module) -> None:
    """Raise ValueError for an added tower that would be frozen as it was drawn."""
    for call, added in towers_without_weights(model).items():
        if not added.trainable:
            raise ValueError(
                f"The added tower, {type(added.tower).__name__}, is frozen with random weights: what it sees means nothing. "
                f"Call {call} before training, or set trainable=true in its connector to train it from nothing. For a "
                "command line, save the model with its weights, and train that folder."
            )


def describe_tower(source: str, processor: Any = None, **options: Any) -> dict[str, Any]:
    """Return the mapping of connector two_encoders for a checkpoint's vision tower; only configs are read.

    With the model's processor the mapping says how to get from its normalisation of pixels to the tower's. `options` are
    TwoEncoders' (fusion, trainable, num_heads).
    """
    return {"name": "two_encoders", **_described(source, processor), **options}


def describe_towers(sources: Sequence[str], processor: Any = None, **options: Any) -> dict[str, Any]:
    """Return the mapping of connector multi_encoder_resampler for the vision towers of several checkpoints.

    As `describe_tower`; `options` are MultiEncoderResampler's (num_queries, num_layers, num_heads, trainable, start).
    """
    towers = [_described(source, processor) for source in sources]
    return {"name": "multi_encoder_resampler", "towers": towers, **options}


def _described(source: str, processor: Any) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(source)
    tower = getattr(config, "vision_config", config).to_diff_dict()
    known = getattr(config, "vision_config", config)
    unused = _unknown_sizes(tower, known)  # old files hold what only text models ever read
    tower = {key: value for key, value in tower.items() if key not in unused}
    described: dict[str, Any] = {"tower": {**tower, "model_type": _vision_type(config)}}
    if processor is None:
        return described
    own, theirs = processor.image_processor, AutoImageProcessor.from_pretrained(source)
    for name, images in (("processor", own), ("tower", theirs)):
        described |= dict(zip((f"{name}_mean", f"{name}_std"), _norms(images), strict=True))
    return described


def _norms(images: Any) -> tuple[list[float], list[float]]:
    """Return the mean and deviation by which an image processor changes pixels of 0 to 1, one a channel."""
    largest = 255 * images.rescale_factor if images.do_rescale else 255.0  # what 1 is before it is normalised
    if not images.do_normalize:
        return [0.0] * 3, [1 / largest] * 3
    return [value / largest for value in images.image_mean], [value / largest for value in images.image_std]


def _vision_type(config: PretrainedConfig) -> str:
    return str(getattr(config, "vision_config", config).model_type)


def _tower_config(name: str, tower: Mapping[str, Any] | None) -> PretrainedConfig:
    """Build the tower's config; of a model of pictures and text, its vision part."""
    if tower is not None and not isinstance(tower, Mapping):
        raise ValueError(
            f"{name} tower={tower!r} is no mapping; write {{'model_type': 'dinov2', ...}}, or let "
            "describe_tower(checkpoint) write it."
        )
    values = {key: value for key, value in (tower or {}).items() if key not in ("dtype", "torch_dtype")}
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"{name} tower={tower!r} names no model_type; write {{'model_type': 'dinov2', ...}}, or let "
            "describe_tower(checkpoint) do it."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(unknown("model_type of an added tower:", model_type, CONFIG_MAPPING.keys()))
    config = AutoConfig.for_model(model_type, **values)
    for size, known in _unknown_sizes(values, config).items():
        cure = "describe_tower(checkpoint) writes a checkpoint's."
        raise ValueError(unknown(f"size of tower {model_type!r} of {name}:", size, known, cure))
    vision: PretrainedConfig = getattr(config, "vision_config", config)
    if type(vision) not in MODEL_MAPPING:
        raise ValueError(
            f"{name} tower model_type={model_type!r}: transformers builds no {type(vision).__name__} by itself; choose "
            "another tower, such as dinov2, siglip_vision_model or clip_vision_model."
        )
    return vision


def _unknown_sizes(values: Mapping[str, Any], config: PretrainedConfig) -> dict[str, list[str]]:
    """Return what a config was given and does not know, which nobody would read, and what it knows there."""
    default = type(config)()
    known = [size for size in default.to_dict() if size not in PretrainedConfig().to_dict()]
    found = {key: known for key in values if not hasattr(default, key)}
    for key, value in values.items():
        inner = getattr(config, key, None)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            found |= _unknown_sizes(value, inner)
    return found


def _check_inputs(name: str, tower: nn.Module) -> None:
    """A tower that cannot work from pixel_values alone cannot be added."""
    inputs = inspect.signature(tower.forward).parameters.values()
    if not any(x.name == "pixel_values" for x in inputs):
        raise ValueError(
            f"The added tower, {type(tower).__name__}, reads {next(iter(inputs)).name}, not pixel_values; choose a vision "
            "tower, such as dinov2, siglip_vision_model or clip_vision_model."
        )
    needed = [x.name for x in inputs if x.default is x.empty and x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]
    if extra := [name for name in needed if name != "pixel_values"]:
        raise ValueError(
            f"The added tower, {type(tower).__name__}, wants {', '.join(extra)} beside pixel_values, which {name} "
            "cannot give it; choose a tower of pictures of one size."
        )


def _width(config: Any) -> int:
    sizes = getattr(config, "hidden_sizes", None)  # of a convolutional tower, one a stage
    return int(sizes[-1] if sizes else config.hidden_size)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _renormalization(name: str, *given: Channels | None) -> tuple[list[float], list[float]]:
    """Return the factor and summand, one a channel, that turn the processor's pixels into the tower's."""
    known = [value for value in given if value is not None]
    if not known:
        return [1.0] * 3, [0.0] * 3
    if len(known) < len(given):
        raise ValueError(
            f"{name} needs processor_mean, processor_std, tower_mean and tower_std together, or none of them."
        )
    channels = [_channels(name, option, value) for option, value in zip(NORMS, known, strict=True)]
    means_and_stds = list(zip(*channels, strict=True))  # a channel: of the processor, of the tower
    scale = [std / tower_std for _, std, _, tower_std in means_and_stds]
    return scale, [(mean - tower_mean) / tower_std for mean, _, tower_mean, tower_std in means_and_stds]


def _channels(name: str, option: str, value: Any) -> list[float]:
    """Return a mean or deviation as one number a channel."""
    channels = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    positive = option.endswith("_std")
    numbers = len(channels) == 3 and all(isinstance(x, int | float) and (x > 0 or not positive) for x in channels)
    if not numbers:
        kind = "a positive number" if positive else "a number"
        raise ValueError(f"{name} {option}={value!r}; it takes {kind}, or three, one a channel.")
    return channels
