"""Pixtral beside what every family must do: rows of placeholders keep their marks, sizes may be left to the tower."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Family, picture

from hfcustom.families import missing_packages

pytestmark = pytest.mark.skipif(bool(missing_packages("pixtral")), reason="works with torchvision only")


@pytest.fixture
def pixtral(families: dict[str, Family]) -> Family:
    return families["pixtral"]


@pytest.mark.parametrize(
    ("connector", "expected"),
    [
        (None, "IIIIBIIIIBIIIIE"),  # 56 x 35 px, patches of 14: 3 rows of 4
        ("average_pool", "IIBIIE"),
        ({"name": "perceiver_resampler", "num_queries": 3, "num_heads": 4}, "IIIE"),
    ],
    ids=["stock", "pooled", "resampled"],
)
def test_rows_end_with_a_break_and_the_image_with_its_end(pixtral: Family, connector: object, expected: str) -> None:
    processor = copy.deepcopy(pixtral.processor)
    pixtral.model(connector=connector).match_processor(processor)
    ids = processor(text=["[IMG]"], images=[picture(0, (50, 30))], add_special_tokens=False)["input_ids"][0]
    letters = dict(zip(processor.image_token_ids, "IBE", strict=True))
    assert "".join(letters[int(token)] for token in ids) == expected


@pytest.mark.parametrize("connector", [None, "average_pool"])
def test_images_without_sizes_are_taken_whole(pixtral: Family, connector: str | None) -> None:
    processor = copy.deepcopy(pixtral.processor)
    model = pixtral.model(connector=connector)
    model.match_processor(processor)
    batch = pixtral.batch([2, 1], processor)
    with torch.no_grad():
        expected = model(**batch).logits
        del batch["image_sizes"]  # all images of the batch are of one size
        assert torch.equal(model(**batch).logits, expected)
        if connector is None:
            assert torch.equal(pixtral.model(pixtral.stock_class)(**batch).logits, expected)
