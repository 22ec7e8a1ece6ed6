"""What the tests of contrastive encoders share: the encoders by enumeration, tiny models, batches of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from conftest import picture, stock_config

from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.registry import REGISTERED

WORDS = ("a cat", "two dogs and a cat", "3 of 9", "no", "a picture of number 7", "red", "left to right", "one row")


@dataclass(frozen=True)
class Encoder:
    """One encoder under test: its module, its classes, and tiny instances of them."""

    name: str
    module: ModuleType

    @cached_property
    def model_class(self) -> Any:
        return REGISTERED[f"custom_{self.name}"]

    @cached_property
    def stock_class(self) -> Any:
        return self.model_class.stock_class()

    @cached_property
    def processor(self) -> Any:
        return self.module.tiny_processor()

    def model(self, model_class: Any = None, seed: int = 0, **config: Any) -> Any:
        """Return a tiny model in eval mode, the same weights for the same seed, its scale and bias no special values."""
        model_class = model_class or self.model_class
        tiny = self.module.tiny_config()
        for name, value in config.items():
            assert hasattr(tiny, name), name
            setattr(tiny, name, value)
        if not issubclass(model_class, self.model_class):
            tiny = stock_config(model_class, tiny)
        torch.manual_seed(seed)
        model = model_class(tiny).eval()
        with torch.no_grad():
            model.logit_scale.fill_(1.7)
            if "logit_bias" in dict(model.named_parameters()):
                model.logit_bias.fill_(-1.1)
        return model

    def batch(self, rows: Any = range(4)) -> dict[str, torch.Tensor]:
        """Return pairs; texts are padded to one length, as SigLIP wants it, so that a row does not depend on others."""
        rows = list(rows)
        texts, images = [WORDS[row] for row in rows], [picture(row) for row in rows]
        return dict(
            self.processor(text=texts, images=images, padding="max_length", max_length=64, return_tensors="pt")
        )


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with its pixels in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def encoders() -> dict[str, Encoder]:
    """Return all encoders by name."""
    return {name: Encoder(name, load_encoder(name)) for name in encoder_names()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def naive_loss(name: str, images: torch.Tensor, texts: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    """Return a loss of N pairs by loops over them."""
    total = torch.zeros((), dtype=images.dtype)
    for i in range(len(images)):
        logits = [images[i] @ texts[j] * scale + bias for j in range(len(images))]
        back = [images[j] @ texts[i] * scale + bias for j in range(len(images))]
        if name == "contrastive":
            for row in (logits, back):
                total = total + (torch.stack(row).exp().sum().log() - row[i]) / 2
        else:
            for j, logit in enumerate(logits):
                total = total + torch.log1p(torch.exp(-logit if i == j else logit))
    return total / len(images)


def step(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run forward and backward in training mode; return the outputs and every gradient."""
    model.train()
    outputs = model(**batch, return_loss=True, **options)
    outputs.loss.backward()
    model.eval()
    return outputs, gradients(model)
