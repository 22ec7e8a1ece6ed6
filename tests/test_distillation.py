"""Distillation: divergences are what they are called, zero at the teacher, finite at its zeros, and a cache is enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401

from hfcustom.losses import LOSSES, Teacher, find_loss

SHIPPED = sorted(name for name, loss in LOSSES.items() if loss.inputs == ("teacher",))
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "alpha_distillation": [{"alpha": alpha} for alpha in (-1.0, 0.0, 1e-6, 0.3, 0.5, 0.999999, 1.0, 2.0)],
    "jsd_distillation": [{"beta": beta} for beta in (0.1, 0.5, 0.9)],
    "topk_distillation": [{"k": k} for k in (1, 5, 8)],
}
CASES = [(name, options) for name in SHIPPED for options in OPTIONS.get(name, [{}])]
EACH_CASE = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
M, V = 7, 9
TARGETS = torch.zeros(M, dtype=torch.long)


def value_of(name: str, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
    return find_loss(name).function(student, TARGETS, Teacher(V, logits=teacher), **options)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of the softmax of two logits, by torch's own class."""
    first, second = (torch.distributions.Categorical(logits=logits) for logits in (p, q))
    return torch.distributions.kl_divergence(first, second)


@EACH_CASE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_zero_at_the_teacher_and_positive_elsewhere(name: str, options: Any, temperature: float) -> None:
    teacher = 3 * torch.randn(M, V)
    same = value_of(name, teacher + 5.0, teacher, temperature=temperature, **options)  # a shift changes no softmax
    assert float(same.abs().max()) < 1e-5
    assert (value_of(name, torch.randn(M, V), teacher, temperature=temperature, **options) > 1e-4).all()


@EACH_CASE
def test_the_gradient_is_right_and_zero_at_the_teacher(name: str, options: Any) -> None:
    student = torch.randn(M, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(M, V, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: value_of(name, x, teacher, temperature=2.0, **options), student)
    (slopes,) = torch.autograd.grad(value_of(name, student, student.detach(), **options).sum(), student)
    assert float(slopes.abs().max()) < 1e-6


FINITE_AT_ZERO = [case for case in CASES if case != ("alpha_distillation", {"alpha": -1.0})]  # truly infinite


@pytest.mark.parametrize(("name", "options"), FINITE_AT_ZERO, ids=str)
def test_tokens_that_the_teacher_rules_out_give_no_nan(name: str, options: Any) -> None:
    student, teacher = torch.randn(M, V), torch.randn(M, V)
    teacher[:, 2:5] = -torch.inf
    student[0, 2:5] = -torch.inf  # both
    student[1, 2] = -300.0
    student.requires_grad_(True)
    values = value_of(name, student, teacher, **options)
    (slopes,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all() and slopes.isfinite().all()
    if name == "topk_distillation":
        return  # its k may reach into what is ruled out
    possible = [0, 1, 5, 6, 7, 8]
    teacher_of_the_rest = Teacher(len(possible), logits=teacher[:1, possible])
    rest = find_loss(name).function(student[:1, possible], TARGETS[:1], teacher_of_the_rest, **options)
    torch.testing.assert_close(values[:1], rest, rtol=1e-4, atol=1e-6)  # what both rule out counts for nothing


def test_forward_and_reverse_kl_are_torchs_own() -> None:
    student, teacher = torch.randn(M, V), torch.randn(M, V)
    torch.testing.assert_close(value_of("kl_distillation", student, teacher), kl(teacher, student))
    torch.testing.assert_close(value_of("reverse_kl", student, teacher), kl(student, teacher))
    expected = 9 * kl(teacher / 3, student / 3)
    torch.testing.assert_close(value_of("kl_distillation", student, teacher, temperature=3.0), expected)


@pytest.mark.parametrize("near", [0.0, 1e-7, -1e-7, 1e-4])
def test_alpha_runs_from_reverse_to_forward_kl_without_a_jump(near: float) -> None:
    student, teacher = torch.randn(M, V), torch.randn(M, V)
    forward, reverse = kl(teacher, student), kl(student, teacher)
    exact = {"rtol": 0.0, "atol": 0.0} if near == 0.0 else {"rtol": 1e-3, "atol": 1e-5}
    forward_of_ours, reverse_of_ours = (value_of(name, student, teacher) for name in ("kl_distillation", "reverse_kl"))
    torch.testing.assert_close(
        value_of("alpha_distillation", student, teacher, alpha=1 + near), forward_of_ours, **exact
    )
    torch.testing.assert_close(value_of("alpha_distillation", student, teacher, alpha=near), reverse_of_ours, **exact)
    torch.testing.assert_close((forward_of_ours, reverse_of_ours), (forward, reverse))


@pytest.mark.parametrize("alpha", [-0.7, 0.2, 0.5, 0.8, 1.5, 2.0])
def test_alpha_equals_its_formula(alpha: float) -> None:
    student, teacher = torch.randn(M, V, dtype=torch.float64), torch.randn(M, V, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))
    torch.testing.assert_close(value_of("alpha_distillation", student, teacher, alpha=alpha), expected)


@pytest.mark.parametrize("beta", [1e-4, 0.5, 1 - 1e-4])
def test_jsd_is_bounded_and_goes_as_the_two_kl_at_its_ends(beta: float) -> None:
    student, teacher = torch.randn(M, V, dtype=torch.float64), torch.randn(M, V, dtype=torch.float64)
    value = value_of("jsd_distillation", student, teacher, beta=beta)
    if beta == 0.5:
        apart = value_of("jsd_distillation", 100 * student, -100 * student, beta=beta)
        assert float(apart.max()) <= torch.tensor(2.0).log().item() + 1e-6
        torch.testing.assert_close(value, value_of("jsd_distillation", teacher, student, beta=beta))
        return
    limit = kl(teacher, student) * beta if beta < 0.5 else kl(student, teacher) * (1 - beta)
    torch.testing.assert_close(value, limit, rtol=1e-2, atol=0.0)


def test_topk_grows_with_k_to_the_whole_kl() -> None:
    student, teacher = torch.randn(M, V), torch.randn(M, V)
    values = torch.stack([value_of("topk_distillation", student, teacher, k=k) for k in range(1, V)])  # (V-1, M)
    assert (values.diff(dim=0) > -1e-6).all()
    torch.testing.assert_close(values[-1], value_of("kl_distillation", student, teacher), rtol=1e-4, atol=1e-5)


def test_topk_makes_the_same_of_a_cache() -> None:
    student, teacher = torch.randn(M, V), Teacher(V, logits=torch.randn(M, V))
    ids, log_probs = teacher.top(5)
    cache = Teacher(V, ids=ids, top_log_probs=log_probs)
    loss = find_loss("topk_distillation").function
    for k in (2, 5):
        torch.testing.assert_close(loss(student, TARGETS, cache, k=k), loss(student, TARGETS, teacher, k=k))
    with pytest.raises(ValueError, match="cache holds the teacher's 5 likeliest tokens at temperature 1; k=6"):
        loss(student, TARGETS, cache, k=6)
    with pytest.raises(ValueError, match="its whole distribution: use topk_distillation"):
        find_loss("kl_distillation").function(student, TARGETS, cache)


# ---- in a model -----------------------------------------------------------------------------------------------------


def test_a_cached_teacher_trains_as_the_one_that_runs_along(family: Family) -> None:
    batch, k = family.batch([1, 0]), 4
    teacher = family.model(seed=1)
    with torch.no_grad():
        log_probs = teacher(**batch, return_logits=True).logits.float().log_softmax(-1)  # (B, T, V)
    top = log_probs.topk(k, -1)
    after = {
        "teacher_ids": top.indices.roll(1, 1),
        "teacher_log_probs": top.values.roll(1, 1),
    }  # token t is said at t - 1
    losses = []
    for columns in ({}, after):
        model = family.model(loss={"topk_distillation": {"k": k}}).train()
        if not columns:
            model.set_teacher(teacher)
        loss = model(**batch, **columns).loss
        loss.backward()
        losses.append((loss.detach(), model.get_output_embeddings().weight.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_error_says_how_to_get_one(internvl: Family) -> None:
    model = internvl.model(loss="kl_distillation").train()
    with pytest.raises(ValueError, match="needs a teacher.*Call model.set_teacher"):
        model(**internvl.batch([1]))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(internvl: Family, name: str) -> None:
    model = internvl.model(loss=name).train()
    model.set_teacher(internvl.model())
    loss = model(**internvl.batch([1, 0])).loss
    assert abs(float(loss.detach())) < 1e-6


# ---- options --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("alpha_distillation", {"alpha": float("inf")}, "alpha of loss 'alpha_distillation' is inf; it must be a finite"),
    (
        "jsd_distillation",
        {"beta": 1},
        "beta of loss 'jsd_distillation' is 1; it must be between 0 and 1; for the limits",
    ),
    ("jsd_distillation", {"beta": -0.1}, "beta of loss 'jsd_distillation' is -0.1; it must be .* from 0 to 1"),
    ("kl_distillation", {"temperature": 0.0}, "temperature of loss 'kl_distillation' is 0.0; it must be above 0"),
    ("reverse_kl", {"temperature": "hot"}, "temperature of loss 'reverse_kl' is 'hot'; it must be a finite number"),
    ("topk_distillation", {"k": 0}, "k of loss 'topk_distillation' is 0; it must be a whole number from 1 to 8"),
    ("topk_distillation", {"k": V}, "k of loss 'topk_distillation' is 9; it must be a whole number from 1 to 8"),
    ("topk_distillation", {"k": 2.0}, "k of loss 'topk_distillation' is 2.0; it must be a whole number"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_told_what_is_allowed(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value_of(name, torch.randn(M, V), torch.randn(M, V), **options)
