"""Images of any size as a base view and tiles: the connector seam of LLaVA-NeXT and LLaVA-OneVision, and its processor.

Stock puts the tiles of an image together, cuts off what is padding, and packs base view, rows and a newline after each row.
A connector sees the base view as a square and the rest as rows and columns without newlines; a newline then follows
each row that it leaves: (P, N, D) a base view and tiles -> (M + rows * (columns + 1), D) an image. One that looks at pictures
sees that of the base view with it, and those of all tiles with the rest.
Letters: P crops, N tokens a crop, M tokens out, D hidden. Paper: https://llava-vl.github.io/blog/2024-01-30-llava-next/
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from hfcustom.connectors import Grid, count_tokens_out, grid_out, of_each, takes_pictures
from hfcustom.processors import ConnectedProcessor
from hfcustom.ragged import RaggedImages


class AnyresImages(RaggedImages):
    """Mixin between CustomVLM and a stock class that has `pack_image_features`."""

    no_tower_cache = no_resizing = ""  # crops reach the tower as pictures of one size

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features before the projector, which gets crops of one size, and pictures before the tower."""
        vision, projector = (self.stock_parts().paths[part][0] for part in ("vision", "connector"))
        looks: list[tuple[str, str, str, dict[str, bool]]] = [
            (vision, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        return [
            *super().seam_hooks(),
            *(looks if takes_pictures(self.custom_connector) else []),
            (projector, "register_forward_pre_hook", "_at_connector_input", {}),
        ]

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Stand in for pack_image_features, where the tiles of an image come together."""
        return [*super().seam_methods(), (self.inner_path(), "pack_image_features", "_at_packing")]

    def match_processor(self, processor: Any) -> Any:
        """Give the processor the connector, so that it writes as many placeholders; save it with the model.

        Raises ValueError when it would cut images in another way than this model puts them together.
        """
        for name, theirs in self.processor_settings(processor).items():
            own = getattr(self.config, name)
            if theirs != own:
                raise ValueError(
                    f"The processor's {name} is {theirs}, the model's {own}: the text would get other placeholders than the "
                    f"model makes tokens. Set both, on the processor and as model.config.{name}."
                )
        return super().match_processor(processor)

    def processor_settings(self, processor: Any) -> dict[str, Any]:
        """Return what the processor must have in common with the model's config."""
        return {"image_grid_pinpoints": [list(size) for size in processor.image_processor.image_grid_pinpoints]}

    def _connect(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return features  # packing has run the connector

    def _at_packing(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.custom_connector is None:
            return stock(*args, **kwargs)
        inputs = inspect.signature(stock).bind(*args, **kwargs).arguments
        crops, newline = inputs["image_features"], inputs.get("image_newline")  # a (P, N, D) each image, (D,)
        images, lengths = stock(**inputs | {"image_newline": None})  # (N + rows * columns, D) each
        thin = {"image_features": [image[..., :1] for image in crops], "image_newline": lengths.new_zeros(1)}
        rows = (stock(**inputs | thin)[1] - lengths).tolist()  # with newlines there is a token more a row
        views = self._views_of([len(image) for image in crops]) if self.looks_behind_projector else None
        bases = [image[0] for image in crops]
        rests = [image[len(base) :] for image, base in zip(images, bases, strict=True)]  # (rows * columns, D)
        grids = [(height, len(rest) // height) for height, rest in zip(rows, rests, strict=True)]
        told = self.question_of(self._packed_lengths([len(base) for base in bases], grids, newline is not None))
        squares = [square(len(base)) for base in bases]
        bases = self._reduce(bases, squares, told, views and [image[:1] for image in views])
        tiled = [image for image, rest in enumerate(rests) if len(rest)]
        found = self._reduce(
            [rests[image] for image in tiled],
            [grids[image] for image in tiled],
            of_each(told, tiled),
            views and [views[image][1:] for image in tiled],
        )
        reduced = dict(zip(tiled, found, strict=True))
        packed = [
            torch.cat([base, self._lines(reduced.get(image, rests[image]), grids[image], newline)])
            for image, base in enumerate(bases)
        ]
        return packed, lengths.new_tensor([len(image) for image in packed])

    def _views_of(self, counts: list[int]) -> list[torch.Tensor]:
        """Return the pictures of each image, (K, 3, H, W), its base view and then its tiles."""
        pictures, self._pictures = self._pictures, None
        assert pictures is not None and len(pictures) == sum(counts), "the tower has looked at these crops"
        return list(pictures.split(counts))

    def _packed_lengths(self, bases: list[int], grids: list[Grid], newlines: bool) -> list[int]:
        """Return the tokens of each image after the connector, from those of its base view and how its tiles lie."""
        module = self.custom_connector
        lefts = [self._rows_and_columns(grid) for grid in grids]
        tiles = [rows * (columns + newlines) for rows, columns in lefts]
        return [count_tokens_out(module, base, square(base)) + rest for base, rest in zip(bases, tiles, strict=True)]

    def _rows_and_columns(self, grid: Grid) -> Grid:
        """Return how the tokens of tiles lie after the connector; of a base view alone there are none, in one row."""
        tokens = math.prod(grid)
        return grid_out(self.custom_connector, tokens, grid) if tokens else (1, 0)

    def _lines(self, rest: torch.Tensor, grid: Grid, newline: torch.Tensor | None) -> torch.Tensor:
        """End each row of what is left of the tiles, (M, D), with a newline; `grid` is how they lay before the connector."""
        rows, columns = self._rows_and_columns(grid)
        lines = rest.view(rows, columns, rest.shape[-1])  # (rows, columns, D)
        if newline is not None:
            lines = torch.cat([lines, newline.to(lines).expand(rows, 1, -1)], 1)  # (rows, columns + 1, D)
        return lines.flatten(0, 1)


class AnyresProcessor(ConnectedProcessor):
    """Mixin before a stock processor that counts the tokens of a base view, tiles and newlines."""

    def base_tokens(self, image_inputs: dict[str, Any]) -> int:
        """Return the tokens of a base view before the connector."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how many tokens a base view has: define base_tokens()."
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of an image: stock's count, with the base view as the connector reduces it."""
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)
        module = self.connector_module()
        if module is None:
            return text
        token: str = self.image_token  # type: ignore[attr-defined]
        base = self.base_tokens(image_inputs)
        return token * (len(text) // len(token) - base + count_tokens_out(module, base, square(base)))

    def _get_unpadded_features(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the tokens of the tiles of an image after the connector, and the newlines; stock counts with this."""
        stock: Any = super()
        tokens, rows = stock._get_unpadded_features(*args, **kwargs)
        module = self.connector_module()
        if module is None:
            return tokens, rows
        rows, columns = grid_out(module, tokens, (rows, tokens // rows))
        return rows * columns, rows


def square(num_tokens: int) -> Grid:
    """Return the rows and columns of a square view."""
    side = math.isqrt(num_tokens)
    return side, side
