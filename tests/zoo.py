"""Broken models, one for each check of the doctor: each has one fault, which that check and no other is to find.

ZOO: name of the check -> a function that makes the class from a family's class. What must live in a file is a script.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

ZOO: dict[str, Callable[[Any], Any]] = {}


def broken(check: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def add(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        assert check not in ZOO
        ZOO[check] = make
        return make

    return add


@broken("parity")
def another_epsilon(base: Any) -> Any:
    class Broken(base):
        """Changes a number of the stock part that no folder holds."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.language_model.norm.variance_epsilon = 0.5

    return Broken


@broken("overrides")
def a_method_that_nobody_calls(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * hidden_states

    return Broken


@broken("image_sensitivity")
def images_in_training_only(base: Any) -> Any:
    class Broken(base):
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return features if self.training else torch.ones_like(features)

    return Broken


@broken("strict_load")
def a_head_that_starts_again(base: Any) -> Any:
    class Broken(base):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            loaded = super().from_pretrained(*args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if cls.stock_class().__name__ in (model.config.architectures or []):  # "a new task"
                nn.init.normal_(model.lm_head.weight)
            return loaded

    return Broken


def rename(folder: Any, old: str, new: str) -> None:
    file = f"{folder}/model.safetensors"
    save_file({name.replace(old, new): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})


@broken("stock_reload")
def names_of_its_own(base: Any) -> Any:
    class Broken(base):
        def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
            super().save_pretrained(folder, **kwargs)
            rename(folder, "vision_tower", "eyes")

        @classmethod
        def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
            rename(folder, "eyes", "vision_tower")
            return super().from_pretrained(folder, **kwargs)

    return Broken


@broken("gradients")
def a_detached_tower(base: Any) -> Any:
    class Broken(base):
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return 1.1 * features.detach()

    return Broken


@broken("accumulation")
def a_mean_of_means(base: Any) -> Any:
    class Broken(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs.loss = outputs.loss / len(kwargs["labels"])
            return outputs

    return Broken


@broken("all_masked")
def a_division_by_nothing(base: Any) -> Any:
    class Broken(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs.loss = 2 * outputs.loss / (kwargs["labels"] != -100).sum().clamp(max=1)
            return outputs

    return Broken


@broken("checkpointing")
def a_hook_that_is_gone_by_then(base: Any) -> Any:
    class Broken(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            norm = self.model.language_model.layers[0].input_layernorm
            handle = norm.register_forward_hook(lambda module, args, output: 1.5 * output)
            try:
                return super().forward(*args, **kwargs)
            finally:
                handle.remove()

    return Broken


@broken("batch_invariance")
def statistics_of_the_batch(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if self.training or len(hidden_states) == 1:
                return 1.1 * hidden_states
            return hidden_states - 0.1 * hidden_states.mean(0, keepdim=True)

    return Broken


@broken("packing")
def positions_of_its_own(base: Any) -> Any:
    class Broken(base):
        """Believes that positions always count from 0 to the end."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("position_ids", None)
            return super().forward(*args, **kwargs)

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.1 * hidden_states

    return Broken


@broken("causal_leak")
def a_look_ahead(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if self.training:
                hidden_states = hidden_states + 0.2 * hidden_states.roll(-1, 1)
            return 1.1 * hidden_states

    return Broken


@broken("cache_parity")
def a_prompt_treated_apart(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states if hidden_states.shape[1] == 1 else 1.2 * hidden_states

    return Broken


@broken("padding_side")
def padding_on_the_right_only(base: Any) -> Any:
    class Broken(base):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None:
                lengths, columns = attention_mask.sum(1, keepdim=True), torch.arange(attention_mask.shape[1])
                attention_mask = (columns < lengths).long()
            return super().forward(*args, attention_mask=attention_mask, **kwargs)

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.1 * hidden_states

    return Broken


@broken("bf16")
def a_tensor_of_float32(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * torch.linspace(0.5, 1.5, hidden_states.shape[-1])

    return Broken


@broken("compiled")
def a_fast_path(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states if torch.compiler.is_compiling() else 1.1 * hidden_states

    return Broken


@broken("lora")
def a_bare_parameter(base: Any) -> Any:
    class Broken(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = nn.Parameter(torch.ones(config.text_config.hidden_size))
            self.post_init()

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * self.scale

    return Broken


@broken("quantized")
def the_dtype_of_a_weight(base: Any) -> Any:
    class Broken(base):
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.1 * hidden_states.to(self.model.language_model.layers[0].mlp.up_proj.weight.dtype)

    return Broken


@broken("trainers")
def a_forward_on_the_instance(base: Any) -> Any:
    class Broken(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)

            @wraps(self.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return type(self).forward(self, *args, **kwargs)

            self.forward = forward

    return Broken


DRAWN = '''
import hfcustom
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration

@hfcustom.register
class Drawn(CustomInternVLForConditionalGeneration):
    """A number that Python draws anew for each process."""

    def transform_hidden_states(self, hidden_states):
        return hidden_states * (1.5 + hash("scale") % 1000 / 1000)
'''
