"""The ways to run one training step that the benchmark compares: the same weights, the same batch, the same optimiser.

Each variant is a function Job -> Bench that builds a model and returns a step (forward, backward, clip to 1.0, fused AdamW)
which gives back the loss and the gradient's norm before clipping. VARIANTS at the bottom lists them: to add one, write its
function and a line there. trl's source is quoted from 1.16.0.
Letters: B rows, T text tokens, M supervised tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tasks import Job, count_supervised, fill_weights, make_batch, stock_config

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
LORA_RANK = 16
BETA = 0.1  # of DPO
GAMMA = 2.0  # of the focal loss
EPSILON = 0.1  # of label smoothing


class UnavailableError(Exception):
    """A variant cannot be measured here, for the reason it gives."""


StepFunction = Callable[[], tuple[float, float]]
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Bench:
    """A model that is ready to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: StepFunction


# ---- objectives in plain torch, for the variants that need full logits ----------------------------------------------


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(M, V), (M,) -> (M,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def focal(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(M, V), (M,) -> (M,): -(1 - p)^gamma log p."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (-torch.expm1(-nll)) ** GAMMA * nll


def label_smoothing(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(M, V), (M,) -> (M,)."""
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=EPSILON)


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "label_smoothing": label_smoothing,
}


def loss_function(objective: str) -> Callable[..., torch.Tensor] | None:
    """Return a `compute_loss_func` as a user of Trainer writes it, on all logits; None where Trainer has the loss."""
    if objective == "cross_entropy":
        return None

    def compute(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits[:, :-1].float()  # (B, T-1, V)
        targets = labels[:, 1:]
        values = TOKEN_LOSSES[objective](logits.flatten(0, 1), targets.flatten().clamp(min=0))  # (B * (T-1),)
        return (values * (targets.flatten() != -100)).sum() / num_items_in_batch

    return compute


def dpo_loss(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B,), (B,) -> (): rows are [chosen 0, rejected 0, ...]. Rafailov et al. 2023, https://arxiv.org/abs/2305.18290."""
    ratio = log_probs - reference
    return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()


# ---- models ---------------------------------------------------------------------------------------------------------


def stock_model(job: Job) -> Any:
    """Return the stock class with the benchmark's weights."""
    from transformers import InternVLForConditionalGeneration

    return _prepared(InternVLForConditionalGeneration(stock_config(job.task)), job)


def stock_lora(model: Any) -> Any:
    """Wrap the stock model as a user of peft does, where hfcustom.lora puts its matrices."""
    from peft import LoraConfig, get_peft_model

    pattern = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=pattern))


def stock_or_lora(job: Job) -> Any:
    """Return the stock model, with LoRA where the job asks for it, ready to train."""
    model = stock_model(job)
    return _filled(stock_lora(model) if job.lora else model)


def _prepared(model: Any, job: Job) -> Any:
    model.config.use_cache = model.config.get_text_config().use_cache = False  # as Trainer does
    for (
        parameter
    ) in model.parameters():  # not the buffers: rotary frequencies stay in float32, as from_pretrained keeps them
        parameter.data = parameter.data.to(getattr(torch, job.dtype))
    return model.to(job.device)


def _filled(model: Any) -> Any:
    fill_weights(model)
    return model.train()


def batch_of(job: Job) -> dict[str, torch.Tensor]:
    """Return the task's batch on the device, pixels in the model's type; only ours is told which row is preferred."""
    batch = {name: value.to(job.device) for name, value in make_batch(job.task, job.objective).items()}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, job.dtype))
    if not job.variant.startswith("ours"):
        batch.pop("preference", None)
    return batch


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimiser of every variant."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def plain_bench(model: nn.Module, compute: Callable[[], torch.Tensor]) -> Bench:
    """Return a step in four lines of torch around a loss."""
    optimizer = make_optimizer(model)

    def step() -> tuple[float, float]:
        loss = compute()
        loss.backward()
        return _finish(model, optimizer, loss)

    return Bench(model, optimizer, step)


def _finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> tuple[float, float]:
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss), float(norm)


# ---- variants -------------------------------------------------------------------------------------------------------


def stock(job: Job) -> Bench:
    """Run transformers' own forward with labels, or for DPO the loss that its logits allow."""
    model, batch = stock_or_lora(job), batch_of(job)
    if job.objective == "cross_entropy":
        return plain_bench(model, lambda: model(**batch).loss)
    if job.objective == "dpo":
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = batch["labels"][:, 1:]

        def log_probs() -> torch.Tensor:
            logits = model(**inputs).logits[:, :-1].float()  # (B, T-1, V)
            chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (B, T-1)
            return (chosen * (targets != -100)).sum(-1)  # (B,)

        return plain_bench(model, lambda: dpo_loss_of(model, log_probs))
    raise UnavailableError("stock classes have no such loss; see trainer")


def dpo_loss_of(model: Any, log_probs: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Evaluate DPO on log-probabilities of rows (B,), the reference first, with the adapter off."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_probs()
    return dpo_loss(log_probs(), reference)


def trainer(job: Job) -> Bench:
    """Run transformers.Trainer's training_step; a custom loss goes in as compute_loss_func."""
    from transformers import Trainer, TrainingArguments

    if job.objective == "dpo":
        raise UnavailableError("Trainer has no preference loss; see stock")
    model = stock_or_lora(job)
    arguments = TrainingArguments(**_arguments(job))
    optimizer = make_optimizer(model)
    made = Trainer(
        model,
        arguments,
        train_dataset=_one_row(),
        optimizers=(optimizer, None),
        compute_loss_func=loss_function(job.objective),
    )
    return _trainer_bench(made, model, optimizer, job)


def trl(job: Job) -> Bench:
    """Run trl's SFTTrainer as it is on this device; for DPO its fused log-probabilities."""
    if job.objective == "dpo":
        return _trl_dpo(job)
    from trl import SFTConfig, SFTTrainer

    from hfcustom.families.internvl import tiny_processor

    model = stock_or_lora(job)
    optimizer = make_optimizer(model)
    arguments = SFTConfig(
        **_arguments(job),
        gradient_checkpointing=False,  # on by default in trl; here nobody recomputes
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    made = SFTTrainer(
        model,
        arguments,
        train_dataset=_one_row(),
        processing_class=tiny_processor(),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, None),
        compute_loss_func=loss_function(job.objective),
    )
    return _trainer_bench(made, model, optimizer, job)


def trl_good(job: Job) -> Bench:
    """Run trl as on a device with Triton: its head sees supervised positions only, folded by torch on a CPU."""
    import trl.trainer.utils

    if job.device == "cuda":
        raise UnavailableError("on this device trl takes its good path by itself; see trl")
    trl.trainer.utils._use_triton = lambda device: True  # only what add_fused_lm_head asks; the tiles stay in torch
    return VARIANTS["trl"](job)


def _trl_dpo(job: Job) -> Bench:
    from trl.trainer.utils import add_fused_lm_head

    model, batch = stock_model(job), batch_of(job)
    add_fused_lm_head(model)  # before peft, as its docstring asks
    model = _filled(stock_lora(model))
    return plain_bench(
        model,
        lambda: dpo_loss_of(model, lambda: model(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(-1)),
    )


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is saved
        "use_cpu": job.device == "cpu",
        "bf16": False,  # the weights have the job's type; nobody runs under autocast
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def _one_row() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])  # the trainers want one; they never read it


def _trainer_bench(made: Any, model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> Bench:
    batch = batch_of(job)
    made.current_gradient_accumulation_steps = 1  # Trainer.train() sets it

    def step() -> tuple[float, float]:
        num_items = made._get_num_items_in_batch([batch], batch["labels"].device)
        assert num_items == count_supervised(batch["labels"]), "Trainer counts otherwise than this benchmark"
        loss = made.training_step(model, dict(batch), num_items)
        return _finish(model, optimizer, loss)

    return Bench(model, optimizer, step)


def ours(job: Job) -> Bench:
    """Run hfcustom.train.train_step on the custom class."""
    return _ours(job, packed=False)


def ours_packed(job: Job) -> Bench:
    """Run the same on the rows packed into one, as fit() with packing does."""
    return _ours(job, packed=True)


def ours_cached(job: Job) -> Bench:
    """Run the same with the frozen tower's features read, as fit() with packing and cache_features does."""
    if not job.lora:
        raise UnavailableError("the tower is trained, so its features change with each step")
    return _ours(job, packed=True, cached=True)


def _ours(job: Job, packed: bool, cached: bool = False) -> Bench:
    import hfcustom
    from hfcustom.data.collate import Batch
    from hfcustom.data.packing import pack_rows
    from hfcustom.families.internvl import CustomInternVLForConditionalGeneration
    from hfcustom.losses import LOSSES
    from hfcustom.train import make_accelerator, train_step

    if job.objective not in LOSSES:
        raise UnavailableError(f"this hfcustom has no loss {job.objective!r}")
    config = CustomInternVLForConditionalGeneration.config_class.adopt(stock_config(job.task))
    config.loss = {job.objective: {"weight": 1.0, **OPTIONS.get(job.objective, {})}}
    model = _prepared(CustomInternVLForConditionalGeneration(config), job)
    model = _filled(hfcustom.lora(model, "language", rank=LORA_RANK) if job.lora else model)
    optimizer = make_optimizer(model)
    settings = hfcustom.TrainConfig(precision="fp32", max_grad_norm=MAX_GRAD_NORM)  # no autocast, as for all
    accelerator = make_accelerator(settings)
    batch = Batch(batch_of(job))
    if cached:
        batch.pictures = _known_pictures(model, job, batch)
    if packed:
        batch = pack_rows([batch], CustomInternVLForConditionalGeneration.merge_images)

    def step() -> tuple[float, float]:
        report = train_step(model, [batch], optimizer, accelerator, settings)
        return sum(float(value) for value in report.losses.values()), float(report.grad_norm)

    return Bench(model, optimizer, step)


def _known_pictures(model: nn.Module, job: Job, batch: dict[str, torch.Tensor]) -> list[Any]:
    """Give the model a cache for as long as it lives; return the pictures of the batch, which its first step fills in."""
    from hfcustom.cache.features import FeatureCache, Picture
    from hfcustom.cache.store import ShardStore
    from hfcustom.parts import unwrap

    core, opened = unwrap(model), ExitStack()
    folder = opened.enter_context(tempfile.TemporaryDirectory())
    opened.enter_context(FeatureCache(core, ShardStore(Path(folder), "features", 1e12)).installed())
    weakref.finalize(core, opened.close)
    return [Picture(str(at), job.task.image_tokens) for at in range(len(batch["pixel_values"]))]


OPTIONS: dict[str, dict[str, float]] = {
    "dpo": {"beta": BETA},
    "focal": {"gamma": GAMMA},
    "label_smoothing": {"epsilon": EPSILON},
}

VARIANTS: dict[str, Callable[[Job], Bench]] = {
    "ours": ours,
    "ours_packed": ours_packed,
    "ours_cached": ours_cached,
    "stock": stock,
    "trainer": trainer,
    "trl": trl,
    "trl_good": trl_good,
}
