"""token_pruning: the tokens that differ most from the rest of their crop, or those nearest to the question."""

from __future__ import annotations

import math

import torch
from torch import nn

from hfcustom.naming import unknown

CHOICES = ("novelty", "question")


class TokenPruning(nn.Module):
    """Keep `num_kept` tokens of each crop, or a share `keep_ratio` of them (a half by default), in their order.

    A token's score is what `by` names plus a learned part, which starts at zero:
    - by="novelty": its cosine distance from the mean of its crop, so that tokens of an even background go first. The
      learned part is Linear(LayerNorm(token)).
    - by="question": its cosine similarity to each word that the prompt of its row says (hfcustom/questions.py), on average
      over the words; where there are none, its novelty. The learned part also has a product of the token with the mean
      word, through a matrix: what the question should look for can be learned. No answer has a say, so training,
      evaluation and generation of a prompt keep the same tokens.
    Scores are computed in float32 and equal ones are settled by position: the same features keep the same tokens. The
    choice itself has no gradient; a kept token does, and it is multiplied by 2 sigmoid(learned part), 1 at the start,
    through which the learned part is trained. keep_ratio=1.0 keeps every token: exactly no connector until it is trained.

    Source: LongVU, https://arxiv.org/abs/2410.17434, section 3 (selective feature reduction by a cross-modal query). There
    the score is the mean product of a video frame's features, in the language model's space, with the embeddings of the
    question; it picks the frames that keep all their tokens, others are pooled. Here, too, features have passed the
    family's projector and words are rows of the language model's embedding, but single tokens of a crop are picked, others
    are dropped, and the cosine keeps long vectors from winning by their length. LongVU's comparison of frames is
    temporal_dedup.
    """

    def __init__(
        self, hidden_size: int, num_kept: int | None = None, keep_ratio: float | None = None, by: str = "novelty"
    ) -> None:
        super().__init__()
        if num_kept is not None and keep_ratio is not None:
            raise ValueError(f"token_pruning num_kept={num_kept} and keep_ratio={keep_ratio} exclude each other.")
        if num_kept is not None and num_kept < 1:
            raise ValueError(f"token_pruning num_kept={num_kept}; it must be at least 1.")
        if by not in CHOICES:
            raise ValueError(unknown("token_pruning by:", by, CHOICES))
        self.num_kept, self.by = num_kept, by
        self.keep_ratio = check_ratio("token_pruning", 0.5 if keep_ratio is None else keep_ratio)
        self.norm = nn.LayerNorm(hidden_size)
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        if by == "question":
            self.match = nn.Linear(hidden_size, hidden_size, bias=False)
            nn.init.zeros_(self.match.weight)

    @property
    def asks(self) -> bool:
        """Whether the question is wanted: it is looked up for a connector that takes it, unless that says False here."""
        return self.by == "question"

    def forward(
        self,
        features: torch.Tensor,
        question: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        learned = self.score(self.norm(features))  # (P, N, 1)
        scores = novelty(features)  # (P, N)
        if self.by == "question":
            if question is None or question_mask is None:
                raise ValueError("token_pruning by='question' was called without a question.")
            word = mean_word(question, question_mask)[..., None]  # (P, D, 1)
            learned = learned + self.match(self.norm(features)) @ word.to(features.dtype)
            asked = question_mask.any(1, keepdim=True)  # (P, 1)
            scores = torch.where(asked, similarity(features, word), scores)
        with torch.no_grad():
            kept = highest(scores + learned[..., 0].float(), self.num_tokens_out(features.shape[1]))  # (P, M)
        return pick(features * (2 * learned.sigmoid()), kept)  # (P, M, D)

    def num_tokens_out(self, num_tokens: int) -> int:
        """Return how many tokens of a crop are kept; a smaller crop keeps them all."""
        return min(self.num_kept or math.ceil(self.keep_ratio * num_tokens), num_tokens)


@torch.no_grad()
def novelty(features: torch.Tensor) -> torch.Tensor:
    """Return the cosine distance of each token from the mean of its crop: (P, N, D) -> (P, N)."""
    tokens = features.float()
    return 1 - nn.functional.cosine_similarity(tokens, tokens.mean(1, keepdim=True), -1)


def mean_word(question: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the words of a question, each brought to length one: (P, Q, D), (P, Q) -> (P, D); zeros of no words."""
    words = nn.functional.normalize(question.float(), dim=-1).masked_fill(~mask[..., None], 0.0)
    return words.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def similarity(features: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine similarity of each token to the words that `mean_word` averaged: (P, N, D), (P, D, 1) -> (P, N)."""
    return (nn.functional.normalize(features.float(), dim=-1) @ word)[..., 0]


def check_ratio(name: str, keep_ratio: float) -> float:
    """Return the share of tokens to keep; ValueError when it is none."""
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"{name} keep_ratio={keep_ratio}; it must be above 0 and at most 1.")
    return keep_ratio


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the `count` highest scores of each row, in ascending order: (P, N) -> (P, count)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


def pick(features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Gather tokens: (P, N, D), (P, M) -> (P, M, D)."""
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
