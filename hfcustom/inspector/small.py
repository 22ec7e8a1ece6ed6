"""Questions that a model must answer, put to the family's tiny one: does it take what the processor makes, and what does a
token of it see?

Letters: B rows, T text tokens, P crops, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from hfcustom.doctor.patient import move_off_start
from hfcustom.inspector.target import Subject

FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class SmallModel:
    """The target's class with the family's tiny sizes, and its connector; the family's own where that cannot be built small."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model_class: Any = subject.model_class
        self.connector = None if subject.is_encoder else subject.skeleton().config.connector
        self.is_targets_own = True
        try:
            self.model()
            self.processor()
        except FAULTS:
            self.model_class, self.connector, self.is_targets_own = subject.family_class, None, False

    def processor(self) -> Any:
        """Return a fresh tiny processor, which writes as many tokens as the connector makes."""
        processor = self.subject.module.tiny_processor()
        return processor if self.connector is None else self.model().match_processor(processor)

    def model(self, namespace: dict[str, Any] | None = None, **config: Any) -> Any:
        """Return the tiny model in eval mode, the same weights each time, with these fields of its config."""
        tiny = self.model_class.config_class.adopt(self.subject.module.tiny_config())
        for name, value in {"connector": self.connector, **config}.items():
            setattr(tiny, name, value)
        members = {"__module__": __name__, **(namespace or {})}
        model_class = type(self.model_class.__name__, (self.model_class,), members) if namespace else self.model_class
        torch.manual_seed(0)
        model = model_class(tiny).eval()
        wake: Callable[[Any], None] | None = vars(self.subject.module).get("wake")
        if wake is not None:  # what starts at zero
            wake(model)
        move_off_start(model)
        return model

    def accepts(self, processor: Any, picture: Image.Image, config: dict[str, Any], **settings: Any) -> str:
        """Return "" where the model takes what a processor makes of a picture, else what it says."""
        try:
            text = [processor.image_token + " what"]
            features = processor(text=text, images=[[picture]], return_tensors="pt", **settings)
            with torch.no_grad():
                self.model(**config)(**features)
        except FAULTS as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return ""

    def token_sees_all(self) -> bool | None:
        """Whether each token of an image is made of all its patches (queries do so); None where that cannot be asked.

        Gradients of a token's embedding reach the patches that its connector reads.
        """
        lacks = self.model_class.lacks
        if not self.is_targets_own or "transform_vision_features" in lacks or "transform_embeddings" in lacks:
            return None
        seen: dict[str, Any] = {"features": []}

        def transform_vision_features(model: Any, features: torch.Tensor) -> torch.Tensor:
            seen["features"].append(features.detach().requires_grad_())
            return seen["features"][-1]

        def transform_embeddings(model: Any, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            seen["tokens"] = embeddings[image_mask]  # (N, D)
            return embeddings

        model = self.model({f.__name__: f for f in (transform_vision_features, transform_embeddings)})
        processor = self.processor()
        picture = Image.effect_noise((64, 64), 64).convert("RGB")
        model(**processor(text=[processor.image_token + " what"], images=[[picture]], return_tensors="pt"))
        if not len(seen.get("tokens", ())):
            return None
        token = seen["tokens"][0] @ torch.randn(seen["tokens"].shape[-1])
        found = torch.autograd.grad(token, seen["features"], allow_unused=True)
        for gradient in (one for one in found if one is not None and bool(one.any())):
            crop = gradient.flatten(0, -3)[0] if gradient.ndim > 2 else gradient  # (patches, D)
            return len(crop) > 4 and bool((crop != 0).any(-1).all())
        return None
