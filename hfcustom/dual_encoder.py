"""CustomDualEncoder: the mixin that turns a stock contrastive encoder (CLIP, SigLIP) into one with seams.

images -> vision tower -> [vision features] -> pooling, projection -> [image embeddings] \\
                                                                      cosine * exp(logit_scale) + bias -> [loss]
texts  -> text tower   -> [text features]   -> pooling, projection -> [text embeddings]  /

    class CustomCLIPModel(CustomDualEncoder, CLIPModel): ...

With nothing overridden, logits are bit-equal to the stock class, and so are loss and gradients with loss="stock". Any other
loss has the pairs of all processes for negatives, under fit() those of all micro-batches too, and in training the (N, N)
similarities are never built (hfcustom/losses/pairs.py). Loading is strict and saving is faithful, as for CustomVLM.
Letters: n pairs of a batch, N pairs that it is compared with, T text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForZeroShotImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils.generic import ModelOutput, can_return_tuple

from hfcustom import loading, seams
from hfcustom.configuration import CustomConfig
from hfcustom.custom_model import CustomModel, named_tensors
from hfcustom.losses import Divisors, Loss, LossValue, StepSummary, WeightedLoss
from hfcustom.losses.chunked import accumulation_dtype
from hfcustom.losses.pairs import (
    PAIR_LOSSES,
    PairLoss,
    count_matches,
    find_pair_loss,
    gather_rows,
    pair_values,
    share_of_step,
)

if TYPE_CHECKING:
    from hfcustom.data.captions import CaptionCollator

IMAGE_INPUTS = ("pixel_values", "interpolate_pos_encoding")  # of forward(); all others are the texts'
ONE_VECTOR = "an image becomes one vector, so there are no tokens for a language model"


@dataclass(kw_only=True)
class CustomEncoderConfig(CustomConfig):
    """Mixin for a stock config: `loss`, and the bound of the learned scale, which CLIP's authors set to 100 and stock omits."""

    max_logit_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.max_logit_scale is not None and not self.max_logit_scale > 0:
            raise ValueError(f"max_logit_scale={self.max_logit_scale} must be above 0, for instance 100.")


class CustomDualEncoder(CustomModel):
    """Mixin before a stock model of two towers; see the module docstring."""

    auto_classes = (AutoModel, AutoModelForZeroShotImageClassification)
    task_table = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    output_class: ClassVar[type[ModelOutput]]  # what the stock forward returns
    image_head: ClassVar[str]  # path of the module whose output is the image embedding, (n, D)
    text_head: ClassVar[str]
    text_padding: ClassVar[Literal["longest", "max_length"]] = "longest"  # what the checkpoints were trained with
    lacks: ClassVar[Mapping[str, str]] = {  # of the seams of CustomVLM
        "connector": ONE_VECTOR,
        "transform_embeddings": ONE_VECTOR,
        "transform_hidden_states": "there is no language model; a text's are its text features",
    }
    default_loss: ClassVar[str] = "contrastive"
    accepts_loss_kwargs = False  # transformers.Trainer then averages micro-batches, each with negatives of its own
    logit_scale: Any  # of the stock class, as the next three; a loss with a bias adds one where stock has none
    logit_bias: Any
    get_image_features: Any
    get_text_features: Any

    # ---- the seams: what a user overrides ---------------------------------------------------------------------------

    def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
        """Change the vision tower's output before it is normed and pooled: (n, patches, D_vision) -> the same shape."""
        return features

    def transform_text_features(self, features: torch.Tensor) -> torch.Tensor:
        """Change the text tower's output before it is normed and pooled: (n, T, D_text) -> the same shape."""
        return features

    def transform_image_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Change the images' vectors before they are normalised: (n, D) -> the same shape."""
        return embeddings

    def transform_text_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Change the texts' vectors before they are normalised: (n, D) -> the same shape."""
        return embeddings

    # The loss seam is `default_loss` or `config.loss`, a name in hfcustom.losses.pairs.PAIR_LOSSES, or "stock".

    # ---- construction -----------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stock_class()
        for seam in cls.lacks:
            if seam in cls.__dict__:
                raise TypeError(f"{cls.__name__} overrides {seam}, which this family does not have: {cls.lacks[seam]}")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = cast(Any, self.config_class).adopt(config)  # saved as a parent's, it would load as the parent
        if config.connector is not None:
            raise ValueError(f"connector={config.connector!r}: this family takes none: {self.lacks['connector']}")
        with loading.stock_device():
            super().__init__(config, *args, **kwargs)
        self._stock_tensors = frozenset(name for name, _ in named_tensors(self))
        config.loss = self.default_loss if config.loss is None else config.loss
        if "logit_bias" not in self._stock_tensors:
            loss = PAIR_LOSSES.get(str(config.loss))  # a model computes without the file of the loss it was trained on
            bias = None if loss is None or loss.bias is None else nn.Parameter(torch.tensor(loss.bias))
            self.register_parameter("logit_bias", bias)
        self.loss_values: dict[str, LossValue] = {}  # what the last forward of a step under fit() computed
        self.loss_metrics: dict[str, torch.Tensor] = {}  # and recorded besides: sum and count, (2,) each
        self.loss_step: int | None = None  # the optimiser step
        self.companions: dict[str, CustomModel] = {}  # frozen models beside this one: none
        self.post_init()

    def overridden_seams(self) -> list[str]:
        """Return the seams that differ from the stock class, in words, for the start-up facts."""
        own = [name for name in vars(CustomDualEncoder) if name.startswith("transform_")]
        found = [name for name in own if getattr(type(self), name) is not getattr(CustomDualEncoder, name)]
        return found + ([f"loss {self.config.loss!r}"] if self.config.loss != self.default_loss else [])

    # ---- where the seams are ----------------------------------------------------------------------------------------

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Return (module path, hook registrar, method, options) for each seam."""
        places = [
            ("vision_model.encoder", "_at_vision_output"),
            ("text_model.encoder", "_at_text_output"),
            (self.image_head, "_at_image_embeddings"),
            (self.text_head, "_at_text_embeddings"),
        ]
        return [(path, "register_forward_hook", method, {}) for path, method in places]

    def _at_vision_output(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        outputs.last_hidden_state = self._transformed("transform_vision_features", outputs.last_hidden_state)
        return outputs

    def _at_text_output(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        outputs.last_hidden_state = self._transformed("transform_text_features", outputs.last_hidden_state)
        return outputs

    def _at_image_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self._transformed("transform_image_embeddings", output)

    def _at_text_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self._transformed("transform_text_embeddings", output)

    def _transformed(self, method: str, given: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = getattr(self, method)(given)
        seams.check_kept(method, changed, given)
        return changed

    # ---- forward ----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        loss_divisors: Divisors | None = None,
        loss_counts: Mapping[str, float] | None = None,
        step_summaries: Mapping[str, StepSummary] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the stock forward with the seams in effect; with `return_loss` or `loss_divisors`, evaluate the configured loss.

        Row i of the images and row i of the texts are a pair, every other combination is none. In training the negatives
        are those of all processes, which must all call this, but not those of other micro-batches; the loss is this
        process's share times the number of processes, so that DDP's average of gradients is the gradient of the mean over
        all N pairs. With `loss_divisors`, the pairs of a whole optimiser step, the loss is this batch's share of the step's
        mean, and `step_summaries` (`loss_summaries` of every batch) bring the negatives: losses and gradients of the
        batches add up to those of one. `loss_counts`, which fit() passes to every model, say nothing new here.
        Logits (n, n) are returned outside training, or with `return_logits=True`.
        """
        if not torch.compiler.is_compiling():
            seams.install(self)  # a part may have been replaced since
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        images = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if not return_loss and loss_divisors is None:
            return super().forward(**texts, **images, **kwargs)
        self._bound_scale()
        if self.config.loss == "stock":
            return super().forward(**texts, **images, return_loss=True, **kwargs)
        if return_logits is None:
            return_logits = not self.training
        outputs = super().forward(**texts, **images, **kwargs) if return_logits else self._embed(texts, images, kwargs)
        loss = self.pair_loss(outputs.image_embeds, outputs.text_embeds, loss_divisors, step_summaries)
        return self.output_class(**{**outputs, "loss": loss})

    def _embed(self, texts: dict[str, Any], images: dict[str, Any], both: dict[str, Any]) -> Any:
        vision = self.get_image_features(**images, **both, return_dict=True)
        text = self.get_text_features(**texts, **both, return_dict=True)
        return self.output_class(
            text_embeds=_unit(text.pooler_output),
            image_embeds=_unit(vision.pooler_output),
            text_model_output=text,
            vision_model_output=vision,
        )

    def _bound_scale(self) -> None:
        """Hold the scale at or below its bound, which an optimiser step may have left behind."""
        if self.training and self.config.max_logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def pair_loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        divisors: Divisors | None = None,
        summaries: Mapping[str, StepSummary] | None = None,
    ) -> torch.Tensor:
        """Return the configured loss of vectors of length 1, (n, D) and (n, D) -> (); see `forward` for what it is the mean of.

        Raises ValueError for an unknown loss, and for a number of images that is not that of the texts.
        """
        loss, own = find_pair_loss(self.config.loss), _pairs(image_embeds, text_embeds)  # (n, 2, D)
        scale = self.logit_scale.to(accumulation_dtype(self.logit_scale)).exp()
        step, processes = (summaries or {}).get(loss.name), 1
        if step is None:
            everyone, start = gather_rows(own) if self.training else (own, 0)  # (N, 2, D)
            processes = torch.distributed.get_world_size() if everyone is not own else 1
            total = pair_values(loss, own, everyone, start, scale, self.logit_bias).sum()
        else:
            everyone, start = step.with_own(own), step.start  # (N, 2, D)
            total = share_of_step(loss, own, everyone, start, scale, self.logit_bias)
        if divisors is None:
            return total * (processes / len(everyone))
        mean = total / divisors[loss.name]
        self.loss_values = {loss.name: LossValue(total.detach(), len(own), 1.0, mean.detach())}
        matches = count_matches(own, everyone, start)
        self.loss_metrics = {f"{loss.name}_accuracy": torch.stack([matches, matches.new_tensor(len(own))]).float()}
        return mean

    # ---- a whole step, as fit() asks about it -----------------------------------------------------------------------

    def make_collator(
        self, processor: Any, max_length: int | None = None, min_pixels: int | None = None
    ) -> CaptionCollator:
        """Return what turns rows of an image and its text into this model's batches."""
        from hfcustom.data.captions import CaptionCollator  # for training, which a bundle leaves to hfcustom

        options = {} if min_pixels is None else {"min_pixels": min_pixels}
        length = self.config.text_config.max_position_embeddings
        return CaptionCollator(processor, length, max_length, padding=self.text_padding, **options)

    def losses(self) -> list[WeightedLoss]:
        """Return the configured loss as a term over the rows of a step; ValueError for one that is unknown, and for "stock"."""
        if self.config.loss == "stock":
            raise ValueError(
                "loss='stock' compares the pairs of one forward, so it would change with micro_batch_size and the number of "
                f"processes; {self.default_loss!r} is the same formula over the whole step."
            )
        loss: PairLoss = find_pair_loss(self.config.loss)
        return [WeightedLoss(Loss(loss.name, loss.function, "term", "rows", summary=CustomDualEncoder.embed), 1.0)]

    def loss_counts(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return the pairs of several batches, by the name of the loss: what forward() wants as `loss_divisors`."""
        return {self.losses()[0].loss.name: sum(len(batch["pixel_values"]) for batch in batches)}

    def loss_summaries(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the vectors of a batch's pairs, which are other batches' negatives: {name: (n, 2, D)}."""
        with torch.no_grad():
            return {self.losses()[0].loss.name: self.embed(batch)}

    def embed(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the vectors of length 1 of a batch's pairs, image and text: (n, 2, D)."""
        seams.install(self)
        images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        texts = {name: value for name, value in batch.items() if name not in IMAGE_INPUTS}
        outputs = self._embed(texts, images, {})
        return _pairs(outputs.image_embeds, outputs.text_embeds)

    @staticmethod
    def check_loss(spec: Any) -> None:
        """Raise ValueError for a loss that is not known."""
        find_pair_loss(spec)


def _pairs(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return image and text of each pair together, (n, 2, D)."""
    if len(image_embeds) != len(text_embeds):
        raise ValueError(
            f"The batch has {len(image_embeds)} images and {len(text_embeds)} texts; with return_loss=True text i is "
            "image i's own, so there must be as many."
        )
    return torch.stack([image_embeds, text_embeds.to(image_embeds.device)], 1)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors of length 1, (n, D), float32 or better: a scale of 100 would magnify what 16 bits round away."""
    return F.normalize(vectors.to(accumulation_dtype(vectors)), dim=-1)
