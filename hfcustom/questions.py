"""Questions: the words that a row's prompt asks with, for a connector that wants them, and which row a crop belongs to.

A question is what a row says before its answer: in training and evaluation the tokens before its first label, in generate()
those of the prompt, in a forward without labels the whole row. So no answer has a say, and the same prompt is the same
question everywhere. Tokens of which the config knows the id are no words: placeholders, marks of images, padding, the
beginning and the end of a text. Letters: B rows of a batch, T text tokens, R rows of data (several where they are packed
into one of the batch), Q words of the longest question, P crops, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hfcustom import losses, seams

if TYPE_CHECKING:
    from hfcustom.seam_hooks import SeamHooks

TOKEN_IDS = re.compile(r"_(token|patch|col)_(id|index)$")  # how configs call the ids of tokens that are no words


class Asked:
    """What a running forward() or generate() was given; its questions are read when a connector asks for them."""

    def __init__(
        self,
        model: SeamHooks,
        inputs: Mapping[str, Any],
        labels: torch.Tensor | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self.model, self.inputs, self.labels, self.prompt_length = model, inputs, labels, prompt_length

    def of_crops(self, lengths: Sequence[int], token: int | None = None) -> dict[str, torch.Tensor]:
        """Return `of_rows` for crops of so many image tokens each, in the order of their placeholders.

        `token` is the placeholder's id, by default the image's. ValueError where the text has another number of them.
        """
        ids, embeds = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds")
        places = seams.find_placeholders(self.model, ids, embeds, token)  # (B, T)
        rows = self.rows[places]  # (tokens of all crops,)
        counts = torch.tensor(lengths, device=rows.device)
        if not torch.compiler.is_compiling() and len(rows) != sum(lengths):
            raise self.model.unmatched(len(rows), sum(lengths), len(lengths))
        return self.of_rows(rows[counts.cumsum(0) - counts])

    def of_rows(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the question of each of some rows of data, (P,): embeddings (P, Q, D), mask (P, Q)."""
        words, mask = self.questions
        if len(words) == 1:
            return {"question": words.expand(len(rows), -1, -1), "question_mask": mask.expand(len(rows), -1)}
        return {"question": words[rows], "question_mask": mask[rows]}

    @cached_property
    def rows(self) -> torch.Tensor:
        """The row of data of each position, (B, T)."""
        batch = {name: self.inputs.get(name) for name in ("position_ids", "attention_mask")}
        return losses.row_ids({**batch, "labels": self._positions()})

    @cached_property
    def questions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The question of each row of data as the embeddings of its words, (R, Q, D), and which places have one, (R, Q)."""
        said = self._said()  # (B, T)
        if self.inputs.get("input_ids") is None:
            words = self.inputs["inputs_embeds"][said]  # (words of all rows, D)
        else:
            words = self.model.get_input_embeddings()(self.inputs["input_ids"][said][None])[0]
        counts = torch.bincount(self.rows[said], minlength=int(self.rows.max()) + 1)  # (R,)
        padded = pad_sequence(list(words.split(counts.tolist())), batch_first=True)  # (R, Q, D)
        return padded, torch.arange(padded.shape[1], device=counts.device) < counts[:, None]

    def _positions(self) -> torch.Tensor:
        ids = self.inputs.get("input_ids")
        return self.inputs["inputs_embeds"][..., 0] if ids is None else ids  # (B, T)

    def _said(self) -> torch.Tensor:
        """Return which positions are words of a question, (B, T)."""
        said = torch.ones_like(self._positions(), dtype=torch.bool)
        attended = self.inputs.get("attention_mask")
        if isinstance(attended, torch.Tensor) and attended.ndim == 2:  # with a cache it covers what came before, too
            said &= attended[:, -said.shape[1] :].bool()
        if self.prompt_length is not None:
            said[:, self.prompt_length :] = False
        if self.labels is not None:
            said &= before_answers(self.labels.to(said.device), self.rows)
        ids, embeds = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds")
        if ids is not None:
            return said & ~torch.isin(ids, ids.new_tensor(known_tokens(self.model)))
        for token in known_tokens(self.model):
            said &= ~seams.find_placeholders(self.model, None, embeds, token)
        return said


def before_answers(labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return which positions come before the first label of their row of data; both (B, T), as what is returned."""
    supervised = (labels != losses.IGNORE).flatten().long()
    seen = supervised.cumsum(0)  # up to here, those of the rows before included
    of_rows = rows.new_zeros(int(rows.max()) + 1).index_add(0, rows.flatten(), supervised)  # (R,)
    return (seen == (of_rows.cumsum(0) - of_rows)[rows.flatten()]).view_as(labels)


def known_tokens(model: SeamHooks) -> list[int]:
    """Return the ids that the model's config names."""
    config: Any = model.config
    named = {**vars(config.get_text_config()), **vars(config)}
    found = {model.placeholder_token_id}
    for name, value in named.items():
        if TOKEN_IDS.search(name):
            found |= set(value if isinstance(value, list | tuple) else [value])
    return sorted(token for token in found if isinstance(token, int) and token >= 0)
