"""Rules about the inner model: how a server calls it, and what its layers must hand on."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from hfcustom.origins import Place, is_users, place_of, tree_of
from hfcustom.serving.finding import Found, rule
from hfcustom.serving.syntax import (
    line_in,
    mentions,
    method_of,
    names_called,
    owner_of,
    passes_on,
    place_of_class,
    variadic_name,
)
from hfcustom.serving.target import Served

PASSED = ("input_ids", "inputs_embeds", "use_cache", "position_ids", "attention_instances", "return_dict")
ATTENDS = (
    "scaled_dot_product_attention",
    "softmax",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "multi_head_attention_forward",
)
IN_FORWARD = ("get_placeholder_mask", "inputs_merger", "get_video_placeholder_mask")
EXPERT_INPUTS = ("hidden_states", "top_k_index", "top_k_weights")
STATE_METHODS = ("state_dict", "load_state_dict", "_load_from_state_dict", "_save_to_state_dict")
STATE_HOOKS = (
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
    "_register_load_state_dict_pre_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "_register_state_dict_hook",
)


@rule(
    asks="the inner model class has _supports_attention_backend = True",
    why="The server asks is_backend_compatible() of the class before it loads anything, and stops where that is False.",
    cure="Set `_supports_attention_backend = True` in the inner model's class once its attention goes through "
    "ALL_ATTENTION_FUNCTIONS.",
)
def backend(served: Served) -> Iterator[Found]:
    """Ask the class that a server builds."""
    inner: Any = type(served.alone) if served.alone is not None else served.auto_class
    if inner is None:
        what = f"{served.model_class.__name__} has no inner model: its class is head and all, and AutoModel has none for it"
        yield place_of_class(served.model_class), what, "warning"
    elif not inner.is_backend_compatible():
        own = is_users(inner)
        yield (
            place_of_class(inner),
            f"{inner.__name__}._supports_attention_backend is False",
            "error" if own else "warning",
        )
    elif served.alone is None:
        what = f"AutoModel has {inner.__name__} itself, which returns logits where a server wants hidden states"
        yield place_of_class(served.model_class), what, "warning"


@rule(
    asks="the inner forward needs no argument of its own",
    why=f"The server passes {', '.join(PASSED)} and nothing else: a required argument is a TypeError, and an optional one "
    "stays at its default without a word.",
    cure="Take it from the config, or compute it in get_image_features; accept **kwargs for what the server adds.",
)
def arguments(served: Served) -> Iterator[Found]:
    """Read the signature of an inner forward of the user's."""
    if served.alone is None or (found := method_of(type(served.alone), "forward")) is None:
        return
    inner = type(served.alone)
    owner = owner_of(inner, "forward")
    assert owner is not None
    at = inner.__mro__.index(owner) + 1
    inherited = next((vars(base)["forward"] for base in inner.__mro__[at:] if "forward" in vars(base)), None)
    known = set(inspect.signature(inherited).parameters) if inherited is not None else set()
    for name, parameter in list(inspect.signature(inner.forward).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in PASSED:
            continue
        place = line_in(found[1], _argument(found[0], name))
        if parameter.default is parameter.empty:
            yield place, f"{owner.__name__}.forward cannot be called without {name!r}"
        elif name not in known:
            yield place, f"{owner.__name__}.forward gets no {name!r}: it is always {parameter.default!r}"


def _argument(node: ast.FunctionDef, name: str) -> ast.AST:
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return next((item for item in every if item.arg == name), node)


@rule(
    asks="**kwargs are taken and handed on, from the inner model to the attention",
    why="The attention of the server finds its key-value cache in the keyword argument attention_instances; a module that does "
    "not take **kwargs is a TypeError, one that does not hand them on leaves the attention without its cache.",
    cure="Add **kwargs to forward() and to the call of the next module.",
)
def kwargs(served: Served) -> Iterator[Found]:
    """Read the forward of each class of the user's on the way to an attention."""
    for module in dict.fromkeys(type(module) for _, module in _on_the_way(served)):
        found = method_of(module, "forward")
        if found is None:
            continue
        name = variadic_name(module.forward)
        if name is None:
            yield found[1], f"{module.__name__}.forward takes no **kwargs"
        elif not passes_on(found[0], name):
            yield found[1], f"{module.__name__}.forward does not hand **{name} on"


def _on_the_way(served: Served) -> Iterator[tuple[str, nn.Module]]:
    if served.alone is not None and is_users(type(served.alone)):
        yield "", served.alone
    for name, module in served.own_modules():
        if module is not served.alone and any(is_attention(inner) for inner in module.modules()):
            yield name, module


def is_attention(module: nn.Module) -> bool:
    """Whether a module attends: its class or a base of it is called so, or its user's source computes it."""
    kind = type(module)
    named = any(base.__name__.endswith(("Attention", "Attn")) for base in kind.__mro__)
    return named or (is_users(kind) and mentions(kind, *ATTENDS))


@rule(
    asks="attention in the language model goes through ALL_ATTENTION_FUNCTIONS, in a layer with a layer_idx",
    why="The server's attention keeps keys and values of earlier steps and of many requests in one flat row. Attention that is "
    "computed by hand sees the tokens of this step alone, of all requests at once: the answers are wrong without an error.",
    cure="attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]; attention(self, query, key, value, mask, "
    "scaling=..., **kwargs), and self.layer_idx below num_hidden_layers.",
)
def attention_interface(served: Served) -> Iterator[Found]:
    """Read each attention of the user's in the language model."""
    layers = served.config.get_text_config().num_hidden_layers
    seen: set[type] = set()
    for name, module in served.own_modules():
        kind = type(module)
        if kind in seen or not is_attention(module) or method_of(kind, "forward") is None:
            continue
        seen.add(kind)
        if not mentions(kind, "ALL_ATTENTION_FUNCTIONS", "get_interface"):
            yield _computed_at(kind), f"{kind.__name__} computes attention itself"
        elif not isinstance(index := vars(module).get("layer_idx"), int):
            yield place_of_class(kind), f"{kind.__name__} has no layer_idx"
        elif index >= layers:
            yield (
                place_of_class(kind),
                f"{kind.__name__} at {name} has layer_idx {index}; the config has {layers} layers",
            )
    if any(isinstance(module, nn.MultiheadAttention) for module in served.decoder.modules()):
        owner = next(kind for kind in _holders(served, nn.MultiheadAttention))
        yield (
            place_of_class(owner),
            f"{owner.__name__} holds an nn.MultiheadAttention, which computes attention itself",
        )


def _computed_at(kind: type) -> Place | None:
    found = method_of(kind, "forward")
    if found is None:
        return place_of_class(kind)
    return next((line_in(found[1], call) for name, call in names_called(found[0]) if name in ATTENDS), found[1])


def _holders(served: Served, kind: type) -> Iterator[type]:
    for module in served.decoder.modules():
        if any(isinstance(child, kind) for child in module.children()):
            yield type(module)


@rule(
    asks="the inner model has get_image_features, which needs nothing but what the processor gives",
    why="The server makes image embeddings by get_image_features(pixel_values, **what the image processor returned) of the inner "
    "model, and by nothing else.",
    cure="Define it in the inner model; return the embeddings, or an output with pooler_output; give other arguments defaults.",
)
def image_features(served: Served) -> Iterator[Found]:
    """Look for the method, and at the arguments of one of the user's."""
    inner = type(served.alone) if served.alone is not None else None
    if inner is None:
        return
    method = getattr(inner, "get_image_features", None)
    if method is None:
        if served.config.get_text_config() is not served.config:
            what = f"{inner.__name__} has no get_image_features: images cannot be asked about"
            yield place_of_class(inner), what, "error" if is_users(inner) else "warning"
        return
    found = method_of(inner, "get_image_features")
    if found is None:
        return
    known = _known_inputs(served)
    for name, parameter in list(inspect.signature(method).parameters.items())[2:]:
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and name not in known:
            what = f"get_image_features cannot be called without {name!r}, which no processor gives"
            yield line_in(found[1], _argument(found[0], name)), what


def _known_inputs(served: Served) -> set[str]:
    """Return what the processor gives besides text, else what the stock method takes."""
    names = set(getattr(getattr(served.processor, "image_processor", None), "model_input_names", None) or ())
    for base in type(served.alone).__mro__:
        method = vars(base).get("get_image_features")
        if method is not None and not is_users(base):
            names |= set(inspect.signature(method).parameters)
    return names


@rule(
    asks="the inner forward does nothing with pictures",
    why="The server calls get_image_features by itself, puts the result among the embeddings by itself, and gives forward() "
    "inputs_embeds alone: pixel_values is always None there, and no placeholder is looked for.",
    cure="Do what concerns pictures in get_image_features.",
)
def forward_images(served: Served) -> Iterator[Found]:
    """Find uses of pixel_values in an inner forward of the user's, and methods that only such a forward calls."""
    if served.alone is None:
        return
    inner = type(served.alone)
    found = method_of(inner, "forward")
    if found is not None and (node := _use_of_pixels(found[0])) is not None:
        yield line_in(found[1], node), f"{inner.__name__}.forward uses pixel_values"
    for name in IN_FORWARD:
        if (own := method_of(inner, name)) is not None:
            yield own[1], f"{inner.__name__}.{name} is only called with pictures in forward()"


def _use_of_pixels(node: ast.FunctionDef) -> ast.AST | None:
    """Return the first use that is more than handing it on as pixel_values=pixel_values."""
    handed = {id(item.value) for call in ast.walk(node) if isinstance(call, ast.Call) for item in call.keywords}
    for inner in ast.walk(node):
        used = isinstance(inner, ast.Name) and inner.id == "pixel_values" and id(inner) not in handed
        named = isinstance(inner, ast.Constant) and inner.value == "pixel_values"
        if used or named:
            return inner
    return None


@rule(
    asks="stacked experts are called experts, and take hidden_states, top_k_index, top_k_weights",
    why="The server replaces a module named experts by its fused kernel, and calls it so; others run unfused on one device, or "
    "fail where their arguments are others.",
    cure="Name the attribute `experts`, hold all 3-D Parameters in it, and route outside of it.",
)
def experts(served: Served) -> Iterator[Found]:
    """Look at modules of the user's that hold 3-D Parameters."""
    seen: set[type] = set()
    for name, module in served.own_modules():
        stacked = [own for own, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3]
        kind = type(module)
        if not stacked or kind in seen or isinstance(module, nn.Conv1d):
            continue
        seen.add(kind)
        if name.rpartition(".")[2] != "experts":
            yield place_of_class(kind), f"{kind.__name__} holds stacked experts ({stacked[0]}) as {name!r}"
        takes = inspect.signature(kind.forward).parameters
        if lost := [word for word in EXPERT_INPUTS if word not in takes]:
            found = method_of(kind, "forward")
            where = found[1] if found is not None else place_of_class(kind)
            yield where, f"{kind.__name__}.forward takes no {', '.join(lost)}"


@rule(
    asks="weights load by their names, as they are",
    why="The server reads the safetensors files itself and puts each tensor where its name says; state_dict(), load_state_dict() "
    "and their hooks are not called, so what they rename, split or compute does not happen.",
    cure="Save the tensors under the names and in the shapes that the modules have.",
)
def weights(served: Served) -> Iterator[Found]:
    """Find methods and hooks that change a state dict."""
    kinds = dict.fromkeys([served.model_class, *(type(module) for module in served.model.modules())])
    for owner in dict.fromkeys(
        base for kind in kinds for base in kind.__mro__ if is_users(base) and base is not object
    ):
        for name in STATE_METHODS:
            if name in vars(owner):
                yield place_of(vars(owner)[name]), f"{owner.__name__}.{name} is not called"
        found = tree_of(owner)
        for name, call in names_called(found[0]) if found is not None else ():
            if name in STATE_HOOKS:
                assert found is not None
                yield line_in(found[1], call), f"{owner.__name__} hooks its state dict ({name}), which is not called"
