"""The batch that a plan is made for: the longest of the rows that were given, or one of so many tokens and image crops."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from hfcustom.data.collate import Batch
from hfcustom.data.feed import first_example
from hfcustom.data.packing import make_packer
from hfcustom.data.sources import Examples
from hfcustom.data.steps import Attempts
from hfcustom.train import make_collator, split_batch
from hfcustom.training.costliest import batch_size, costliest_batches

FILLER = "seven red balloons "
MOST_IMAGES = 64


def planned_batches(core: Any, processor: Any, config: Any, rows: Any) -> list[Batch]:
    """Return the costliest micro-batches of one GPU; ValueError for a stream, RowError for rows of no use."""
    if not isinstance(rows, Examples):
        raise ValueError(
            "The rows are a stream, in which the longest cannot be looked up; give --tokens and --crops instead."
        )
    micro_batch_size, _ = split_batch(config, config.gpus)
    collate = make_collator(core, processor, config, first_example(rows, config).columns)
    usable = Attempts(rows, skip_bad_rows=True, exclude=config.exclude)
    return costliest_batches(usable, collate, micro_batch_size, make_packer(core, config), config.scan_rows)


def shaped_batches(core: Any, processor: Any, config: Any) -> list[Batch]:
    """Return a batch of rows of exactly `config.tokens` tokens, with the fewest images that make `config.crops` crops each.

    Raises ValueError for a shape that cannot be made.
    """
    micro_batch_size, _ = split_batch(config, config.gpus)
    if config.packing:
        micro_batch_size = 1  # whose tokens are those of a pack
    collate = make_collator(core, processor, config, {})
    width, height = config.picture_size()
    picture = Image.effect_noise((width, height), 64).convert("RGB")
    images = next((n for n in range(MOST_IMAGES + 1) if _crops(collate, picture, n) >= config.crops), None)
    if images is None:
        raise ValueError(
            f"crops={config.crops} would take more than {MOST_IMAGES} images of {config.image_size} a row; choose fewer crops, "
            "or a larger image_size."
        )
    needed = _row(picture, images, 0)
    shortest = collate([needed])["input_ids"].shape[1]
    if shortest > config.tokens:
        raise ValueError(
            f"tokens={config.tokens}, but a row with {images} images of {config.image_size} takes {shortest} already; choose "
            "more tokens, fewer crops, or a smaller image_size."
        )
    words = config.tokens - shortest  # of which each is at least a token
    batch: Batch = collate([_row(picture, images, words)] * micro_batch_size)
    length = batch["input_ids"].shape[1]
    for name, tensor in batch.items():
        if tensor.shape[:2] == (micro_batch_size, length):
            batch[name] = tensor[:, : config.tokens].contiguous()
    return [batch]


def _crops(collate: Any, picture: Image.Image, images: int) -> int:
    return batch_size(collate([_row(picture, images, 0)])).crops


def _row(picture: Image.Image, images: int, words: int) -> dict[str, Any]:
    """Return a row whose answer, which comes last, is long."""
    content: list[dict[str, Any]] = [*[{"type": "image"}] * images, {"type": "text", "text": "What is this?"}]
    answer = "It is" + FILLER * words
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture] * images}


def batch_tokens(batch: Batch) -> dict[str, int]:
    """Return what a batch holds: rows, the tokens of each with padding, image crops, supervised tokens."""
    rows, length = batch["input_ids"].shape[:2]
    labels = batch.get("labels", torch.empty(0))
    return {"rows": rows, "tokens": length, "crops": batch_size(batch).crops, "supervised": int((labels >= 0).sum())}
