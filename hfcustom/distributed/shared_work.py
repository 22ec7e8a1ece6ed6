"""over_ranks(): what is to be done for each of some items, evaluation above all, shared out over the processes of a job.

items -> [work(item) for item in items], in order, on every rank; each item is worked on by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from accelerate.utils import gather_object
from rich.progress import track

from hfcustom.console import out
from hfcustom.distributed.ranks import process_state

Item = TypeVar("Item")
Result = TypeVar("Result")
EVALUATING: ContextVar[bool] = ContextVar("hfcustom is evaluating on all ranks", default=False)


@contextmanager
def evaluating() -> Iterator[None]:
    """Within, all ranks are known to evaluate the same rows, so that generate_answers and retrieval_recall share them."""
    token = EVALUATING.set(True)
    try:
        yield
    finally:
        EVALUATING.reset(token)


def over_ranks(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    kinds: Sequence[Hashable] | None = None,
    share: bool | None = None,
    title: str = "",
) -> list[Result]:
    """Return [work(item) for item in items], each item worked on by one process and all results given to each, in order.

    All processes have to call it, with the same items, and results must be picklable. Where FSDP shards the model, all have to
    run the same modules equally often: items of one of the `kinds` (text alone, images) take their turns together, and a process
    that has none left does one once more. `share`: whether to share at all; by default in the `evaluate` of fit(), not outside of it.
    """
    state = process_state()
    if state.num_processes == 1 or not (EVALUATING.get() if share is None else share):
        return [work(item) for item in _shown(items, title)]
    rank, ranks, own = state.process_index, state.num_processes, {}
    for places in _shown(_turns(kinds or [0] * len(items), ranks), title):
        if rank < len(places):
            own[places[rank]] = work(items[places[rank]])
        elif state.distributed_type == "FSDP":
            work(items[places[0]])
    found = dict(gather_object(list(own.items())))
    return [found[at] for at in range(len(items))]


def _turns(kinds: Sequence[Hashable], ranks: int) -> list[list[int]]:
    """Return which places are worked on at the same time: as many of one kind as there are ranks, or what is left of it."""
    turns: list[list[int]] = []
    for kind in dict.fromkeys(kinds):
        places = [at for at, own in enumerate(kinds) if own == kind]
        turns += [places[start : start + ranks] for start in range(0, len(places), ranks)]
    return turns


def _shown(items: Sequence[Item], title: str) -> Iterator[Item]:
    silent = not title or not out.is_terminal
    yield from track(items, title, console=out, transient=True, disable=silent)
