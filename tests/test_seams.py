"""What the hooks at the borders of the parts refuse."""

from __future__ import annotations

import pytest
import torch
from conftest import Family

from hfcustom.base import SEAM_METHODS


@pytest.mark.parametrize("method", SEAM_METHODS)
def test_a_transform_that_changes_the_dtype_is_named(method: str, families: dict[str, Family]) -> None:
    llava = families["llava"]
    mine = type("Wide", (llava.model_class,), {method: lambda self, x, *mask: x.float(), "__module__": __name__})
    model, batch = llava.model(mine).bfloat16(), llava.batch([1])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with pytest.raises(ValueError, match=rf"{method} returned float32; it got bfloat16: end with .to\(torch.bfloat16"):
        model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**batch).loss)  # what follows casts it
