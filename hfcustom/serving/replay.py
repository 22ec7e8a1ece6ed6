"""Run the inner model as a server does, on small random weights, and compare with what the whole class computes.

pictures and words -> inner.get_image_features -> among the embeddings -> inner.forward with six arguments, attention through the
registered function -> head -> logits (B, T, V). Letters: B rows, T text tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfcustom.custom_model import CustomModel
from hfcustom.doctor.patient import ROUNDING, difference, family_class_of, picture
from hfcustom.origins import place_of
from hfcustom.parts import find_head
from hfcustom.serving.finding import Found, rule
from hfcustom.serving.target import Served

NAME = "hfcustom_replay"
OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class CannotReplay(Exception):
    """The stock class of a family, run so, does not compute what it computes by itself."""


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: Any = None,
    attention_instances: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, (B, heads, T, d) -> (B, T, heads, d), as a server that looks its cache up by the layer."""
    attention_instances[module.layer_idx]
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def serve(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits that a server computes from the weights of a model, (1, T, V)."""
    config = copy.deepcopy(model.config)
    inner_class = type(model.base_model)
    config.get_text_config()._attn_implementation = NAME
    inner = inner_class(config).eval()
    inner.load_state_dict(model.base_model.state_dict())
    ids, token = inputs["input_ids"], model.placeholder_token_id
    embeds = inner.get_input_embeddings()(ids)  # (1, T, D)
    given = {name: value for name, value in inputs.items() if name not in OF_THE_TEXT}
    features = inner.get_image_features(given.pop("pixel_values"), **given)
    features = features[0] if isinstance(features, tuple) else getattr(features, "pooler_output", features)
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    embeds[ids == token] = features.reshape(-1, embeds.shape[-1]).to(embeds.dtype)
    outputs = inner(
        input_ids=None,
        inputs_embeds=embeds,
        use_cache=False,
        position_ids=_positions(inner, inputs),
        attention_instances={at: object() for at in range(config.get_text_config().num_hidden_layers)},
        return_dict=False,
    )
    head: Any = find_head(model)
    logits: torch.Tensor = head(outputs[0])
    return logits


def _positions(inner: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (1, T), or (3, 1, T) where a family has positions in time, height and width."""
    ids = inputs["input_ids"]
    if not hasattr(inner, "get_rope_index"):
        return torch.arange(ids.shape[1])[None]
    more = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
    positions: torch.Tensor = inner.get_rope_index(input_ids=ids, **more)[0]
    return positions


def compare(model_class: Any, config: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Return by how much the logits of a server differ from those of a class, as a share of the largest."""
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config)).eval()
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    with torch.no_grad():
        return difference(serve(model, inputs), model(**inputs).logits)


def inputs_for(served: Served) -> dict[str, torch.Tensor]:
    """Return a picture between words."""
    processor = served.processor
    text = f"see {processor.image_token} what is it?"
    features = processor(text=[text], images=[[picture(0)]], return_tensors="pt")
    return {name: value for name, value in features.items() if torch.is_tensor(value)}


@rule(
    asks="run as a server runs it, the inner model has the logits of the whole class",
    why="Something outside of the inner model, which no other rule saw, changes what is computed: a value set on a part, a hook, a "
    "replaced function.",
    cure="Set it in the __init__ of the inner model's own class, from the config.",
)
def replay(served: Served) -> Iterator[Found]:
    """Compare on small random weights; only asked where no other rule found an error."""
    try:
        found = measured(served)
    except CannotReplay:
        return
    if found > ROUNDING:
        what = f"served, the logits of {served.model_class.__name__} differ by {found:.1e} of the largest"
        yield place_of(served.model_class), what


def measured(served: Served) -> float:
    """Return by how much serving changes the logits; CannotReplay where it would in the family itself, or cannot be tried."""
    if not isinstance(served.model, CustomModel) or served.processor is None or not served.is_outer:
        raise CannotReplay
    if served.checkpoint is not None:
        raise CannotReplay  # of its size; its class can be asked
    family: Any = family_class_of(served.model_class)
    inputs = inputs_for(served)
    try:
        if compare(family, _plain(family, served.config), inputs) > ROUNDING:
            raise CannotReplay
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CannotReplay from error
    return compare(served.model_class, served.config, inputs)


def _plain(family: Any, config: Any) -> Any:
    left_out = ("model_type", "connector", "loss")
    return family.config_class(**{name: value for name, value in config.to_dict().items() if name not in left_out})
