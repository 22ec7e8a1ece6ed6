"""Adapt a model: LoRA on parts, 8-bit or 4-bit for parts, and merge back; each checked, none silent.

Scopes are parts (hfcustom/parts.py), not name patterns: `lora(model)` touches the language model and nothing else, new
modules are trained and saved with the adapter, and a quantised model is inspected after loading.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
)
from transformers.utils import cached_file

from hfcustom import sentinel
from hfcustom.custom_model import CustomModel
from hfcustom.exits import ConfigError
from hfcustom.parts import (
    PartMap,
    check_parts,
    expert_matrices,
    find_parts,
    is_adapter,
    is_inside,
    unwrap,
    without_wrappers,
    wrapped_by_peft,
)
from hfcustom.record import read_record
from hfcustom.training.resume import BASE_FILE, check_base

Bits = Literal["8bit", "4bit"]


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def lora(
    model: Any,
    parts: str | Iterable[str] = "language",
    *,
    rank: int | Mapping[str, int] = 16,
    alpha: int | Mapping[str, int] | None = None,
    dropout: float = 0.0,
    train: str | Iterable[str] = (),
    experts: bool = False,
    rslora: bool = False,
    dora: bool = False,
) -> Any:
    """Wrap a model with LoRA on every Linear of the named parts; return the peft.PeftModel.

    Modules that the class adds to its stock parent, and the parts named by `train`, are trained in full, saved and loaded
    with the adapter; what such a module froze itself stays frozen (a second vision tower). A bare Parameter of the stock
    class (LLaVA's image_newline) cannot be saved so, stays frozen, and a warning says it. `rank` and `alpha` are numbers, or
    one for each part, {"vision": 8, "language": 32}; alpha is 2 * rank by default. `experts` adds the routed experts of those
    parts, whose stacked matrices are no Linear: each expert gets an A and a B of its own, and peft allows neither dropout nor
    DoRA with it. `rslora` divides alpha by the root of the rank (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), so
    that larger ranks learn as fast; `dora` trains the length of each output beside its direction (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353). Raises ValueError for a model that has an adapter, an unknown part, a part without a
    Linear, a rank for a part that gets no LoRA or none for one that does, experts where there are none, and a part both
    adapted and trained in full (modules that the class adds always are).
    """
    from peft import LoraConfig, TaskType, get_peft_model

    part_map = find_parts(model)
    parts, full = _adapted_and_full(model, part_map, parts, train)
    if experts and dora:
        raise ConfigError("dora=True and experts=True exclude each other in peft; choose one.")
    ranks = _by_part("rank", rank, parts)
    alphas = {part: 2 * ranks[part] for part in parts} if alpha is None else _by_part("alpha", alpha, parts)
    targets = _linear_names(model, part_map, parts)
    stacked = _expert_names(model, part_map, parts) if experts else []
    saved = _modules_to_save(model, part_map, dict.fromkeys(full))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if unwrap(model).can_generate() else None,
        r=ranks[parts[0]],
        lora_alpha=alphas[parts[0]],
        rank_pattern=_other_parts(ranks, [*targets, *stacked], part_map),
        alpha_pattern=_other_parts(alphas, [*targets, *stacked], part_map),
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=dropout,
        target_modules=_pattern(targets),
        target_parameters=stacked or None,
        modules_to_save=saved or None,
    )
    frozen = _frozen_inside_new(model)
    with _without_peft_warning():
        wrapped = get_peft_model(model, config)
    _keep_frozen(wrapped, frozen)
    _check_lora(wrapped, targets, stacked, saved)
    return wrapped


def _adapted_and_full(
    model: Any, part_map: PartMap, parts: str | Iterable[str], train: str | Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which parts get LoRA and which are trained in full beside them; ValueError where that cannot be."""
    if wrapped_by_peft(model):
        raise ConfigError("This model has an adapter already; merge it (merge_adapter), or train that one further.")
    parts = check_parts(parts, part_map.present())
    if not parts:
        raise ConfigError(f"lora() names no part; this model has {', '.join(part_map.present())}.")
    full = (*check_parts(train, part_map.present()), *(["new"] if "new" in part_map.present() else []))
    if both := set(parts) & set(full):
        raise ConfigError(
            f"{', '.join(sorted(both))} cannot have LoRA and be trained in full at once; name it in one place."
        )
    return parts, full


def _by_part(name: str, given: int | Mapping[str, int], parts: tuple[str, ...]) -> dict[str, int]:
    """Return one number for each part that gets LoRA; ValueError for others than those, and for what is no positive number."""
    numbers: dict[str, int] = dict(given) if isinstance(given, Mapping) else dict.fromkeys(parts, given)
    if numbers.keys() != set(parts):
        raise ConfigError(
            f"lora() {name}={given!r} names {', '.join(numbers) or 'no part'}, but {', '.join(parts)} get LoRA; name a number "
            "for each of those."
        )
    for part, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ConfigError(f"lora() {name}={number!r} of {part} must be a positive whole number.")
    return {part: numbers[part] for part in parts}


def _other_parts(numbers: Mapping[str, int], names: list[str], part_map: PartMap) -> dict[str, int]:
    """Return peft's pattern for each part whose number is not that of the first."""
    first, *others = numbers
    return {
        _pattern([name for name in names if part_map.find(name) == part]): numbers[part]
        for part in others
        if numbers[part] != numbers[first]
    }


def _frozen_inside_new(model: nn.Module) -> set[str]:
    """Return the parameters that added modules keep frozen."""
    part_map = find_parts(model)
    return {name for name, p in model.named_parameters() if not p.requires_grad and part_map.part_of(name) == "new"}


def _keep_frozen(wrapped: nn.Module, frozen: set[str]) -> None:
    """peft trains every parameter of a module that it saves with the adapter."""
    for name, parameter in wrapped.named_parameters():
        if without_wrappers(name) in frozen:
            parameter.requires_grad_(False)


def _linear_names(model: nn.Module, part_map: PartMap, parts: Iterable[str]) -> list[str]:
    names = []
    for part in parts:
        found = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not _is_own_kind(module) and part_map.find(name) == part
        ]
        if not found:
            paths = ", ".join(part_map.paths[part])
            raise ConfigError(
                f"The part {part!r} ({paths}) has no Linear module for LoRA to adapt; choose another part."
            )
        names += found
    return names


def _expert_names(model: nn.Module, part_map: PartMap, parts: tuple[str, ...]) -> list[str]:
    names = [name for name, _ in expert_matrices(model) if part_map.find(name) in parts]
    if not names:
        raise ConfigError(
            f"experts=True, but {', '.join(parts)} of this {type(model).__name__} holds no experts as stacked matrices; "
            "leave it out: LoRA is on every Linear already."
        )
    return names


def _is_own_kind(linear: nn.Linear) -> bool:
    """Whether a model brought this class of Linear along; Llama 4's router returns a pair, which no wrapper expects."""
    return type(linear).__module__.startswith("transformers.models.")


def _pattern(names: list[str]) -> str:
    """Return a regular expression for exactly these modules, layer numbers folded: `...layers\\.\\d+\\.mlp\\.up_proj`."""
    folded = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names})
    return "|".join(folded)


def _modules_to_save(model: nn.Module, part_map: PartMap, parts: Iterable[str]) -> list[str]:
    modules = dict(model.named_modules())
    paths = [path for part in parts for path in part_map.paths[part]]
    for path in (path for path in paths if path not in modules):
        what = f"{path!r} is a bare Parameter, which peft cannot save with an adapter"
        if part_map.find(path) == "new":
            raise ConfigError(f"{what}; wrap it in a small nn.Module, or train without LoRA.")
        logging.getLogger("hfcustom").warning(
            f"{what}: it stays as it is in the base while the rest of its part is trained. To train it too, train without an "
            "adapter: freeze() the other parts."
        )
    return [path for path in paths if path in modules]


def _check_lora(wrapped: Any, targets: list[str], stacked: list[str], saved: list[str]) -> None:
    """peft matches by suffix and by pattern; make sure that it took these modules and no other."""
    core = unwrap(wrapped)
    adapted = {
        ".".join([name.replace(".base_layer", ""), *([module.parameter_name] if _wraps_parameter(module) else [])])
        for name, module in core.named_modules()
        if is_adapter(module)
    }
    copied = {
        name.removesuffix(".modules_to_save") for name, _ in core.named_modules() if name.endswith(".modules_to_save")
    }
    for what, found, wanted in (("LoRA", adapted, {*targets, *stacked}), ("full training", copied, set(saved))):
        if found != wanted:
            extra, lost = sorted(found - wanted), sorted(wanted - found)
            raise RuntimeError(f"peft applied {what} to other modules than asked: too many {extra}, missing {lost}.")


def _wraps_parameter(adapter: Any) -> bool:
    """Whether peft adapts one bare Parameter of a module here: it wraps the module once for each."""
    return type(adapter).__name__ == "ParamWrapper"


def load_adapter(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    model_class: Any = None,
    trainable: bool = False,
    **options: Any,
) -> Any:
    """Load a base, attach a saved adapter and the modules trained with it, and return the peft.PeftModel.

    `base` is the folder or hub id of the weights, by default the one the adapter was trained on. The class is that of the
    config.json which `fit` writes beside an adapter, else `model_class`, else the base's; `trainable` leaves the adapter
    to be trained further; `options` go to `from_pretrained`. Raises ValueError when the class lacks a module that the adapter
    holds, or the adapter a tensor; CheckpointError when `fit` trained it on another base.
    """
    from peft import PeftConfig, PeftModel

    peft_config = PeftConfig.from_pretrained(str(adapter))
    base = base or peft_config.base_model_name_or_path
    beside = cached_file(str(adapter), "config.json", _raise_exceptions_for_missing_entries=False)
    config = (model_class.config_class if model_class else AutoConfig).from_pretrained(adapter if beside else base)
    model_class = model_class or _class_for(config)
    config.architectures = None  # new modules come from the adapter, whichever class wrote the base
    record = read_record(adapter) if issubclass(model_class, CustomModel) else {}
    drifts = sentinel.check_class(model_class, record, adapter)
    model = model_class.from_pretrained(base, config=config, **options)
    if fingerprint := cached_file(str(adapter), BASE_FILE, _raise_exceptions_for_missing_entries=False):
        check_base(model, Path(fingerprint).parent)
    sentinel.warn(model, record, adapter, [*drifts, *sentinel.check_model(model, record, adapter)])
    if record:
        model.training_runs, model.origin = record["training"], record["origin"]
    modules = dict(model.named_modules())
    for name in peft_config.modules_to_save or ():
        if name not in modules:
            raise ValueError(
                f"The adapter {adapter} holds the module {name!r}, which {model_class.__name__} has not. Pass the class "
                "that it was trained with: model_class=..."
            )
    frozen = _frozen_inside_new(model)
    with _without_peft_warning(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable).eval()
            _keep_frozen(wrapped, frozen)
            return wrapped
        except UserWarning as error:
            raise ValueError(f"The adapter {adapter} does not fit {model_class.__name__}: {error}") from error


def _class_for(config: PretrainedConfig) -> Any:
    """Return the class that the Auto classes know for a config: of a vision-language model, else of a contrastive encoder."""
    encoder = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    return encoder or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def merge_adapter(
    adapter: str | Path, base: str | Path | None = None, *, model_class: Any = None, **options: Any
) -> Any:
    """Load a base in full precision, attach a saved adapter, merge it in, and return the plain model.

    Arguments and errors as for `load_adapter`; ValueError also when the base's weights are stored quantised: merging into
    those would round the adapter away.
    """
    from peft import PeftConfig

    base = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    stored = PretrainedConfig.get_config_dict(base)[0]
    if "quantization_config" in stored or "quantization_config" in options:
        raise ValueError(
            f"The base {base} is quantised; an adapter is merged into full-precision weights. Pass base=..."
        )
    return load_adapter(adapter, base, model_class=model_class, **options).merge_and_unload()


@contextlib.contextmanager
def _without_peft_warning() -> Iterator[None]:
    """peft 0.21 reads a property that transformers 5.23 has renamed, and warns about it to no one's use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


# ---- 8-bit and 4-bit ------------------------------------------------------------------------------------------------

QUANTIZED = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def quantization_config(
    source: str | Path, bits: Bits = "8bit", *, model_class: Any = None, parts: str | Iterable[str] = "language"
) -> BitsAndBytesConfig:
    """Return the bitsandbytes config that quantises the Linears of the named parts and keeps every other part out.

    `source` is a folder or hub id, of which only the config is read; `model_class` is needed when its model_type belongs
    to another class than the one that will load it. 4-bit is nf4 with double quantisation, computing in bfloat16.
    """
    _say_once("bitsandbytes.autograd._functions")  # it warns of the same cast for every matrix
    if bits not in QUANTIZED:
        raise ValueError(f"bits={bits!r}; choose {' or '.join(QUANTIZED)}.")
    config = (model_class.config_class if model_class else AutoConfig).from_pretrained(source)
    model_class = model_class or _class_for(config)
    with torch.device("meta"):
        skeleton = model_class(config)
    part_map = find_parts(skeleton)
    chosen = check_parts(parts, part_map.present())
    linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    kept = [path for part in part_map.present() if part not in chosen for path in part_map.paths[part]]
    kept = [path for path in kept if any(is_inside(name, (path,)) for name in linears)]
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _say_once(logger_name: str) -> None:
    """Let each message of a logger through one time."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    logger = logging.getLogger(logger_name)
    if not logger.filters:
        logger.addFilter(is_new)


@dataclass(frozen=True)
class LinearRow:
    """Weight matrices of one kind, layer numbers folded: where, what they really are, how many."""

    part: str
    name: str
    kind: str
    count: int


def linear_table(model: nn.Module) -> list[LinearRow]:
    """List every Linear of a loaded model with its real class, and the 3-D expert weights that no quantiser converts."""
    core = unwrap(model)
    counts: dict[tuple[str, str, str], int] = {}
    part_map = find_parts(core)
    kinds = {name: _kind(module) for name, module in core.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in expert_matrices(core):
        dtype = str(parameter.dtype).removeprefix("torch.")
        kinds[name] = f"3-D Parameter, not a Linear: stays {dtype}"
    for path, kind in kinds.items():
        key = (part_map.part_of(path), re.sub(r"(?<=\.)\d+(?=\.)", "*", path.replace(".base_layer", "")), kind)
        counts[key] = counts.get(key, 0) + 1
    return [LinearRow(*key, count) for key, count in counts.items()]


def _kind(linear: nn.Linear) -> str:
    dtype = str(linear.weight.dtype).removeprefix("torch.")
    return type(linear).__name__ + (f", not a plain Linear: stays {dtype}" if _is_own_kind(linear) else "")


def check_quantization(model: Any) -> list[LinearRow]:
    """Compare what bitsandbytes did with what its config asked for; return the table of every Linear.

    Raises RuntimeError for a skip entry that matched no Linear, a Linear converted against the skip list or left out
    without being on it, and a model in which nothing was converted.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    core = unwrap(model)
    config = getattr(core.config, "quantization_config", None)
    if config is None:
        raise RuntimeError(f"{type(core).__name__} was not loaded with a quantization_config.")
    if config.llm_int8_skip_modules is None:
        raise RuntimeError(
            f"{type(core).__name__} was quantised without a skip list, so that vision and connector may be converted too; "
            "load it with hfcustom.quantization_config(...)."
        )
    skip = list(config.llm_int8_skip_modules)
    wanted = QUANTIZED["8bit" if config.load_in_8bit else "4bit"]
    linears = {
        name: module
        for name, module in core.named_modules()
        if isinstance(module, nn.Linear) and not _is_own_kind(module)
    }
    linears = {name.removesuffix(".base_layer"): module for name, module in linears.items() if ".lora_" not in name}
    for entry in skip:
        if all(should_convert_module(name, [entry]) for name in linears):
            raise RuntimeError(
                f"The skip entry {entry!r} matched no Linear (matching starts at the full name, such as "
                f"{next(iter(linears))!r}); use hfcustom.quantization_config, or the full path of the part."
            )
    for name, module in linears.items():
        kind = type(module).__name__
        if should_convert_module(name, skip) != (kind == wanted):
            raise RuntimeError(f"{name} is a {kind}, against the skip list {skip}.")
    if not any(type(module).__name__ == wanted for module in linears.values()):
        raise RuntimeError(f"Nothing was converted to {wanted}: every Linear is on the skip list {skip}.")
    return linear_table(core)
