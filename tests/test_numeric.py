"""Losses that know what numbers mean: digits against a loop, boxes against one box at a time, and what a box is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from loss_cases import batch_of, model_of
from peft import LoraConfig, get_peft_model

from hfcustom.losses import IGNORE, find_loss
from hfcustom.losses.numeric import box_distances, count_boxes, find_boxes, generalised_iou

digit_distance = find_loss("digit_distance").function


# ---- digits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["mse", "wasserstein"])
def test_digit_distance_equals_a_loop(metric: str) -> None:
    ids = [7, 3, 11, 0, 5, 2, 9, 14, 6, 1]  # of "0" to "9", in a tokenizer that puts them anywhere
    logits, targets = torch.randn(15, 15), torch.arange(15)
    values = digit_distance(logits, targets, digit_ids=ids, metric=metric)
    for row, target, value in zip(logits, targets.tolist(), values.tolist(), strict=True):
        expected = 0.0
        if target in ids:
            chances, said = row[ids].softmax(-1).tolist(), ids.index(target)
            mean = sum(chance * at for at, chance in enumerate(chances))
            distance = sum(chance * abs(said - at) for at, chance in enumerate(chances))
            expected = distance if metric == "wasserstein" else (said - mean) ** 2
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_digit_nearby_costs_less_and_words_cost_nothing() -> None:
    logits = torch.eye(12)[[3, 4, 9, 11]] * 20.0
    logits.requires_grad_(True)
    near = digit_distance(logits, torch.tensor([3, 3, 3, 11]), digit_ids=list(range(10)))
    torch.testing.assert_close(near, torch.tensor([0.0, 1.0, 6.0, 0.0]), rtol=1e-5, atol=1e-5)
    (slopes,) = torch.autograd.grad(near.sum(), logits)
    assert not slopes[3].any()


WRONG_DIGITS: list[tuple[dict[str, Any], str]] = [
    (
        {"digit_ids": [1, 2], "metric": "l1"},
        "Unknown metric of loss 'digit_distance': 'l1'.*Allowed: mse, wasserstein",
    ),
    (
        {"digit_ids": [1, 1]},
        r"digit_ids of loss 'digit_distance' is \[1, 1\]; it must be two or more different ids from 0 to 8",
    ),
    ({"digit_ids": [1, 9]}, r"is \[1, 9\].*convert_tokens_to_ids"),
    ({"digit_ids": "0123456789"}, "is '0123456789'; it must be two or more"),
    ({"digit_ids": [[1], [2]]}, r"is \[\[1\], \[2\]\]; it must be two or more"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_DIGITS, ids=lambda value: str(value)[:40])
def test_wrong_digits_are_told_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digit_distance(torch.randn(2, 9), torch.tensor([0, 1]), **options)


# ---- what a box is --------------------------------------------------------------------------------------------------

FIRST, NUM = 100, 11  # ids 100 to 110 mean 0.0, 0.1, ... 1.0
X = IGNORE


def boxes_of(labels: list[list[int]], **batch: torch.Tensor) -> list[list[int]]:
    """Return the boxes' tokens."""
    table = torch.tensor(labels)
    found = find_boxes({"labels": table, **batch}, FIRST, NUM)
    return table[:, 1:].flatten()[found].tolist()


def test_four_coordinates_in_succession_are_a_box() -> None:
    one, two = [100, 101, 105, 110], [102, 102, 103, 104]
    assert boxes_of([[X, 7, *one, 7, *two]]) == [one, two]
    assert boxes_of([[X, *one, *two]]) == [one, two]
    assert boxes_of([[X, *one, 103, 104, 105, 7, 100, 101]]) == [one]  # tails of one to three tokens are no box
    assert boxes_of([[X, 100, 101, 105, 7, 110]]) == []
    assert boxes_of([[X, 99, 100, 101, 105, 111, 110]]) == []  # 99 and 111 lie outside
    assert boxes_of([[X, X, X], [X, 1, 2]]) == []


def test_a_box_does_not_reach_over_what_is_ignored_or_into_another_row() -> None:
    assert boxes_of([[X, 100, 101, X, 105, 110]]) == []
    assert boxes_of([[X, 7, 100, 101], [X, 105, 110, 7]]) == []
    assert boxes_of([[X, 7, 100, 101], [102, 105, 110, 7]]) == []
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert boxes_of([[X, 100, 101, 105, 110, 7]], position_ids=packed) == []
    assert boxes_of([[100, 101, 102, 105, 110, 7]]) == [[101, 102, 105, 110]]  # nothing predicts the first token


def test_answers_that_are_disliked_teach_no_boxes() -> None:
    labels = [[X, 100, 101, 105, 110], [X, 102, 103, 104, 105]]
    assert boxes_of(labels, preference=torch.tensor([1, -1])) == [[100, 101, 105, 110]]


# ---- the distance of boxes ------------------------------------------------------------------------------------------


def naive_giou(first: list[float], second: list[float]) -> float:
    (a, b, c, d), (e, f, g, h) = first, second
    overlap = max(min(c, g) - max(a, e), 0.0) * max(min(d, h) - max(b, f), 0.0)
    union = (c - a) * (d - b) + (g - e) * (h - f) - overlap
    hull = (max(c, g) - min(a, e)) * (max(d, h) - min(b, f))
    return overlap / union - (hull - union) / hull


def random_boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2).sort(1).values  # (N, 2 corners, 2)
    return corners.flatten(1)


def test_generalised_iou_equals_one_box_at_a_time() -> None:
    first, second = random_boxes(50), random_boxes(50)
    expected = [naive_giou(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert generalised_iou(first, second).tolist() == pytest.approx(expected, abs=1e-4)
    assert generalised_iou(first, first).tolist() == pytest.approx([1.0] * 50, abs=1e-4)
    yxyx = [1, 0, 3, 2]
    torch.testing.assert_close(generalised_iou(first[:, yxyx], second[:, yxyx]), generalised_iou(first, second))


DEGENERATE = {
    "a point": [0.5, 0.5, 0.5, 0.5],
    "a line": [0.2, 0.5, 0.8, 0.5],
    "another line": [0.5, 0.2, 0.5, 0.8],
    "swapped corners": [0.8, 0.8, 0.2, 0.2],
    "half swapped": [0.2, 0.8, 0.8, 0.2],
    "everything": [0.0, 0.0, 1.0, 1.0],
}


@pytest.mark.parametrize("predicted", DEGENERATE)
@pytest.mark.parametrize("target", DEGENERATE)
def test_degenerate_boxes_have_finite_values_and_gradients(predicted: str, target: str) -> None:
    boxes = torch.tensor([DEGENERATE[predicted]], requires_grad=True)
    values = box_distances(boxes, torch.tensor([DEGENERATE[target]]), 5.0, 2.0)
    (slopes,) = torch.autograd.grad(values.sum(), boxes)
    assert 0 <= float(values.detach()) <= 5 * 4 + 2 * 2
    assert slopes.isfinite().all() and float(slopes.abs().max()) < 100


def test_swapped_corners_are_the_same_rectangle_but_not_the_same_numbers() -> None:
    box, swapped = torch.tensor([[0.2, 0.2, 0.8, 0.8]]), torch.tensor([[0.8, 0.8, 0.2, 0.2]])
    assert float(generalised_iou(box, swapped)) == pytest.approx(1.0)
    assert float(box_distances(box, swapped, 5.0, 2.0)) == pytest.approx(5 * 4 * 0.6)


def test_boxes_have_the_gradient_of_their_distance() -> None:
    predicted, target = random_boxes(8).double().requires_grad_(True), random_boxes(8).double()
    assert torch.autograd.gradcheck(lambda x: box_distances(x, target, 5.0, 2.0), predicted)


# ---- in a model -----------------------------------------------------------------------------------------------------


def naive_box(model: Any, batch: dict[str, torch.Tensor], first: int, num: int) -> torch.Tensor:
    """Return the mean distance of the boxes, from full logits, token by token."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "token_weights")}
    logits = model(**inputs, use_cache=False).logits  # (B, T, V)
    expected, said = [], []
    for row, labels in enumerate(batch["labels"].tolist()):
        run: list[int] = []
        for at in range(1, len(labels) + 1):
            if at < len(labels) and first <= labels[at] < first + num:
                run.append(at)
                continue
            for start in range(0, len(run) - len(run) % 4, 4):
                places = run[start : start + 4]
                chances = torch.stack([logits[row, place - 1, first : first + num] for place in places]).softmax(-1)
                expected.append(chances @ torch.linspace(0, 1, num))
                said.append([(labels[place] - first) / (num - 1) for place in places])
            run = []
    ious = [naive_giou(_sorted(a), _sorted(b)) for a, b in zip(torch.stack(expected).tolist(), said, strict=True)]
    distances = (torch.stack(expected) - torch.tensor(said)).abs().sum(-1)
    gious = generalised_iou(torch.stack(expected), torch.tensor(said))
    assert gious.tolist() == pytest.approx(ious, abs=1e-3)
    return (5 * distances + 2 * (1 - gious)).mean()


def _sorted(box: list[float]) -> list[float]:
    (a, c), (b, d) = sorted(box[::2]), sorted(box[1::2])
    return [a, b, c, d]


def coordinates(family: Family) -> dict[str, int]:
    return find_loss("box").example_options(family.processor)


def test_box_in_training_equals_full_logits(family: Family) -> None:
    batch, options = family.batch([1, 0]), coordinates(family)
    model, reference = model_of("box", family).train(), family.model().train()
    loss = model(**batch).loss
    assert model.loss_values["box"].count == count_boxes(batch, **options) >= 4
    expected = naive_box(reference, batch, options["first_id"], options["num_ids"])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6, msg=key)


def test_disliked_answers_are_left_out_where_they_stand_among_others(internvl: Family) -> None:
    batch = internvl.batch([1, 0, 1])
    alone = model_of("box", internvl)(
        **{key: value[1:2] for key, value in batch.items() if key != "pixel_values"}
    ).loss
    batch["preference"] = torch.tensor([-1, 1, -1])
    torch.testing.assert_close(model_of("box", internvl)(**batch).loss, alone)


def test_the_examples_of_ids_occur_in_every_family(family: Family) -> None:
    """Else the tests that enumerate losses would compare zeros."""
    for name in ("box", "digit_distance"):
        assert float(model_of(name, family)(**batch_of(name, family, [0, 1])).loss.detach()) > 0.01, name


WRONG_BOXES: list[tuple[dict[str, Any], str]] = [
    ({"first_id": -1}, "first_id of loss 'box' is -1; it must be a whole number from 0"),
    ({"num_ids": 1}, "num_ids of loss 'box' is 1; it must be a whole number from 2"),
    ({"num_ids": 10**6}, r"num_ids of loss 'box' is 1000000; it must be a whole number from 2 to \d+"),
    ({"giou_weight": -2.0}, "giou_weight of loss 'box' is -2.0; it must be a finite number from 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_BOXES, ids=str)
def test_wrong_coordinates_are_told_what_is_allowed(internvl: Family, options: dict[str, Any], message: str) -> None:
    model = internvl.model(loss={"box": {**coordinates(internvl), **options}})
    with pytest.raises(ValueError, match=message):
        model(**internvl.batch([0]))


# ---- a few logits of any head ---------------------------------------------------------------------------------------


def test_a_head_that_is_no_plain_linear_gives_its_few_logits_in_chunks(internvl: Family, monkeypatch: Any) -> None:
    monkeypatch.setattr("hfcustom.losses.chunked.CHUNK_ELEMENTS", 1)  # chunks of 16 tokens
    batch, rows = internvl.batch([1, 0, 0]), list[int]()
    adapted = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    models = [get_peft_model(model_of("box", internvl), adapted) for _ in range(2)]
    for model in models:
        torch.manual_seed(3)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    options = coordinates(internvl)
    head = models[0].get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    loss = models[0](**batch).loss
    loss.backward()
    assert max(rows) == 16 and sum(rows) >= 2 * 30, "the chunks are computed again in the backward pass"
    expected = naive_box(models[1].get_base_model(), batch, options["first_id"], options["num_ids"])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (key, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6, msg=key)
