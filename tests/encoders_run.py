"""The run of tests/test_encoders.py and tests/test_encoder_training.py in two processes: shares of the pairs, gradients.

torchrun --nproc_per_node 2 tests/encoders_run.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from encoder_cases import encoders, gradients
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hfcustom.data.collate import Batch
from hfcustom.data.steps import agree_on_batches
from hfcustom.losses.pairs import PAIR_LOSSES, gather_rows
from hfcustom.train import make_accelerator, train_step
from hfcustom.train_config import TrainConfig

SHARES = {"unequal": (range(3), range(3, 8)), "equal": (range(4), range(4, 8)), "one on one": (range(7), range(7, 8))}

STEP_ROWS = ((range(5),), (range(5, 6), range(6, 8)))  # of each process, the micro-batches of one step


def whole_steps() -> dict[str, dict[str, torch.Tensor]]:
    """Return this process's share of the loss of a step of train_step(), and its gradients."""
    found = {}
    config = TrainConfig(precision="fp32", max_grad_norm=0.0)
    accelerator = make_accelerator(config)
    for name, encoder in encoders().items():
        for loss in PAIR_LOSSES:
            core = encoder.model(loss=loss).train()
            optimizer = torch.optim.SGD(core.parameters(), lr=0.0)
            kept: dict[str, torch.Tensor] = {}
            optimizer.register_step_pre_hook(lambda *_, core=core, kept=kept: kept.update(copies(gradients(core))))
            batches = [Batch(encoder.batch(rows)) for rows in STEP_ROWS[accelerator.process_index]]
            batches = agree_on_batches(batches, accelerator)
            report = train_step(accelerator.prepare(core), batches, optimizer, accelerator, config)
            found[f"step {name} {loss}"] = {"loss": report.losses[loss].detach(), **kept}
    return found


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies, which zero_grad() leaves alone."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, encoder in encoders().items():
        for loss in PAIR_LOSSES:
            for case, shares in SHARES.items():
                core = encoder.model(loss=loss).train()
                model = DistributedDataParallel(core)
                value = model(**encoder.batch(shares[rank]), return_loss=True).loss
                value.backward()
                found[f"{name} {loss} {case}"] = {"loss": value.detach(), **gradients(core)}
    core = encoders()["clip"].model().eval()  # outside training a process's own pairs are all there are
    with torch.no_grad():
        found["eval"] = {"loss": core(**encoders()["clip"].batch(SHARES["equal"][rank]), return_loss=True).loss}
    own = torch.full((3 * rank, 2), float(rank), requires_grad=True)
    everyone, start = gather_rows(own)
    (everyone * torch.arange(6.0).view(3, 2) * (rank + 1)).sum().backward()
    found["gather"] = {"everyone": everyone.detach(), "start": torch.tensor(start), "gradient": own.grad}
    found |= whole_steps()
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
