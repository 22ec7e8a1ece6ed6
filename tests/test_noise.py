"""NEFTune's noise: at text alone, of the size that its row's length asks for, in training alone, in every family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Family
from encoder_cases import Encoder
from test_packing import packed
from training import train, uneven_rows

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.encoders import load_encoder
from hfcustom.exits import ConfigError
from hfcustom.noise import set_noise, text_noise
from hfcustom.packed import why_not_packed

ALPHA = 5.0


def embeddings_of(model: Any, batch: Mapping[str, Any], **call: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return what reaches the language model (B, T, D), where images stand in it (B, T), and the outputs."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
        seen.append((embeddings.detach().clone(), image_mask))
        return embeddings

    model.transform_embeddings = look
    outputs = model(**{**batch, **call})
    del model.transform_embeddings
    return *seen[0], outputs


def test_noise_is_on_text_while_training_and_nowhere_else(family: Family) -> None:
    model, batch = family.model().train(), family.batch([1, 0])
    real = batch["attention_mask"].bool()
    assert not real.all(), "a row has padding"
    clean, images, plain = embeddings_of(model, batch)
    model.neftune_alpha = ALPHA
    noisy, _, outputs = embeddings_of(model, batch)
    noise, text = noisy - clean, real & ~images
    assert images.any()
    assert (noise[text] != 0).float().mean() > 0.99 and not noise[~text].any()
    for row, places in zip(noise, real, strict=True):
        most = ALPHA / math.sqrt(int(places.sum()) * row.shape[-1])
        assert 0.9 * most < float(row.abs().max()) < 1.001 * most
    assert not torch.equal(outputs.loss, plain.loss)
    outputs.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert torch.isfinite(gradient).all() and gradient.any()
    with torch.no_grad():  # summaries of a step, references
        assert torch.equal(embeddings_of(model, batch)[0], clean)
    without = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(embeddings_of(model, without)[0], clean)  # generation
    assert torch.equal(embeddings_of(model.eval(), batch)[0], clean)


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_how_strong_it_is_does_not_depend_on_how_rows_are_cut(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    model, rows = family.model().train(), uneven_rows()[:3]
    assert not why_not_packed(model)
    collate = Collator(family.processor)
    singles = [collate([row]) for row in rows]
    lengths = [single["input_ids"].shape[1] for single in singles]

    def noise_of(batch: Any) -> torch.Tensor:
        model.neftune_alpha = 0.0
        clean, images, _ = embeddings_of(model, batch)
        model.neftune_alpha = ALPHA
        return (embeddings_of(model, batch)[0] - clean).masked_fill(images[..., None], 0.0)

    alone = [noise_of(single)[0] for single in singles]
    together = noise_of(collate(rows))
    in_one = noise_of(packed(family, singles))[0].split(lengths)
    for at, length in enumerate(lengths):
        most = ALPHA / math.sqrt(length * alone[at].shape[-1])
        for noise in (alone[at], together[at], in_one[at]):
            assert 0.97 * most < float(noise.abs().max()) < 1.001 * most


def test_the_size_is_that_of_the_paper() -> None:
    """Uniform in [-1, 1] times alpha / sqrt(L D), for which the norm of a whole row is about alpha / sqrt(3)."""
    torch.manual_seed(0)
    text = torch.ones(2, 100, dtype=torch.bool)
    real = text.clone()
    real[1, 30:] = False
    noise = text_noise(torch.zeros(2, 100, 64), ALPHA, text, real, None)
    torch.testing.assert_close(noise.flatten(1).norm(dim=1), torch.full((2,), ALPHA / math.sqrt(3)), rtol=0.03, atol=0)
    assert float(noise.abs().max(-1).values[0].max()) < ALPHA / 80 and not noise[1, 30:].any()


def test_it_is_on_the_parents_own_loss_and_on_embeddings_that_peft_wraps(internvl: Family) -> None:
    import peft

    batch = internvl.batch([1, 0])
    stock = internvl.model(loss="stock").train()
    clean = stock(**batch).loss
    stock.neftune_alpha = ALPHA
    assert not torch.equal(stock(**batch).loss, clean)
    wrapped = peft.get_peft_model(internvl.model(), peft.LoraConfig(r=2, target_modules=["embed_tokens"])).train()
    core = hfcustom.parts.unwrap(wrapped)
    clean, _, _ = embeddings_of(core, batch)
    core.neftune_alpha = ALPHA
    noisy, images, outputs = embeddings_of(core, batch)
    assert (noisy - clean).abs().max() > 0 and torch.equal(noisy[images], clean[images])
    outputs.loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if p.requires_grad)


def test_a_model_without_that_seam_is_told(internvl: Family) -> None:
    wrapped = hfcustom.wrap(internvl.model(internvl.stock_class))
    with pytest.raises(ConfigError, match=r"neftune_alpha=5\.0: .*InternVL.* has no seam at the embeddings"):
        set_noise(wrapped, 5.0)
    with pytest.raises(ConfigError, match="CustomCLIPModel has no seam at the embeddings"):
        set_noise(Encoder("clip", load_encoder("clip")).model(), 5.0)


def test_fit_trains_with_it_and_leaves_nothing_behind(internvl: Family, tmp_path: Any) -> None:
    losses = []
    for alpha in (0.0, 0.0, 5.0):
        model = internvl.model()
        result = train(model, internvl, tmp_path, max_steps=1, neftune_alpha=alpha, overwrite=True)
        losses.append(result.history[0]["loss"])
        assert model.neftune_alpha == 0.0
    assert losses[0] == losses[1] != losses[2]
    model = internvl.model()
    with pytest.raises(ConfigError, match="already holds checkpoints"):  # a run that ends before its first step
        train(model, internvl, tmp_path, max_steps=1, neftune_alpha=5.0)
    assert model.neftune_alpha == 0.0
