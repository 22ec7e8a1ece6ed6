"""Time frame selection by normalised cross-correlation against selection by CLIP's embeddings, on the same clip.

    python benchmarks/frames.py
    python benchmarks/frames.py --frames 60 --rounds 5

Both read the example of `hfcustom frames --example` anew in every round, one after the other, and choose k frames. CLIP has
the shapes of openai/clip-vit-base-patch32 and random weights: only its time counts here. Prints a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hfcustom.options import parse


@dataclass(kw_only=True)
class FramesConfig:
    """Sizes; each annotation is the flag's help."""

    frames: Annotated[int, "frames of the clip, at most 239"] = 239
    k: Annotated[int, "frames to choose"] = 8
    rounds: Annotated[int, "measured runs of each method"] = 3
    threads: Annotated[int, "processor threads of the encoder"] = 1
    encoder: Annotated[Literal["base", "tiny"], "CLIP ViT-B/32, or a smoke test's, whose times mean nothing"] = "base"

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        names = ("frames", "k", "rounds", "threads")
        wrong = [f"{name}={getattr(self, name)} must be positive" for name in names if getattr(self, name) < 1]
        return wrong + ([f"frames={self.frames} is more than the clip's 239"] if self.frames > 239 else [])


if __name__ == "__main__":
    CONFIG = parse(FramesConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from hfcustom.console import show_table
from hfcustom.data.frames import select_frames
from hfcustom.data.frames.embeddings import Encoder
from hfcustom.data.frames.example import example_clip
from hfcustom.encoders import clip as clip_encoder


def encoder_of(size: str) -> Encoder:
    """Return CLIP with random weights; a processor without a tokenizer is enough for pictures."""
    torch.manual_seed(0)
    if size == "tiny":
        return Encoder(CLIPModel(CLIPConfig(**clip_encoder.tiny_config().to_dict())), clip_encoder.tiny_processor())
    shapes = clip_encoder.CHECKPOINTS["openai/clip-vit-base-patch32"]
    processor: Any = SimpleNamespace(image_processor=CLIPImageProcessorPil())
    return Encoder(CLIPModel(CLIPConfig(**shapes)), processor)


def main(config: FramesConfig) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    frames: np.ndarray = example_clip()[0].frames
    frames = frames[np.linspace(0, len(frames) - 1, config.frames).round().astype(int)]  # (F, H, W, 3)
    ways: dict[str, dict[str, Any]] = {"cross_correlation": {}, "embedding": {"model": encoder_of(config.encoder)}}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    chosen: dict[str, list[int]] = {}
    for _ in range(config.rounds + 1):  # the first one warms up
        for way, options in ways.items():
            began = time.process_time()
            chosen[way] = select_frames(frames, way, config.k, **options)
            seconds[way].append(time.process_time() - began)
    best = {way: min(taken[1:]) for way, taken in seconds.items()}
    rows = [
        (way, f"{best[way]:.3f}", f"{best['embedding'] / best[way]:.1f}x", " ".join(map(str, chosen[way])))
        for way in ways
    ]
    show_table(("method", "processor seconds", "faster than embedding", "frames"), rows)


if __name__ == "__main__":
    main(CONFIG)
