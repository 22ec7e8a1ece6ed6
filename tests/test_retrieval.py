"""Retrieval: recall on hand-made vectors, texts that rows share, and independence of the batch size."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from encoder_cases import WORDS, encoders
from torch.nn import functional as F

from hfcustom import retrieval
from hfcustom.data.sources import Examples
from hfcustom.losses import chunked
from hfcustom.retrieval import embed_rows, nearest, retrieval_recall

EAST, NORTH, WEST, SOUTH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def recall(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[torch.Tensor, torch.Tensor, str]]) -> dict[str, float]:
    """Return the recall of rows (image vector, text vector, text)."""
    vectors = torch.stack([torch.stack([image, text]) for image, text, _ in rows])
    made = (F.normalize(vectors, dim=-1), [text for _, _, text in rows])
    monkeypatch.setattr(retrieval, "embed_rows", lambda *_, **__: made)
    return retrieval_recall(None, None, [{}] * len(rows))


def test_recall_counts_what_is_nearest_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(EAST, EAST, "a"), (NORTH, NORTH, "b"), (EAST + 0.1 * NORTH, SOUTH, "c"), (WEST, WEST, "d")]
    assert recall(monkeypatch, rows) == {"image_to_text_recall": 0.75, "text_to_image_recall": 0.75}
    rows[1] = (SOUTH, NORTH, "b")  # nearest to the text of "c", whose nearest image it becomes; "b" has no near one
    found = recall(monkeypatch, rows)
    assert found == {"image_to_text_recall": 0.5, "text_to_image_recall": 0.5}


def test_a_text_of_several_rows_stands_once_and_any_of_its_images_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(EAST + 0.3 * NORTH, EAST, "a"), (EAST, EAST, "a"), (NORTH, NORTH, "b")]
    assert recall(monkeypatch, rows) == {"image_to_text_recall": 1.0, "text_to_image_recall": 1.0}


@pytest.mark.parametrize("name", sorted(encoders()))
def test_vectors_do_not_depend_on_the_batch_size_and_the_mode_is_left_as_it_was(name: str) -> None:
    encoder, rows = encoders()[name], [{"image": picture(at), "text": text} for at, text in enumerate(WORDS)]
    model = encoder.model().train()
    found = [embed_rows(model, encoder.processor, Examples(rows), batch_size=size) for size in (3, 8)]
    assert model.training and found[0][1] == found[1][1] == list(WORDS)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    outputs = model.eval()(**encoder.batch(range(8)))
    torch.testing.assert_close(found[0][0][:, 0], outputs.image_embeds, rtol=1e-5, atol=1e-6)
    assert set(retrieval_recall(model, encoder.processor, rows)) == {"image_to_text_recall", "text_to_image_recall"}
    with pytest.raises(ValueError, match="There are no rows to retrieve"):
        retrieval_recall(model, encoder.processor, [])


def test_similarities_are_built_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, choices = torch.randn(40, 8), torch.randn(70, 8)
    expected = nearest(queries, choices)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 16 * 70)
    assert torch.equal(nearest(queries, choices), expected)
