"""The runs of tests/test_distributed.py: the test calls them in its own process, torchrun in two.

    torchrun --nproc_per_node 2 tests/distributed_run.py FOLDER

Every rank writes what it ended with to FOLDER/<case>/rank-<rank>.pt.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import KINDS, Family, picture
from encoder_cases import WORDS, encoders
from full_memory import Where, room_for
from loss_cases import batch_of, cut, family_of, model_of
from loss_cases import gradients as gradients_of
from torch import distributed, nn
from training import ANSWER_WORDS, IMAGES, TERMS, add_dropout, short_config, uneven_rows, user_losses, weights

import hfcustom
from hfcustom import commit, train
from hfcustom.data.order import step_rows
from hfcustom.families import load_family
from hfcustom.losses import LOSSES
from hfcustom.parts import unwrap
from hfcustom.train_config import TrainConfig
from hfcustom.training import checkpoint
from hfcustom.training.memory import NoMemoryError

STEPS, ROWS = 3, 8
SKIPPING: dict[str, Any] = {"on_bad_row": "skip", "max_bad_share": 1.0}


@dataclass(frozen=True)
class Case:
    """One run: what the rows of a step hold in the order in which they are cut, and what differs from the default."""

    images: Sequence[int] = IMAGES
    words: Sequence[int] = ANSWER_WORDS
    loss: Any = "cross_entropy"
    lora: bool = False
    connector: bool = False  # is all that is trained
    pairs: bool = False  # rows with a chosen and a rejected answer
    sgd: bool = True  # weights after SGD differ as gradients do; Adam hides a wrong scale and magnifies rounding
    stop_at: int | None = None
    dropout: float = 0.0
    room: int = 0  # tokens of a forward that rank 1 of two has memory for; 0: as many as there are
    full: Where = "forward"  # where its memory runs out
    bad: Sequence[int] = ()  # places in each step whose row cannot be read
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "unequal rows": Case(),
    "unequal rows, micro-batches of 2": Case(
        options={"micro_batch_size": 2, "mfu": True, "trackers": ["tensorboard"]}
    ),
    "AdamW with clipping": Case(sgd=False, options={"micro_batch_size": 2, "max_grad_norm": 0.1}),
    "no image on one rank": Case(images=[1, 1, 2, 1, 0, 0, 0, 0]),
    "no image on one rank in the last micro-batch": Case(
        images=[1, 1, 0, 1, 2, 1, 0, 0], options={"micro_batch_size": 2}
    ),
    "no image on any rank in the last micro-batch": Case(
        images=[1, 1, 2, 1, 0, 0, 0, 0], options={"micro_batch_size": 2}
    ),
    "no image anywhere": Case(images=[0] * 8),
    "three terms": Case(loss=TERMS, options={"micro_batch_size": 2}),
    "terms without images on one rank": Case(images=[1, 1, 2, 1, 0, 0, 0, 0], loss=TERMS),
    "contrastive": Case(loss="contrastive", options={"micro_batch_size": 2}),
    "contrastive with all images on one rank": Case(images=[1, 1, 2, 1, 0, 0, 0, 0], loss="contrastive"),
    "gradient checkpointing": Case(options={"micro_batch_size": 2, "gradient_checkpointing": True}),
    "the connector alone, no image on one rank": Case(images=[1, 1, 2, 1, 0, 0, 0, 0], connector=True),
    "the connector alone, an image now and then": Case(
        images=[0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, *[1, 0, 0, 0, 0, 0, 0, 1]],
        words=ANSWER_WORDS * STEPS,
        connector=True,
        options={"micro_batch_size": 2},
    ),
    "packed rows": Case(options={"packing": True, "pack_tokens": 250}),
    "packed contrastive": Case(loss="contrastive", options={"packing": True, "pack_tokens": 250}),
    "LoRA": Case(lora=True, options={"micro_batch_size": 2}),
    "bad rows on one rank": Case(bad=[4, 6], options={**SKIPPING, "micro_batch_size": 2}),
    "a rank with bad rows only": Case(bad=[2, 3, 6, 7], options={**SKIPPING, "micro_batch_size": 2}),
    "bad rows on both ranks, contrastive": Case(
        bad=[0, 1, 4], loss="contrastive", options={**SKIPPING, "micro_batch_size": 2}
    ),
    "memory runs out on one rank": Case(room=400, options={"max_steps": 2}),
    "memory runs out on one rank before the last micro-batch": Case(
        room=200, options={"micro_batch_size": 2, "max_steps": 2}
    ),
    "memory runs out on one rank, gradients half exchanged": Case(
        room=400, full="amid backward", options={"max_steps": 2}
    ),
    "memory runs out on one rank, contrastive": Case(
        room=200, full="first look", loss="contrastive", options={"micro_batch_size": 2, "max_steps": 2}
    ),
    "preferences": Case(loss="dpo", lora=True, pairs=True, options={"micro_batch_size": 2}),
}
STOPPED = Case(dropout=0.3, stop_at=2, options={"micro_batch_size": 2})
GROWN = Case(options={"schedule": "constant"})


def case_rows(case: Case) -> list[dict[str, Any]]:
    """Return rows in such an order that every step sees the case's rows in the case's order."""
    images, words = (list(given) * (STEPS if len(given) == ROWS else 1) for given in (case.images, case.words))
    wanted = uneven_rows(images, words)
    if case.pairs:
        wanted = [as_pair(row) for row in wanted]
    for at in (ROWS * step + place for step in range(STEPS) for place in case.bad):
        wanted[at] = {"messages": [], "images": []}
    order = [at for step in range(STEPS) for at in step_rows(len(wanted), step, ROWS, seed=0)]
    assert sorted(order) == list(range(len(wanted)))
    return [wanted[order.index(at)] for at in range(len(wanted))]


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose answer is preferred to a shorter one."""
    prompt, answer = row["messages"][:-1], row["messages"][-1]["content"]
    return {"prompt": prompt, "chosen": answer, "rejected": answer[: len(answer) // 2] + "x", "images": row["images"]}


def build(case: Case) -> tuple[nn.Module, Family]:
    """Return a case's model and its family; rank 1 starts from other weights, which DDP must replace by rank 0's (FSDP refuses)."""
    family, sharded = Family("internvl", load_family("internvl")), "ACCELERATE_USE_FSDP" in os.environ
    model = family.model(seed=0 if sharded else train.process_state().process_index, loss=case.loss)
    torch.manual_seed(0)  # of LoRA
    add_dropout(model, case.dropout)
    if case.connector:
        hfcustom.train_only(model, ["connector"])
    return (hfcustom.lora(model, rank=2) if case.lora else model), family


def use_sgd(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Stand in for make_optimizer."""
    group = {"params": [p for p in model.parameters() if p.requires_grad], "part": "all", "peak_lr": config.lr}
    return torch.optim.SGD([group], lr=config.lr)


def run(case: Case, folder: Path, **options: Any) -> dict[str, Any]:
    """Train a case with fit(); return its weights before and after, its history and where it stopped."""
    model, family = build(case)
    start = weights(model)
    rank, original = train.process_state().process_index, train.make_optimizer
    ddp = train.DistributedDataParallelKwargs

    def evaluate(model: Any, step: int) -> dict[str, float]:
        if rank == 1 and step == case.stop_at and "resume" not in options:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    config = short_config(folder, **{"eval_steps": 1, "max_steps": STEPS, **case.options, **options})
    try:
        train.make_optimizer = use_sgd if case.sgd else original
        if case.room:  # several buckets, as large models have
            train.DistributedDataParallelKwargs = partial(ddp, bucket_cap_mb=0.02)
        with room_for(case.room, case.full) if case.room and rank == 1 else nullcontext() as room:
            result = train.fit(model, family.processor, case_rows(case), config, evaluate=evaluate)
        assert room is None or room.failures
    finally:
        train.make_optimizer, train.DistributedDataParallelKwargs = original, ddp
    return {
        "start": start,
        "end": weights(model),
        "history": result.history,
        "step": result.step,
        "interrupted": result.interrupted,
    }


def every_loss() -> dict[str, dict[str, torch.Tensor]]:
    """Return each registered loss's value over all ranks and its gradients, each rank with its share of the rows."""
    found = {}
    config = TrainConfig(precision="fp32", max_grad_norm=0.0)
    accelerator = train.make_accelerator(config)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    for name in sorted(LOSSES):
        family = family_of(name)
        batch = batch_of(name, family)
        size = len(batch["labels"]) // ranks
        model = accelerator.prepare(model_of(name, family))
        gradients: dict[str, torch.Tensor] = {}

        class Look(torch.optim.SGD):
            def step(self, closure: Any = None, model: Any = model, into: Any = gradients) -> None:
                into.update(gradients_of(unwrap(model)))

        own = cut(batch, [size] * ranks)[rank]
        report = train.train_step(model, [own], Look(model.parameters(), lr=0.0), accelerator, config)
        found[name] = {**gradients, "value": accelerator.reduce(report.losses[name].detach(), "sum")}
    return found


EVALUATIONS = ("five rows", "one row", "no rows", "recall")


def evaluated() -> dict[str, Any]:
    """Return what evaluation says of models with the same weights everywhere: answers and a recall."""
    family, encoder, worked = Family("internvl", load_family("internvl")), encoders()["clip"], []
    model, pairs = family.model(), [{"image": picture(at), "text": text} for at, text in enumerate(WORDS[:5])]

    def work(at: int) -> int:
        worked.append(at)
        return at * at

    assert hfcustom.over_ranks(work, range(5), share=True) == [0, 1, 4, 9, 16]
    found: dict[str, Any] = {"worked on": worked}
    for name, rows in zip(
        EVALUATIONS, (uneven_rows([1, 0, 2, 0, 1], [1] * 5), uneven_rows([1], [1]), []), strict=False
    ):
        answers = hfcustom.generate_answers(model, family.processor, rows, batch_size=2, max_new_tokens=3, share=True)
        found[name] = [(item.question, item.answer, item.truth, item.example.name) for item in answers]
    found["recall"] = hfcustom.retrieval_recall(encoder.model(), encoder.processor, pairs, batch_size=2, share=True)
    return found


def too_large(folder: Path, on_bad_row: str) -> str:
    """Train where rank 1 has no memory for one of its rows; return how that ends on this rank."""
    case = Case(room=150, options={"on_bad_row": on_bad_row, "max_steps": 2})
    if on_bad_row == "skip":
        case.options["max_bad_share"] = 0.5
    try:
        found = run(case, folder)
    except NoMemoryError as error:
        return str(error)
    return f"{found['step']} steps, weights add up to {sum(float(value.double().sum()) for value in found['end'].values())}"


MIXED = [name for name in KINDS if name != "aria"]  # its experts know nothing of images


def mixed_steps() -> dict[str, list[float]]:
    """Return loss and gradient norm of a step whose second half, another rank's or a micro-batch, is text alone."""
    found: dict[str, list[float]] = {}
    config = TrainConfig(precision="fp32", max_grad_norm=0.0)
    accelerator = train.make_accelerator(config)
    for name, lora in itertools.product(MIXED, (False, True)):
        family = Family(name, load_family(name))
        halves = [family.batch(images) for images in ([1, 2], [0, 0])]
        own = halves if accelerator.num_processes == 1 else [halves[accelerator.process_index]]
        model = hfcustom.lora(family.model(), rank=2) if lora else family.model()
        model = accelerator.prepare(model.train())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        report = train.train_step(model, own, optimizer, accelerator, config)
        loss = accelerator.reduce(report.losses["cross_entropy"].detach(), "sum")
        found[f"{name} {'with LoRA' if lora else 'in full'}"] = [float(loss), float(report.grad_norm)]
    return found


def forbid_writing() -> None:
    """Make every function that writes, but for a rank's own random state, an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("only rank 0 writes")

    for name in ("save_model", "save_optimizer", "write_json", "replace_folder"):
        setattr(checkpoint, name, refuse)
    commit.write_manifest = commit.put_in_place = refuse  # type: ignore[assignment]
    Path.write_text = refuse  # type: ignore[method-assign]


def note_what_is_left(folder: Path) -> None:
    """Write down whether the processes are still connected when the interpreter goes; called before they are."""
    path = folder / f"connected-{os.environ['RANK']}.pt"
    atexit.register(lambda: torch.save(distributed.is_initialized(), path))


def main(folder: Path) -> None:
    gc.freeze()
    note_what_is_left(folder)
    rank = train.process_state().process_index
    if rank:
        forbid_writing()
    torch.save(every_loss(), folder / f"every-loss-{rank}.pt")
    (folder / "evaluated").mkdir(exist_ok=True)
    torch.save(evaluated(), folder / "evaluated" / f"rank-{rank}.pt")
    torch.save(mixed_steps(), folder / f"mixed-{rank}.pt")
    with user_losses():
        for name, case in CASES.items():
            torch.save(run(case, folder / name / "out"), folder / name / f"rank-{rank}.pt")
    ends = {way: too_large(folder / way, way) for way in ("skip", "error")}
    torch.save(ends, folder / f"too-large-{rank}.pt")
    torch.save(run(STOPPED, folder / "stopped" / "out"), folder / "stopped" / f"rank-{rank}.pt")
    torch.save(run(STOPPED, folder / "stopped" / "out", resume=True), folder / "stopped" / f"resumed-{rank}.pt")
    unbroken = run(replace(STOPPED, stop_at=None), folder / "unbroken" / "out")
    torch.save(unbroken, folder / "unbroken" / f"rank-{rank}.pt")
    torch.save(run(GROWN, folder / "grown" / "out", resume=True), folder / "grown" / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
