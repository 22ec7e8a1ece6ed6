"""SeamHooks: which borders of a stock model carry a seam, and what happens there.

A family whose graph differs (no inner model, a connector inside the tower, images of different lengths) overrides
`seam_hooks`, `seam_methods` or one `_at_...` method in its file; CustomVLM is built on this class.
Letters: B rows, T text tokens, N image tokens, P crops, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from hfcustom import parts, seams
from hfcustom.connectors import (
    Told,
    build_connector,
    count_tokens_out,
    find_connector,
    frames_together,
    reduce_tokens,
    takes_pictures,
    takes_question,
    works_before_projector,
)
from hfcustom.custom_model import CustomModel
from hfcustom.naming import check_shape
from hfcustom.noise import text_noise
from hfcustom.packed import keep_rows_apart, merge_crops, packed_row_ids, why_not_packed
from hfcustom.questions import Asked

if TYPE_CHECKING:
    from hfcustom.base import CustomVLM


class SeamHooks(CustomModel):
    """The methods that hfcustom/seams.py hangs on the parts of a model."""

    ignores_logits_to_keep: ClassVar[bool] = (
        False  # the stock forward runs the head on every position whatever it is told
    )
    no_packing: ClassVar[str] = ""  # why rows packed into one would see each other
    state_modules: ClassVar[tuple[type[nn.Module], ...]] = ()  # what carries a state from one token to the next
    crop_dims: ClassVar[Mapping[str, int]] = {}  # image tensor -> the dimension along which it has crops, by default 0
    keeps_mask: ClassVar[bool] = False  # the stock forward reads more from attention_mask than where padding is
    no_connector_cache: ClassVar[str] = ""  # why what the connector makes of an image cannot be kept
    no_feature_cache: ClassVar[str] = ""  # why what is made of an image cannot be kept
    no_tower_cache: ClassVar[str] = ""  # why what the tower alone makes of an image cannot be kept
    no_resizing: ClassVar[str] = ""  # why resize_images has nothing to do, or cannot do it
    custom_connector: nn.Module | None
    _pictures: torch.Tensor | None = None  # (P, 3, H, W), what the vision tower is looking at
    _asked: Asked | None = None  # while a connector may ask for the question
    _noisy: bool = False  # within a forward that trains
    _real: torch.Tensor | None = None  # its attention_mask (B, T), where there is one
    _stock_parts: parts.PartMap | None = None  # until the stock part is built
    _pass: seams.ForwardPass | None

    transform_vision_features: Any  # of CustomVLM, as the next three
    transform_embeddings: Any
    transform_hidden_states: Any
    tokens_per_crop: Any

    @property
    def max_packed_tokens(self) -> int | None:
        """The tokens of rows packed into one beyond which stock would not treat them as by themselves; None for any number."""
        return None

    @classmethod
    def merge_images(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join the image tensors of rows that are packed into one; a family in which they point at each other says how."""
        return merge_crops(rows, cls.crop_dims)

    @property
    def placeholder_token_id(self) -> int | None:
        """The id in input_ids that stands for one image token."""
        return int(self.config.image_token_id)

    def stock_parts(self) -> parts.PartMap:
        """Return the part map of the stock graph."""
        assert self._stock_parts is not None, "asked for inside the stock __init__"
        return self._stock_parts

    def vision_width(self) -> int:
        """Return D_vision, the width of what transform_vision_features sees; a family with another one says so."""
        return int(self.config.vision_config.hidden_size)

    def looked_at_width(self) -> int:
        """Return the width of what a connector sees that works before the projector: that of the vision features."""
        return self.vision_width()

    def make_connector(self) -> nn.Module | None:
        """Build the configured connector; ValueError when this family cannot give it what it works on."""
        spec = self.config.connector
        if spec is None:
            return None
        if "connector" in self.lacks:
            raise ValueError(f"connector={spec!r}: this family takes none: {self.lacks['connector']}")
        before = works_before_projector(find_connector(spec)[0])
        return build_connector(spec, self.looked_at_width() if before else self.config.get_text_config().hidden_size)

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Return (module path, hook registrar, method, options) for each seam."""
        vision, connector, language = (
            self.stock_parts().paths[part][0] for part in ("vision", "connector", "language")
        )
        head: list[tuple[str, str, str, dict[str, bool]]] = [
            (self.stock_parts().paths["head"][0], "register_forward_pre_hook", "_at_head_input", {})
        ]
        pictures: list[tuple[str, str, str, dict[str, bool]]] = [
            (vision, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        borders: list[tuple[str, str, str, dict[str, bool]]] = [
            (self.inner_path(), "register_forward_pre_hook", "_begin_pass", {"with_kwargs": True}),
            (self.inner_path(), "register_forward_hook", "_end_pass", {"always_call": True}),
        ]
        return [
            *(pictures if takes_pictures(self.custom_connector) else []),
            *(borders if self.inner_path() else []),
            (connector, "register_forward_pre_hook", "_at_connector_input", {}),
            (connector, "register_forward_hook", "_at_connector_output", {}),
            (language, "register_forward_pre_hook", "_at_language_input", {"with_kwargs": True}),
            (language, "register_forward_pre_hook", "_at_packed_rows", {"with_kwargs": True}),
            (language, "register_forward_hook", "_at_language_output", {}),
            *(head if self.ignores_logits_to_keep else []),
        ]

    def inner_path(self) -> str:
        """Return the path of the model without its head, "" for a family that has none."""
        return "" if self.base_model is self else self.base_model_prefix

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Return (module path, its method, the method called instead) for seams that lie inside no part's border."""
        found = self.named_modules() if self.state_modules else ()
        states = [(path, "forward", "_at_state") for path, module in found if isinstance(module, self.state_modules)]
        return [*super().seam_methods(), *states]

    def _at_state(
        self,
        stock: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        *args: Any,
        row_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Begin anew with each of the rows that are packed into one: (1, T, D) -> (1, T, D)."""
        if row_lengths is None:
            return stock(hidden_states, *args, **kwargs)
        return torch.cat([stock(row, *args, **kwargs) for row in hidden_states.split(list(row_lengths), 1)], 1)

    @contextmanager
    def stock_pass(
        self, call: Mapping[str, Any], inputs: Mapping[str, Any], labels: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Surround the stock forward, which gets `call` of `inputs`: a connector may ask for the questions in these.

        Of a class without an inner model, whose call would do it, it begins and ends the pass, too. Hooks on the model
        itself would not do: peft calls its forward(), which runs no hook. One context, since torch.compile nests none.
        """
        before, flat = self._asked, not self.inner_path()
        self._ask(inputs, labels)
        if self.neftune_alpha:  # not where nothing is learned: in evaluation, generation, a reference, a summary
            self._noisy = labels is not None and self.training and torch.is_grad_enabled()
            mask = inputs.get("attention_mask")
            self._real = mask if mask is not None and mask.ndim == 2 else None
        try:
            if flat:
                self._begin_pass(self, (), dict(call))
            yield
        finally:
            self._asked, self._noisy = before, False
            if flat:
                self._pass = None

    @contextmanager
    def asking(self, inputs: Mapping[str, Any], prompt_length: int | None = None) -> Iterator[None]:
        """Let a connector ask for the questions in these inputs where it is run outside of forward()."""
        before = self._asked
        self._ask(inputs, None, prompt_length)
        try:
            yield
        finally:
            self._asked = before

    def _ask(self, inputs: Mapping[str, Any], labels: torch.Tensor | None, prompt_length: int | None = None) -> None:
        if not takes_question(self.custom_connector):
            return
        if self._asked is not None and prompt_length is None:  # a forward of generate()
            prompt_length = self._asked.prompt_length
        self._asked = Asked(self, inputs, labels, prompt_length)

    def question_of(self, lengths: Sequence[int], token: int | None = None) -> dict[str, torch.Tensor]:
        """Return what a connector that asks for it is told of the question of each crop's row, nothing for another one.

        `lengths` are the tokens of each crop as the text has placeholders for them, `token` is these placeholders' id.
        """
        if not takes_question(self.custom_connector):
            return {}
        return self._what_is_asked().of_crops(lengths, token)

    def _what_is_asked(self) -> Asked:
        if self._asked is None:
            raise ValueError(
                f"connector={self.config.connector!r} wants to know what the text asks, but images came without a text. Call "
                "the model or generate() with both, or put the call into `with model.asking({'input_ids': ...}):`."
            )
        return self._asked

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs.get("input_ids")
        if self._pass is None:  # the inner model is called directly
            if not torch.compiler.is_compiling():
                seams.install(cast("CustomVLM", self))
            self._pass = seams.ForwardPass(ends_with_inner=True, asked_before=self._asked)
            if self._asked is None and takes_question(self.custom_connector):
                self._asked = Asked(self, {**kwargs, "input_ids": input_ids})
        embeds, token = kwargs.get("inputs_embeds"), self.placeholder_token_id
        self._pass.image_mask = seams.find_placeholders(self, input_ids, embeds, token)
        self._pass.rows = packed_row_ids(kwargs)

    def _end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pass is not None and self._pass.ends_with_inner:
            self._asked = self._pass.asked_before
            self._pass = None

    def _at_vision_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pictures = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if pictures.ndim != 4:
            raise ValueError(
                f"connector={self.config.connector!r} looks at pictures, (P, 3, H, W), but the vision tower of "
                f"{type(self).__name__} is given {tuple(pictures.shape)}."
            )
        self._pictures = pictures

    def _at_connector_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._vision_features(args[0]), *args[1:])

    def _vision_features(self, features: torch.Tensor) -> torch.Tensor:
        features = self._transformed(features)  # (P, patches, D_vision)
        if works_before_projector(self.custom_connector):
            features = self._look_again(features)
        if self._pass is not None and self._pass.records:
            self._pass.vision_features = features
        return features

    def _transformed(self, given: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.transform_vision_features(given)  # (P, patches, D_vision)
        seams.check_kept("transform_vision_features", features, given)
        return features

    def _look_again(self, features: torch.Tensor) -> torch.Tensor:
        """Run a connector that works on vision features and pictures: (P, patches, D_vision) -> the same shape."""
        connector: Any = self.custom_connector
        looked: torch.Tensor = connector(features, pixel_values=self._pictures_of(features))
        check_shape(f"connector {self.config.connector!r}", looked, features.shape)
        return looked

    def pictures_of_tokens(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a connector behind the projector is told of the pictures of (P, N, D), nothing for another one."""
        return {"pixel_values": self._pictures_of(features)} if self.looks_behind_projector else {}

    @property
    def looks_behind_projector(self) -> bool:
        """Whether the connector looks at pictures where every other one works."""
        return takes_pictures(self.custom_connector) and not works_before_projector(self.custom_connector)

    def _pictures_of(self, features: torch.Tensor) -> torch.Tensor:
        """Return the pictures that the tower has just looked at, (P, 3, H, W), for what became of them, (P, ...)."""
        pictures, self._pictures = self._pictures, None
        if pictures is None or len(pictures) != len(features):
            seen = 0 if pictures is None else len(pictures)
            raise ValueError(
                f"connector={self.config.connector!r} looks at the picture of each crop: there are {len(features)} crops and "
                f"{seen} pictures. A video's frames have none in families that read videos with another tower."
            )
        return pictures

    def _at_connector_output(self, module: nn.Module, args: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        if self.custom_connector is not None:
            tokens = count_tokens_out(self.custom_connector, features.shape[1])
            features = self._reduced(features, self.question_of([tokens] * len(features)))  # (P, M, D)
            self._check_placeholders(features.shape[0] * features.shape[1], len(features))
        if self._pass is not None and self._pass.records:
            self._pass.image_features = features
        return features

    def _reduced(self, features: torch.Tensor, told: Told) -> torch.Tensor:
        """Run a connector behind the projector, `told` what the texts ask: (P, N, D) -> (P, M, D)."""
        told = {**told, **self.pictures_of_tokens(features)}
        return reduce_tokens(self.custom_connector, features, None, self.config.connector, told)

    def _check_placeholders(
        self,
        tokens: int,
        crops: int,
        lengths: Sequence[int] = (),
        *,
        mask: torch.Tensor | None = None,
        kind: str = "image",
    ) -> None:
        """Say what to do when the processor still writes the placeholders of the stock connector; mask (B, T).

        `lengths` are the tokens of each crop where they are not all the same.
        """
        if self._pass is None or torch.compiler.is_compiling():
            return
        mask = self._pass.image_mask if mask is None else mask
        assert mask is not None
        placeholders = int(mask.sum())
        if placeholders != tokens:
            raise self.unmatched(placeholders, tokens, crops, kind)
        if kind == "image" or lengths:
            self._check_clips(lengths or [tokens // crops] * crops, mask)

    def unmatched(self, placeholders: int, tokens: int, crops: int, kind: str = "image") -> ValueError:
        """Return the error for a text that has other placeholders than the connector makes tokens."""
        return ValueError(
            f"The text has {placeholders} {kind} placeholders, the connector {self.config.connector!r} made {tokens} "
            f"tokens of {crops} crops. Call model.match_processor(processor) before processing, and save that "
            "processor with the model."
        )

    def _check_clips(self, lengths: Sequence[int], mask: torch.Tensor) -> None:
        """A connector that takes neighbouring crops together must not mix those of two rows; mask (B, T)."""
        frames = frames_together(self.custom_connector)
        if frames == 1:
            return
        ends = [0, *accumulate(lengths)][::frames]
        for row, end in enumerate(self._tokens_of_rows(mask).cumsum(0).tolist()):
            if end not in ends:
                raise ValueError(
                    f"connector={self.config.connector!r} takes {frames} neighbouring crops together, but row {row} of the "
                    f"batch ends amid such {frames}. Give each row a multiple of {frames} images (repeat a still one) or "
                    "frames of a video, one crop each: switch the processor's multi-crop off."
                )

    def _tokens_of_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """Return how many positions of a mask (B, T) each row of data has, (R,)."""
        rows = None if self._pass is None else self._pass.rows
        if rows is None:
            return mask.sum(1)
        return rows.new_zeros(int(rows.max()) + 1).index_add(0, rows.flatten(), mask.flatten().to(rows.dtype))

    def _at_language_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._pass is None or self._pass.image_mask is None:  # the language model is run by itself
            return args, kwargs
        given = kwargs.get("inputs_embeds")
        if given is None:  # images are not merged into them in this family
            given = self.get_input_embeddings()(kwargs["input_ids"])
            kwargs = {**kwargs, "input_ids": None}
        noisy = given + self._noise(given, self._pass) if self._noisy else given
        embeddings = self.transform_embeddings(noisy, self._pass.image_mask)  # (B, T, D)
        seams.check_kept("transform_embeddings", embeddings, given)
        return args, {**kwargs, "inputs_embeds": embeddings}

    def _noise(self, embeddings: torch.Tensor, passed: seams.ForwardPass) -> torch.Tensor:
        """Draw noise for the text among merged embeddings, (B, T, D)."""
        assert passed.image_mask is not None
        seen = passed.image_mask if passed.video_mask is None else passed.image_mask | passed.video_mask
        return text_noise(embeddings, self.neftune_alpha, ~seen, self._real, passed.rows)

    def _at_packed_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._pass is None or self._pass.rows is None:
            return args, kwargs
        if reason := why_not_packed(self):
            raise ValueError(
                f"position_ids start again within a row, as where rows are packed into one, which {type(self).__name__} cannot "
                f"keep apart: {reason}. Give each row a row of the batch, and an attention_mask."
            )
        limit, rows = self.max_packed_tokens, self._pass.rows
        if limit is not None and rows.shape[1] > limit:
            raise ValueError(
                f"Rows of {rows.shape[1]} tokens are packed into one; {type(self).__name__} takes at most {limit}: pack fewer."
            )
        kept = keep_rows_apart(module, kwargs, rows)
        if self.state_modules and "row_lengths" not in kept:
            raise ValueError(
                f"{type(self).__name__} carries a state from token to token, which is begun anew only for rows packed into a "
                "batch of one row, and not under torch.compile. Pack into one row, or pad."
            )
        return args, kept

    def _at_head_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (args[0][:, :0],) if self._pass is not None and self._pass.skips_head else None

    def _at_language_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._pass is None:  # the language model is run by itself
            return output
        hidden_states = self.transform_hidden_states(output[0])  # (B, T, D)
        seams.check_kept("transform_hidden_states", hidden_states, output[0])
        if self._pass.records:
            self._pass.hidden_states = hidden_states
        if isinstance(output, tuple):
            return (hidden_states, *output[1:])
        output.last_hidden_state = hidden_states
        return output
