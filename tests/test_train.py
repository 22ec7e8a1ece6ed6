"""fit(): however a step is cut the training is the same; rates, decay, clipping and precision are as asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from kinds import family_of_each_kind  # noqa: F401
from torch import nn
from training import (
    TERMS,
    add_dropout,
    curve,
    relative_distance,
    short_config,
    train,
    uneven_rows,
    user_losses,
    weights,
)

import hfcustom
from hfcustom.data.collate import Collator
from hfcustom.data.order import step_rows
from hfcustom.losses import NonFiniteError
from hfcustom.train import (
    choose_precision,
    make_accelerator,
    make_optimizer,
    set_lr,
    set_precision,
    split_batch,
    train_step,
)
from hfcustom.train_config import TrainConfig

CUTS = {"8x1": 8, "4x2": 4, "2x4": 2}
FEW_IMAGES = (1, 0, 0, 0, 1, 0, 0, 0)  # Aria's are 980 px


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with user_losses():
        yield


# ---- the cut of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "image_size", TERMS], ids=str)
def test_however_a_step_is_cut_the_training_is_the_same(internvl: Family, tmp_path: Path, loss: Any) -> None:
    histories, ends, start = {}, {}, weights(internvl.model(loss=loss))
    for cut, size in CUTS.items():
        model = internvl.model(loss=loss)
        histories[cut] = train(model, internvl, tmp_path / cut, micro_batch_size=size).history
        ends[cut] = weights(model)
    names = ["loss", "grad_norm", *(TERMS if loss is TERMS else [])]
    for cut in CUTS:
        for expected, found in zip(histories["8x1"], histories[cut], strict=True):
            assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5), cut
        assert relative_distance(ends[cut], ends["8x1"], start) < 1e-4, cut


def test_so_it_is_in_every_family(family: Family, tmp_path: Path) -> None:
    curves, ends, start = {}, {}, weights(family.model())
    for size in (8, 2):
        model = family.corrected()
        result = train(model, family, tmp_path / str(size), uneven_rows(FEW_IMAGES), micro_batch_size=size)
        curves[size], ends[size] = curve(result), weights(model)
    assert curves[2] == pytest.approx(curves[8], rel=1e-5)
    assert relative_distance(ends[2], ends[8], start) < 1e-4


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "margin", "image_size"])
def test_a_mean_of_micro_batch_means_would_be_another_loss(internvl: Family, tmp_path: Path, loss: str) -> None:
    rows, first = uneven_rows(), train(internvl.model(loss=loss), internvl, tmp_path, max_steps=1).history[0]
    model = internvl.model(loss=loss).train()
    order = step_rows(len(rows), 0, 8, seed=0)
    means = []
    for at in range(0, 8, 2):
        mean = model(**Collator(internvl.processor)([rows[index] for index in order[at : at + 2]])).loss / 4
        mean.backward()
        means.append(float(mean.detach()))
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert sum(means) != pytest.approx(first["loss"], rel=1e-5)
    assert float(norm) != pytest.approx(first["grad_norm"], rel=1e-3)


def one_step(model: nn.Module, batches: Sequence[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """Run train_step with plain SGD, under which weights move by the gradient itself."""
    config = short_config(folder, **{"max_grad_norm": 0, **options})
    model, optimizer = make_accelerator(config).prepare(model, torch.optim.SGD(model.parameters(), lr=config.lr))
    return train_step(model.train(), batches, optimizer, make_accelerator(config), config)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "stock"])
def test_a_micro_batch_without_supervision_adds_nothing(internvl: Family, tmp_path: Path, loss: str) -> None:
    batches = [internvl.batch([1, 0]), internvl.batch([2, 1])]
    silent = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    models = [internvl.model(loss=loss) for _ in range(2)]
    start = weights(models[0])
    alone, among = (
        one_step(m, b, tmp_path) for m, b in zip(models, (batches, [silent, *batches, silent]), strict=True)
    )
    assert float(among.losses[loss]) == pytest.approx(float(alone.losses[loss]), rel=1e-6)
    assert float(among.grad_norm) == pytest.approx(float(alone.grad_norm), rel=1e-5)
    assert relative_distance(weights(models[1]), weights(models[0]), start) < 1e-5


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", TERMS], ids=str)
def test_a_step_without_supervision_is_zero_and_moves_nothing(internvl: Family, tmp_path: Path, loss: Any) -> None:
    silent = internvl.batch([0, 0])
    silent["labels"] = torch.full_like(silent["labels"], -100)
    model = internvl.model(loss=loss)
    start = weights(model)
    report = one_step(model, [silent, silent], tmp_path)
    assert all(float(value) == 0.0 for value in report.losses.values()) and float(report.grad_norm) == 0.0
    assert all(torch.equal(start[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("processes", "options", "expected"),
    [(1, {}, (8, 1)), (1, {"micro_batch_size": 2}, (2, 4)), (4, {"micro_batch_size": 1}, (1, 2)), (2, {}, (4, 1))],
)
def test_a_batch_is_shared_out(processes: int, options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert split_batch(TrainConfig(batch_size=8, **options), processes) == expected


@pytest.mark.parametrize(
    ("processes", "batch_size", "micro", "message"),
    [
        (
            1,
            8,
            3,
            r"batch_size=8 rows cannot be shared by 1 processes in micro-batches of 3; choose a multiple of 3\.",
        ),
        (2, 8, 8, r"in micro-batches of 8; choose a multiple of 16\."),
        (3, 8, None, r"shared by 3 processes; choose a multiple of 3\."),
        (4, 2, None, r"shared by 4 processes; choose a multiple of 4\."),
    ],
)
def test_a_batch_that_cannot_be_shared_is_an_error(processes: int, batch_size: int, micro: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(TrainConfig(batch_size=batch_size, micro_batch_size=micro), processes)


# ---- learning rates, decay, clipping --------------------------------------------------------------------------------

COSINE = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))  # a quarter of the way, down to a tenth
SCHEDULES = [
    # schedule, step, share of the peak; warm-up of 4 steps, 12 in all
    ("cosine", 0, 0.25),
    ("linear", 2, 0.75),
    ("constant", 3, 1.0),
    ("cosine", 4, 1.0),
    ("cosine", 6, COSINE),
    ("cosine", 8, 0.55),
    ("cosine", 12, 0.1),
    ("linear", 4, 1.0),
    ("linear", 6, 0.775),
    ("linear", 12, 0.1),
    ("constant", 11, 1.0),
]


@pytest.mark.parametrize(("schedule", "step", "share"), SCHEDULES)
def test_the_learning_rate_of_a_step(schedule: Any, step: int, share: float) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "peak_lr": peak} for peak in (1e-3, 4e-3)]
    optimizer = torch.optim.AdamW(groups)
    set_lr(optimizer, step, 12, TrainConfig(schedule=schedule, warmup_steps=4, min_lr_ratio=0.1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * share, 4e-3 * share])


def test_fit_follows_the_schedule(internvl: Family, tmp_path: Path) -> None:
    options = {"max_steps": 4, "batch_size": 2, "lr": 1e-3, "warmup_steps": 2, "schedule": "linear", "min_lr_ratio": 0}
    result = train(internvl.model(), internvl, tmp_path, **options)
    assert curve(result, "lr") == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_rates_go_to_parts_and_decay_to_matrices(family: Family) -> None:
    model = family.model(connector={"name": "perceiver_resampler", "num_queries": 4, "num_heads": 4})
    config = TrainConfig(lr=1e-4, connector_lr=1e-3, vision_lr=1e-5, weight_decay=0.3)
    rates = {"vision": 1e-5, "connector": 1e-3, "new": 1e-3, "language": 1e-4, "head": 1e-4, "other": 1e-4}
    parts, seen = hfcustom.find_parts(model), {}
    for group in make_optimizer(model, config).param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            seen[name] = parameter
            assert group["lr"] == group["peak_lr"] == rates[parts.part_of(name)], name
            plain = parameter.ndim < 2 or "embed" in name
            assert group["weight_decay"] == (0.0 if plain else 0.3), name
    assert {id(p) for p in seen.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {parts.part_of(name) for name in seen} >= {*family.parts, "new"} - {"head"}  # which may be tied


def test_frozen_parameters_are_left_out(internvl: Family) -> None:
    model = internvl.model()
    hfcustom.freeze(model, ["vision", "language"])
    groups = make_optimizer(model, TrainConfig(weight_decay=0.0)).param_groups
    assert [group["part"] for group in groups] == ["connector", "head"]


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_a_rate_without_effect_is_an_error(internvl: Family, part: str) -> None:
    model = internvl.model()
    hfcustom.freeze(model, part)
    with pytest.raises(ValueError, match=f"{part}_lr=0.5 has no effect: no parameter of the {part} is trainable"):
        make_optimizer(model, TrainConfig(**{f"{part}_lr": 0.5}))


def test_a_connector_rate_is_for_new_modules_too(internvl: Family) -> None:
    model = internvl.model(connector={"name": "perceiver_resampler", "num_queries": 4, "num_heads": 4})
    hfcustom.freeze(model, "connector")
    rates = {group["part"]: group["lr"] for group in make_optimizer(model, TrainConfig(connector_lr=0.5)).param_groups}
    assert rates["new"] == 0.5 and "connector" not in rates


def test_nothing_trainable_is_an_error(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model().requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter is trainable: unfreeze a part, attach LoRA"):
        train(model, internvl, tmp_path)


@pytest.mark.parametrize("limit", [0.01, 0])
def test_clipping_takes_effect_and_the_norm_before_it_is_reported(
    internvl: Family, tmp_path: Path, limit: float
) -> None:
    model, batch = internvl.model(), internvl.batch([1, 0])
    start = weights(model)
    report = one_step(model, [batch], tmp_path, max_grad_norm=limit, lr=1.0)
    moved = torch.stack([(start[name] - value).norm() for name, value in weights(model).items()]).norm()
    assert float(report.grad_norm) > 1
    assert float(moved) == pytest.approx(limit or float(report.grad_norm), rel=1e-4)


# ---- precision and memory -------------------------------------------------------------------------------------------


def test_16_bit_weights_need_bf16(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model().to(torch.bfloat16)
    count = sum(1 for _ in model.parameters())
    with pytest.raises(ValueError, match=rf"{count} parameters are 16-bit .*\(model\..* first\).*precision='bf16'"):
        train(model, internvl, tmp_path, precision="fp32")


def test_precision_follows_the_weights_and_the_launcher(internvl: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    full, low = internvl.model(), internvl.model().to(torch.bfloat16)
    assert [choose_precision(model, TrainConfig()) for model in (full, low)] == ["fp32", "bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision(full, TrainConfig()) == "bf16"
    assert choose_precision(full, TrainConfig(precision="fp32")) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision='fp16'; fit.. trains in bf16 or fp32"):
        choose_precision(full, TrainConfig())


def test_one_process_can_train_in_one_precision_after_the_other(internvl: Family, tmp_path: Path) -> None:
    rows = uneven_rows(FEW_IMAGES)
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        model = internvl.model().to(dtype)
        train(model, internvl, tmp_path / str(number), rows)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_cannot_be_trained_is_named(internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no rows to train on"):
        train(internvl.model(), internvl, tmp_path, [])
    with pytest.raises(TypeError, match="load the InternVLForConditionalGeneration with its family's custom class"):
        train(internvl.model(internvl.stock_class), internvl, tmp_path)


def test_bf16_keeps_trained_weights_in_float32_and_frozen_ones_as_they_are(internvl: Family) -> None:
    model = internvl.model().to(torch.bfloat16)
    hfcustom.freeze(model, "vision")
    set_precision(model, TrainConfig(precision="bf16"))
    parts = hfcustom.find_parts(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parts.part_of(name) == "vision" else torch.float32), name


def test_bf16_trains_near_fp32(family: Family, tmp_path: Path) -> None:
    rows, answers = uneven_rows(FEW_IMAGES), []

    def evaluate(model: Any, step: int) -> dict[str, float]:
        inputs = {name: tensor for name, tensor in family.batch([0]).items() if name != "labels"}
        answers.append(model.generate(**inputs, max_new_tokens=2, do_sample=False))
        return {}

    exact = curve(train(family.model(), family, tmp_path / "fp32", rows))
    model = family.model()
    low = train(model, family, tmp_path / "bf16", rows, precision="bf16", evaluate=evaluate, eval_steps=3)
    assert curve(low) == pytest.approx(exact, rel=2e-2)
    assert curve(low) != exact
    assert len(answers) == 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(family: Family, tmp_path: Path) -> None:
    """With dropout, whose random numbers the second forward has to repeat."""
    results, ends, rows = [], [], uneven_rows(FEW_IMAGES)
    for recompute in (False, True):
        model = family.model()
        add_dropout(model, 0.2)
        options = {"gradient_checkpointing": recompute, "micro_batch_size": 4}
        results.append(train(model, family, tmp_path / str(recompute), rows, **options))
        ends.append(weights(model))
    assert curve(results[1]) == pytest.approx(curve(results[0]), rel=1e-6)
    assert curve(results[1], "grad_norm") == pytest.approx(curve(results[0], "grad_norm"), rel=1e-5)
    assert relative_distance(ends[1], ends[0], weights(family.model())) < 1e-4


def test_a_token_loss_finds_its_input_among_the_columns(internvl: Family, tmp_path: Path) -> None:
    """One number a label token, as the collator labels them."""

    @hfcustom.token_loss(inputs=("importance",))
    def important(logits: torch.Tensor, targets: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        return importance * nn.functional.cross_entropy(logits, targets, reduction="none")

    rows = uneven_rows()
    for row in rows:
        labels = Collator(internvl.processor)([row])["labels"]
        row["importance"] = [2.0] * int((labels != -100).sum())
    result = train(internvl.model(loss="important"), internvl, tmp_path / "important", rows, max_steps=1)
    plain = train(internvl.model(), internvl, tmp_path / "plain", rows, max_steps=1)
    assert curve(result) == pytest.approx([2 * value for value in curve(plain)], rel=1e-5)
    with pytest.raises(ValueError, match="Give the rows a column 'importance' with a number for each label token"):
        train(internvl.model(loss="important"), internvl, tmp_path / "without", max_steps=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("reaches_gradient", [True, False])
def test_a_loss_that_is_no_number_stops_before_the_step(
    internvl: Family, tmp_path: Path, bad: float, reaches_gradient: bool
) -> None:
    steps: list[int] = []

    @hfcustom.token_loss
    def breaks(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        values = logits.logsumexp(-1)
        return values if not steps else values * bad if reaches_gradient else values + bad

    def evaluate(model: Any, step: int) -> dict[str, float]:
        steps.append(step)
        return {}

    once, model = internvl.model(loss="breaks"), internvl.model(loss={"cross_entropy": 1.0, "breaks": 1e-3})
    once.config.loss = model.config.loss
    train(once, internvl, tmp_path / "once", max_steps=1, schedule="constant")
    told = rf"'cross_entropy': \d.*'breaks': {bad}.*the step was not applied. Look at row \d"
    with pytest.raises(NonFiniteError, match=told):
        train(model, internvl, tmp_path / "broken", schedule="constant", evaluate=evaluate, eval_steps=1)
    assert steps == [1]
    assert all(torch.equal(weights(once)[name], value) for name, value in weights(model).items())


def test_the_rows_are_named_where_a_loss_is_no_number_from_the_first_step_on(internvl: Family, tmp_path: Path) -> None:
    @hfcustom.token_loss
    def never_finite(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.logsumexp(-1) * math.nan

    told = r"'never_finite' returned nan .*Clamp what can overflow\. The step was not applied\. Look at row \d\. There is no"
    with pytest.raises(NonFiniteError, match=told):
        train(internvl.model(loss="never_finite"), internvl, tmp_path, micro_batch_size=1)


def test_the_rows_of_a_micro_batch_that_is_no_number_are_named(internvl: Family, tmp_path: Path) -> None:
    rows = [{**row, "scale": 1.0} for row in uneven_rows()]
    rows[5]["scale"] = math.nan

    @hfcustom.term(count="rows", columns=("scale",))
    def scaled(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
        return (context.row_log_probs * context.batch["scale"]).sum(), context.num_rows

    with pytest.raises(NonFiniteError, match=r"Look at row 5\. There is no checkpoint yet"):
        train(internvl.model(loss="scaled"), internvl, tmp_path, rows, micro_batch_size=1)


def test_a_forward_that_computes_its_own_loss_is_told(internvl: Family, tmp_path: Path) -> None:
    @hfcustom.register(model_type="forward_with_a_loss")
    class OwnLoss(internvl.model_class):  # type: ignore[misc, name-defined]
        def forward(self, *args: Any, labels: Any = None, loss_divisors: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.loss = outputs.logits.square().mean()
            return outputs

    with pytest.raises(ValueError, match=r"OwnLoss.forward computed its loss without .*super\(\).forward\(labels="):
        train(internvl.model(OwnLoss), internvl, tmp_path)


WRONG_ARGUMENTS = {
    "a class that is not registered": ({}, "is not registered: what it saves would load as CustomInternVL"),
    "schedule": ({"schedule": "cosin"}, "schedule='cosin'.*'cosine', 'linear' or 'constant'"),
    "precision": ({"precision": "fp16"}, "precision='fp16'.*'fp32' or 'bf16'"),
    "a number in quotes": ({"lr": [1e-4]}, "lr=.0.0001.*number"),
    "both": ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    "no evaluate": ({"eval_steps": 2}, "eval_steps=2 and evaluate=None have an effect only together"),
    "no steps": ({"evaluate": lambda model, step: {}}, "eval_steps=None and evaluate=.* only together"),
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_arguments_without_effect_or_sense_are_errors(wrong: str, internvl: Family, tmp_path: Path) -> None:
    options, message = WRONG_ARGUMENTS[wrong]
    bare = type("Bare", (internvl.model_class,), {"__module__": __name__})
    model = internvl.model(None if options else bare)
    with pytest.raises(ValueError, match=message):
        train(model, internvl, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", ["rows.jsonl", iter([])], ids=["path", "iterator"])
def test_rows_that_are_no_sequence_are_told(rows: Any, internvl: Family, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rows is a .*pass hfcustom.load_rows"):
        train(internvl.model(), internvl, tmp_path, rows)
