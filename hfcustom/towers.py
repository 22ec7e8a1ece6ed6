"""Towers: what of a vision tower no image feature passes through.

LLaVA and its kin read features from a layer of their choice (`config.vision_feature_layer`, an index into hidden_states,
whose first is the embeddings); the layers behind it compute for nothing, and training never reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def unread(model: nn.Module, path: str, layers: int | Sequence[int]) -> dict[str, str]:
    """Return how names of parameters behind the last layer read begin, and why nothing reaches them.

    `path` is the tower's; its last norm, where it has one, is behind every layer (CLIP, SigLIP).
    """
    tower = model.get_submodule(path)
    name, stack = next((name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList))
    states = len(stack) + 1
    last = max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))
    why = f"features are read behind layer {last} of {len(stack)}"
    found = {f"{path}.{name}.{layer}.": why for layer in range(last, len(stack))}
    norms = [child for child, _ in tower.named_children() if child == "post_layernorm"]
    return found | {f"{path}.{norm}.": "features are read before the last norm" for norm in norms}
