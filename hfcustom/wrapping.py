"""wrap(): losses, LoRA, freezing and 8 bits around a model class that is not transformers' own.

    model = AutoModel.from_pretrained("org/model", trust_remote_code=True)
    model = hfcustom.wrap(model, loss={"cross_entropy": 1.0, "z_loss": 1e-4})

The model keeps its weights, its forward and its way of saving; forward() with labels then evaluates hfcustom's losses
from what reaches the head, so that training builds no logits, and fit(), lora(), freeze() and the tables of parts work
through the part map alone. The other seams (vision features, connector, embeddings, hidden states) need a class of the
family's own: hfcustom/families/.
Letters: B rows, T text tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hfcustom import losses, parts, seams
from hfcustom.base import SEAM_METHODS, CustomVLM
from hfcustom.losses.frozen import evaluating

Model = TypeVar("Model", bound=PreTrainedModel)

REASON = (
    "wrap() leaves the model's forward alone; subclass a family of hfcustom.families to change what lies inside it."
)
GIVEN_LABELS = (
    "given_labels"  # in a context's batch: labels as they came, where the model puts its images between them
)
TOLERANCE = 1e-3  # of the largest logit, between the model's own and the head applied to what reached it


class WrappedVLM(CustomVLM):
    """What wrap() puts before a model's own class."""

    lacks: ClassVar[Mapping[str, str]] = dict.fromkeys((*SEAM_METHODS, "connector"), REASON)
    no_packing = "wrap() knows nothing of how the model's own forward attends"
    _own_class: ClassVar[type[PreTrainedModel]] = PreTrainedModel
    _image_token: int | None = None
    _paths: Mapping[str, str] = {}  # what wrap() was told of "vision" and "language"
    _head_is_checked = False
    _splices = False  # its forward lays rows out anew: one mark in the text becomes all tokens of an image
    _keeps_padding = False  # it leaves padding on the left where it is

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """Return the class that was wrapped."""
        return cls._own_class

    @property
    def placeholder_token_id(self) -> int | None:
        """The id that stands for one image token, None where neither wrap() nor the config says it."""
        known = (self._image_token, *(getattr(self.config, name, None) for name in IMAGE_TOKEN_FIELDS))
        return next((int(token) for token in known if token is not None), None)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder of a modality; of images, the one that wrap() was told."""
        told = self._paths.get("vision") if modality == "image" else None
        found: nn.Module = super().get_encoder(modality) if told is None else self.get_submodule(told)
        return found

    def get_decoder(self) -> nn.Module:
        """Return the language model, the one that wrap() was told."""
        told = self._paths.get("language")
        found: nn.Module = super().get_decoder() if told is None else self.get_submodule(told)
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head: the class's own answer, else the language model's."""
        head: nn.Module | None = super().get_output_embeddings()
        return parts.head_of_language_model(self) if head is None else head

    def _adopt(self, loss: str | Mapping[str, Any], image_token_id: int | None, paths: Mapping[str, str]) -> None:
        """Take over a finished model: what CustomVLM's __init__ would have done."""
        self._image_token, self._paths, self.custom_connector = image_token_id, paths, None
        self._stock_tensors = frozenset({*dict(self.named_parameters()), *dict(self.named_buffers())})
        try:
            self._stock_parts = parts.find_parts(self)
        except ValueError as error:
            raise ValueError(
                f"{error} Name it: wrap(model, vision='path.of.encoder', language='path.of.decoder')."
            ) from error
        if not self._stock_parts.paths["head"]:
            raise ValueError(
                f"{self._own_class.__name__} has no output embeddings, so no loss can be evaluated from its head."
            )
        self._start_losses()
        self.config.loss, self.config.connector = dict(loss) if isinstance(loss, Mapping) else loss, None
        self.losses()
        seams.install(self)

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Look at what reaches the head, and at nothing else."""
        head = self.stock_parts().paths["head"][0]
        return [(head, "register_forward_pre_hook", "_at_head_input", {})]

    def _at_head_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._pass is not None:
            self._pass.hidden_states = args[0]
        return super()._at_head_input(module, args)

    def loss_context(
        self, batch: Mapping[str, Any], labels: torch.Tensor, return_logits: bool = False
    ) -> losses.LossContext:
        """Run the model's own forward up to its head and return all that a loss may look at."""
        labels = batch.get(GIVEN_LABELS, labels)  # a reference is shown the batch of another context
        call = self.stock_inputs({name: value for name, value in batch.items() if name != GIVEN_LABELS})
        if not self._head_is_checked:
            self._check_head(call)
        self._splices = self._splices or self._moves_padding(call, labels)
        if not self._splices:
            outputs, hidden_states = self._run(call, skips_head=not return_logits)
            self._splices = hidden_states.shape[:2] != labels.shape
        if self._splices:
            return self._spliced_context(batch, call, labels, return_logits)
        token = self.placeholder_token_id
        image_mask = batch["input_ids"] == token if token is not None and "input_ids" in batch else None
        return losses.LossContext(self, {**batch, "labels": labels}, labels, hidden_states, outputs, image_mask)

    def _moves_padding(self, call: Mapping[str, Any], labels: torch.Tensor) -> bool:
        """Whether labels are elsewhere once padding on the left is gone: asked once, of the first batch that has some."""
        mask = call.get("attention_mask")
        if self._keeps_padding or mask is None or mask.shape != labels.shape or bool(mask[:, 0].all()):
            return False
        with torch.no_grad(), evaluating(self), LossInputs() as caught:
            _, hidden_states = self._run({**call, "labels": labels}, skips_head=False)
        found = caught.labels(hidden_states.shape[:2])
        self._keeps_padding = found is None or torch.equal(found[:, 1:], labels[:, 1:].to(found.device))
        return not self._keeps_padding

    def _spliced_context(
        self, batch: Mapping[str, Any], call: Mapping[str, Any], labels: torch.Tensor, return_logits: bool
    ) -> losses.LossContext:
        """Return the context of a model that splices images into the text: it knows where its labels go, (B, T) -> (B, T')."""
        with LossInputs() as caught:
            outputs, hidden_states = self._run({**call, "labels": labels}, skips_head=not return_logits)
        found = caught.labels(hidden_states.shape[:2])
        if found is None:
            raise ValueError(
                f"{self._own_class.__name__}.forward made {tuple(hidden_states.shape[:2])} positions of labels "
                f"{tuple(labels.shape)} and did not hand its own labels of that shape to cross_entropy. Pass inputs_embeds and "
                "labels that have the images in them already, or wrap a subclass whose forward does not lengthen rows."
            )
        batch = {**batch, "labels": found, GIVEN_LABELS: labels}
        return losses.LossContext(self, batch, found, hidden_states, outputs)

    def _run(self, call: Mapping[str, Any], skips_head: bool) -> tuple[Any, torch.Tensor]:
        self._pass = passed = seams.ForwardPass(records=True, skips_head=skips_head)
        if "return_dict" in inspect.signature(self._own_class.forward).parameters:  # left out, some return a tuple
            call = {**call, "return_dict": True}
        try:
            outputs = self._own_class.forward(self, **call)
        finally:
            self._pass = None
        name = self._own_class.__name__
        if passed.hidden_states is None:
            raise ValueError(
                f"{name}.forward did not call its head {self.stock_parts().paths['head'][0]}: nothing to train on."
            )
        if not isinstance(outputs, ModelOutput):
            raise TypeError(
                f"{name}.forward returned a {type(outputs).__name__}; wrap() needs a ModelOutput with logits."
            )
        return outputs, passed.hidden_states

    def _check_head(self, call: Mapping[str, Any]) -> None:
        """Compare once, on the first batch, the model's logits with the head applied to what reached it."""
        with torch.no_grad(), evaluating(self):
            outputs, hidden_states = self._run(call, skips_head=False)
            expected = self.compute_logits(hidden_states[:, -8:])  # (B, 8, V) are enough
        given = outputs.logits[:, -8:]
        if given.shape != expected.shape or float((given - expected).abs().max()) > TOLERANCE * float(
            given.abs().max()
        ):
            raise ValueError(
                f"{self._own_class.__name__} changes its logits after the head (scaling, capping, a mask), so a loss from the "
                "head alone would be another: wrap a subclass whose compute_logits(hidden_states) does the same."
            )
        self._head_is_checked = True

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the wrapped class does: what is written is its own checkpoint."""
        self._own_class.save_pretrained(self, save_directory, *args, **kwargs)


class LossInputs(TorchFunctionMode):
    """While it is entered, cross_entropy keeps the targets it is given and returns 0."""

    targets: torch.Tensor | None = None  # (B * T',) or (B * (T' - 1),): each position's next token

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, all but one as it is."""
        kwargs = kwargs or {}
        if function is not nn.functional.cross_entropy:
            return function(*args, **kwargs)
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        self.targets = given["target"]
        return given["input"].new_zeros(())

    def labels(self, shape: torch.Size) -> torch.Tensor | None:
        """Return the labels (B, T') whose targets were kept, None where they are none of that shape."""
        rows, length = shape
        found = self.targets
        if found is None or found.numel() not in (rows * length, rows * (length - 1)):
            return None
        found = found.reshape(rows, -1)[:, : length - 1]  # (B, T' - 1)
        return nn.functional.pad(found, (1, 0), value=losses.IGNORE)


IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "img_context_token_id", "image_patch_id")


def wrap(
    model: Model,
    loss: str | Mapping[str, Any] = "cross_entropy",
    *,
    image_token_id: int | None = None,
    vision: str | None = None,
    language: str | None = None,
) -> Model:
    """Give a model of any class hfcustom's losses in place, and return it; LoRA, freezing and 8 bits then work on it.

    `loss` is as in a custom config; `image_token_id` is what stands for an image token where the config does not say, `vision` and
    `language` are the paths of the image encoder and the decoder where their names are unusual. A model may put an image's
    tokens in the place of one mark while it runs, as LLaVA's own code does, if it hands the labels that it makes of those it
    is given to cross_entropy. Raises TypeError for what is no
    PreTrainedModel or is custom already, ValueError when no image encoder, decoder or head can be found, and at the first batch
    when the logits are not the head's own.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"wrap() takes a PreTrainedModel, not the {type(model).__name__}; load it with from_pretrained."
        )
    if isinstance(model, CustomVLM):
        raise TypeError(f"{type(model).__name__} has hfcustom's losses already; set model.config.loss.")
    own = type(model)
    paths = {part: path for part, path in (("vision", vision), ("language", language)) if path is not None}
    for part, path in paths.items():
        if path not in dict(model.named_modules()):
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"{part}={path!r} is no module of {own.__name__}, which has {children}.")
    namespace = {
        "_own_class": own,
        "__module__": own.__module__,
        "__doc__": own.__doc__,
        "config_class": own.config_class,
    }
    model.__class__ = type(own.__name__, (WrappedVLM, own), namespace)
    try:
        cast(WrappedVLM, model)._adopt(loss, image_token_id, paths)
    except Exception:
        model.__class__ = own
        raise
    return model
