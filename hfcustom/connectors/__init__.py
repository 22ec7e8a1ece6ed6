"""Token reduction between connector and language model: modules with `forward` and `num_tokens_out`, one file each.

(P, N, D) -> (P, M, D), M = num_tokens_out(N). A connector named in a config sits behind the family's own projector (whose
pretrained weights stay in use), sees one image crop a row, and is saved and trained with the model; the processor then
writes M placeholders where it wrote N (`model.match_processor`). What a connector may ask for, by its signature:

- `forward(features, grid)` and `num_tokens_out(n, grid)`: how the tokens lie, (rows, columns); None stands for a square.
- `forward(features, pixel_values)`: the crops' pictures, (P, 3, H, W). Such a connector works before the projector, on the
  vision features: (P, patches, D_vision) -> the same shape; with an attribute `after_projector`, where every other one
  does, and may change the number of tokens; of tiles that were put together it gets each, (P * K, 3, H, W). Images of
  different sizes come in a call for each size, or, with an attribute `takes_lists`, in one: lists of features, of pictures
  and of grids, an entry an image, and so is what it returns.
- `forward(features, question, question_mask)`: what the text of each crop's row asks (hfcustom/questions.py), as the
  embeddings of its words, (P, Q, D), and which places of the Q hold one, (P, Q); unless an attribute `asks` is False.
- an attribute `frames`: it takes that many neighbouring crops together, as the frames of one clip (frame_average.py).

Weights start so that a pretrained model goes on from where it is: as the identity, or as the average of what is reduced.
Letters: P crops, N tokens in, M tokens out, D hidden.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from hfcustom.connectors.attention_pooling import AttentionPooling
from hfcustom.connectors.average_pool import AveragePool
from hfcustom.connectors.frame_average import FrameAverage
from hfcustom.connectors.grids import Grid, alike
from hfcustom.connectors.linear import Linear
from hfcustom.connectors.mlp import MLP
from hfcustom.connectors.multi_encoder_resampler import MultiEncoderResampler
from hfcustom.connectors.patch_merger import PatchMerger
from hfcustom.connectors.perceiver_resampler import PerceiverResampler
from hfcustom.connectors.pixel_shuffle import PixelShuffle
from hfcustom.connectors.query_cross_attention import QueryCrossAttention
from hfcustom.connectors.temporal_dedup import TemporalDedup
from hfcustom.connectors.token_pruning import TokenPruning
from hfcustom.connectors.two_encoders import TwoEncoders
from hfcustom.exits import ConfigError
from hfcustom.naming import check_shape, snake_case, unknown
from hfcustom.parts import is_trained_copy

Told = Mapping[str, torch.Tensor]
ConnectorClass = TypeVar("ConnectorClass", bound=type[nn.Module])


def connector(module_class: ConnectorClass) -> ConnectorClass:
    """Register a module class under its snake_case name (PairPool -> "pair_pool").

    Its __init__ takes (hidden_size, **options), its forward (P, N, D) -> (P, M, D), its num_tokens_out(N) returns M.
    Raises TypeError for a missing method, ValueError when the name belongs to another class.
    """
    for method in ("forward", "num_tokens_out"):
        if not callable(getattr(module_class, method, None)):
            raise TypeError(f"{module_class.__name__} needs a method {method}() to be a connector.")
    if _takes("question", module_class) != _takes("question_mask", module_class):
        raise TypeError(
            f"{module_class.__name__}.forward takes one of question (P, Q, D) and question_mask (P, Q); rows have questions of "
            "different lengths, so it must take both."
        )
    name = snake_case(module_class.__name__)
    taken = CONNECTORS.get(name)
    if taken is not None and _origin(taken) != _origin(module_class):
        raise ValueError(f"The connector name {name!r} belongs to {_origin(taken)}; rename {_origin(module_class)}.")
    CONNECTORS[name] = module_class
    return module_class


def _origin(module_class: type[nn.Module]) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"


def find_connector(spec: str | Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the class that a config names, and its options: "average_pool" or {"name": "average_pool", "size": 2}.

    Raises ValueError naming an unknown connector or option and the nearest known one.
    """
    options = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping) or "name" not in options:
        raise ConfigError(
            f"connector={spec!r}; give a name, or a mapping with one: {{'name': 'average_pool', 'size': 2}}."
        )
    options = dict(options)
    name = options.pop("name")
    if name not in CONNECTORS:
        cure = "Import the file that registers your own with @hfcustom.connector before loading."
        raise ConfigError(unknown("connector", name, CONNECTORS, cure))
    known = dict(list(inspect.signature(CONNECTORS[name]).parameters.items())[1:])
    for option, value in options.items():
        if option not in known:
            raise ConfigError(unknown(f"option of connector {name!r}:", option, known))
        kinds = inspect.formatannotation(known[option].annotation).strip("'")
        if not _is_one_of(value, kinds.split(" | ")):
            raise ConfigError(f"connector {name!r}: {option}={value!r}; it takes {kinds}.")
    return CONNECTORS[name], options


def _is_one_of(value: Any, kinds: list[str]) -> bool:
    """Whether a value is of a plain kind that an annotation names; an annotation of another kind says nothing."""
    plain: dict[str, Any] = {"None": type(None), "bool": bool, "float": (int, float), "int": int, "str": str}
    if not set(kinds) <= set(plain):
        return True
    return any(isinstance(value, plain[kind]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds)


def build_connector(spec: str | Mapping[str, Any], hidden_size: int) -> nn.Module:
    """Build the module that a config names; errors as for `find_connector`."""
    module_class, options = find_connector(spec)
    return module_class(hidden_size, **options)


def _takes(name: str, module: Any) -> bool:
    """Whether the forward of a connector, or of a class of them, has an argument; peft may have wrapped the module."""
    return name in inspect.signature(unwrapped(module).forward).parameters


def unwrapped(module: Any) -> Any:
    """Return the connector that peft may have wrapped, or a class as it is."""
    wrapped = not isinstance(module, type) and is_trained_copy(module)
    return module.original_module if wrapped else module


def takes_grid(module: nn.Module) -> bool:
    """Whether a connector wants to know how its tokens lie: `forward(features, grid)`, `num_tokens_out(n, grid)`."""
    return _takes("grid", module)


def takes_pictures(module: nn.Module | type[nn.Module] | None) -> bool:
    """Whether a connector, or a class of them, looks at pictures: `forward(features, pixel_values)`."""
    return module is not None and _takes("pixel_values", module)


def works_before_projector(module: nn.Module | type[nn.Module] | None) -> bool:
    """Whether a connector, or a class of them, takes pictures and vision features, and leaves the tokens as they are."""
    return takes_pictures(module) and not getattr(unwrapped(module), "after_projector", False)


def takes_lists(module: Any) -> bool:
    """Whether a connector that looks at pictures takes images of different sizes in one call."""
    return bool(getattr(unwrapped(module), "takes_lists", False))


def takes_question(module: nn.Module | None) -> bool:
    """Whether a connector wants to know what the text asks: `forward(features, question, question_mask)`."""
    if module is None or not _takes("question", module):
        return False
    return bool(getattr(unwrapped(module), "asks", True))


def frames_together(module: Any) -> int:
    """Return how many neighbouring crops a connector takes together."""
    return int(getattr(module, "frames", 1))


def of_each(told: Told, crops: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return what a connector is told of some crops, by their places, from what it is told of all."""
    return {name: entries[list(crops)] for name, entries in told.items()}


def reduce_tokens(
    module: Any, features: torch.Tensor, grid: Grid | None, name: Any, told: Told | None = None
) -> torch.Tensor:
    """Run a connector on crops of one size: (P, N, D) -> (P, M, D); ValueError when M is not what it said.

    `told` is what it asks for besides, by name, an entry a crop. One that works before the projector has done so.
    """
    if works_before_projector(module):
        return features
    known: dict[str, Any] = {"grid": grid} if grid is not None and takes_grid(module) else {}
    known |= {key: entries.to(features.device) for key, entries in (told or {}).items()}
    if "question" in known:
        known["question"] = known["question"].to(features.dtype)
    elif takes_question(module):
        raise ValueError(f"connector {name!r} wants to know what the text asks, and is not told here.")
    reduced: torch.Tensor = module(features, **known)
    expected = torch.Size((len(features), count_tokens_out(module, features.shape[1], grid), features.shape[2]))
    check_shape(f"connector {name!r}", reduced, expected, "(crops, num_tokens_out, hidden size)")
    return reduced


def look_at(
    module: Any,
    features: Sequence[torch.Tensor],
    pictures: Sequence[torch.Tensor],
    grids: Sequence[Grid | None],
    name: Any,
) -> list[torch.Tensor]:
    """Run a connector that takes pictures on images of any sizes: (F, N, D) each and its F * K pictures -> (F, M, D) each.

    ValueError when M is not what it said, or, before the projector, not N.
    """
    looked: dict[int, torch.Tensor] = {}
    if takes_lists(module):
        looked.update(enumerate(module(list(features), pixel_values=list(pictures), grid=list(grids))))
    else:
        kinds = [(x.shape[1:], y.shape[1:], grid) for x, y, grid in zip(features, pictures, grids, strict=True)]
        for at in alike(kinds):
            grid = grids[at[0]]
            known: dict[str, Any] = {"grid": grid} if grid is not None and takes_grid(module) else {}
            known["pixel_values"] = torch.cat([pictures[image] for image in at])
            found = module(torch.cat([features[image] for image in at]), **known)
            looked.update(zip(at, found.split([len(features[image]) for image in at]), strict=True))
    for place, (image, grid) in enumerate(zip(features, grids, strict=True)):
        left = image.shape[1] if works_before_projector(module) else count_tokens_out(module, image.shape[1], grid)
        expected = torch.Size((len(image), left, image.shape[2]))
        check_shape(f"connector {name!r}", looked[place], expected, "(crops, num_tokens_out, hidden size)")
    return [looked[place] for place in range(len(features))]


def count_tokens_out(module: Any, num_tokens: int, grid: Grid | None = None) -> int:
    """Return how many tokens a connector makes of `num_tokens`, which lie in `grid` (rows, columns) where that is known."""
    known = {"grid": grid} if grid is not None and takes_grid(module) else {}
    return int(module.num_tokens_out(num_tokens, **known))


def grid_out(module: Any, num_tokens: int, grid: Grid) -> Grid:
    """Return how the tokens lie that a connector makes: its own grid_out(grid), else as before, or, if fewer, in one row."""
    if callable(getattr(module, "grid_out", None)):
        rows, columns = module.grid_out(grid)
        return rows, columns
    left = count_tokens_out(module, num_tokens, grid)
    return grid if left == num_tokens else (1, left)


def grids_out(module: Any, grids: torch.Tensor, merge: int) -> torch.Tensor:
    """Return the grids of patches that would make, frame by frame, as many tokens as a connector makes of `grids`.

    Both are (P, 3), frames, rows and columns of patches, for a family that merges `merge` x `merge` of them.
    """
    found = []
    for frames, rows, columns in grids.tolist():
        given = rows // merge, columns // merge
        found.append((frames, *(merge * side for side in grid_out(module, math.prod(given), given))))
    return grids.new_tensor(found)


CONNECTORS: dict[str, type[nn.Module]] = {
    "attention_pooling": AttentionPooling,
    "average_pool": AveragePool,
    "frame_average": FrameAverage,
    "linear": Linear,
    "mlp": MLP,
    "multi_encoder_resampler": MultiEncoderResampler,
    "patch_merger": PatchMerger,
    "perceiver_resampler": PerceiverResampler,
    "pixel_shuffle": PixelShuffle,
    "query_cross_attention": QueryCrossAttention,
    "temporal_dedup": TemporalDedup,
    "token_pruning": TokenPruning,
    "two_encoders": TwoEncoders,
}
