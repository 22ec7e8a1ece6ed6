"""Strict loading: every tensor from the checkpoint, or an error that names the one that is not there.

transformers initialises a missing tensor at random and says so in a log line. Here only a module that the class adds to
its stock parent may be missing, and only where that can be meant: the checkpoint comes from the stock class, or the
caller names the module. Loading builds the model on the meta device, where what an __init__ writes is lost, and leaves
bare Parameters and buffers uninitialised (transformers issue 48892). So the added modules are built once more for real,
and what no checkpoint holds is taken from there: it starts as its __init__ made it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from logging import Filter, LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging

from hfcustom import parts
from hfcustom.connectors.added_tower import AddedTower, towers_without_weights

if TYPE_CHECKING:
    from hfcustom.custom_model import CustomModel

logger = logging.get_logger("hfcustom")

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # where to find it
IN_BUNDLE = not __name__.startswith("hfcustom.")  # whose folder leaves card, record and sentinel to hfcustom
STOCK_ON_META: ContextVar[bool] = ContextVar("STOCK_ON_META", default=False)


def load_strictly(
    cls: type[CustomModel], load: Callable[..., Any], *args: Any, new_modules: Iterable[str], **kwargs: Any
) -> Any:
    """Call the stock `from_pretrained` and check what it loaded; see CustomModel.from_pretrained."""
    wants_info = kwargs.pop("output_loading_info", False)
    source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    check_source(source)
    if kwargs.get("loss", "stock") != "stock":
        cls.check_loss(kwargs["loss"])  # a mistyped name is an error before gigabytes are read
    if kwargs.get("config") is None:
        kwargs |= _own_defaults(cls, source, kwargs)
    with nullcontext() if IN_BUNDLE else _compared(cls, source, _hub_options(kwargs)) as compare:
        with report_in_error():
            model, info = load(*args, output_loading_info=True, **kwargs)
        if compare is not None:
            compare(model)
        fresh = _check_missing(model, sorted(info["missing_keys"]), tuple(new_modules), source)
    _say_unexpected(model, sorted(info["unexpected_keys"]), source)
    _fill(model, fresh)
    _say_random_towers(model, fresh)
    _keep_4bit_layout(model)
    for name in model._frozen_by_init:  # transformers makes every loaded parameter trainable
        model.get_parameter(name).requires_grad_(False)
    return (model, info) if wants_info else model


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}


@contextmanager
def _compared(cls: Any, source: Any, hub: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
    """Say what a checkpoint relies on that has changed since it was saved, in an error as well, which may be why.

    The function that is yielded looks at the loaded model, and gives it the checkpoint's past.
    """
    from hfcustom.record import origin_of, read_record
    from hfcustom.sentinel import check_class, check_model, message, warn

    record = {} if source is None else read_record(source, **hub)
    drifts, models = check_class(cls, record, source), []

    def compare(model: Any) -> None:
        drifts.extend(check_model(model, record, source))
        model.training_runs, model.origin = record.get("training", []), origin_of(source, record, **hub)
        vars(model.config).pop("auto_map", None)  # of a bundle: what is saved from here has no such code beside it
        models.append(model)

    try:
        yield compare
    except Exception as error:
        if drifts:
            error.add_note(message(cls, record["relies_on"], drifts, source))
        raise
    for model in models:
        warn(model, record, source, drifts)


def _keep_4bit_layout(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are, also on processors with AVX512-BF16.

    There its Linear4bit (0.50, nn/modules.py) rewrites them in the first eval pass on a CPU: that fails where the outputs are no
    multiple of 32, rounds to bfloat16 what training does not, and training after it fails.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_source(source: Any) -> None:
    """Raise FileNotFoundError for what can only be a folder and is none; the hub's own message speaks of connections."""
    if str(source).startswith((".", "/", "~")) and not Path(str(source)).is_dir():
        raise FileNotFoundError(f"There is no folder {source}; give an existing one, or a name on the hub.")


def _own_defaults(cls: type[CustomModel], source: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class's own connector and loss where the checkpoint recorded only the defaults of another class."""
    from hfcustom.registry import REGISTERED

    stored = PretrainedConfig.get_config_dict(source, **_hub_options(kwargs))[0]
    writer = REGISTERED.get(stored.get("model_type", ""))
    own: dict[str, Any] = {}
    for name in ("connector", "loss") if writer is not None else ():
        default, other = getattr(cls, f"default_{name}"), getattr(writer, f"default_{name}")
        if name not in kwargs and default != other and stored.get(name) == other:
            own[name] = default
            logger.warning(
                f"{cls.__name__}: {name} {default!r} instead of {source}'s {other!r}, a default of its class."
            )
    return own


def _check_missing(model: CustomModel, missing: list[str], allowed: tuple[str, ...], source: Any) -> list[str]:
    """Return the missing tensors that may be missing; ValueError names the first that may not."""
    added = parts.find_parts(model).paths["new"]
    for name in allowed:
        if name not in added:
            raise ValueError(
                f"new_modules names {name!r}, which {type(model).__name__} does not add to "
                f"{model.stock_class().__name__}; added: {', '.join(added) or 'nothing'}."
            )
    from_own_class = type(model).__name__ in (model.config.architectures or [])[:1]
    fresh: dict[str, None] = {}
    for key in dict.fromkeys(
        model.all_tied_weights_keys.get(key, key) for key in missing
    ):  # a tied head has no tensor
        module = next((path for path in added if key == path or key.startswith(path + ".")), None)
        if module is None or (from_own_class and module not in allowed):
            raise ValueError(_missing_message(model, key, module, source))
        fresh[module] = None
    _check_whole(missing, list(fresh), model, source)
    if fresh:
        logger.warning(f"{type(model).__name__}: {', '.join(fresh)} not in {source}; newly initialised.")
    return [key for key in missing if any(key == path or key.startswith(path + ".") for path in fresh)]


def _check_whole(missing: list[str], fresh: list[str], model: CustomModel, source: Any) -> None:
    """A module half in the checkpoint is a damaged checkpoint, not a new module."""
    for module in fresh:
        own = {name for name in model.new_tensor_names() if name == module or name.startswith(module + ".")}
        if lost := sorted(own.intersection(missing)):
            if len(lost) < len(own):
                raise ValueError(_missing_message(model, lost[0], module, source))


def _missing_message(model: CustomModel, key: str, module: str | None, source: Any) -> str:
    if module is None:
        part = parts.find_parts(model).part_of(key)
        cure = "The checkpoint is incomplete or of another architecture; fetch it again, or check its config.json."
    else:
        part = f"new module {module}"
        cure = f"If {module} is meant to start untrained, pass new_modules=[{module!r}]."
    return f"{source} has no tensor for {key!r} ({part} of {type(model).__name__}). Nothing was loaded. {cure}"


def _say_unexpected(model: CustomModel, unexpected: list[str], source: Any) -> None:
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        logger.warning(f"{type(model).__name__} has no place for {len(unexpected)} tensors of {source}: {shown}")


def _say_random_towers(model: CustomModel, fresh: list[str]) -> None:
    """A new module usually starts untrained; a tower that a connector adds has weights to be loaded."""
    for name, module in model.named_modules():
        if isinstance(module, AddedTower) and any(key.startswith(f"{name}.tower.") for key in fresh):
            module.lacks_weights = True
    for call, added in towers_without_weights(model).items():
        logger.warning(f"The added tower {type(added.tower).__name__} has random weights until {call}.")


def _fill(model: CustomModel, fresh: list[str]) -> None:
    """Give tensors that no checkpoint holds the values they have in a model whose added modules were really built."""
    added = parts.find_parts(model).paths["new"]
    lost = {
        name: buffer
        for name, buffer in model.named_non_persistent_buffers()
        if any(name.startswith(path + ".") for path in added)  # of any class: stock initialises no added module
        or not type(model.get_submodule(name.rpartition(".")[0])).__module__.startswith("transformers.")
    }
    lost |= {name: model.get_parameter_or_buffer(name) for name in fresh}
    if not lost:
        return
    token = STOCK_ON_META.set(True)
    try:
        built = type(model)(copy.deepcopy(model.config))
    except NotImplementedError as error:
        if "meta tensor" not in str(error):  # torch's own, for a tensor that has no values
            raise
        raise ValueError(
            f"{type(model).__name__}.__init__ reads weights of the stock parts, which are not loaded while it runs "
            f"({error}). Set what depends on them after from_pretrained."
        ) from error
    finally:
        STOCK_ON_META.reset(token)
    with torch.no_grad():
        for name, tensor in lost.items():
            tensor.copy_(built.get_parameter_or_buffer(name))


def stock_device() -> AbstractContextManager[Any]:
    """Return the context for the stock part of an __init__: the meta device while only added modules are wanted."""
    return torch.device("meta") if STOCK_ON_META.get() else nullcontext()


@contextmanager
def report_in_error() -> Iterator[None]:
    """Hold back transformers' table of missing and unexpected keys; an error that points at it carries it."""
    stock_logger = logging.get_logger("transformers.modeling_utils")
    reports: list[str] = []

    class OtherRecords(Filter):
        def filter(self, record: LogRecord) -> bool:
            message = record.getMessage()
            if "LOAD REPORT" in message:
                reports.append(message)
            return "LOAD REPORT" not in message

    held_back = OtherRecords()
    stock_logger.addFilter(held_back)
    try:
        yield
    except RuntimeError as error:
        if not reports:
            raise
        raise RuntimeError(f"{error}\n{reports[-1]}") from error
    finally:
        stock_logger.removeFilter(held_back)
