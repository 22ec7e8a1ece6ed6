"""trl's fused head, read from a custom model's own forward: log probabilities of labels, as trl's DPOTrainer asks for them.

model(**inputs, labels=labels, fused_lm_head=True) -> trl's FusedCausalLMOutput, every field (B, T - 1). trl runs the inner
model and a head of its own in chunks (trl 1.16, trl/trainer/utils.py, add_fused_lm_head); here the class's forward makes
the logits, so all that it changes counts, and the memory is that of (B, T, V) logits.
Letters: B rows, T text tokens, V vocabulary, M tokens that carry a label.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

IGNORED = -100


def read_from_forward(core: Any) -> None:
    """Let `fused_lm_head=True` be answered from a model's own forward; without it a call stays what it is."""
    hooked = vars(core).get("forward")  # accelerate's, of a device map
    core.forward = MethodType(_make_forward(hooked), core)


def is_read_from_forward(core: Any) -> bool:
    """Whether `read_from_forward` was here, under whatever accelerate has put around the forward since."""
    layer: Any = vars(core).get("forward")
    while layer is not None:
        layer = layer.__func__ if isinstance(layer, MethodType) else layer
        if getattr(layer, "__qualname__", "").startswith(_make_forward.__qualname__):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def _make_forward(hooked: Callable[..., Any] | None) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        run = MethodType(type(self).forward, self) if hooked is None else hooked  # a deep copy runs its own weights
        if not fused_lm_head:
            return run(*args, **inputs)
        labels = inputs.pop("labels")
        if inputs.pop("shift_labels", None) is not None:
            raise ValueError(
                "Labels are shifted beforehand under context parallelism, which honour_model() does not know."
            )
        divisor = inputs.pop("num_items_in_batch", None)
        outputs = run(*args, **{**inputs, "return_dict": True})
        if inputs.get("output_router_logits") and outputs.get("aux_loss") is None:
            raise ValueError(
                f"{type(self).__name__}.forward returns no aux_loss, which trl wants of a mixture of experts; set "
                "router_aux_loss_coef=0.0 in the trainer's arguments."
            )
        return score(outputs, labels, divisor)

    return forward


def score(outputs: Any, labels: torch.Tensor, divisor: torch.Tensor | int | None = None) -> Any:
    """Return what trl wants to know of each label, from logits (B, T, V) and labels (B, T): fields of (B, T - 1)."""
    from trl.trainer.utils import FusedCausalLMOutput

    wanted = labels[:, 1:].to(outputs.logits.device)  # (B, T - 1)
    mask = wanted != IGNORED
    logits, targets = outputs.logits[:, :-1][mask].float(), wanted[mask]  # (M, V), (M,)
    log_p = logits.log_softmax(-1)

    def placed(
        values: torch.Tensor,
    ) -> torch.Tensor:  # zero where there is no label; stays connected when none has one
        return values.new_zeros(mask.shape).masked_scatter(mask, values)  # (M,) -> (B, T - 1)

    log_probs = placed(log_p.gather(-1, targets[:, None])[:, 0])
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)
    with torch.no_grad():
        facts = {
            "entropy": placed(-(log_p.exp() * log_p).sum(-1)),
            "log_sum_sq_probs": placed((2 * log_p).logsumexp(-1)),
            "mean_logits": placed(logits.mean(-1)),
            "is_top1": placed(logits.argmax(-1) == targets),
        }
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=outputs.get("aux_loss"), **facts
    )
