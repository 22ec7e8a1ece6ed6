"""Sizes that the families' published checkpoints share: vision towers and decoders as the hub's config.json files have them.

A family's CHECKPOINTS maps a hub id to what its config has beyond the stock config's defaults; hfcustom/catalog.py builds
it on the meta device and counts. Totals are checked in tests/test_catalog.py against the published parameter counts.
"""

from __future__ import annotations

from typing import Any

Sizes = tuple[int, int, int, int, int]  # hidden, intermediate, layers, heads, key-value heads


def decoder(model_type: str, sizes: Sizes, vocabulary: int) -> dict[str, Any]:
    """Return the text_config of a decoder of these sizes."""
    hidden, intermediate, layers, heads, key_value_heads = sizes
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


def vision(
    hidden: int, intermediate: int, layers: int, heads: int, image_size: Any, patch_size: Any, **more: Any
) -> dict[str, Any]:
    """Return the vision_config of a plain ViT of these sizes."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
        **more,
    }


def so400m(image_size: int, **more: Any) -> dict[str, Any]:
    """Return SigLIP-SO400M/14 for an image size in pixels (google/siglip-so400m-patch14-384)."""
    return vision(1152, 4304, 27, 16, image_size, 14, **more)


CLIP_L_336 = vision(1024, 4096, 24, 16, 336, 14, model_type="clip_vision_model", projection_dim=768)
INTERNVIT_300M = vision(1024, 4096, 24, 16, [448, 448], [14, 14], attention_bias=True)
INTERNVIT_6B = vision(3200, 12800, 45, 25, [448, 448], [14, 14], use_qk_norm=True)
