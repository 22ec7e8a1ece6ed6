"""The losses of contrastive encoders: equal to a loop over pairs, bounded in memory, the same over processes."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import Encoder, doubled, encoders, gradients, naive_loss, step
from encoders_run import SHARES
from test_distributed import two_ranks
from test_log_probs import Largest
from torch import nn

import hfcustom
from hfcustom.encoders import load_encoder
from hfcustom.losses import chunked, pairs
from hfcustom.losses.pairs import PAIR_LOSSES, find_pair_loss, pair_loss, pair_values

ENCODERS = encoders()


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("size", [16, 2**24])
def test_value_and_gradients_equal_a_loop_over_pairs(
    encoder: Encoder, loss: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", size)
    model, reference = encoder.model(loss=loss).double(), encoder.model(loss=loss).double()
    batch = doubled(encoder.batch())
    found, grads = step(model, batch)
    outputs = reference(**batch)
    bias = 0.0 if reference.logit_bias is None else reference.logit_bias
    expected = naive_loss(loss, outputs.image_embeds, outputs.text_embeds, reference.logit_scale.exp(), bias)
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_a_sure_model_has_an_exact_loss_in_float32(name: str) -> None:
    """Where logits are large and the loss is small, a difference of large numbers would be rounding alone."""
    torch.manual_seed(0)
    vectors = torch.eye(6)[:, None].repeat(1, 2, 1)
    vectors = nn.functional.normalize(vectors + 0.01 * torch.randn(6, 2, 6), dim=-1)
    bias = None if name == "contrastive" else torch.tensor(-10.0)
    scale = 8.0 if bias is None else 20.0
    found = pair_values(find_pair_loss(name), vectors, vectors, 0, scale, bias)
    exact = pair_values(find_pair_loss(name), *[vectors.double()] * 2, 0, scale, bias)
    assert float(exact.max()) < 5e-3
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_similarities_are_built_a_chunk_at_a_time_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs_of_all, width, rows = 512, 8, 32
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows * pairs_of_all)
    vectors = torch.randn(pairs_of_all, 2, width, requires_grad=True)
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    for loss in PAIR_LOSSES.values():
        scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
            value = pair_values(loss, vectors, vectors, 0, scale, bias).sum()
        with largest:
            value.backward()
        assert max(saved) <= vectors.numel() < largest.elements == rows * pairs_of_all


def test_training_builds_no_logits_unless_asked(encoder: Encoder) -> None:
    model, batch = encoder.model().train(), encoder.batch()
    assert model(**batch, return_loss=True).logits_per_image is None
    assert model(**batch, return_loss=True, return_logits=True).logits_per_image.shape == (4, 4)
    assert model.eval()(**batch, return_loss=True).logits_per_image.shape == (4, 4)
    assert model(**batch, return_loss=True, return_logits=False).logits_per_image is None


def test_16_bit_vectors_are_compared_in_float32(encoder: Encoder) -> None:
    model, batch = encoder.model(), encoder.batch()
    expected = float(step(model, batch)[0].loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = encoder.model().train()(**batch, return_loss=True).loss
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(expected, rel=2e-2)
    model = encoder.model().to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    outputs, grads = step(model, batch)
    assert outputs.loss.dtype == torch.float32 and float(outputs.loss.detach()) == pytest.approx(expected, rel=5e-2)
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())


def test_the_scale_is_learned_and_held_at_its_bound(encoder: Encoder) -> None:
    free, bound = encoder.model(), encoder.model(max_logit_scale=5.0)
    _, grads = step(free, encoder.batch())
    assert grads["logit_scale"].abs().sum() > 0
    with torch.no_grad():
        bound.logit_scale.fill_(9.0)
        assert float(bound(**encoder.batch(), return_loss=True).loss) and float(bound.logit_scale) == 9.0
    step(bound, encoder.batch())
    assert float(bound.logit_scale.detach()) == pytest.approx(torch.tensor(5.0).log().item())
    assert float(free.logit_scale.detach()) == pytest.approx(1.7)
    with pytest.raises(ValueError, match="max_logit_scale=0.0 must be above 0"):
        encoder.model_class.config_class(max_logit_scale=0.0)


def test_a_loss_with_a_bias_brings_one_where_stock_has_none(encoder: Encoder, tmp_path: Path) -> None:
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "stock")
    has = "logit_bias" in dict(encoder.model(encoder.stock_class).named_parameters())
    plain = encoder.model_class.from_pretrained(tmp_path / "stock", loss="contrastive")
    assert (plain.logit_bias is not None) == has
    model = encoder.model_class.from_pretrained(tmp_path / "stock", loss="sigmoid_contrastive")
    assert float(model.logit_bias.detach()) == pytest.approx(-1.1 if has else -10.0)
    _, grads = step(model, encoder.batch())
    assert grads["logit_bias"].abs().sum() > 0
    assert hfcustom.find_parts(model).paths["new"] == (() if has else ("logit_bias",))
    with torch.no_grad():
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(tmp_path / "mine")
    assert float(encoder.model_class.from_pretrained(tmp_path / "mine").logit_bias.detach()) == -3.0


def test_a_users_loss_is_one_function(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIR_LOSSES", dict(PAIR_LOSSES))

    @pair_loss
    def hinge(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        own = logits.gather(1, positives[:, None])  # (C, 1)
        return (1 + logits - own).clamp(min=0).sum(1) - 1

    outputs, grads = step(encoder.model(loss="hinge"), encoder.batch(), return_logits=True)
    logits = outputs.logits_per_image.detach()
    if encoder.model().logit_bias is not None:
        logits = logits - encoder.model().logit_bias.detach()
    rows = [(1 + side - side.diagonal()[:, None]).clamp(min=0).sum(1) - 1 for side in (logits, logits.t())]
    assert float(outputs.loss.detach()) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)
    assert grads
    pair_loss(hinge)  # again is harmless
    with pytest.raises(ValueError, match="'contrastive' belongs to hfcustom.losses.pairs.contrastive"):

        @pair_loss
        def contrastive(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
            return logits


def test_mistakes_name_the_value_and_the_cure(encoder: Encoder, tmp_path: Path) -> None:
    batch = encoder.batch()
    with pytest.raises(
        ValueError, match=r"Unknown loss of a contrastive encoder: 'contrstive'. Did you mean 'contrast"
    ):
        encoder.model(loss="contrstive")(**batch, return_loss=True)
    weighted = encoder.model(loss={"contrastive": 0.5})
    with pytest.raises(ValueError, match=r"Unknown loss of a contrastive encoder: \{'contrastive': 0.5\}"):
        weighted(**batch, return_loss=True)
    encoder.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unknown loss of a contrastive encoder: 'sigmoid'"):
        encoder.model_class.from_pretrained(tmp_path, loss="sigmoid")
    with pytest.raises(ValueError, match="4 images and 3 texts; with return_loss=True text i is"):
        encoder.model()(batch["input_ids"][:3], batch["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="connector='average_pool': this family takes none: an image becomes one"):
        encoder.model(connector="average_pool")
    with pytest.raises(ValueError, match="Unknown encoder 'clipp'. Did you mean 'clip'"):
        load_encoder("clipp")


def test_the_formulas_of_the_documentation_are_right() -> None:
    assert doctest.testmod(pairs).failed == 0 < doctest.testmod(pairs).attempted


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("encoders")
    two_ranks(folder, "encoders_run.py")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("case", SHARES)
def test_loss_and_gradients_of_two_processes_are_those_of_one(
    ranks: list[dict[str, Any]], encoder: Encoder, loss: str, case: str
) -> None:
    first, second = (dict(rank[f"{encoder.name} {loss} {case}"]) for rank in ranks)
    outputs, expected = step(encoder.model(loss=loss), encoder.batch(range(8)))
    found = (first.pop("loss") + second.pop("loss")) / 2
    torch.testing.assert_close(found, outputs.loss.detach(), rtol=1e-5, atol=0)
    assert first.keys() == second.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]), name
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((first[name] - gradient).abs().max()) <= 1e-4 * scale, name


def test_negatives_of_one_process_alone_would_be_another_loss(ranks: list[dict[str, Any]]) -> None:
    clip = ENCODERS["clip"]
    for rank, share in zip(ranks, SHARES["equal"], strict=True):
        with torch.no_grad():
            alone = clip.model()(**clip.batch(share), return_loss=True).loss
        torch.testing.assert_close(rank["eval"]["loss"], alone)
        assert abs(float(rank["clip contrastive equal"]["loss"]) / float(alone) - 1) > 0.1


def test_gathered_rows_stand_in_order_and_get_everyones_gradients(ranks: list[dict[str, Any]]) -> None:
    weights = 3 * torch.arange(6.0).view(3, 2)  # 1 times on the first process, 2 times on the second
    for rank, rows in zip(ranks, (slice(0, 0), slice(0, 3)), strict=True):
        assert rank["gather"]["everyone"].tolist() == [[1, 1]] * 3
        assert int(rank["gather"]["start"]) == 0
        assert torch.equal(rank["gather"]["gradient"], weights[rows])
