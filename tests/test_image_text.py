"""Contrastive terms against loops over pairs, their negatives across a step, and what cannot be paired."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from torch.nn import functional as F
from training import add_dropout, cut_batches, run_step, train, uneven_rows

import hfcustom
from hfcustom.losses import StepSummary, find_loss
from hfcustom.losses.image_text import count_pairs, pair_vectors

IMAGES = [1, 0, 2, 1]


def naive_vectors(model: Any, family: Family, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images' and the texts' vectors of rows that have both, each row run by itself."""
    images, texts = [], []
    for at in range(len(rows)):
        (batch,) = cut_batches(family, rows[at : at + 1], 1, {})
        if "pixel_values" not in batch:
            continue
        pixels = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
        places = [place for place, label in enumerate(batch["labels"][0].tolist()) if label != -100]
        images.append(torch.cat(list(pixels)).mean(0))
        texts.append(sum(hidden[place] for place in places) / len(places))
    return torch.stack(images), torch.stack(texts)


def naive_clip(images: torch.Tensor, texts: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    scores = F.cosine_similarity(images[:, None], texts[None], dim=-1) / temperature
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(scores.t(), own, reduction="sum")) / 2


def naive_siglip(images: torch.Tensor, texts: torch.Tensor, temperature: float = 0.1, bias: float = -10.0) -> Any:
    total = torch.zeros((), dtype=images.dtype)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            score = image @ text / (image.norm() * text.norm()) / temperature + bias
            total = total + torch.log1p(torch.exp(-score if i == j else score))
    return total


@pytest.mark.parametrize(("name", "naive"), [("contrastive", naive_clip), ("sigmoid_contrastive", naive_siglip)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient_equal_a_loop_over_pairs(internvl: Family, name: str, naive: Any, size: int) -> None:
    rows = uneven_rows(IMAGES, [3, 1, 8, 2])
    reference = internvl.model().double()
    expected = naive(*naive_vectors(reference, internvl, rows)) / 3
    expected.backward()
    values, gradients = run_step(internvl.model(loss=name).double(), cut_batches(internvl, rows, size, {}))
    assert values[name] == pytest.approx(float(expected.detach()), rel=1e-6)
    for key, parameter in reference.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-9:
            assert float((gradients[key] - parameter.grad).norm() / parameter.grad.norm()) < 1e-6, key


def test_only_rows_with_an_image_and_supervised_text_count(internvl: Family) -> None:
    batch, token = internvl.batch(IMAGES), internvl.model().config.image_token_id
    assert count_pairs(batch, token) == 3
    batch["labels"][0] = -100
    assert count_pairs(batch, token) == 2
    model = internvl.model(loss="contrastive").train()
    model(**batch).loss.backward()
    assert model.loss_values["contrastive"].count == 2
    with torch.no_grad():
        vectors = pair_vectors(model.loss_context(batch, batch["labels"]))
    assert vectors.shape == (2, 2, 64)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 2))


def test_every_family_can_be_paired(family: Family) -> None:
    images = [1, 0, 1] if family.name == "aria" else [2, 0, 1, 3]
    model = family.model(loss={"contrastive": 1.0, "sigmoid_contrastive": 1.0}).train()
    model(**family.batch(images)).loss.backward()
    assert {value.count for value in model.loss_values.values()} == {len(images) - 1}
    parts = hfcustom.find_parts(model)
    trained = {parts.part_of(key) for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    reached = [
        path for path in parts.paths["vision"] if f"{path}." not in model.unreached()
    ]  # two towers: one of videos
    assert ("vision" in trained) == bool(reached)


def test_an_untied_pair_costs_what_chance_says() -> None:
    """With all cosines equal each of n texts is as likely: log n."""
    ids = torch.tensor([[9, 1]] * 4)
    labels = torch.tensor([[-100, 1]] * 4)
    ones = torch.ones(4, 2, 3)
    context = hfcustom.LossContext(
        SimpleNamespace(image_token_rows=lambda batch: None),  # type: ignore[arg-type]
        {"input_ids": ids, "labels": labels},
        labels,
        ones,
        {},
        image_mask=ids == 9,
        image_features=ones[:, :1],
    )
    value, count = find_loss("contrastive").function(context)
    assert float(value) / count == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_first_look_sees_what_the_step_sees(
    internvl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    """With dropout, autocast, frozen 16-bit weights and checkpointing: else a row would be its own negative."""
    seen, with_own = [], StepSummary.with_own

    def compare(self: StepSummary, own: torch.Tensor) -> torch.Tensor:
        assert torch.equal(self.values[self.start : self.start + len(own)], own)
        seen.append(len(self.values))
        return with_own(self, own)

    monkeypatch.setattr(StepSummary, "with_own", compare)
    model = internvl.model(loss="contrastive").to(torch.bfloat16)
    if frozen:
        hfcustom.freeze(model, "vision")
    add_dropout(model, 0.3)
    train(model, internvl, tmp_path, micro_batch_size=2, precision="bf16", gradient_checkpointing=True, max_steps=1)
    assert seen and set(seen) == {4}


def test_what_cannot_be_paired_is_told(internvl: Family) -> None:
    batch, model = internvl.batch([1, 1]), internvl.model(loss="contrastive")
    context = model.loss_context(batch, batch["labels"])
    context.running = "contrastive"
    context.image_features = context.image_features[:, :-1]
    with pytest.raises(ValueError, match=r"which rows 42 image tokens belong to: the text has 56 placeholders"):
        pair_vectors(context)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with pytest.raises(ValueError, match="finds the rows with images by input_ids"):
        model.train()(**batch, inputs_embeds=embeddings)
