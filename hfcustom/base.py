"""CustomVLM: the mixin that turns a stock vision-language model into one with five seams.

    class CustomInternVLForConditionalGeneration(CustomVLM, InternVLForConditionalGeneration): ...

Override a transform_* method, name a connector, name a loss. With nothing overridden, logits are bit-equal to the stock
class. The stock parent computes; the seams intervene at the borders of its parts (hfcustom/seams.py); the loss is
evaluated from hidden states, so that training never builds the (B, T, V) logits (hfcustom/losses/). Loading is
strict and saving is faithful (hfcustom/custom_model.py).
Letters: B rows, T text tokens, N image tokens, P crops, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.doc import copy_func
from transformers.utils.generic import can_return_tuple

from hfcustom import loading, losses, parts, seams
from hfcustom.configuration import share_key_conversion
from hfcustom.custom_model import named_tensors
from hfcustom.processors import ConnectedProcessor, match_connector
from hfcustom.seam_hooks import SeamHooks

SEAM_METHODS = ("transform_vision_features", "transform_embeddings", "transform_hidden_states")


class CustomVLM(SeamHooks):
    """Mixin before a stock `...ForConditionalGeneration` class; see the module docstring."""

    auto_classes = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    task_table = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    placeholder_field: ClassVar[str]  # the processor's attribute that holds the placeholders of one image crop
    corrections: ClassVar[Mapping[str, str]] = {}  # config field, off by default -> what of stock it corrects
    default_loss: ClassVar[str | dict[str, Any]] = "cross_entropy"
    _input_names: ClassVar[tuple[str, ...]]
    accepts_loss_kwargs = True  # transformers.Trainer then passes num_items_in_batch and does not divide again

    # ---- the five seams: what a user overrides ----------------------------------------------------------------------

    def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
        """Change the vision tower's output before the connector: (P, patches, D_vision) -> the same shape."""
        return features

    def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
        """Change the merged embeddings before the language model: (B, T, D), image_mask (B, T) -> (B, T, D).

        Cached generation shows this only the new tokens, so a change that mixes positions would differ there.
        """
        return embeddings

    def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Change the language model's output before the head: (B, T, D) -> (B, T, D); must not mix positions either."""
        return hidden_states

    # The connector seam is `default_connector` or `config.connector` (hfcustom/connectors.py), the loss seam is
    # `default_loss` or `config.loss` (hfcustom/losses/). The config wins; both are written into it.

    # ---- construction -----------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        share_key_conversion(stock.__name__, cls.__name__)  # some families' goes by the class, not by the model_type
        for seam in cls.lacks:
            if getattr(cls, seam, None) is not getattr(CustomVLM, seam, None):
                raise TypeError(f"{cls.__name__} overrides {seam}, which this family does not have: {cls.lacks[seam]}")
        cls._input_names = tuple(inspect.signature(stock.forward).parameters)[1:]
        if (
            "forward" not in cls.__dict__
        ):  # inherited, perhaps from a mixin; its signature is to be changed for this class
            setattr(cls, "forward", copy_func(cls.forward))  # noqa: B010  (mypy forbids assigning to a method)
        _show_inputs(cls.forward, stock.forward)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = cast(Any, self.config_class).adopt(config)  # saved as a parent's, it would load as the parent
        with loading.stock_device():
            super().__init__(config, *args, **kwargs)
        self._stock_tensors = frozenset(name for name, _ in named_tensors(self))
        self._stock_parts = parts.find_parts(self)
        self._start_losses()
        config.connector = copy.deepcopy(self.default_connector if config.connector is None else config.connector)
        config.loss = copy.deepcopy(self.default_loss if config.loss is None else config.loss)
        self.custom_connector = self.make_connector()
        self.post_init()

    def _start_losses(self) -> None:
        stock = self.stock_class().__name__  # transformers reads the kind of loss out of the class name
        self.loss_type = next((kind for kind in LOSS_MAPPING if kind in stock), "ForCausalLM")
        self.loss_values: dict[str, losses.LossValue] = {}  # what the last forward with labels computed, by name
        self.loss_metrics: dict[str, torch.Tensor] = {}  # what its terms recorded besides: sum and count, (2,) each
        self.loss_step: int | None = None  # the optimiser step, for scheduled weights; fit() and LossCallback set it
        self.step_plan: list[dict[str, Any]] = []  # of micro-batches to come, where only LossCallback sees a step
        self.companions: dict[str, CustomVLM] = {}  # frozen models beside this one, no part of it
        self._labels_checked = False  # against the head's width
        self._parsed_losses: tuple[Any, list[losses.WeightedLoss]] | None = None
        self._pass: seams.ForwardPass | None = None

    def overridden_seams(self) -> list[str]:
        """Return the seams that differ from the stock class, in words, for the start-up facts."""
        found = [name for name in SEAM_METHODS if getattr(type(self), name) is not getattr(CustomVLM, name)]
        if self.custom_connector is not None:
            found.append(f"connector {self.config.connector!r}")
        if self.config.loss != "cross_entropy":
            found.append(f"loss {self.config.loss!r}")
        return found

    @staticmethod
    def check_loss(spec: Any) -> None:
        """Raise ValueError for a loss that is not known."""
        losses.parse_losses(spec)

    # ---- forward ----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_divisors: losses.Divisors | None = None,
        loss_counts: Mapping[str, float] | None = None,
        step_summaries: Mapping[str, losses.StepSummary] | None = None,
        return_logits: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the stock forward with the seams in effect; with labels, evaluate the configured loss.

        `loss_divisors` (one count a loss, as `loss_counts` finds them) or `num_items_in_batch` (supervised tokens, as
        transformers.Trainer passes it) are counted over the whole optimiser step; without either, this batch is the
        step. `loss_counts` are this batch's own, where they are known; `step_summaries` are for terms across the rows of a
        step (`loss_summaries`). Logits are returned outside training, with `logits_to_keep`, or with `return_logits=True`.
        """
        if not torch.compiler.is_compiling():
            seams.install(self)  # a part may have been replaced since
        inputs.update(zip(self._input_names, args, strict=False))
        labels = inputs.pop("labels", labels)
        if labels is None:
            call = self.stock_inputs(inputs)
            with self.stock_pass(call, inputs):
                return super().forward(**call)
        head = self.loss_head().linear
        if head is not None and not torch.compiler.is_compiling() and (labels.is_cpu or not self._labels_checked):
            losses.check_labels(labels, head.out_features)
            self._labels_checked = True  # asking a GPU takes a wait
        if self.config.loss == "stock":
            losses.refuse_preference(inputs)
            return self._forward_stock(self.stock_inputs(inputs), labels, num_items_in_batch, loss_divisors)
        if return_logits is None:
            return_logits = not self.training or "logits_to_keep" in inputs
        context = self.loss_context(inputs, labels, return_logits)
        if self.training and num_items_in_batch is not None and self.step_plan:  # LossCallback has seen the whole step
            loss_divisors, loss_counts, step_summaries = self.step_plan.pop(0).values()
        elif self.training and num_items_in_batch is not None and not step_summaries:
            losses.check_whole_step(self.losses(), labels, num_items_in_batch)
        context.summaries = step_summaries or {}
        if loss_divisors is None and num_items_in_batch is not None:
            loss_divisors = losses.spread_items(num_items_in_batch, labels, self.loss_counts([context.batch]))
        self._check_schedule()
        loss, self.loss_values = losses.evaluate(context, self.losses(), loss_divisors, self.loss_step, loss_counts)
        self.loss_metrics = context.metrics
        fields = {**context.outputs, "loss": loss, "logits": context.outputs.logits if return_logits else None}
        return type(context.outputs)(**fields)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as stock does; the question that a connector may ask for is the prompt, in every step."""
        stock: Any = super()
        prompt = {"input_ids": inputs, **kwargs}
        shown = kwargs.get("inputs_embeds") if prompt["input_ids"] is None else prompt["input_ids"]
        with nullcontext() if shown is None else self.asking(prompt, prompt_length=shown.shape[1]):
            return stock.generate(inputs, *args, **kwargs)

    def loss_context(
        self, batch: Mapping[str, Any], labels: torch.Tensor, return_logits: bool = False
    ) -> losses.LossContext:
        """Run the stock forward up to the head and return all that a loss may look at."""
        call = self.stock_inputs(batch)
        if self.training or not return_logits or losses.is_packed(batch):  # a cache would undo packing
            call.setdefault("use_cache", False)
        if not return_logits and not self.ignores_logits_to_keep:
            call["logits_to_keep"] = labels.new_empty(0)  # the head runs on no position: (B, 0, V)
        if (
            self.training
            and not self.keeps_mask
            and seams.needs_no_mask(call, self.config.get_text_config(), self.get_decoder())
        ):
            del call["attention_mask"]
        for loss in losses.known(self.config.loss):
            call |= {f"output_{name}": True for name in loss.outputs}
        self._pass = passed = seams.ForwardPass(records=True, skips_head=not return_logits)
        try:
            with self.stock_pass(call, batch, labels):
                outputs = super().forward(**call, return_dict=True)
        finally:
            self._pass = None
        return losses.LossContext(self, {**batch, "labels": labels}, labels, outputs=outputs, **passed.tensors())

    def stock_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the stock forward takes: inputs without the tensors that are for losses only."""
        own = {"labels", "preference", "token_weights"}.union(
            *(loss.tensors for loss in losses.known(self.config.loss))
        )
        return {name: value for name, value in inputs.items() if name not in own}

    def _check_schedule(self) -> None:
        scheduled = [item.loss.name for item in self.losses() if item.is_scheduled]
        if scheduled and self.training and self.loss_step is None:
            raise ValueError(
                f"The weight of {', '.join(scheduled)} is scheduled, but nothing says which step this is. fit() does; call "
                "hfcustom.LossCallback.add_to(trainer) for transformers.Trainer, or set model.loss_step in your own loop."
            )

    def _forward_stock(self, inputs: dict[str, Any], labels: torch.Tensor, num_items: Any, divisors: Any) -> Any:
        """Run the parent's own path, logits and loss included; seams before the head stay in effect."""
        num_items = num_items if divisors is None else divisors["stock"]
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        with self.stock_pass(inputs, inputs, labels):
            outputs = super().forward(**inputs, labels=labels, **extra, return_dict=True)
        count = losses.count_tokens({"labels": labels})
        if not count:  # stock divides by it
            outputs.loss = outputs.logits[:0].sum()
        total = outputs.loss.detach() * (count if num_items is None else num_items)
        self.loss_values, self.loss_metrics = {"stock": losses.LossValue(total, count, 1.0, outputs.loss.detach())}, {}
        return outputs

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the head: (..., D) -> (..., V); families that scale or cap their logits override this."""
        return self.get_output_embeddings()(hidden_states)

    def head_size(self) -> int:
        """Return how many tokens the head can say; some that are read have a larger id, as mllama's <|image|>."""
        size: int = self.get_output_embeddings().out_features
        return size

    def loss_head(self) -> losses.Head:
        """Return the head as losses use it: a plain Linear is multiplied by directly, anything else is called."""
        overridden = type(self).compute_logits is not CustomVLM.compute_logits
        return losses.Head(self.compute_logits) if overridden else losses.Head.of(self.get_output_embeddings())

    def set_teacher(self, teacher: CustomVLM) -> None:
        """Distil from this model: it sees the same batches, frozen, and is no part of what is trained and saved."""
        losses.check_companion(self, teacher, "teacher")
        self.companions["teacher"] = teacher.eval().requires_grad_(False)

    def set_reference(self, reference: CustomVLM) -> None:
        """Compare with this frozen model, instead of this one with its adapter off, in preference losses and the like."""
        losses.check_companion(self, reference, "reference")
        self.companions["reference"] = reference.eval().requires_grad_(False)

    def losses(self) -> list[losses.WeightedLoss]:
        """Return the configured losses; ValueError when a name or an option in `config.loss` is unknown."""
        if self._parsed_losses is None or self._parsed_losses[0] != self.config.loss:
            stock = self.config.loss == "stock"
            parsed = [losses.WeightedLoss(losses.STOCK, 1.0)] if stock else losses.parse_losses(self.config.loss)
            self._parsed_losses = (copy.deepcopy(self.config.loss), parsed)
        return self._parsed_losses[1]

    def loss_counts(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return each loss's count over several batches: what forward() wants as `loss_divisors`."""
        batches = list(batches)
        return {
            item.loss.name: sum(item.loss.count_in(batch, self, item.options) for batch in batches)
            for item in self.losses()
        }

    def loss_summaries(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what terms across the rows of a step want to know of one batch beforehand, {name: (n, ...)}."""
        with torch.no_grad():
            return losses.summarise(self.loss_context(batch, batch["labels"]), self.losses())

    def unreached(self) -> dict[str, str]:
        """Return what training on images and text never reaches: {how names of parameters begin: why}."""
        return {f"{path}.": "images and text do not pass it" for path in self.stock_parts().paths["other"]}

    # ---- image tokens -------------------------------------------------------------------------------------------------

    def stock_tokens_per_crop(self) -> int:
        """Return the tokens that the family's own connector makes of one image crop; each family says so in its file."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how many tokens its connector makes: define stock_tokens_per_crop() and "
            "placeholder_field, as hfcustom/families/idefics3.py does, or match_processor()."
        )

    def tokens_per_crop(self, num_tokens: int | None = None) -> int:
        """Return the tokens that reach the language model for one image crop."""
        num_tokens = self.stock_tokens_per_crop() if num_tokens is None else num_tokens
        connector: Any = self.custom_connector
        return num_tokens if connector is None else connector.num_tokens_out(num_tokens)

    def match_processor(self, processor: Any) -> Any:
        """Make the processor write as many placeholders as this model makes tokens; save it with the model."""
        setattr(processor, self.placeholder_field, self.tokens_per_crop())
        return match_connector(self, processor) if isinstance(processor, ConnectedProcessor) else processor

    def image_token_rows(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the row of data of each image token, (P * N,); None where each stands at its own placeholder."""
        return None


def _show_inputs(forward: Callable[..., Any], stock_forward: Callable[..., Any]) -> None:
    """Give a forward(*args, **kwargs) the stock signature, which generate and Trainer read to know the inputs."""
    own, stock = (inspect.signature(function).parameters for function in (forward, stock_forward))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rest = [p for p in own.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if not rest:
        return
    shown = [p for p in stock.values() if p.kind not in variadic]
    extra = [p.replace(kind=p.KEYWORD_ONLY) for p in own.values() if p.name not in stock and p.kind not in variadic]
    forward.__signature__ = inspect.Signature([*shown, *extra, *rest])  # type: ignore[attr-defined]
