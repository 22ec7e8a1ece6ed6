"""Checks of generate(): with the cache as without, and with padding on the left as with none.

Letters: B rows, T text tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from hfcustom.doctor.finding import Failed, check
from hfcustom.doctor.patient import ROUNDING, Patient, difference

NEW_TOKENS = 5
PADDING = 4


def _generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Return the logits of the tokens that greedy generation adds, (new, V)."""
    said = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[model.placeholder_token_id],  # an untrained model may say one, and then lacks an image
    )
    return torch.cat(said.logits)


def _judge(found: torch.Tensor, expected: torch.Tensor) -> str:
    change = difference(found, expected)
    measured = f"{change:.1e} of the logits over {len(expected)} generated tokens"
    if not change <= ROUNDING:  # NaN is not
        raise Failed(measured)
    return measured


@check(
    expected="generated tokens have the same logits with the cache and without",
    why="With the cache the seams see one new token at a time. What looks at the others, or at the length, answers "
    "differently than it was trained to.",
    cure="Treat each position by itself in transform_embeddings and transform_hidden_states.",
)
def cache_parity(patient: Patient) -> str:
    """Generate with and without the cache; without it each step is a forward over the whole text."""
    model, inputs = patient.model(), patient.prompt(2)
    return _judge(*(_generate(model, inputs, use_cache=use_cache) for use_cache in (True, False)))


@check(
    expected="generated tokens have the same logits with padding on the left and without",
    why="generate() pads prompts of a batch on the left; a class that expects padding on the right answers them wrongly.",
    cure="Read where padding is from attention_mask, and pass the mask and the position_ids on as they come.",
)
def padding_side(patient: Patient) -> str:
    """Generate from a prompt with padding before it."""
    model, plain = patient.model(), patient.prompt(2)
    padded = patient.prompt(2, plain["input_ids"].shape[1] + PADDING)
    assert padded["input_ids"].shape[1] == plain["input_ids"].shape[1] + PADDING, "the processor did not pad"
    return _judge(_generate(model, padded), _generate(model, plain))
