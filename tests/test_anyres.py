"""Base views, tiles and newlines: a connector reduces what is seen, row by row, and the processor counts the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, picture
from torch import nn
from torch.nn import functional as F

from hfcustom.connectors import build_connector

NAMES = ["llava_next", "llava_onevision"]
SIZES = [(50, 30), (30, 50), (28, 28), (90, 20), (100, 100), (17, 60)]  # width, height
RESAMPLER = {"name": "perceiver_resampler", "num_queries": 3, "num_heads": 4, "start": "random"}


@pytest.fixture(params=NAMES)
def anyres(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def image_tokens(model: Any, batch: Any) -> list[torch.Tensor]:
    """Return what the language model gets for each image, (N_i, D)."""
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return list(model.model.get_image_features(**inputs, return_dict=True).pooler_output)


def seen(processor: Any, size: tuple[int, int], images: int = 1) -> Any:
    row = [picture(seed, size) for seed in range(images)]
    return processor(text=["<image>" * images], images=[row], return_tensors="pt")


def rows_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return stock's rows of an image without their newlines: (N, D) -> (rows, columns, D)."""
    ends = (tokens == model.model.image_newline).all(-1).nonzero().flatten()
    lines = tokens.view(len(ends), -1, tokens.shape[-1])  # (rows, columns + 1, D)
    assert torch.equal(lines[:, -1], model.model.image_newline.detach().expand(len(ends), -1))
    return lines[:, :-1]


def pooled(grid: torch.Tensor) -> torch.Tensor:
    """Average 2 x 2 neighbours: (rows, columns, D) -> (rows, columns, D)."""
    image = F.avg_pool2d(grid.permute(2, 0, 1)[None], 2, ceil_mode=True, count_include_pad=False)
    return image[0].permute(1, 2, 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_base_view_and_rows_are_pooled_apart_and_rows_end_with_a_newline(
    anyres: Family, size: tuple[int, int]
) -> None:
    plain, model = anyres.model(), anyres.model(connector="average_pool")
    batch = seen(anyres.processor, size)
    (stock,), (found,) = image_tokens(plain, batch), image_tokens(model, batch)
    base, grid = stock[:16].view(4, 4, -1), rows_of(plain, stock[16:])
    lines = pooled(grid)
    newline = plain.model.image_newline.detach().expand(len(lines), 1, -1)
    expected = torch.cat([pooled(base).flatten(0, 1), torch.cat([lines, newline], 1).flatten(0, 1)])
    torch.testing.assert_close(found, expected)
    processor = model.match_processor(copy.deepcopy(anyres.processor))
    assert (seen(processor, size)["input_ids"] == model.placeholder_token_id).sum() == len(expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_connector_without_rows_of_its_own_makes_one(anyres: Family, size: tuple[int, int]) -> None:
    model = anyres.model(connector=RESAMPLER)
    processor = model.match_processor(copy.deepcopy(anyres.processor))
    batch = seen(processor, size)
    (found,) = image_tokens(model, batch)
    assert (batch["input_ids"] == model.placeholder_token_id).sum() == len(found) == 3 + 3 + 1
    assert torch.equal(found[-1], model.model.image_newline.detach())


def test_queries_that_are_averages_lie_in_rows_of_their_own(anyres: Family) -> None:
    model = anyres.model(connector={**RESAMPLER, "num_queries": 4, "start": "average"})
    batch = seen(model.match_processor(copy.deepcopy(anyres.processor)), (30, 50))  # tiles higher than they are wide
    (found,) = image_tokens(model, batch)
    newline = model.model.image_newline.detach()
    rows = [at for at, token in enumerate(found) if torch.equal(token, newline)]
    assert (batch["input_ids"] == model.placeholder_token_id).sum() == len(found) == 4 + 4 + len(rows)
    assert rows == [4 + (4 // len(rows) + 1) * (row + 1) - 1 for row in range(len(rows))] and len(rows) > 1


def test_crops_alone_end_with_one_newline(families: dict[str, Family]) -> None:
    family = families["llava_onevision"]
    model = family.model(connector="average_pool")
    processor = model.match_processor(copy.deepcopy(family.processor))
    batch = seen(processor, (50, 30), images=3)
    assert batch["pixel_values"].shape[:2] == (3, 1)
    for tokens, stock in zip(image_tokens(model, batch), image_tokens(family.model(), batch), strict=True):
        assert len(stock) == 16 + 1
        expected = pooled(stock[:16].view(4, 4, -1)).flatten(0, 1)
        torch.testing.assert_close(tokens, torch.cat([expected, model.model.image_newline.detach()[None]]))
    assert (batch["input_ids"] == model.placeholder_token_id).sum() == 3 * (4 + 1)


def test_large_images_are_made_smaller_before_the_connector(families: dict[str, Family]) -> None:
    """The tiny config of llava_onevision allows two tiles, 32 tokens; 3 x 3 tiles are interpolated down to that."""
    family = families["llava_onevision"]
    (tokens,) = image_tokens(family.model(), seen(family.processor, (100, 100)))
    assert rows_of(family.model(), tokens[16:]).shape[:2] == (5, 5)


def test_newlines_train_behind_a_connector(anyres: Family) -> None:
    model = anyres.model(connector="average_pool")
    processor = model.match_processor(copy.deepcopy(anyres.processor))
    model.train()(**anyres.batch([1], processor)).loss.backward()
    assert model.model.image_newline.grad.any()


class Everything(nn.Module):
    """A connector that records how its tokens lie."""

    grids: list[tuple[int, int]]

    def __init__(self) -> None:
        super().__init__()
        self.grids = []

    def forward(self, features: torch.Tensor, grid: Any) -> torch.Tensor:
        self.grids += [grid] * len(features)
        return features

    def num_tokens_out(self, num_tokens: int, grid: Any) -> int:
        return num_tokens


def test_a_connector_is_told_how_tokens_lie(anyres: Family) -> None:
    model = anyres.model(connector="average_pool")
    model.custom_connector = Everything()
    image_tokens(model, seen(anyres.processor, (90, 20)))
    rows, columns = model.custom_connector.grids.pop()
    assert model.custom_connector.grids == [(4, 4)]
    assert rows < columns


def test_neighbouring_images_are_averaged_base_with_base_and_rows_with_rows(families: dict[str, Family]) -> None:
    family = families["llava_next"]
    plain, model = family.model(), family.model(connector="frame_average")
    batch = seen(family.processor, (50, 30), images=2)
    stock, found = image_tokens(plain, batch), image_tokens(model, batch)
    base = torch.stack([image[:16] for image in stock]).mean(0)
    rest = torch.stack([rows_of(plain, image[16:]).flatten(0, 1) for image in stock]).mean(0)
    assert len(rest) % 2 == 0
    for tokens, some, others in zip(found, base.chunk(2), rest.chunk(2), strict=True):
        torch.testing.assert_close(tokens, torch.cat([some, others, plain.model.image_newline.detach()[None]]))
    rows = [[picture(0, (50, 30)), picture(1, (30, 50))]]
    uneven = family.processor(text=["<image><image>"], images=rows, return_tensors="pt")
    with pytest.raises(ValueError, match=r"takes 2 neighbouring images together, which must have one size"):
        image_tokens(model, uneven)


# ---- published numbers ----------------------------------------------------------------------------------------------

SMALLER = {"name": "average_pool", "size": 2, "hidden_size": 64}
HUB = {  # tokens of 800 x 1300 px (width x height): a base view and rows, and what average_pool leaves of them
    "llava_next": (24 * 24 + 48 * (30 + 1), 12 * 12 + 24 * (15 + 1)),
    "llava_onevision": (27 * 27 + 108 * (67 + 1), 14 * 14 + 54 * (34 + 1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_hubs_checkpoints(families: dict[str, Family], name: str) -> None:
    processor = families[name].module.published_processor()
    for connector, expected in zip((None, SMALLER), HUB[name], strict=True):
        processor.connector = connector
        assert (seen(processor, (800, 1300))["input_ids"] == processor.image_token_id).sum() == expected


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_a_processor_that_cuts_images_otherwise_is_refused(anyres: Family) -> None:
    processor, model = copy.deepcopy(anyres.processor), anyres.model()
    processor.image_processor.image_grid_pinpoints = [[28, 28]]
    with pytest.raises(
        ValueError, match=r"processor's image_grid_pinpoints is \[\[28, 28\]\], the model's .*Set both"
    ):
        model.match_processor(processor)
    model.config.image_grid_pinpoints = [[28, 28]]
    batch = anyres.batch([1], model.match_processor(processor))
    assert batch["pixel_values"].shape[:2] == (1, 2)
    model(**batch)


def test_another_aspect_ratio_is_refused(families: dict[str, Family]) -> None:
    family = families["llava_onevision"]
    processor = copy.deepcopy(family.processor)
    processor.vision_aspect_ratio = "anyres_max_9"
    with pytest.raises(ValueError, match="processor's vision_aspect_ratio is anyres_max_9, the model's anyres_max_2"):
        family.model().match_processor(processor)


def test_a_processor_that_cannot_follow_is_refused(anyres: Family) -> None:
    stock = next(base for base in type(anyres.processor).__mro__ if base.__module__.startswith("transformers."))
    other = copy.copy(anyres.processor)
    other.__class__ = stock
    with pytest.raises(
        TypeError, match=rf"A {stock.__name__} cannot follow a connector; load the processor with Custom"
    ):
        anyres.model().match_processor(other)


def test_a_flat_list_of_images_is_nested_by_its_placeholders(families: dict[str, Family]) -> None:
    """Stock would tile each image of a flat list, and none of a nested row of several."""
    processor = families["llava_onevision"].processor
    images = [picture(seed) for seed in range(3)]
    texts = ["<image><image> which?", "none", "<image> this?"]
    options = {"return_tensors": "pt", "padding": True}
    flat = processor(text=texts, images=images, **options)
    nested = processor(text=texts, images=[images[:2], [], images[2:]], **options)
    assert flat.keys() == nested.keys()
    assert all(torch.equal(value, nested[name]) for name, value in flat.items())
    assert flat["batch_num_images"].tolist() == [2, 1]
    single = processor(text="<image> this?", images=images[0], **options)
    assert single["batch_num_images"].tolist() == [1]


def test_average_pool_takes_an_odd_square_where_it_knows_the_grid() -> None:
    module: Any = build_connector("average_pool", 8)
    assert module.num_tokens_out(27 * 27, (27, 27)) == 14 * 14
