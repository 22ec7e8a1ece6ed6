"""The part map: which parameters are vision, connector, language, head, new, or other (audio, image generation).

model -> PartMap {part: module paths}. Found from the module graph (who is the image encoder, who is the decoder, what
is left between them), never from a table of model types, so that a renamed subclass keeps its parts. Freezing,
learning rates, LoRA scope, the 8-bit plan and the memory table all read this one map.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfcustom.distributed.zero import is_engine
from hfcustom.exits import ConfigError
from hfcustom.naming import PARTS


def unwrap(model: Any) -> Any:
    """Return the model below any PEFT, DDP, DeepSpeed or compile wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model._modules["_orig_mod"]
        elif wrapped_by_peft(model):  # peft.PeftModel holds a tuner, which holds the model
            model = model._modules["base_model"]._modules["model"]
        else:
            return model


def class_of_model(core: Any) -> Any:
    """Return a model's class, also where torch has put one of its own before it (FSDP)."""
    return next(cls for cls in type(core).__mro__ if not cls.__module__.startswith("torch."))


def wrapped_by_peft(model: nn.Module) -> bool:
    """Whether a model is a peft.PeftModel, asked without importing peft, which may not be installed."""
    return any(base.__name__ == "PeftModel" for base in type(model).__mro__)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one that peft has put in a Linear's place to adapt it."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def is_trained_copy(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper of one that is trained in full beside an adapter."""
    return any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__)


def check_parts(parts: Iterable[str], allowed: Iterable[str] = PARTS) -> tuple[str, ...]:
    """Return `parts` as a tuple; ValueError names the first one that is not a part."""
    allowed = tuple(allowed)
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    for part in parts:
        if part not in allowed:
            near = difflib.get_close_matches(part, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Unknown part {part!r}; this model has {', '.join(allowed)}.{hint}")
    return parts


def is_inside(name: str, paths: Iterable[str]) -> bool:
    """Whether a name is one of these paths or lies below one."""
    return any(name == path or name.startswith(path + ".") for path in paths)


@dataclass(frozen=True)
class PartMap:
    """Module paths of each part, as `named_modules()` of the unwrapped model spells them."""

    paths: dict[str, tuple[str, ...]]

    def part_of(self, name: str) -> str:
        """Return the part of a parameter or module name, PEFT's and DDP's prefixes allowed; KeyError when it is in none."""
        part = self.find(name)
        if part is None:
            raise KeyError(f"{name!r} belongs to no part; parts: {self.paths}")
        return part

    def find(self, name: str) -> str | None:
        """Return the part of a name, None when it is in none; a part inside another (Qwen's merger) is the inner one."""
        name = without_wrappers(name)
        best, part = -1, None
        for candidate, paths in self.paths.items():
            for path in paths:
                if is_inside(name, (path,)) and len(path) > best:
                    best, part = len(path), candidate
        return part

    def present(self) -> tuple[str, ...]:
        """Return the parts this model really has, in reading order."""
        return tuple(part for part in PARTS if self.paths.get(part))


def find_parts(model: nn.Module) -> PartMap:
    """Find the parts of a vision-language model from its module graph.

    Raises ValueError when there is no image encoder or no decoder to be found.
    """
    core = unwrap(model)
    names = {id(module): name for name, module in core.named_modules()}
    encoder = _image_encoder(core)
    vision, head = names[id(encoder)], find_head(core)
    beside = {
        modality: names[id(other)]
        for modality in ("video", "audio")
        if (other := _encoder_of(core, modality)) is not None
    }
    new = tuple(_top_level_new(core))
    paths: dict[str, tuple[str, ...]] = {
        "vision": tuple(dict.fromkeys((vision, *([beside["video"]] if "video" in beside else [])))),
        "language": (names[id(_decoder(core))],),
        "head": (names[id(head)],) if head is not None else (),
        "connector": tuple(path for path in _beside(encoder, _decoder(core), names) if path not in new),
        "new": new,
        "other": (*([beside["audio"]] if "audio" in beside else []), *getattr(core, "other_modules", ())),
    }
    known = PartMap(paths)
    holder = vision.rpartition(".")[0]  # the module that holds the encoder holds the connector beside it
    rest: dict[str, None] = {}
    for name, _ in core.named_parameters(remove_duplicate=False):
        name = without_wrappers(name)
        try:
            known.part_of(name)
        except KeyError:
            rest[_child_path(name, holder)] = None
    modules = dict(core.named_modules())
    rest = dict.fromkeys((*paths["connector"], *rest))
    connector = sorted(rest, key=lambda path: path not in modules)  # what can carry a hook before bare Parameters
    return PartMap({**paths, "connector": tuple(connector) or _inside(encoder, vision, core)})


def find_head(core: Any) -> nn.Module | None:
    """Return the output embeddings: what the class itself says, else what its language model says."""
    head: nn.Module | None = core.get_output_embeddings()
    return head_of_language_model(core) if head is None else head


def head_of_language_model(core: Any) -> nn.Module | None:
    """Return the head of a flat class's whole `language_model`, which its own get_output_embeddings() may not find."""
    language = getattr(core, "language_model", None)
    return language.get_output_embeddings() if isinstance(language, PreTrainedModel) else None


def _beside(encoder: nn.Module, decoder: nn.Module, names: dict[int, str]) -> tuple[str, ...]:
    """Return what stands beside an encoder that the decoder itself holds (LLaVA's own code): no stack of layers, but Linears."""
    if not any(module is encoder for module in decoder.modules()):
        return ()
    others = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
    return tuple(
        names[id(child)]
        for child in others
        if any(isinstance(module, nn.Linear) for module in child.modules())
        and not any(module is encoder for module in child.modules())
    )


def _inside(encoder: nn.Module, path: str, core: Any) -> tuple[str, ...]:
    """Return the encoder's own last step, where that is what makes vectors of the language model's size."""
    width = core.config.get_text_config().hidden_size
    *_, (name, last) = encoder.named_children()
    linears = [module for module in last.modules() if isinstance(module, nn.Linear)]
    return (f"{path}.{name}",) if linears and linears[-1].out_features == width else ()


def _encoder_of(core: Any, modality: str) -> nn.Module | None:
    """Return the encoder of another modality, None where there is none of its own."""
    encoder = getattr(core.base_model, f"{modality}_tower", None) or core.get_encoder(modality=modality)
    return None if encoder is core or encoder is core.base_model else encoder


def _image_encoder(core: Any) -> nn.Module:
    encoder = core.get_encoder(modality="image")
    if encoder is core or encoder is core.base_model:
        children = ", ".join(name for name, _ in core.base_model.named_children())
        raise ValueError(f"{type(core).__name__} has no image encoder among its modules ({children}).")
    return encoder


def _decoder(core: Any) -> nn.Module:
    decoder = core.get_decoder()
    if decoder is core.base_model and core.get_input_embeddings() in decoder.children():
        return decoder  # the inner model is the language model itself, the image encoder among its layers
    if decoder is core or decoder is core.base_model:
        children = ", ".join(name for name, _ in core.base_model.named_children())
        raise ValueError(f"{type(core).__name__} has no language model among its modules ({children}).")
    return decoder


def _top_level_new(core: Any) -> list[str]:
    """Shortest module (or bare parameter) paths that cover every tensor the subclass added to its stock parent."""
    from hfcustom.custom_model import CustomModel

    if not isinstance(core, CustomModel):
        return []
    stock_prefixes = {
        name[:end]
        for name in core.stock_tensor_names()
        for end in [*(m.start() for m in re.finditer(r"\.", name)), None]
    }
    tops: dict[str, None] = {}
    for name in core.new_tensor_names():
        pieces = name.split(".")
        prefixes = (".".join(pieces[:depth]) for depth in range(1, len(pieces) + 1))
        tops[next(prefix for prefix in prefixes if prefix not in stock_prefixes)] = None
    return list(tops)


def _child_path(name: str, holder: str) -> str:
    """Path of the child of `holder` (or of the model itself) that owns the parameter `name`."""
    depth = holder.count(".") + 2 if holder and name.startswith(holder + ".") else 1
    return ".".join(name.split(".")[:depth])


def without_wrappers(name: str) -> str:
    """Strip what DDP, torch.compile and PEFT put into a parameter's name."""
    pieces = name.split(".")
    while pieces[:1] == ["module"] or pieces[:1] == ["_orig_mod"] or pieces[:2] == ["base_model", "model"]:
        pieces = pieces[2:] if pieces[0] == "base_model" else pieces[1:]
    for marker in ("modules_to_save", "original_module"):  # connector.modules_to_save.default.weight
        if marker in pieces:
            at = pieces.index(marker)
            del pieces[at : at + (2 if marker == "modules_to_save" else 1)]
    return ".".join(pieces)


def expert_matrices(core: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the 3-D Parameters in which a mixture of experts keeps one matrix an expert."""
    return [
        (f"{name}.{own}", parameter)
        for name, module in core.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and not isinstance(module, nn.Conv1d)
    ]


@dataclass(frozen=True)
class PartRow:
    """One line of the part table; bytes are of everything in memory, the frozen copies that peft keeps included."""

    part: str
    modules: str
    parameters: int
    trainable: int
    bytes: int
    dtypes: str
    adapter: str = ""  # of LoRA matrices: rank 8, alpha 16


def part_table(model: nn.Module, part_map: PartMap | None = None) -> list[PartRow]:
    """Count parameters, trainable parameters and bytes of each part of a model, wrapped or not; `part_map` where it is known."""
    parts = part_map or find_parts(model)
    rows = []
    by_part: dict[str, list[nn.Parameter]] = {part: [] for part in parts.present()}
    copies: dict[str, int] = dict.fromkeys(by_part, 0)
    shapes = _adapter_shapes(model, parts)
    for name, parameter in model.named_parameters():
        part = parts.part_of(name)
        if ".original_module." in name:
            copies[part] += parameter.numel() * parameter.element_size()
        else:
            by_part[part].append(parameter)
    for part, parameters in by_part.items():
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        rows.append(
            PartRow(
                part=part,
                modules=", ".join(parts.paths[part]),
                parameters=sum(count_parameters(p) for p in parameters),
                trainable=sum(count_parameters(p) for p in parameters if p.requires_grad),
                bytes=copies[part] + sum(p.numel() * p.element_size() for p in parameters),
                dtypes=", ".join(dtypes) or "tied",
                adapter=shapes.get(part, ""),
            )
        )
    return rows


def _adapter_shapes(model: nn.Module, parts: PartMap) -> dict[str, str]:
    """Return the ranks and alphas of the LoRA matrices in each part, in words."""
    found: dict[str, tuple[set[int], set[int]]] = {}
    for name, module in model.named_modules():
        if not is_adapter(module) or (part := parts.find(name)) is None:
            continue
        ranks, alphas = found.setdefault(part, (set(), set()))
        ranks.update(getattr(module, "r", {}).values())
        alphas.update(getattr(module, "lora_alpha", {}).values())
    return {part: f"rank {_range(ranks)}, alpha {_range(alphas)}" for part, (ranks, alphas) in found.items() if ranks}


def _range(values: set[int]) -> str:
    return "-".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def count_parameters(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; a packed 4-bit one holds two a byte."""
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()
