"""Terms that bring a row's images and its text together: contrastive losses over the whole optimiser step.

image tokens (P, N, D), hidden states (B, T, D) -> one image and one text vector a row (n, 2, D) -> a sum over rows. The
negatives of a row are the rows of all micro-batches and processes of the step: `fit` collects everyone's vectors first,
each batch puts its own, which carry gradients, in their place. A batch's value is its own rows' part of the sum, its
gradient that of the whole sum with respect to its own rows, so that values and gradients add up to those of one batch.
The similarities are evaluated in chunks (hfcustom/losses/pairs.py: `share_of_step`).
Letters: B rows of a tensor, R rows of data, T text tokens, P crops, N tokens a crop, D hidden, n rows of the step with a
pair.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hfcustom.losses.context import LossContext, mean_rows
from hfcustom.losses.contract import IGNORE, Batch, count_rows, liked_labels, row_ids, term
from hfcustom.losses.pairs import PAIR_LOSSES, share_of_step


def pair_rows(batch: Batch, image_mask: torch.Tensor) -> torch.Tensor:
    """Return which rows of data have both an image and supervised text, (R,); image_mask (B, T)."""
    rows, num_rows = row_ids(batch), count_rows(batch)
    places = (image_mask.to(rows.device), text_mask(batch))
    images, texts = (torch.bincount(rows[mask], minlength=num_rows) > 0 for mask in places)
    return images & texts


def text_mask(batch: Batch) -> torch.Tensor:
    """Return where supervised tokens stand, (B, T); the first position, which nothing predicts, is none."""
    mask = liked_labels(batch) != IGNORE
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], 1)


def count_pairs(batch: Batch, image_token_id: int) -> int:
    """Count rows with both an image and supervised text."""
    if "input_ids" not in batch:
        raise ValueError(
            "A contrastive term finds the rows with images by input_ids, which the batch has not; add them."
        )
    return int(pair_rows(batch, batch["input_ids"] == image_token_id).sum())


def pair_vectors(context: LossContext) -> torch.Tensor:
    """Return the vectors of the rows with a pair, (n, 2, D) of length 1: the mean of the images' tokens, of the text's.

    Image tokens lie in the order of their placeholders, so that each belongs to the row of its placeholder, whatever
    number of images and crops a row has.
    """
    assert context.image_mask is not None, "a row with a pair has image placeholders"
    hidden, features = context.hidden_states, context.features.flatten(0, -2)  # (B, T, D), (P * N, D)
    rows, num_rows = row_ids(context.batch).to(hidden.device), context.num_rows
    image_rows = context.image_rows  # (P * N,)
    if len(image_rows) != len(features):
        raise ValueError(
            f"Term {context.running!r} cannot tell which rows {len(features)} image tokens belong to: the text has "
            f"{len(image_rows)} placeholders. The connector must return one token a placeholder, in their order."
        )
    texts = text_mask(context.batch).to(hidden.device)  # (B, T)
    image = mean_rows(features.to(hidden.device), image_rows, num_rows)  # (R, D)
    text = mean_rows(hidden[texts], rows[texts], num_rows)  # (R, D)
    pairs = pair_rows(context.batch, context.image_mask).to(hidden.device)  # (R,)
    return F.normalize(torch.stack([image, text], 1)[pairs], dim=-1)  # (n, 2, D)


@term(count=count_pairs, summary=pair_vectors)
def contrastive(context: LossContext, temperature: float = 0.07) -> tuple[torch.Tensor, float | torch.Tensor]:
    """-1/2 (log softmax_j(s_ij) + log softmax_j(s_ji)) at j = i: which text of the step is an image's, and the reverse.

    s_ij = cos(image i, text j) / temperature, the images of a row being the mean of what the connector makes of them, the
    text the mean of the hidden states at its supervised tokens. CLIP, https://arxiv.org/abs/2103.00020, figure 3, with a
    temperature that is not trained. Rows without an image or without supervised text take no part.

    >>> from types import SimpleNamespace
    >>> from hfcustom.losses import LossContext
    >>> ids = torch.tensor([[9, 1], [9, 2]])  # two rows: an image of one token, a word
    >>> labels = torch.tensor([[-100, 1], [-100, 2]])
    >>> image, cat, dog = torch.eye(3)
    >>> context = LossContext(
    ...     model=SimpleNamespace(image_token_rows=lambda batch: None),  # each stands at its placeholder
    ...     batch={"input_ids": ids, "labels": labels},
    ...     labels=labels,
    ...     hidden_states=torch.stack([torch.stack([image, cat]), torch.stack([image, dog])]),
    ...     outputs={},
    ...     image_mask=ids == 9,
    ...     image_features=torch.stack([cat, dog])[:, None],
    ... )
    >>> contrastive(context, temperature=1.0)  # cosines 1 and 0: twice log(e + 1) - 1 = 0.3133
    (tensor(0.6265), 2)
    """
    own = pair_vectors(context)
    everyone, start = _whole_step(context, own)
    return share_of_step(PAIR_LOSSES["contrastive"], own, everyone, start, 1 / temperature), len(own)


@term(count=count_pairs, summary=pair_vectors)
def sigmoid_contrastive(
    context: LossContext, temperature: float = 0.1, bias: float = -10.0
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """-sum_j log sigmoid(z_ij (cos(image i, text j) / temperature + bias)), z_ij = 1 at j = i, else -1: each pair by itself.

    SigLIP, https://arxiv.org/abs/2303.15343, eq. 1 as its algorithm 1 computes it, with the values that its temperature
    and bias start from, not trained. Vectors and rows as in `contrastive`.

    >>> from types import SimpleNamespace
    >>> from hfcustom.losses import LossContext
    >>> ids = torch.tensor([[9, 1], [9, 2]])
    >>> labels = torch.tensor([[-100, 1], [-100, 2]])
    >>> image, cat, dog = torch.eye(3)
    >>> context = LossContext(
    ...     model=SimpleNamespace(image_token_rows=lambda batch: None),  # each stands at its placeholder
    ...     batch={"input_ids": ids, "labels": labels},
    ...     labels=labels,
    ...     hidden_states=torch.stack([torch.stack([image, cat]), torch.stack([image, dog])]),
    ...     outputs={},
    ...     image_mask=ids == 9,
    ...     image_features=torch.stack([cat, dog])[:, None],
    ... )
    >>> sigmoid_contrastive(context, temperature=1.0, bias=0.0)  # twice log(1 + 1/e) + log(1 + 1) = 0.3133 + 0.6931
    (tensor(2.0128), 2)
    """
    own = pair_vectors(context)
    everyone, start = _whole_step(context, own)
    shift = everyone.new_tensor(bias)
    return share_of_step(PAIR_LOSSES["sigmoid_contrastive"], own, everyone, start, 1 / temperature, shift), len(own)


def _whole_step(context: LossContext, own: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the vectors of every row of the step with a pair, (n, 2, D), and where this batch's begin."""
    step = context.step_summary()
    return (own, 0) if step is None else (step.with_own(own), step.start)
