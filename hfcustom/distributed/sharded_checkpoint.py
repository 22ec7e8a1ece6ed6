"""The part of a checkpoint that ranks write together where FSDP has sharded the model: weights and optimizer state.

model/model-00001-of-0000N.safetensors, its index.json    whole weights, which from_pretrained loads; under peft the adapter, by rank 0
optimizer-00001-of-0000N.safetensors, optimizer.json      whole moments

The files are as one process would write them, but for their number (hfcustom/distributed/spread.py), so that a run goes on with another
number of processes, or with one, from the same files. Every rank has to call each function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hfcustom.commit import every_rank, write_json
from hfcustom.distributed.sharding import whole_state
from hfcustom.distributed.spread import Spread, write_spread
from hfcustom.parts import wrapped_by_peft
from hfcustom.quiet import quiet

INDEX = "model.safetensors.index.json"


def write_weights(model: Any, folder: Path, accelerator: Accelerator) -> dict[str, str]:
    """Write a model's weights from all ranks, and its config and card from rank 0; return this rank's digests."""
    state = saved_tensors(model)
    with every_rank(accelerator):
        if accelerator.is_main_process:
            with quiet():
                model.save_pretrained(folder, state_dict={})  # all that is no weight
            for empty in folder.glob("*.safetensors"):
                empty.unlink()
    files, digests = write_spread(state, folder, "model", accelerator)
    with every_rank(accelerator):
        if accelerator.is_main_process:
            total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            homes = {name: file for file, names in files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})
    return digests


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what save_pretrained would write: a tensor that is tied to another one once."""
    ignored = set(model._keys_to_ignore_on_save or ())
    ignored |= set(model.all_tied_weights_keys)
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in ignored}


def adapter_state(model: Any, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return a peft model's state_dict in which what is trained is whole, on rank 0."""
    state, trained = model.state_dict(), {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name: tensor for name, tensor in state.items() if name in trained or "lora_" in name}
    return {**state, **whole_state(own, accelerator.is_main_process)}


def read_weights(model: Any, folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Fill a sharded model from a checkpoint of any number of processes; return what is missing, unexpected, of another shape."""
    targets = model.state_dict()
    tied = set() if wrapped_by_peft(model) else set(model.all_tied_weights_keys)
    if wrapped_by_peft(model):
        from peft import get_peft_model_state_dict

        targets = get_peft_model_state_dict(model, save_embedding_layers=False)
    return fill(targets, Spread(sorted(folder.glob("*.safetensors"))), tied)


def fill(
    targets: Mapping[str, torch.Tensor], spread: Spread, tied: set[str]
) -> tuple[list[str], list[str], list[str]]:
    """Copy tensors of files into those of a model, each rank its shards."""
    differ = [
        f"size mismatch for {name}: {spread.shape(name)} in the checkpoint, {tuple(targets[name].shape)} in the model"
        for name in spread.homes
        if name in targets and spread.shape(name) != tuple(targets[name].shape)
    ]
    missing = [name for name in targets if name not in spread.homes and name not in tied]
    unexpected = [name for name in spread.homes if name not in targets]
    with torch.no_grad():
        for name in spread.homes if not (missing or unexpected or differ) else ():
            targets[name].copy_(spread.read_like(name, targets[name]))
    return missing, unexpected, differ
