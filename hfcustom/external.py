"""Models that the field names and transformers does not have: what each is, and how far hfcustom goes with it.

`hfcustom families molmo-0924` prints one of these. `hfcustom.wrap` puts losses, LoRA, freezing and 8 bits around remote code;
`connectors` are those of hfcustom.connectors that express the model's idea in a native family.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class External:
    """One model outside of transformers."""

    checkpoint: str  # hub id, or where it lives
    what: str
    wrap: str  # whether and how hfcustom.wrap() works on it
    native: str = ""  # the nearest family of hfcustom
    connectors: tuple[str, ...] = ()


def _llava(arguments: str) -> str:
    """Say how to wrap a class in the layout of LLaVA's own code, whose decoder holds the other parts."""
    return (
        f"its class comes with its own repository: import that, then wrap({arguments}); the images that it puts into the text "
        "while it runs, and their labels, are followed"
    )


_FLAT = "wrap(AutoModel.from_pretrained(..., trust_remote_code=True)): vision_model, mlp1 and language_model are found"
EXTERNAL = {
    "molmo-0924": External(
        "allenai/Molmo-7B-D-0924",
        "CLIP-L/14-336 tiles, 2 x 2 attention pooling, MLP, OLMo or Qwen2; remote code MolmoForCausalLM",
        'wrap(model, vision="model.vision_backbone.image_vit", language="model.transformer"): its names are its own',
        "molmo2",
        ("attention_pooling",),
    ),
    "apollo": External(
        "Apollo-LMMs/Apollo-3B-t32",
        "videos: SigLIP-SO400M and InternVideo2 side by side, perceiver resampler, Qwen2.5 (https://arxiv.org/abs/2412.10360)",
        'its weights were withdrawn by the authors; of copies, remote code, wrap(model, vision="vision_tower", language="llm")',
        "qwen2_5_vl",
        ("multi_encoder_resampler", "two_encoders", "perceiver_resampler"),
    ),
    "longvu": External(
        "Vision-CAIR/LongVU_Qwen2_7B",
        "long videos: DINOv2 drops near-copies of frames, the question chooses tokens (https://arxiv.org/abs/2410.17434)",
        _llava('model, vision="model.vision_tower_aux_list"'),
        "qwen2_vl",
        ("temporal_dedup", "token_pruning"),
    ),
    "minigemini": External(
        "YanweiLi/MGM-7B",
        "CLIP-L tokens look into ConvNeXt features of a larger image (https://arxiv.org/abs/2403.18814)",
        _llava("model"),
        "llava",
        ("two_encoders",),
    ),
    "mplug-docowl": External(
        "mPLUG/DocOwl1.5",
        "documents: four horizontal neighbours become one token, cropped pages (https://arxiv.org/abs/2403.12895)",
        _llava("model"),
        "llava_next",
        ("patch_merger",),
    ),
    "brave": External(
        "no weights published",
        "several frozen encoders read into one set of queries (https://arxiv.org/abs/2404.07204)",
        "nothing to wrap: neither code nor weights are public",
        "llava",
        ("multi_encoder_resampler",),
    ),
    "minicpm-o": External(
        "openbmb/MiniCPM-o-2_6",
        "SigLIP-SO400M slices, 64-query resampler, Whisper, Qwen2.5-7B, speech out; remote code MiniCPMO",
        'wrap(model, vision="vpm", language="llm"): its names are its own; its forward takes one dict, so subclass it to take tensors by name',
        "minicpmv4_6",
        ("perceiver_resampler",),
    ),
    "llama-3.1-nemotron-nano-vl": External(
        "nvidia/Llama-3.1-Nemotron-Nano-VL-8B-V1",
        "C-RADIOv2-H tiles, pixel shuffle and MLP, Llama-3.1-8B; remote code in InternVL's layout",
        _FLAT,
        "internvl",
        ("pixel_shuffle", "mlp"),
    ),
}


def find_external(name: str) -> str | None:
    """Return the key of EXTERNAL that a name or hub id means, None for another; case, dashes and the owner do not matter."""
    wanted = _plain(name.rpartition("/")[2])
    for key, model in EXTERNAL.items():
        if wanted and (wanted == _plain(key) or wanted == _plain(model.checkpoint.rpartition("/")[2])):
            return key
    return next(
        (key for key in EXTERNAL if len(wanted) > 3 and (wanted in _plain(key) or _plain(key) in wanted)), None
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
