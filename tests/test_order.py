"""Which rows a step sees: the same ones however the step is cut, and every row once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hfcustom.data.collate import Batch
from hfcustom.data.order import epoch_order, step_loader, step_rows
from hfcustom.data.steps import StepCollator

NUM_ROWS, BATCH, STEPS = 20, 8, 6
CUTS = {  # micro-batch size, micro-batches a step, ranks: 8 rows a step each
    "8x1": (8, 1, 1),
    "4x2": (4, 2, 1),
    "1x8": (1, 8, 1),
    "2 ranks": (4, 1, 2),
    "2 ranks, accumulating": (2, 2, 2),
    "8 ranks": (1, 1, 8),
}


def as_tensor(rows: Sequence[int]) -> Batch:
    return Batch(rows=torch.tensor(rows))


def seen(
    cut: str = "8x1", *, rows: Any = range(NUM_ROWS), steps: range = range(STEPS), seed: int = 0, num_workers: int = 0
) -> list[list[list[int]]]:
    """Return the rows of each micro-batch of each step, those of every rank in the order that a step counts them."""
    size, accumulation, world_size = CUTS[cut]
    ranks = [
        list(
            step_loader(
                rows,
                StepCollator(as_tensor, size),
                steps=steps,
                micro_batch_size=size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                seed=seed,
                num_workers=num_workers,
            )
        )
        for rank in range(world_size)
    ]
    assert {len(found) for found in ranks} == {len(steps)}
    assert {len(step.batches) for found in ranks for step in found} == {accumulation}
    return [
        [
            ranks[rank][step].batches[micro]["rows"].tolist()
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        for step in range(len(steps))
    ]


def flat(steps: list[list[list[int]]]) -> list[list[int]]:
    return [[row for micro_batch in step for row in micro_batch] for step in steps]


def test_every_row_is_seen_once_an_epoch_and_epochs_differ() -> None:
    stream = [row for step in flat(seen(steps=range(5))) for row in step]  # 40 rows: two epochs
    epochs = stream[:NUM_ROWS], stream[NUM_ROWS:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_ROWS))] * 2
    assert epochs[0] != epochs[1] != list(range(NUM_ROWS))


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_has_the_same_rows_however_it_is_cut(cut: str) -> None:
    steps = seen(cut)
    assert flat(steps) == flat(seen("8x1"))
    assert {len(micro_batch) for step in steps for micro_batch in step} == {CUTS[cut][0]}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("resumed_at", [1, 3, 5])
def test_a_resumed_run_sees_the_rows_that_were_left(cut: str, resumed_at: int) -> None:
    assert seen(cut, steps=range(resumed_at, STEPS)) == seen(cut)[resumed_at:]


def test_another_number_of_processes_may_resume() -> None:
    assert flat(seen("2 ranks", steps=range(3, STEPS))) == flat(seen("1x8"))[3:]


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_fewer_rows_than_a_step_are_repeated_epoch_by_epoch(num_rows: int) -> None:
    stream = [row for step in flat(seen(rows=range(num_rows))) for row in step]
    assert len(stream) == BATCH * STEPS
    whole = len(stream) // num_rows * num_rows
    for first in range(0, whole, num_rows):
        assert sorted(stream[first : first + num_rows]) == list(range(num_rows))
    assert max(Counter(stream).values()) - min(Counter(stream).values()) <= 1


@pytest.mark.parametrize("cut", ["8x1", "2 ranks, accumulating"])
def test_loading_processes_change_nothing(cut: str) -> None:
    assert seen(cut, num_workers=2) == seen(cut)


def test_seeds_differ_and_a_seed_repeats() -> None:
    orders = {seed: tuple(map(tuple, flat(seen(seed=seed)))) for seed in range(5)}
    assert len(set(orders.values())) == 5
    assert tuple(map(tuple, flat(seen(seed=3)))) == orders[3]


def test_the_next_seed_is_not_the_next_epoch() -> None:
    assert epoch_order(NUM_ROWS, 1, 0) != epoch_order(NUM_ROWS, 0, 1)


def test_training_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = seen()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert seen() == first


def test_a_step_crosses_epochs_without_a_short_batch() -> None:
    assert [len(step_rows(5, step, 3, seed=0)) for step in range(4)] == [3] * 4
    assert sorted(step_rows(5, 0, 3, 0) + step_rows(5, 1, 3, 0)[:2]) == list(range(5))
