"""What tests/test_sharding.py runs in two processes over gloo: a sharded step against the same step unsharded.

    torchrun --nproc_per_node 2 tests/sharded_run.py FOLDER

Rank 0 writes FOLDER/results.json: for each case the largest relative difference of any gradient, and of weights after AdamW. Then
come the runs of fit() in tests/sharded_fit.py, at whose end rank 1 is killed.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import sharded_fit
import torch
from conftest import FAMILIES, Family
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import hfcustom
from hfcustom.distributed.sharding import shard, whole, whole_state
from hfcustom.families import load_family
from hfcustom.parts import unwrap
from hfcustom.train import checkpoint_activations, make_accelerator, make_optimizer, train_step
from hfcustom.train_config import TrainConfig
from hfcustom.training.norms import part_norms


def plain(model: Any) -> Any:
    return model


def lora(model: Any) -> Any:
    torch.manual_seed(0)
    return hfcustom.lora(model, "language", rank=2)


def tower_frozen(model: Any) -> Any:
    hfcustom.freeze(model, "vision")
    return model


def recomputed(model: Any) -> Any:
    checkpoint_activations(model)
    return model


def two_losses(model: Any) -> Any:
    model.config.loss = {"cross_entropy": 1.0, "focal": 0.5, "z_loss": 1e-2}
    return model


CASES = {f"{name}": (name, plain) for name in FAMILIES} | {
    f"internvl {change.__name__}": ("internvl", change) for change in (lora, tower_frozen, recomputed, two_losses)
}


def run(family: Family, change: Any, folder: Path) -> dict[str, float]:
    """Train two steps of two micro-batches on each rank, sharded; compare with all of them in this process."""
    config = TrainConfig(output_dir=str(folder), max_grad_norm=1.0, lr=1e-3)
    accelerator = make_accelerator(config)
    rank = accelerator.process_index
    batches = [family.batch(images) for images in ([2, 1], [1, 0], [1, 1], [0, 1])]
    alone = change(family.model()).train()
    sharded = shard(copy.deepcopy(alone), init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    optimizers = [make_optimizer(model, config) for model in (alone, sharded)]
    mine = batches[2 * rank : 2 * rank + 2]
    start = {name: p.detach().clone() for name, p in alone.named_parameters()}
    for _ in range(2):
        expected_norms = unsharded_step(alone, batches, optimizers[0], config) if rank == 0 else {}
        report = train_step(sharded, mine, optimizers[1], accelerator, config)
        norms = {part: float(norm) for part, norm in report.part_norms.items()}
        assert rank or norms == pytest.approx(expected_norms, rel=1e-4), (norms, expected_norms)
    moved = [float((whole(p) - start[name]).abs().max()) for name, p in sharded.named_parameters()]
    found = whole_state(sharded.state_dict(), rank == 0)
    expected = alone.state_dict()
    apart = max((float((found[name] - expected[name]).abs().max()) for name in found), default=0.0)
    assert rank or found.keys() == expected.keys()
    return {"apart": apart, "moved": max(moved), "norm": float(report.grad_norm)}


def unsharded_step(model: nn.Module, batches: list[Any], optimizer: Any, config: TrainConfig) -> dict[str, float]:
    core = unwrap(model)
    divisors = core.loss_counts(batches)
    for batch in batches:
        model(**batch, loss_divisors=divisors).loss.backward()
    norms = {part: float(norm) for part, norm in part_norms(optimizer).items()}
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norms


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case, (name, change) in CASES.items():
        results[case] = run(Family(name, load_family(name)), change, folder / "out")
    if distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    sharded_fit.main(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
