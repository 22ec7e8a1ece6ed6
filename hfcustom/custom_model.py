"""CustomModel: what every custom class does around its stock parent, whichever seams it has.

It knows which tensors are the parent's and which are its own, starts the former as stock does and the latter as their
__init__ made them, loads strictly (hfcustom/loading.py), and saves what loads back as the same class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from hfcustom import loading, parts, seams


class CustomModel(PreTrainedModel):
    """Base of the mixins CustomVLM and CustomDualEncoder; they stand before a stock class."""

    processor_class: ClassVar[type[ProcessorMixin]]
    auto_classes: ClassVar[tuple[Any, ...]] = ()  # of transformers, which load the class's checkpoints
    task_table: ClassVar[dict[str, Any]]  # of transformers, by which pipeline() and trl decide what a model is for
    lacks: ClassVar[Mapping[str, str]] = {}  # seam (a transform_* method, "connector"), or "placeholders" -> why not
    default_connector: ClassVar[str | dict[str, Any] | None] = None
    default_loss: ClassVar[str | dict[str, Any]]
    neftune_alpha: float = 0.0  # noise on text embeddings while training (hfcustom/noise.py); fit() sets it
    feature_cache: Any = None  # hfcustom/cache/features.py, while fit() trains with it
    training_runs: Sequence[
        dict[str, Any]
    ] = ()  # what fit() did to the weights, the earliest first: hfcustom/record.py
    origin: Mapping[str, Any] | None = None  # the checkpoint that they began as
    _stock_tensors: frozenset[str] | None = None  # until the stock part is built
    _frozen_by_init: tuple[str, ...] = ()

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """Return the class of transformers that this one customises, else a plain PreTrainedModel of one's own.

        Raises TypeError when there is none among the bases.
        """
        plain = [
            base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, CustomModel)
        ]
        for base in (*(base for base in plain if base.__module__.startswith("transformers.models.")), *plain):
            if base is not PreTrainedModel:
                return base
        mixins = "CustomVLM, or CustomDualEncoder"
        raise TypeError(f"{cls.__name__} must inherit a model class of transformers after {mixins}.")

    @staticmethod
    def check_loss(spec: Any) -> None:
        """Raise ValueError for a loss that is not known."""
        raise NotImplementedError("CustomVLM and CustomDualEncoder know their own losses; inherit one of them.")

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Return (module path, hook registrar, method, options) for each seam that hangs on a module."""
        raise NotImplementedError(
            f"{type(self).__name__} names no borders for seams; inherit CustomVLM or CustomDualEncoder."
        )

    def seam_methods(self) -> list[tuple[str, str, str]]:
        """Return (module path, its method, the method called instead) for seams that lie inside no part's border."""
        return []

    # ---- construction -----------------------------------------------------------------------------------------------

    def post_init(self) -> None:
        """Initialise new weights and put the seams on the parts; call it at the end of your own __init__."""
        super().post_init()
        if self._stock_tensors is not None:  # the stock __init__ calls this before there is anything to hook
            seams.install(self)
            self._frozen_by_init = tuple(name for name, p in self.named_parameters() if not p.requires_grad)

    def initialize_weights(self) -> None:
        """Initialise the stock modules as stock does; what a subclass adds starts as its __init__ made it.

        A subclass that overrides `_init_weights` is asked for its own modules too, as transformers does.
        """
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

    # ---- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, *args: Any, new_modules: Iterable[str] = (), **kwargs: Any) -> Any:
        """Load strictly: a tensor missing from the checkpoint is a ValueError that names it.

        Modules that this class adds to its stock parent may be missing from a checkpoint of the stock class, and from
        one of this class when `new_modules` names them; they start as their __init__ made them, and that is printed.
        Otherwise as `PreTrainedModel.from_pretrained`.
        """
        return loading.load_strictly(cls, super().from_pretrained, *args, new_modules=new_modules, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save weights under the names they have in memory, which this class and the stock class both load whole.

        As `PreTrainedModel.save_pretrained` with save_original_format=False: by default transformers reverts names to the
        hub's old layout, which the stock class cannot convert back under a custom model_type (conversion_mapping.py,
        5.23.0). Beside them: the change card (README.md, one of your own stays) and hfcustom.json. Raises ValueError for a
        class that is not registered: what it saves would load as its parent.
        """
        check_registered(self)
        kwargs.setdefault("save_original_format", False)
        if loading.IN_BUNDLE:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        from hfcustom.card import write_beside
        from hfcustom.hub import PUSHED, push_folder

        push = (
            {name: kwargs.pop(name) for name in PUSHED if name in kwargs} if kwargs.pop("push_to_hub", False) else None
        )
        super().save_pretrained(save_directory, *args, **kwargs)
        main = kwargs.get("is_main_process", args[0] if args else True)
        if self.should_save_on_this_rank(main):
            write_beside(self, Path(save_directory))
            if push is not None:
                push_folder(save_directory, push.pop("repo_id", Path(save_directory).resolve().name), **push)

    def push_to_hub(self, repo_id: str, *, max_shard_size: Any = "50GB", **options: Any) -> Any:  # type: ignore[override]
        """Upload the weights, the change card and hfcustom.json; a README.md that somebody wrote on the hub stays.

        `options` are those of `hfcustom.hub.push_folder`: private, revision, token, commit_message, create_pr, and so on.
        Returns what the hub said of the commit.
        """
        if loading.IN_BUNDLE:
            return super().push_to_hub(repo_id, max_shard_size=max_shard_size, **options)  # type: ignore[arg-type]
        from hfcustom.hub import push_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)


def check_registered(model: CustomModel) -> None:
    """Raise ValueError when the Auto classes would load what this model saves as another class."""
    from hfcustom.registry import REGISTERED

    owner, own = REGISTERED.get(model.config.model_type), parts.class_of_model(model)
    if owner is None or (owner.__module__, owner.__qualname__) != (own.__module__, own.__qualname__):
        becomes = f"{owner.__name__}" if owner else "nothing"
        raise ValueError(
            f"{own.__name__} is not registered: what it saves would load as {becomes}. Put @hfcustom.register above it."
        )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers under their own names, leaving out what an adapter added."""
    adapters = tuple(name + "." for name, module in model.named_modules() if parts.is_adapter(module))
    kept = set(model.state_dict(keep_vars=True))
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in kept and not name.startswith(adapters):
            yield parts.without_wrappers(name), tensor
