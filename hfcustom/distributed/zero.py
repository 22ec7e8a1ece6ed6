"""DeepSpeed's ZeRO-1 and ZeRO-2 under fit(): weights whole on each rank, the optimizer's state shared out.

rows -> engine.forward, engine.backward (gradients stay on their rank) -> one exchange at the end of a step -> norms -> engine.step

DeepSpeed exchanges gradients as they are made, in the order they are made in, so that ranks with unlike rows (text alone, images)
would mix them up. Its `coalesce_grad_reduction` keeps them until the step's last micro-batch; there each rank has one for every
parameter. Checkpoints are as one process writes them: DeepSpeed's own files are pickles, and are neither written nor read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfcustom.exits import CheckpointError, ConfigError
from hfcustom.train_config import TrainConfig

BUCKET = (
    50_000_000  # numbers that are sent around together; DeepSpeed's own are 500 million, 2 GB of each GPU in float32
)
MOMENTS = ("exp_avg", "exp_avg_sq")
BY_FSDP = "recipes/accelerate/fsdp_8.yaml"

# ---- what can be had ------------------------------------------------------------------------------------------------


def is_asked_for() -> bool:
    """Whether the launcher's config asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("", "false", "0")


def check_launcher() -> None:
    """Raise ConfigError for what fit() does not do with DeepSpeed, naming what does the same."""
    setting = {
        name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        for name in ("CONFIG_FILE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
    }
    if setting["CONFIG_FILE"] != "none":
        raise ConfigError(
            f"The launcher's config has deepspeed_config_file: {setting['CONFIG_FILE']}, in which precision, optimizer and clipping are "
            "set beside fit()'s own. Leave it out and set zero_stage, as recipes/accelerate/deepspeed_8.yaml does."
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise ConfigError(
            f"The launcher's config has zero_stage: {stage}; fit() does stages 1 and 2. What stage 3 does, weights shared out too, "
            f"FSDP2 does here: accelerate launch --config_file {BY_FSDP}."
        )
    for name in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        if setting[name] != "none":
            raise ConfigError(
                f"The launcher's config has {name.lower()}: {setting[name]}, with which DeepSpeed replaces the optimizer; set it to none. "
                f"To hold less on the GPU launch with {BY_FSDP}, or train LoRA."
            )
    try:
        from deepspeed import DeepSpeedEngine
    except ImportError as error:
        raise ConfigError(
            f"The launcher's config asks for DeepSpeed, which cannot be imported: {error}. pip install deepspeed, or launch with {BY_FSDP}."
        ) from error
    if not hasattr(DeepSpeedEngine, "coalesce_grad_reduction"):
        raise ConfigError(
            "This DeepSpeed cannot exchange gradients once a step (coalesce_grad_reduction); pip install -U deepspeed, 0.19.8 can."
        )


def check_model(model: nn.Module, config: TrainConfig) -> None:
    """Raise ConfigError for a model or an option that does not go with DeepSpeed, naming what does."""
    if config.optimizer != "adamw":
        raise ConfigError(
            f"optimizer={config.optimizer} of bitsandbytes cannot work on the pieces that DeepSpeed makes of parameters; use adamw, whose "
            "state is shared out, or launch with recipes/accelerate/gpus_8.yaml."
        )
    if any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters()):
        raise ConfigError(
            "The model has been trained with DeepSpeed by an earlier fit(); go on with one that is loaded from its model_dir."
        )


# ---- as fit() runs it -----------------------------------------------------------------------------------------------


def is_engine(model: Any) -> bool:
    """Whether a model is wrapped by DeepSpeed, asked without importing it."""
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return kind is not None and isinstance(model, kind)


def uses_zero(accelerator: Any) -> bool:
    """Whether Accelerate trains with DeepSpeed."""
    return bool(accelerator.distributed_type == "DEEPSPEED")


def plugin(config: TrainConfig) -> Any:
    """Return Accelerate's DeepSpeed plugin for a run: a step is one exchange, however many micro-batches fit() makes of it."""
    from accelerate.utils import DeepSpeedPlugin

    made = DeepSpeedPlugin(gradient_accumulation_steps=1, gradient_clipping=config.max_grad_norm or 0.0)
    made.deepspeed_config["gradient_clipping"] = config.max_grad_norm or 0.0
    made.deepspeed_config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    made.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # which DeepSpeed only counts with
    return made


def prepare(model: Any, core: Any, optimizer: Any, accelerator: Any, config: TrainConfig) -> tuple[Any, Any]:
    """Do as accelerator.prepare(); the model computes under autocast, as one process does, with weights in float32."""
    if config.precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        core.forward, core.loss_summaries = autocast(core.forward), autocast(core.loss_summaries)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    engine, optimizer = accelerator.prepare(model, optimizer)
    load_state(
        engine.optimizer, lambda name, key: None
    )  # DeepSpeed itself would find only the first group's moments again
    for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
        assert parameter.dtype == dtype, f"DeepSpeed has cast weights from {dtype} to {parameter.dtype}"
    return engine, optimizer


def backward(loss: torch.Tensor, accelerator: Any) -> None:
    """Do as accelerator.backward(), which under DeepSpeed would update the weights too."""
    if uses_zero(accelerator):
        accelerator.deepspeed_engine_wrapped.engine.backward(loss)
    else:
        accelerator.backward(loss)


@contextmanager
def one_exchange(model: Any) -> Iterator[None]:
    """Keep a step's gradients on their rank until its end, where they are exchanged once; nothing for another kind of training."""
    if not is_engine(model):
        yield
        return
    with model.coalesce_grad_reduction():
        try:
            yield
            for look in LOOKING:
                look()
        finally:
            for parameter in model.module.parameters():
                if parameter.requires_grad and parameter.grad is None:  # on this rank; others may have one
                    parameter.grad = torch.zeros_like(parameter)


LOOKING: list[Callable[[], None]] = []  # at a step's gradients, before they are exchanged


class LookHook:
    """A function that looks at each step's gradients until it is removed."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look
        LOOKING.append(look)

    def remove(self) -> None:
        """Look no longer."""
        LOOKING.remove(self.look)


def part_norms(engine: Any) -> dict[str, torch.Tensor]:
    """Return the norm of the gradient of each part, exchanged and not yet clipped; of all ranks' pieces together."""
    zero = engine.optimizer
    squares: dict[str, Any] = {}
    for index, group in enumerate(zero.param_groups):
        norm = zero.get_grad_norm_direct(zero.averaged_gradients[index], zero.params_in_partition[index])
        norm = norm.where(norm >= 0, torch.nan)  # DeepSpeed says -1 of what is not finite
        squares[group["part"]] = squares.get(group["part"], 0.0) + norm**2
    return {part: square.sqrt() for part, square in squares.items()}


def step(engine: Any) -> None:
    """Clip, update the weights, and let go of the gradients."""
    engine.set_gradient_accumulation_boundary(True)
    engine.step()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def refresh(engine: Any) -> None:
    """Take over weights that were loaded into the model: DeepSpeed updates a copy of its own."""
    engine.optimizer.refresh_fp32_params()


def inside(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer inside of Accelerate's wrapper, None where there is none."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "bit16_groups") else None


def named_groups(zero: Any) -> list[dict[str, Any]]:
    """Return the groups as one process's optimizer numbers their parameters."""
    groups: list[dict[str, Any]] = []
    for group in zero.param_groups:
        first = sum(len(earlier["params"]) for earlier in groups)
        groups.append({**group, "params": list(range(first, first + len(group["param_names"])))})
    return groups


def optimizer_content(zero: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return what one process's AdamW would hold, tensors and groups; every rank has to ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors: dict[str, torch.Tensor] = {}
    groups = named_groups(zero)
    for group, numbered, parameters in zip(zero.param_groups, groups, zero.bit16_groups, strict=True):
        state = zero.optimizer.state.get(group["params"][0])
        for number, parameter in zip(numbered["params"], parameters, strict=True) if state else ():
            for name in MOMENTS:
                tensors[f"{number}.{name}"] = safe_get_full_optimizer_state(parameter, name).cpu()
            tensors[f"{number}.step"] = state["step"].cpu().clone()
    return tensors, groups


def load_state(zero: Any, read: Callable[[str, str], torch.Tensor | None]) -> None:
    """Give each rank its pieces of moments; `read` returns what a parameter of a name has under a key, whole, or None."""
    from deepspeed.utils import safe_set_full_optimizer_state

    for group in zero.param_groups:
        (flat,) = group["params"]
        steps = {float(found) for name in group["param_names"] if (found := read(name, "step")) is not None}
        if len(steps) > 1:
            raise CheckpointError(
                f"The parameters of {group['part']!r} have been updated unlike often ({sorted(steps)}), which DeepSpeed cannot go on "
                f"with; resume with the launcher's config as then, or with {BY_FSDP}."
            )
        state = zero.optimizer.state[flat]
        for name in MOMENTS:
            state.setdefault(name, torch.zeros_like(flat)).zero_()
        state["step"] = torch.tensor(max(steps, default=0.0), device=flat.device)
    zero._lazy_init_hp_params_optimizer_state()  # as after the first step
    for group, parameters in zip(zero.param_groups, zero.bit16_groups, strict=True):
        for name, parameter in zip(group["param_names"], parameters, strict=True):
            for key in MOMENTS:
                if (found := read(name, key)) is not None:
                    safe_set_full_optimizer_state(parameter, found.to(parameter.device), key)
