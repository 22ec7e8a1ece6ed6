"""Preference losses: equal to plain implementations on full logits, however rows are cut, padded or packed."""

from __future__ import annotations

import copy
import doctest
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import Family
from pairs import IMAGES, pair_batch, perturb, unpadded

import hfcustom
from hfcustom.losses import LOSSES, Head, LossContext, count_pairs, find_loss, preference
from hfcustom.train import train_step
from hfcustom.train_config import TrainConfig

PAIRED = ("dpo", "ipo", "orpo", "simpo")
NAMES = (*PAIRED, "kto")
WITH_REFERENCE = ("dpo", "ipo", "kto")
OPTIONS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.7},
    "orpo": {},
    "simpo": {"beta": 1.5, "gamma": 0.4},
    "kto": {"beta": 0.4, "reference_point": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}


def spec(name: str) -> dict[str, Any]:
    return {name: {"weight": 1.0, **OPTIONS[name]}}


# ---- written again, from the papers, without the toolkit ------------------------------------------------------------


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def answer_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Return log p of each row's labels and their number, from logits of everything."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "preference")}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    log_probs = torch.log_softmax(model.lm_head(hidden), -1)
    totals, counts = [], []
    for row, labels in zip(log_probs, batch["labels"], strict=True):
        places = [at for at in range(1, len(labels)) if labels[at] != -100]
        totals.append(sum((row[at - 1, labels[at]] for at in places), torch.zeros((), dtype=row.dtype)))
        counts.append(len(places))
    return totals, counts


def naive_pair(name: str, chosen: Any, rejected: Any, o: dict[str, float]) -> torch.Tensor:
    """Return the loss of one pair; an answer is (log p, log p of the reference, tokens)."""
    (w, ref_w, len_w), (r, ref_r, len_r) = chosen, rejected
    if name == "dpo":
        h = o["beta"] * ((w - ref_w) - (r - ref_r))
        return -(1 - o["label_smoothing"]) * torch.log(sigmoid(h)) - o["label_smoothing"] * torch.log(sigmoid(-h))
    if name == "ipo":
        return ((w - ref_w) / len_w - (r - ref_r) / len_r - 1 / (2 * o["beta"])) ** 2
    if name == "simpo":
        return -torch.log(sigmoid(o["beta"] / len_w * w - o["beta"] / len_r * r - o["gamma"]))
    p_w, p_r = torch.exp(w / len_w), torch.exp(r / len_r)
    return -torch.log(sigmoid(torch.log((p_w / (1 - p_w)) / (p_r / (1 - p_r)))))


def naive_row(answer: Any, liked: bool, o: dict[str, float]) -> torch.Tensor:
    log_p, reference, _ = answer
    reward = log_p - reference
    if liked:
        return o["desirable_weight"] * (1 - sigmoid(o["beta"] * (reward - o["reference_point"])))
    return o["undesirable_weight"] * (1 - sigmoid(o["beta"] * (o["reference_point"] - reward)))


def naive_loss(name: str, model: Any, reference: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    log_probs, counts = answer_log_probs(model, batch)
    with torch.no_grad():
        references, _ = answer_log_probs(reference, batch)
    answers = list(zip(log_probs, references, counts, strict=True))
    if name == "kto":
        liked = [bool(value > 0) for value in batch["preference"]]
        values = [naive_row(answer, good, OPTIONS[name]) for answer, good in zip(answers, liked, strict=True)]
    else:
        values = [naive_pair(name, *answers[at : at + 2], OPTIONS[name]) for at in range(0, len(answers), 2)]
    return torch.stack(values).mean()


# ---- the models -----------------------------------------------------------------------------------------------------


def policy(internvl: Family, loss: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model to train in full and, where the loss wants one, its reference: other weights."""
    model = internvl.model(loss=loss).to(dtype)
    if any(name in WITH_REFERENCE for name in loss):
        model.set_reference(perturb(copy.deepcopy(model)))
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batch_for(name: str, internvl: Family, images: Sequence[int] = IMAGES[:3]) -> dict[str, torch.Tensor]:
    batch = pair_batch(internvl, images)
    if name == "kto":  # in any order
        batch["preference"] = torch.tensor([1.0, 1.0, -1.0] * len(images))[: len(batch["labels"])]
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_those_of_the_formula_on_full_logits(internvl: Family, name: str) -> None:
    batch = batch_for(name, internvl)
    model = policy(internvl, spec(name))
    reference = model.companions.get("reference", model)
    expected = naive_loss(name, model, reference, batch)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From hidden states on: inside, transformers computes its norms in float32."""
    monkeypatch.setattr("hfcustom.losses.chunked.CHUNK_ELEMENTS", 1)
    labels = torch.randint(0, 11, (4, 9)).masked_fill(torch.rand(4, 9) < 0.3, -100)
    preference = torch.tensor([1.0, 1.0, -1.0, 1.0] if name == "kto" else [1.0, -1.0, 1.0, -1.0])
    batch = {"labels": labels, "preference": preference, "reference_log_probs": -20 * torch.rand(4).double()}

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        head = torch.nn.Linear(5, 11, bias=False).double()
        del head.weight
        head.weight = weight
        model: Any = SimpleNamespace(loss_head=lambda: Head(head, head))
        context = LossContext(model, batch, labels, hidden, None, running=name)
        return find_loss(name).function(context, **OPTIONS[name])[0]

    hidden = torch.randn(4, 9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (hidden, torch.randn(11, 5, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples_hold(name: str) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(find_loss(name).function, globs=dict(vars(preference)))
    assert doctest.DocTestRunner().run(test).failed == 0 and test.examples


def test_trl_computes_the_same_where_it_has_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer.odds_ratio_loss
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer.cpo_loss
    log_probs, lengths = -10 * torch.rand(8), torch.tensor([3, 5, 1, 7, 2, 2, 9, 4])
    context: Any = SimpleNamespace(row_log_probs=log_probs, row_tokens=lengths, record=lambda *args: None)
    own = SimpleNamespace(
        beta=2.0, accelerator=SimpleNamespace(device="cpu"), alpha=0.0, loss_type="simpo", simpo_gamma=0.8, label_smoothing=0.0
    )  # fmt: skip
    means = log_probs / lengths
    theirs = -orpo(own, means[0::2], means[1::2])[0].sum() / own.beta
    torch.testing.assert_close(preference.orpo(context)[0], theirs)
    theirs = cpo(own, means[0::2], means[1::2])[0].sum()
    torch.testing.assert_close(preference.simpo(context, beta=2.0, gamma=0.8)[0], theirs)


# ---- cut, padded, packed --------------------------------------------------------------------------------------------


class KeepGradients:
    """An optimizer that only looks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.param_groups: list[Any] = []

    def step(self) -> None:
        self.gradients = gradients(self.model)

    def zero_grad(self) -> None:
        self.model.zero_grad()


CUTS = {"8x1": 8, "4x2": 4, "2x4": 2, "1x8": 1}


@pytest.mark.parametrize("name", [*NAMES, "cross_entropy and orpo"])
def test_however_a_step_is_cut_loss_gradient_and_metrics_are_the_same(
    internvl: Family, name: str, tmp_path: Path
) -> None:
    loss: dict[str, Any] = {"cross_entropy": 1.0, "orpo": 0.1} if " " in name else spec(name)
    config, accelerator = TrainConfig(output_dir=str(tmp_path), max_grad_norm=0.0), Accelerator()
    results = {}
    for label, size in CUTS.items():
        model = policy(internvl, loss)
        batches = [pair_batch(internvl, IMAGES[at : at + size], first=at) for at in range(0, 8, size)]
        looking: Any = KeepGradients(model)
        report = train_step(model, batches, looking, accelerator, config)
        losses = {key: float(value) for key, value in report.losses.items()}
        metrics = {key: value.tolist() for key, value in report.metrics.items()}
        results[label] = (losses, metrics, looking.gradients)
    losses, metrics, grads = results.pop("8x1")
    assert set(metrics) == {f"{term}_{kind}" for term in loss if term in NAMES for kind in ("margin", "accuracy")}
    assert all(count == (16 if name == "kto" else 8) for _, count in metrics.values())
    for label, (cut_losses, cut_metrics, cut_grads) in results.items():
        assert cut_losses == pytest.approx(losses, rel=1e-5), label
        for key, values in metrics.items():
            assert cut_metrics[key] == pytest.approx(values, rel=1e-4), label
        assert cut_grads.keys() == grads.keys()
        for key, grad in grads.items():
            atol = 1e-5 * float(grad.abs().max()) + 1e-7
            torch.testing.assert_close(cut_grads[key], grad, rtol=1e-3, atol=atol, msg=f"{label}: {key}")


@pytest.mark.parametrize("name", [*NAMES, "cross_entropy"])
def test_packed_rows_are_the_same_rows(internvl: Family, name: str) -> None:
    """One row of the tensor, positions that restart, no attention mask: transformers masks by blocks."""
    batch = batch_for(name, internvl)
    model = policy(internvl, spec(name) if name in NAMES else {name: 1.0})
    packed = unpadded(batch)
    assert len(packed["labels"]) == 1 and len(packed["preference"]) == len(batch["labels"])
    assert model.loss_counts([packed]) == model.loss_counts([batch])
    losses, grads = [], []
    for form in (batch, packed):
        model.zero_grad()
        loss = model(**form).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7, msg=key)


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_nothing_supervised_gives_zero(internvl: Family, name: str) -> None:
    batch, model = batch_for(name, internvl), policy(internvl, spec(name))
    batch["labels"][:] = -100
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_with_nothing_supervised_is_no_pair(internvl: Family, name: str) -> None:
    batch, model = batch_for(name, internvl), policy(internvl, spec(name))
    others = pair_batch(internvl, IMAGES[1:3], first=1)
    batch["labels"][:2] = -100
    assert model.loss_counts([batch]) == {name: 2}
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**others).loss, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.loss_metrics[f"{name}_margin"].tolist()[1] == 2


def test_half_a_pair_is_an_error(internvl: Family) -> None:
    batch, model = batch_for("dpo", internvl), policy(internvl, spec("dpo"))
    batch["labels"][3] = -100
    with pytest.raises(ValueError, match="Pair 1 of the batch has no supervised token in its rejected answer.*drop"):
        model(**batch)


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (None, r"The batch has no preference \(R,\).*Give rows with 'chosen' and 'rejected'"),
    "odd": ([1, -1, 1], r"The 3 rows of the batch have preference 1, -1, 1; pairs are 1, -1, 1, -1"),
    "not alternating": ([1, 1, -1, -1], r"The 4 rows of the batch have preference 1, 1, -1, -1; .*loss 'kto'"),
    "rejected first": ([-1, 1], r"The 2 rows of the batch have preference -1, 1; "),
    "too short": ([1, -1], r"The batch's preference is \(2,\) for 4 rows; .*Give rows with 'chosen'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_are_no_pairs_are_an_error(internvl: Family, wrong: str) -> None:
    preferences, message = WRONG[wrong]
    rows = 4 if wrong in ("missing", "too short") else len(preferences)
    batch = {"labels": torch.ones(rows, 5, dtype=torch.long)}
    if preferences is not None:
        batch["preference"] = torch.tensor(preferences, dtype=torch.float)
    with pytest.raises(ValueError, match=message):
        count_pairs(batch)


def test_kto_needs_a_preference_for_each_row(internvl: Family) -> None:
    batch, model = batch_for("kto", internvl), policy(internvl, spec("kto"))
    judged = batch.pop("preference")
    with pytest.raises(ValueError, match="The batch has no preference for 6 rows; .*'completion' and 'label'"):
        model(**batch)
    with pytest.raises(ValueError, match=r"The batch has a preference of \(4,\) for 6 rows"):
        model(**batch, preference=judged[:4])


BAD_OPTIONS = [
    ("dpo", {"beta": 0.0}, "'beta' of loss 'dpo' is 0.0; it must be above 0"),
    ("dpo", {"label_smoothing": 0.5}, r"'label_smoothing' of loss 'dpo' is 0.5; it must be in \[0, 0.5\)"),
    ("ipo", {"beta": -1.0}, "'beta' of loss 'ipo' is -1.0"),
    ("simpo", {"beta": 0.0}, "'beta' of loss 'simpo' is 0.0"),
    ("kto", {"beta": 0.0}, "'beta' of loss 'kto' is 0.0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_options_out_of_range_are_an_error(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_loss(name).function(SimpleNamespace(), **options)


@pytest.mark.parametrize("p", [1.0, 1 - 1e-7, 1e-30, 0.5])
def test_orpo_is_finite_for_sure_answers(p: float) -> None:
    log_probs = torch.tensor([math.log(p), -1.0], requires_grad=True)
    context: Any = SimpleNamespace(row_log_probs=log_probs, row_tokens=torch.tensor([1, 1]), record=lambda *args: None)
    total, _ = preference.orpo(context)
    total.backward()
    assert total.isfinite() and log_probs.grad is not None and log_probs.grad.isfinite().all()


def test_token_losses_beside_a_preference_see_chosen_answers_only(internvl: Family) -> None:
    """ORPO's total is {"cross_entropy": 1.0, "orpo": 0.1}."""
    batch = pair_batch(internvl, IMAGES[:3])
    model = policy(internvl, {"cross_entropy": 1.0, "orpo": 0.1})
    loss = model(**batch).loss
    chosen = {**batch, "labels": batch["labels"].clone()}
    chosen["labels"][1::2] = -100
    del chosen["preference"]
    imitation = internvl.model(loss="cross_entropy").train()(**chosen).loss
    alone = policy(internvl, {"orpo": 1.0})(**batch).loss
    torch.testing.assert_close(loss, imitation + 0.1 * alone)


# ---- numbers beside a loss ------------------------------------------------------------------------------------------


def test_margin_and_accuracy_are_recorded(internvl: Family) -> None:
    batch, model = batch_for("dpo", internvl), policy(internvl, {"dpo": {"beta": 0.3}})
    model(**batch)
    with torch.no_grad():
        (log_probs, _), (references, _) = (
            answer_log_probs(core, batch) for core in (model, model.companions["reference"])
        )
    rewards = [0.3 * float(log_p - reference) for log_p, reference in zip(log_probs, references, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert model.loss_metrics.keys() == {"dpo_margin", "dpo_accuracy"}
    assert model.loss_metrics["dpo_margin"].tolist() == pytest.approx([sum(margins), 3], rel=1e-4)
    assert model.loss_metrics["dpo_accuracy"].tolist() == [sum(margin > 0 for margin in margins), 3]
    assert not any(value.requires_grad for value in model.loss_metrics.values())


def test_a_term_of_ones_own_records_numbers(internvl: Family) -> None:
    @hfcustom.term(count="rows")
    def noted(context: hfcustom.LossContext) -> Any:
        context.record("length", context.row_tokens.sum(), context.num_rows)
        context.record("length", context.row_tokens.sum(), context.num_rows)
        return context.hidden_states.sum() * 0, context.num_rows

    model, batch = internvl.model(loss="noted").train(), internvl.batch([1, 0])
    model(**batch)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert {name: value.tolist() for name, value in model.loss_metrics.items()} == {"noted_length": [2 * tokens, 4]}


@pytest.mark.parametrize("taken", ["weighted", "other"])
def test_a_recorded_number_cannot_take_another_name(internvl: Family, taken: str) -> None:
    @hfcustom.term(count="rows")
    def noted(context: hfcustom.LossContext) -> Any:
        context.record(taken, context.hidden_states.sum(), 1)
        return context.hidden_states.sum() * 0, context.num_rows

    def noted_other(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]

    hfcustom.token_loss(noted_other)
    assert "noted_other" in LOSSES
    with pytest.raises(ValueError, match=f"cannot be named 'noted_{taken}', which the log has already"):
        internvl.model(loss="noted").train()(**internvl.batch([1]))
