"""The run of tests/test_encoders.py in two processes: each has its share of the pairs, and writes loss and gradients.

torchrun --nproc_per_node 2 tests/encoders_run.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from encoder_cases import encoders, gradients
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hfcustom.losses.pairs import PAIR_LOSSES, gather_rows

SHARES = {"unequal": (range(3), range(3, 8)), "equal": (range(4), range(4, 8)), "one on one": (range(7), range(7, 8))}


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
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
