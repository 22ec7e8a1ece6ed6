"""Classes that a server would run otherwise than meant, each breaking one rule of lint-serving, and clean ones.

The line that a finding must name ends with `# the line`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import InternVLModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

import hfcustom
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration, CustomInternVLProcessor

BROKEN: dict[str, tuple[str, type]] = {}  # class -> (the rule that it breaks, the class)
CLEAN: list[type] = []


def breaks(rule: str) -> Any:
    def add(model_class: type) -> type:
        if issubclass(model_class, CustomInternVLForConditionalGeneration):
            hfcustom.register(model_class)
        BROKEN[model_class.__name__] = rule, model_class
        return model_class

    return add


def clean(model_class: type) -> type:
    CLEAN.append(hfcustom.register(model_class))
    return model_class


def holding(inner: type[PreTrainedModel]) -> Any:
    """Return a custom class that holds an inner model of this class."""
    inner.register_for_auto_class("AutoModel")

    class Outer(CustomInternVLForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = inner(config)
            self.post_init()

    Outer.__name__ = Outer.__qualname__ = f"With{inner.__name__}"
    return Outer


def breaks_inside(rule: str) -> Any:
    def add(inner: type[PreTrainedModel]) -> type[PreTrainedModel]:
        breaks(rule)(holding(inner))
        return inner

    return add


# ---- clean ----------------------------------------------------------------------------------------------------------


@clean
class OwnLoss(CustomInternVLForConditionalGeneration):
    default_loss = {"focal": 1.0}

    def loss_counts(self, batches: Any) -> Any:
        return super().loss_counts(batches)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features * self.gain


class Careful(InternVLModel):
    """Changes image features and hidden states where a server looks for it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.brightness = Gain()
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        outputs = super().get_image_features(pixel_values, **kwargs)
        outputs.pooler_output = self.brightness(outputs.pooler_output)
        return outputs

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        if isinstance(outputs, tuple):  # a server asks with return_dict=False
            return (1.5 * outputs[0], *outputs[1:])
        outputs.last_hidden_state = 1.5 * outputs.last_hidden_state
        return outputs


clean(holding(Careful))


class LouderAttention(Qwen2Attention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        assert attend is not None
        return super().forward(1.1 * hidden_states, *args, **kwargs)


def with_attention(kind: Any) -> Any:
    """Return an inner model whose first layer has this attention."""

    class Inner(InternVLModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.language_model.layers[0].self_attn = kind(config.text_config, 0)
            self.post_init()

    Inner.__name__ = Inner.__qualname__ = f"{kind.__name__}Inner"
    return Inner


clean(holding(with_attention(LouderAttention)))

# ---- outside of the inner model -------------------------------------------------------------------------------------


@breaks("inner-model")
class OutsideStates(CustomInternVLForConditionalGeneration):
    def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:  # the line
        return 1.5 * hidden_states


@breaks("inner-model")
class OutsideFeatures(CustomInternVLForConditionalGeneration):
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:  # the line
        return super().get_image_features(*args, **kwargs)


@breaks("outer-module")
class OutsideConnector(CustomInternVLForConditionalGeneration):
    default_connector = "average_pool"  # the line


@breaks("outer-module")
class OutsideGate(CustomInternVLForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.text_config.hidden_size, 1)  # the line
        self.post_init()


@breaks("built-inside")
class PutInAfterwards(CustomInternVLForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.multi_modal_projector.act = nn.Tanh()  # the line
        self.post_init()


class Head(nn.Linear):
    pass


@breaks("head")
class OtherHead(CustomInternVLForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = Head(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)  # the line
        self.post_init()


class Unregistered(InternVLModel):  # the line
    pass


@breaks("auto-map")
class HoldsUnregistered(CustomInternVLForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Unregistered(config)
        self.post_init()


# ---- the inner model ------------------------------------------------------------------------------------------------


@breaks_inside("backend")
class NotForBackends(InternVLModel):  # the line
    _supports_attention_backend = False


@breaks_inside("arguments")
class NeedsDepth(InternVLModel):
    def forward(
        self,
        depth: torch.Tensor,  # the line
        input_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


@breaks_inside("arguments")
class WaitsForDepth(InternVLModel):
    def forward(
        self,
        input_ids: Any = None,
        depth: float = 1.0,  # the line
        **kwargs: Any,
    ) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * depth
        return outputs


@breaks_inside("kwargs")
class TakesNoMore(InternVLModel):
    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None) -> Any:  # the line
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)


class DropsKwargs(Qwen2Attention):
    def forward(self, states: Any, rope: Any = None, mask: Any = None, **kwargs: Any) -> Any:  # the line
        assert ALL_ATTENTION_FUNCTIONS is not None
        return super().forward(states, rope, mask)


breaks_inside("kwargs")(with_attention(DropsKwargs))


class ByHand(Qwen2Attention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        states = self.v_proj(hidden_states, **kwargs)
        return F.scaled_dot_product_attention(states, states, states), None  # the line


breaks_inside("attention-interface")(with_attention(ByHand))


class BeyondAttention(Qwen2Attention):  # the line
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.layer_idx = 7

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert ALL_ATTENTION_FUNCTIONS is not None
        return super().forward(*args, **kwargs)


breaks_inside("attention-interface")(with_attention(BeyondAttention))


class NamelessAttention(nn.Module):  # the line
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        query = self.q_proj(hidden_states)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, query, query, None, **kwargs)


breaks_inside("attention-interface")(with_attention(NamelessAttention))


@breaks_inside("image-features")
class NeedsHints(InternVLModel):
    def get_image_features(
        self,
        pixel_values: Any,
        hints: torch.Tensor,  # the line
        **kwargs: Any,
    ) -> Any:
        return super().get_image_features(pixel_values * hints, **kwargs)


@breaks_inside("forward-images")
class LooksInForward(InternVLModel):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        bright = pixel_values * 1.1  # the line
        return super().forward(input_ids=input_ids, pixel_values=bright, **kwargs)


@breaks_inside("forward-images")
class OwnMask(InternVLModel):
    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Any:  # the line
        return super().get_placeholder_mask(*args, **kwargs)


class Stack(nn.Module):  # the line
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 64, 64))

    def forward(self, hidden_states: Any, top_k_index: Any = None, top_k_weights: Any = None) -> Any:
        return hidden_states @ self.up[0]


@breaks_inside("experts")
class MisnamedExperts(InternVLModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.layers[0].mlp = Stack()
        self.post_init()


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 64, 64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # the line
        return tokens @ self.up[0]


@breaks_inside("experts")
class OtherArguments(InternVLModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.layers[0].mlp.experts = OneByOne()
        self.post_init()


@breaks_inside("weights")
class RenamesOnLoad(InternVLModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_load_state_dict_pre_hook(lambda *args: None)  # the line
        self.post_init()


@breaks_inside("weights")
class RenamesOnSave(InternVLModel):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # the line
        return super().state_dict(*args, **kwargs)


# ---- around it ------------------------------------------------------------------------------------------------------


class FlatConfig(PretrainedConfig):  # the line
    model_type = "zoo_flat"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.vocab_size = 8, 1, 1, 16


@breaks("text-config")
class Flat(PreTrainedModel):
    config_class = FlatConfig
    _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return pixel_values

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return self.embed_tokens(input_ids, **kwargs)


class DarkProcessor(CustomInternVLProcessor):  # the line
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("return_text_replacement_offsets", None)
        return super().__call__(*args, **kwargs)


class WideProcessor(CustomInternVLProcessor):  # the line
    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return {"num_image_tokens": [1], "num_image_patches": [1]}


def processed(processor_class: Any) -> Any:
    """Return a class with this processor."""

    class Processed(CustomInternVLForConditionalGeneration):
        def match_processor(self, processor: Any) -> Any:
            processor = super().match_processor(processor)
            processor.__class__ = processor_class
            return processor

    Processed.__name__ = Processed.__qualname__ = f"With{processor_class.__name__}"
    return Processed


breaks("processor")(processed(DarkProcessor))
breaks("processor")(processed(WideProcessor))


class Adapter(nn.Module):  # the line
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(64, 64)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.squeeze(hidden_states)


@breaks_inside("parallel")
class UnplannedMatrix(InternVLModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.layers[0].mlp = Adapter()
        self.post_init()


@breaks("replay")
class LouderFromOutside(CustomInternVLForConditionalGeneration):  # the line
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model.layers[0].self_attn.scaling *= 3
        self.post_init()
