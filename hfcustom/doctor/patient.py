"""Patient: a small copy of a custom class, with rows and pictures made on the spot, and variants of it to compare with.

The family's tiny config with the class's own fields, connector and loss -> a model of the class; the same weights each time.
What the class adds to its stock parent is moved a little off its start, so that a gate that opens from zero shows its effect.
Letters: B rows, T text tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from hfcustom.base import CustomVLM
from hfcustom.changes import own_functions
from hfcustom.custom_model import named_tensors
from hfcustom.data.collate import Batch, Collator
from hfcustom.losses import WeightedLoss, parse_losses

FAMILIES = "hfcustom.families."
NOISE = 0.05  # how far added weights are moved off their start
HUGE = 1e30
ROUNDING = 2e-5  # of the largest logit: what the order of float32 sums may change


class Patient:
    """A custom class under examination; `settings` are fields of its config that differ from the class's defaults."""

    def __init__(
        self,
        model_class: type[CustomVLM],
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
    ) -> None:
        self.model_class: Any = model_class
        self.family_class = family_class_of(model_class)
        self.module: ModuleType = sys.modules[self.family_class.__module__]
        self.folder = folder
        self.checkpoint = checkpoint  # where the class and its settings were read, None for a class alone
        self.settings = dict(settings or {})
        self.loss_left_out = self._why_not_own_loss()
        self.processor = self.model().match_processor(self.module.tiny_processor())

    # ---- models -----------------------------------------------------------------------------------------------------

    def config(self, model_class: Any = None, **changes: Any) -> Any:
        """Return the family's tiny config under the class's own, with its settings and these changes."""
        config = (model_class or self.model_class).config_class.adopt(self.module.tiny_config())
        left_out = {"loss": "cross_entropy"} if self.loss_left_out else {}
        for name, value in {**self.settings, **left_out, **changes}.items():
            setattr(config, name, value)
        return config

    def model(self, model_class: Any = None, **changes: Any) -> Any:
        """Return a model in eval mode, without dropout, the same weights each time."""
        torch.manual_seed(0)
        model = (model_class or self.model_class)(self.config(model_class, **changes))
        if wake := vars(self.module).get("wake"):  # what starts at zero in the family itself
            wake(model)
        move_off_start(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.loss_step = 0  # for weights on a schedule
        return model.eval()

    def variant(self, model: Any, namespace: Mapping[str, Any], **changes: Any) -> Any:
        """Return a model of the class with other methods, or settings, and the same weights."""
        name = self.model_class.__name__
        members = {**namespace, "__module__": __name__, "__qualname__": name}
        members |= {f"default_{setting}": value for setting, value in changes.items()}  # which stands in for None
        other = self.model(type(name, (self.model_class,), members), **changes)
        known = other.state_dict()
        same = {key: value for key, value in model.state_dict().items() if key in known}
        other.load_state_dict(same, strict=False)
        return other

    def stock(self, model: Any = None) -> Any:
        """Return the stock parent, with the weights of a model of the class."""
        stock_class = self.model_class.stock_class()
        values = {
            key: value
            for key, value in self.module.tiny_config().to_dict().items()
            if key not in ("connector", "loss")
        }
        values.pop("model_type")
        torch.manual_seed(0)
        stock = stock_class(stock_class.config_class(**values)).eval()
        if model is not None:
            mine = {name: tensor for name, tensor in model.state_dict().items() if name in stock.state_dict()}
            stock.load_state_dict(mine)
        return stock

    def own_methods(self) -> dict[str, Any]:
        """Return the methods that the user's classes define."""
        found = own_functions(self.model_class).items()
        return {name: vars(owner)[name] for name, (owner, _) in found if is_method(vars(owner)[name], name)}

    def is_structural(self, model: Any) -> str:
        """Say what the class adds to the stock graph or takes out of it; nothing where every tensor is stock's."""
        names = {name for name, _ in named_tensors(model)}
        added, lost = sorted(names - model.stock_tensor_names()), sorted(model.stock_tensor_names() - names)
        said = [f"adds {shorten(added)}"] * bool(added) + [f"takes out {shorten(lost)}"] * bool(lost)
        return " and ".join(said)

    def corrections(self) -> str:
        """Say which corrections of stock the family has and this model has off; nothing where there are none."""
        config = vars(self.config())
        known = {name: why for name, why in self.model_class.corrections.items() if not config[name]}
        return "; ".join(f"Set {name}=True in the config: {why}" for name, why in known.items())

    def _why_not_own_loss(self) -> str:
        """Say why the configured loss cannot be run on made-up rows; nothing if it can."""
        wanted = self.settings.get("loss") or self.model_class.default_loss
        if wanted == "stock":
            return ""
        for item in parse_losses(wanted):
            if needs := _needs(item):
                return f"the loss {item.loss.name!r} wants {needs}, which made-up rows have not"
        return ""

    # ---- rows -------------------------------------------------------------------------------------------------------

    def batch(self, images: list[int], processor: Any = None, **pictures: int) -> Batch:
        """Return a training batch with a row for each number of images; `pictures` as for row()."""
        collate = Collator(processor or self.processor)
        return collate([self.row(count, seed, **pictures) for seed, count in enumerate(images)])

    def row(self, num_images: int, seed: int = 0, *, swapped: int | None = None) -> dict[str, Any]:
        """Return a row of images between words, and an answer as long as `seed` says; image `swapped` is another one."""
        content: list[dict[str, Any]] = []
        for at in range(num_images):
            content += [{"type": "text", "text": f"picture {at}: "}, {"type": "image"}]
        content.append({"type": "text", "text": f"What is number {seed}?"})
        answer = " ".join(["It is", *(str(word) for word in range(1 + 4 * seed))])
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        images = [picture(10 * seed + at + (500 if at == swapped else 0)) for at in range(num_images)]
        return {"messages": messages, "images": images}

    def prompt(self, num_images: int, length: int | None = None) -> dict[str, torch.Tensor]:
        """Return the inputs of generate() for one row, (1, T), padded on the left to a length."""
        row = self.row(num_images)
        text = self.processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        options: dict[str, Any] = {"images": [row["images"]]} if num_images else {}
        if length is not None:
            options |= {"padding": "max_length", "max_length": length, "padding_side": "left"}
        bos = self.processor.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            options["add_special_tokens"] = False  # the template wrote it already
        return dict(self.processor(text=[text], return_tensors="pt", **options))


def _needs(item: WeightedLoss) -> str:
    wanted = [*item.loss.columns, *(name for name in item.loss.inputs if name != "previous_tokens")]
    return ", ".join(wanted)


def is_method(value: Any, name: str) -> bool:
    """Whether a member of a class is a plain method that Python does not call by itself."""
    return isinstance(value, FunctionType) and not name.startswith("__")


def move_off_start(model: Any) -> None:
    """Move what a class adds a little off its start, so that a gate that opens from zero has an effect."""
    generator = torch.Generator().manual_seed(1)
    added = set(model.new_tensor_names())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)


def family_class_of(model_class: type[CustomVLM]) -> Any:
    """Return the class of hfcustom's family that a class inherits; TypeError for one of no family."""
    for base in model_class.__mro__:
        if base.__module__.startswith(FAMILIES) and issubclass(base, CustomVLM) and "config_class" in vars(base):
            return base
    raise TypeError(
        f"{model_class.__name__} inherits no family of hfcustom, so there is no small copy of it. Subclass one of "
        "hfcustom.families, or test a model of your own directly."
    )


def picture(seed: int) -> Image.Image:
    """Return noise, 50 x 30."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors as a share of the largest value that was expected."""
    found, expected = found.detach(), expected.detach()
    said = ~((found == expected) & (expected.abs() > HUGE))  # a family may rule tokens out by a logit of -3e38
    if not said.any():
        return 0.0
    return float((found - expected)[said].abs().max() / expected[said].abs().max().clamp(min=1e-30))


def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def shorten(names: list[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
