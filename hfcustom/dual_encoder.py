"""CustomDualEncoder: the mixin that turns a stock contrastive encoder (CLIP, SigLIP) into one with seams.

images -> vision tower -> [vision features] -> pooling, projection -> [image embeddings] \\
                                                                      cosine * exp(logit_scale) + bias -> [loss]
texts  -> text tower   -> [text features]   -> pooling, projection -> [text embeddings]  /

    class CustomCLIPModel(CustomDualEncoder, CLIPModel): ...

With nothing overridden, logits are bit-equal to the stock class, and so are loss and gradients with loss="stock". Any other
loss has all processes' pairs for negatives, and in training the (N, N) similarities are never built
(hfcustom/losses/pairs.py). Loading is strict and saving is faithful, as for CustomVLM.
Letters: n pairs of a batch, N pairs of all processes, T text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils.generic import ModelOutput, can_return_tuple

from hfcustom import loading, seams
from hfcustom.base import CustomVLM, check_registered, named_tensors
from hfcustom.configuration import CustomConfig
from hfcustom.losses.chunked import accumulation_dtype
from hfcustom.losses.pairs import PAIR_LOSSES, find_pair_loss, gather_rows, pair_values
from hfcustom.naming import check_shape

ONE_VECTOR = "an image becomes one vector, so there are no tokens for a language model"


@dataclass(kw_only=True)
class CustomEncoderConfig(CustomConfig):
    """Mixin for a stock config: `loss`, and the bound of the learned scale, which CLIP's authors set to 100 and stock omits."""

    max_logit_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.max_logit_scale is not None and not self.max_logit_scale > 0:
            raise ValueError(f"max_logit_scale={self.max_logit_scale} must be above 0, for instance 100.")


class CustomDualEncoder(PreTrainedModel):
    """Mixin before a stock model of two towers; see the module docstring."""

    processor_class: ClassVar[type[ProcessorMixin]]
    output_class: ClassVar[type[ModelOutput]]  # what the stock forward returns
    image_head: ClassVar[str]  # path of the module whose output is the image embedding, (n, D)
    text_head: ClassVar[str]
    lacks: ClassVar[Mapping[str, str]] = {  # of the seams of CustomVLM
        "connector": ONE_VECTOR,
        "transform_embeddings": ONE_VECTOR,
        "transform_hidden_states": "there is no language model; a text's are its text features",
    }
    default_connector: ClassVar[None] = None
    default_loss: ClassVar[str] = "contrastive"
    _frozen_by_init: tuple[str, ...] = ()  # a vision language model remembers what its connector froze; here is none
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

    _stock_tensors: frozenset[str] | None = None  # until the stock part is built

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stock_class()
        for seam in cls.lacks:
            if seam in cls.__dict__:
                raise TypeError(f"{cls.__name__} overrides {seam}, which this family does not have: {cls.lacks[seam]}")

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """Return the class of transformers that this one customises; TypeError when there is none among the bases."""
        for base in cls.__mro__:
            if base.__module__.startswith("transformers.models."):
                return base
        raise TypeError(f"{cls.__name__} must inherit a model class of transformers after CustomDualEncoder.")

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
        self.post_init()

    def post_init(self) -> None:
        """Initialise new weights and put the seams on the parts; call it at the end of your own __init__."""
        super().post_init()
        if self._stock_tensors is not None:  # the stock __init__ calls this before there is anything to hook
            seams.install(cast(CustomVLM, self))

    def initialize_weights(self) -> None:
        """Initialise the stock modules as stock does; what a subclass adds starts as its __init__ made it."""
        if self._stock_tensors is not None and type(self)._init_weights is self.stock_class()._init_weights:
            for name in self.new_tensor_names():
                cast(Any, self.get_submodule(name.rpartition(".")[0]))._is_hf_initialized = True
        super().initialize_weights()

    def stock_tensor_names(self) -> frozenset[str]:
        """Return the names of the parameters and persistent buffers that the stock class builds."""
        assert self._stock_tensors is not None, "asked for inside the stock __init__"
        return self._stock_tensors

    def new_tensor_names(self) -> list[str]:
        """Return the names of the parameters and persistent buffers that this class adds to its stock parent."""
        return [name for name, _ in named_tensors(self) if name not in self.stock_tensor_names()]

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

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Return no methods that are stood in for."""
        return []

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
        check_shape(method, changed, given.shape)
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
        **kwargs: Any,
    ) -> Any:
        """Run the stock forward with the seams in effect; with `return_loss`, evaluate the configured loss.

        Row i of the images and row i of the texts are a pair, every other combination is none. In training the negatives
        are those of all processes, which must all call this, but not those of other micro-batches; the loss is this
        process's share times the number of processes, so that DDP's average of gradients is the gradient of the mean over
        all N pairs. Logits (n, n) are returned outside training, or with `return_logits=True`.
        """
        if not torch.compiler.is_compiling():
            seams.install(cast(CustomVLM, self))  # a part may have been replaced since
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        images = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if not return_loss:
            return super().forward(**texts, **images, **kwargs)
        self._bound_scale()
        if self.config.loss == "stock":
            return super().forward(**texts, **images, return_loss=True, **kwargs)
        if return_logits is None:
            return_logits = not self.training
        outputs = super().forward(**texts, **images, **kwargs) if return_logits else self._embed(texts, images, kwargs)
        loss = self.pair_loss(outputs.image_embeds, outputs.text_embeds)
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

    def pair_loss(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Return the configured loss of vectors of length 1, (n, D) and (n, D) -> (); see `forward` for what it is the mean of.

        Raises ValueError for an unknown loss, and for a number of images that is not that of the texts.
        """
        if len(image_embeds) != len(text_embeds):
            raise ValueError(
                f"The batch has {len(image_embeds)} images and {len(text_embeds)} texts; with return_loss=True text i is "
                "image i's own, so there must be as many."
            )
        own = torch.stack([image_embeds, text_embeds.to(image_embeds.device)], 1)  # (n, 2, D)
        everyone, start = gather_rows(own) if self.training else (own, 0)  # (N, 2, D)
        processes = torch.distributed.get_world_size() if everyone is not own else 1
        scale = self.logit_scale.to(accumulation_dtype(self.logit_scale)).exp()
        values = pair_values(find_pair_loss(self.config.loss), own, everyone, start, scale, self.logit_bias)  # (n,)
        return values.sum() * (processes / len(everyone))

    # ---- loading and saving -----------------------------------------------------------------------------------------

    @staticmethod
    def check_loss(spec: Any) -> None:
        """Raise ValueError for a loss that is not known."""
        find_pair_loss(spec)

    @classmethod
    def from_pretrained(cls, *args: Any, new_modules: Iterable[str] = (), **kwargs: Any) -> Any:
        """Load strictly, as `CustomVLM.from_pretrained`: a tensor missing from the checkpoint is a ValueError that names it."""
        return loading.load_strictly(cls, super().from_pretrained, *args, new_modules=new_modules, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as stock does; ValueError for a class that is not registered: what it saves would load as its parent."""
        check_registered(cast(CustomVLM, self))
        super().save_pretrained(save_directory, *args, **kwargs)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors of length 1, (n, D), float32 or better: a scale of 100 would magnify what 16 bits round away."""
    return F.normalize(vectors.to(accumulation_dtype(vectors)), dim=-1)
