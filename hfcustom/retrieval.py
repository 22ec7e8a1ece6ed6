"""Retrieval: how often a contrastive encoder finds the text of an image, and an image of a text, among held-out rows.

rows -> vectors (R, 2, D) -> {"image_to_text_recall": ..., "text_to_image_recall": ...}. Rows may share a text; it then
stands once among those to choose from, and any of its images is right.
Letters: R rows, U different texts, C rows of a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hfcustom.data.captions import caption
from hfcustom.data.sources import Examples
from hfcustom.distributed.sharding import gathered
from hfcustom.distributed.shared_work import over_ranks
from hfcustom.losses.chunked import chunks
from hfcustom.parts import unwrap


def retrieval_recall(
    model: Any, processor: Any, rows: Sequence[Any], *, batch_size: int = 64, share: bool | None = None
) -> dict[str, float]:
    """Return recall at 1 in both directions over all rows; as `evaluate` of `fit`, call it on held-out rows.

    There the processes share the batches, and each gets the score of all rows; `share` says so elsewhere, or not to. Raises ValueError for no rows, RowError for one that is not an image with its text.
    """
    examples = rows if isinstance(rows, Examples) else Examples(rows)
    if not len(examples):
        raise ValueError("There are no rows to retrieve; pass at least one image with its text.")
    vectors, texts = embed_rows(model, processor, examples, batch_size=batch_size, share=share)  # (R, 2, D)
    firsts = {text: at for at, text in reversed(list(enumerate(texts)))}
    numbers = {text: number for number, text in enumerate(firsts)}
    own = torch.tensor([numbers[text] for text in texts], device=vectors.device)  # (R,) of U
    images, choices = vectors[:, 0], vectors[list(firsts.values()), 1]  # (R, D), (U, D)
    found_texts = nearest(images, choices)  # (R,) of U
    found_images = nearest(choices, images)  # (U,) of R
    return {
        "image_to_text_recall": float((found_texts == own).float().mean()),
        "text_to_image_recall": float(
            (own[found_images] == torch.arange(len(choices), device=own.device)).float().mean()
        ),
    }


@torch.no_grad()
def embed_rows(
    model: Any, processor: Any, rows: Sequence[Any], *, batch_size: int = 64, share: bool | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Return the vectors of length 1 of each row's image and text, (R, 2, D), and the texts."""
    core = unwrap(model)
    was_training = model.training
    model.eval()
    collate = core.make_collator(processor)

    def embed(chunk: range) -> tuple[torch.Tensor, list[str]]:
        examples = [rows[at] for at in chunk]
        batch = {name: value.to(core.device) for name, value in collate(examples).items()}
        return core.embed(batch).cpu(), [caption(example) for example in examples]

    chunks = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    with gathered(model):
        found = over_ranks(embed, chunks, share=share)
    model.train(was_training)
    parts, texts = zip(*found, strict=True)
    return torch.cat(parts).to(core.device), [text for own in texts for text in own]


def nearest(queries: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """Return which choice (U, D) is nearest to each query (R, D): (R,), without the (R, U) similarities."""
    return torch.cat([(queries[rows] @ choices.t()).argmax(1) for rows in chunks(len(queries), len(choices))])
