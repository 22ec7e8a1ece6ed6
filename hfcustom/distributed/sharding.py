"""Sharded models (FSDP2): which modules are sharded by themselves, how fit() runs them, and whole tensors back from shards.

Accelerate shards in fit() when a config of recipes/accelerate/ asks for it; `shard` does the same by hand, for a loop of one's
own. Blocks are the modules that transformers must not split over devices (`_no_split_modules`), vision and language alike. All
else, the embeddings and the head among it, is one unit with the model itself, so that a loss finds the head's weights whole.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from hfcustom.distributed import zero
from hfcustom.exits import ConfigError
from hfcustom.parts import unwrap
from hfcustom.train_config import TrainConfig

# ---- what can be had ------------------------------------------------------------------------------------------------


def check_launcher() -> None:
    """Raise ConfigError where the launcher asks for a kind of training in shards that fit() does not do, naming one that it does."""
    asked = {name: value for name, value in os.environ.items() if value.lower() not in ("", "false", "0")}
    if "ACCELERATE_USE_MEGATRON_LM" in asked:
        raise ConfigError(
            "The launcher's config asks for Megatron-LM, whose engine steps, clips and saves by itself, so that fit() could "
            "neither divide losses over the step nor resume exactly. Launch with recipes/accelerate/fsdp_8.yaml."
        )
    if zero.is_asked_for():
        zero.check_launcher()
    if "ACCELERATE_USE_FSDP" not in asked:
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"The launcher's config has fsdp_version: {version}; set it to 2, as recipes/accelerate/ does."
        )
    for name, cure in (
        ("ACTIVATION_CHECKPOINTING", "--gradient-checkpointing does the same"),
        ("CPU_RAM_EFFICIENT_LOADING", "every process loads the checkpoint by itself"),
    ):
        if f"FSDP_{name}" in asked:
            raise ConfigError(f"The launcher's config has fsdp_{name.lower()}: true; set it to false, {cure}.")


def check_shardable(model: nn.Module, config: TrainConfig) -> None:
    """Raise ConfigError for a model or an option that does not go with sharded parameters, naming what does."""
    whole_models = "or keep the model whole on each GPU: recipes/accelerate/gpus_8.yaml"
    if config.optimizer != "adamw":
        raise ConfigError(
            f"optimizer={config.optimizer} of bitsandbytes cannot work on sharded parameters (FSDP); use adamw, whose state is "
            f"shared out, {whole_models}."
        )
    if config.cache_features is not None:
        raise ConfigError(
            f"cache_features={config.cache_features!r}: a process that has its images there would not run the tower, whose shards "
            f"the others (FSDP) wait for. Leave it out (cache_images is no problem), {whole_models}."
        )
    if is_sharded(model):
        raise ConfigError(
            "The model has been sharded by an earlier fit(); go on with one that is loaded from its model_dir."
        )
    for name, parameter in unwrap(model).named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"{name} is packed by bitsandbytes, which cannot be sharded (FSDP). Load the model in bfloat16, {whole_models}."
            )
        if parameter.ndim == 0:
            raise ConfigError(
                f"{name} is a single number, which cannot be sharded (FSDP). Make it (1,), {whole_models}."
            )


def check_same_weights(model: nn.Module) -> None:
    """Raise ConfigError where processes have built models of different weights, of which each would give its shards."""
    sample = [p.detach().flatten()[:16].to("cpu", torch.float32) for p in unwrap(model).parameters()]
    digests = gather_object([hashlib.sha256(torch.cat(sample).numpy().tobytes()).hexdigest()])
    if len(set(digests)) > 1:
        raise ConfigError(
            "The processes have built models of different weights, which FSDP would mix. Draw the same random numbers in all of "
            "them before new modules or LoRA are made: accelerate.utils.set_seed(0)."
        )


# ---- as fit() runs them ---------------------------------------------------------------------------------------------


def uses_fsdp(accelerator: Any) -> bool:
    """Whether Accelerate shards parameters."""
    return bool(accelerator.distributed_type == "FSDP")


def forget_precision() -> None:
    """Let the next Accelerator of this process choose its precision anew, and whether to shard."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    shared = PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.FSDP:  # which Accelerate makes of the other one
        shared["distributed_type"] = DistributedType.MULTI_GPU


def prepare(model: Any, optimizer: Any, accelerator: Any, config: TrainConfig) -> tuple[Any, Any]:
    """Do as accelerator.prepare(); a model that FSDP shards computes under autocast and adds up its gradients in float32.

    That is what one process does. Accelerate's own policy casts all inputs to 16 bits, what losses are divided by among them,
    and would make the head a unit of its own, whose gradient were sent around once for each chunk of a loss.
    """
    if zero.uses_zero(accelerator):
        return zero.prepare(model, unwrap(model), optimizer, accelerator, config)
    if not uses_fsdp(accelerator):
        prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
        return prepared
    from torch.distributed.fsdp import MixedPrecisionPolicy

    core = unwrap(model)
    check_same_weights(core)
    if accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        core.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(core.forward)
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module .* returned a view"
    )  # the loss, which nothing changes in place
    core.get_input_embeddings = core.get_output_embeddings = lambda: None  # which Accelerate 1.15 would shard apart
    try:
        _, optimizer = accelerator.prepare(core, optimizer)
    finally:
        del core.get_input_embeddings, core.get_output_embeddings
    return model, optimizer


def no_sync(model: nn.Module, accelerator: Any) -> AbstractContextManager[Any]:
    """Return a context in which gradients stay on their rank, but for a sharded model: whole ones would need its whole size."""
    if uses_fsdp(accelerator) or zero.uses_zero(accelerator):
        return nullcontext()
    return accelerator.no_sync(model)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, other methods of a sharded model than forward() can be called (generate): what lies outside of its blocks is whole.

    All ranks have to be in it together, and to run the same modules equally often.
    """
    from torch.distributed.fsdp import FSDPModule

    core: Any = unwrap(model)
    if not is_sharded(core) or core in GATHERED:
        yield
        return
    core._get_fsdp_state()._lazy_init()  # else the first block that runs would be taken for the outermost
    core.unshard()
    GATHERED.append(core)
    try:
        yield
    finally:
        GATHERED.remove(core)
        for module in core.modules():  # blocks too, where they stay whole until the backward pass
            if isinstance(module, FSDPModule):
                module.reshard()


GATHERED: list[nn.Module] = []


def forget_whole(model: nn.Module) -> None:
    """Drop whole weights that a sharded model still holds after a forward pass: its shards have been changed since."""
    from torch.distributed.fsdp import FSDPModule

    for module in unwrap(model).modules() if is_sharded(model) else ():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- which modules --------------------------------------------------------------------------------------------------


def block_classes(model: nn.Module) -> list[str]:
    """Return the class names of the blocks of a model that are there, for `fsdp_transformer_layer_cls_to_wrap`.

    Raises ValueError for a model none of whose modules says what must not be split.
    """
    named: set[str] = set()
    for module in unwrap(model).modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    found = sorted({type(module).__name__ for module in unwrap(model).modules()} & named)
    if not found:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no block to shard by itself: set _no_split_modules on the class, to the "
            "names of the classes of its layers."
        )
    return found


def name_blocks(model: nn.Module, accelerator: Any) -> None:
    """Tell Accelerate's FSDP which blocks there are, unless its config does: its own choice may name absent ones and fail."""
    if accelerator.distributed_type == "FSDP":
        plugin = accelerator.state.fsdp_plugin
        given = plugin.transformer_cls_names_to_wrap
        if given is None or any(given is own for own in NAMED):  # for an earlier model of this process
            NAMED[:] = [block_classes(model)]
            (plugin.transformer_cls_names_to_wrap,) = NAMED


NAMED: list[list[str]] = []


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Shard a model's parameters over a one-dimensional device mesh, in place: each block by itself, then the rest.

    `options` go to torch's fully_shard (mp_policy, offload_policy, reshard_after_forward). Make the optimizer afterwards.
    """
    from torch.distributed.fsdp import fully_shard

    core, names = unwrap(model), set(block_classes(model))
    blocks = [module for module in core.modules() if type(module).__name__ in names]
    for module in reversed(blocks):  # what is inside another goes first
        fully_shard(module, mesh=mesh, **options)
    fully_shard(core, mesh=mesh, **options)
    return model


# ---- whole tensors --------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has sharded a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unwrap(model), FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole, on its device; all ranks have to ask for the same one."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, all of one that is whole."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(tensors: Mapping[str, torch.Tensor], is_wanted: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors, on the CPU, to ranks that want them; others give their shards, and get an empty mapping.

    One tensor is gathered at a time, so that a rank never holds more than its shards and one whole tensor on its device.
    """
    state = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if is_wanted:
            state[name] = gathered.cpu()
    return state
