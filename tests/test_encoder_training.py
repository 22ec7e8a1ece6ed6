"""fit() trains each contrastive encoder: however a step is cut, over micro-batches or processes, it is the same step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from encoder_cases import WORDS, Encoder, doubled, encoders, gradients, naive_loss
from encoders_run import STEP_ROWS
from test_distributed import two_ranks
from training import Step, add_dropout, assert_same_step, curve, run_step, short_config, weights

import hfcustom
from hfcustom.console import show_start
from hfcustom.losses.pairs import PAIR_LOSSES, count_matches, find_pair_loss, pair_values, share_of_step
from hfcustom.train import TrainResult, fit
from hfcustom.train_config import TrainConfig

ENCODERS = encoders()
CUTS: dict[str, Sequence[int]] = {"4x2": (4, 4), "2x4": (2, 2, 2, 2), "unequal": (1, 5, 2)}
ROWS = [{"image": picture(at), "text": text} for at, text in enumerate(WORDS)]


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


def cut_step(encoder: Encoder, model: Any, sizes: Sequence[int]) -> Step:
    """Run one step in float64 over the rows, cut into micro-batches."""
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    batches = [doubled(encoder.batch(range(end - size, end))) for size, end in zip(sizes, ends, strict=True)]
    return run_step(model.double(), batches)


def train(encoder: Encoder, model: Any, folder: Path, **options: Any) -> TrainResult:
    def evaluate(model: Any, step: int) -> dict[str, float]:
        return hfcustom.retrieval_recall(model, encoder.processor, ROWS[:4])

    return fit(model, encoder.processor, ROWS, short_config(folder, **{"eval_steps": 3, **options}), evaluate=evaluate)


# ---- the cut of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
def test_however_a_step_is_cut_loss_and_every_gradient_are_those_of_all_pairs(encoder: Encoder, loss: str) -> None:
    """The scale and the bias are among the gradients; each belongs to every pair of the step once."""
    reference = encoder.model(loss=loss).double().train()
    outputs = reference(**doubled(encoder.batch(range(8))))
    bias = 0.0 if reference.logit_bias is None else reference.logit_bias
    value = naive_loss(loss, outputs.image_embeds, outputs.text_embeds, reference.logit_scale.exp(), bias)
    value.backward()
    expected = ({loss: float(value.detach())}, gradients(reference))
    assert "logit_scale" in expected[1] and ("logit_bias" in expected[1]) == (reference.logit_bias is not None)
    for sizes in ((8,), *CUTS.values()):
        found = cut_step(encoder, encoder.model(loss=loss), sizes)
        assert_same_step(found, expected)
        for name in ("logit_scale", "logit_bias") if "logit_bias" in expected[1] else ("logit_scale",):
            torch.testing.assert_close(found[1][name], expected[1][name], rtol=1e-8, atol=1e-12)


def test_negatives_of_a_micro_batch_alone_would_be_another_loss(encoder: Encoder) -> None:
    whole = cut_step(encoder, encoder.model(), (8,))[0]
    model = encoder.model().double()
    with torch.no_grad():
        halves = [model(**doubled(encoder.batch(rows)), return_loss=True).loss for rows in (range(4), range(4, 8))]
    assert abs(float(sum(halves)) / 2 / next(iter(whole.values())) - 1) > 0.1


def test_the_first_look_draws_the_same_dropout_as_the_step() -> None:
    """Own vectors must be those that the first look saw, or the losses of others would be about other vectors."""
    encoder = ENCODERS["clip"]
    model = encoder.model()
    add_dropout(model, 0.4)
    seen: list[torch.Tensor] = []

    def spy(self: Any, images: torch.Tensor, texts: torch.Tensor, divisors: Any, summaries: Any) -> torch.Tensor:
        step = summaries["contrastive"]
        seen.append(step.values[step.start : step.start + len(images)] - torch.stack([images, texts], 1).detach())
        return type(model).pair_loss(self, images, texts, divisors, summaries)

    model.pair_loss = spy.__get__(model)
    cut_step(encoder, model, (4, 4))
    assert len(seen) == 2
    assert all(float(difference.abs().max()) < 1e-6 for difference in seen)


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
def test_shares_of_a_step_need_no_more_than_chunks_and_own_rows_in_any_place(loss: str) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(7, 2, 5, dtype=torch.float64), dim=-1).requires_grad_()
    scale, bias = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    inputs = (vectors, scale, bias)
    whole = pair_values(find_pair_loss(loss), vectors, vectors, 0, scale, bias).sum()
    expected = torch.autograd.grad(whole, inputs)
    total, found = 0.0, [torch.zeros_like(tensor) for tensor in inputs]
    for rows in (slice(0, 3), slice(3, 3), slice(3, 7)):
        everyone = vectors.detach().clone()
        everyone = torch.cat([everyone[: rows.start], vectors[rows], everyone[rows.stop :]])
        share = share_of_step(find_pair_loss(loss), vectors[rows], everyone, rows.start, scale, bias)
        total += float(share.detach())
        parts = torch.autograd.grad(share, inputs, allow_unused=True)
        found = [sum_ if part is None else sum_ + part for sum_, part in zip(found, parts, strict=True)]
    assert total == pytest.approx(float(whole.detach()), rel=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


def test_matches_are_counted_as_the_chance_of_choosing_the_own_text() -> None:
    one, two, three = torch.eye(3)
    vectors = torch.stack([torch.stack(pair) for pair in ((one, one), (two, three), (one, one), (three, three))])
    assert float(count_matches(vectors, vectors, 0)) == pytest.approx(0.5 + 0.25 + 0.5 + 0.5)
    assert float(count_matches(vectors[2:], vectors, 2)) == pytest.approx(1.0)
    assert float(count_matches(vectors[:1].expand(4, 2, 3), vectors[:1].expand(4, 2, 3), 0)) == 1.0  # collapsed


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_fit_trains_evaluates_logs_and_saves_what_the_stock_class_loads(
    encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [encoder.model() for _ in range(2)]
    start = weights(models[0])
    show_start(models[0], encoder.processor, ROWS[0], TrainConfig())
    first, second = (
        train(encoder, model, tmp_path / str(size), micro_batch_size=size)
        for size, model in zip((8, 2), models, strict=True)
    )
    name = f"{encoder.model_class.default_loss}_accuracy"
    for number in ("loss", "grad_norm", name, "image_to_text_recall", "text_to_image_recall"):
        assert len(curve(first, number)) == (1 if "recall" in number else 3)
        assert curve(first, number) == pytest.approx(curve(second, number), rel=1e-4), number
    assert curve(first)[-1] < curve(first)[0]
    assert all(
        not torch.equal(start[name], value) for name, value in weights(models[0]).items() if "k_proj" not in name
    )
    stock, info = encoder.stock_class.from_pretrained(first.model_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found, expected = (model.eval()(**encoder.batch()).logits_per_image for model in (stock, models[0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    printed = capsys.readouterr().out
    assert f"losses: {encoder.model_class.default_loss} among all pairs of a step; cosines times 5.47" in printed
    assert "seams in effect: none (stock)" in printed and ", 1 image\n" in printed


def test_resume_goes_on_with_the_same_numbers(encoder: Encoder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 4, "eval_steps": 1}
    whole = train(encoder, encoder.model(), tmp_path, save_steps=2, keep_checkpoints=9, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000003")
    again = train(encoder, encoder.model(seed=1), tmp_path, resume=True, **options)
    for number in ("loss", "grad_norm", "image_to_text_recall"):
        assert curve(again, number) == curve(whole, number)


def test_parts_freeze_and_have_rates_of_their_own(encoder: Encoder, tmp_path: Path) -> None:
    model = encoder.model()
    hfcustom.freeze(model, "vision")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(encoder, model, tmp_path, connector_lr=1e-2, micro_batch_size=4)
    parts = hfcustom.find_parts(model)
    moved = {parts.part_of(name) for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"connector", "language"}
    assert curve(result, "lr_connector")[0] == pytest.approx(1e-2) != curve(result, "lr_language")[0]


def test_an_adapter_is_trained_saved_loaded_and_merged(encoder: Encoder, tmp_path: Path) -> None:
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "base")
    model = hfcustom.lora(encoder.model_class.from_pretrained(tmp_path / "base"), ["vision", "language"], rank=2)
    result = train(encoder, model, tmp_path / "out", micro_batch_size=2)
    assert curve(result)[-1] < curve(result)[0]
    with torch.no_grad():
        expected = model.eval()(**encoder.batch()).logits_per_image
        for load in (hfcustom.load_adapter, hfcustom.merge_adapter):
            found = load(result.model_dir, tmp_path / "base").eval()
            torch.testing.assert_close(found(**encoder.batch()).logits_per_image, expected, rtol=1e-4, atol=1e-4)
    assert type(found) is encoder.model_class


def test_16_bit_weights_and_recomputed_layers(encoder: Encoder, tmp_path: Path) -> None:
    model = encoder.model().to(torch.bfloat16)
    result = train(encoder, model, tmp_path, micro_batch_size=4, gradient_checkpointing=True)
    exact = train(encoder, encoder.model(), tmp_path / "exact")
    assert curve(result)[0] == pytest.approx(curve(exact)[0], rel=5e-2)


def test_what_cannot_be_trained_is_refused_with_the_reason(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss='stock' compares the pairs of one forward.*contrastive' is the same"):
        train(encoder, encoder.model(loss="stock"), tmp_path)
    with pytest.raises(TypeError, match=r"fit\(\) trains custom models"):
        train(encoder, encoder.model(encoder.stock_class), tmp_path)
    with pytest.raises(ValueError, match="train_on='all' has no effect on a contrastive encoder"):
        train(encoder, encoder.model(), tmp_path, train_on="all")
    with pytest.raises(TypeError, match="LossCallback has nothing to add to .*hfcustom.fit compares"):
        hfcustom.LossCallback().on_train_begin(None, None, None, model=encoder.model())  # type: ignore[arg-type]
    with pytest.raises(hfcustom.RowError, match=r"row \d: 0 images and 2 texts"):
        rows = [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]}]
        fit(encoder.model(), encoder.processor, rows * 8, short_config(tmp_path))


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("steps")
    two_ranks(folder, "encoders_run.py")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
def test_a_step_of_two_processes_in_micro_batches_is_that_of_one(
    ranks: list[dict[str, Any]], encoder: Encoder, loss: str
) -> None:
    """The processes have different numbers of micro-batches, so that one runs a blank."""
    values, expected = run_step(encoder.model(loss=loss), [encoder.batch(range(8))])
    first, second = (dict(rank[f"step {encoder.name} {loss}"]) for rank in ranks)
    assert sum(len(rows) for share in STEP_ROWS for rows in share) == 8
    assert float(first.pop("loss") + second.pop("loss")) == pytest.approx(values[loss], rel=1e-5)
    assert all(torch.equal(first[name], second[name]) for name in expected)
    assert_same_step(({}, first), ({}, expected), rtol=1e-5)
    torch.testing.assert_close(first["logit_scale"], expected["logit_scale"], rtol=1e-4, atol=1e-7)
