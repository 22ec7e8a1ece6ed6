"""Time the ways in which transformers runs a mixture of experts: a loop, batched products, one grouped product.

    python benchmarks/experts.py
    python benchmarks/experts.py --tokens 2048 --hidden-size 2560 --intermediate-size 1664 --num-experts 64 --top-k 6

One layer of Aria's routed experts, forward and backward, in interleaved rounds; prints a table. The second command has
Aria's own sizes. Which way a model takes is in the start-up facts of a run; `set_experts_implementation` chooses another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hfcustom.options import parse

WAYS = ("eager", "batched_mm", "grouped_mm")


@dataclass(kw_only=True)
class ExpertsConfig:
    """Sizes of the layer; each annotation is the flag's help."""

    tokens: Annotated[int, "tokens of a step"] = 512
    hidden_size: Annotated[int, "width of a token"] = 512
    intermediate_size: Annotated[int, "width of an expert"] = 512
    num_experts: Annotated[int, "experts"] = 16
    top_k: Annotated[int, "experts that a token goes to"] = 4
    rounds: Annotated[int, "measured steps of each way"] = 5
    threads: Annotated[int, "processor threads"] = 1
    dtype: Annotated[Literal["float32", "bfloat16"], "of the weights"] = "float32"
    device: Annotated[Literal["cpu", "cuda"], "where"] = "cpu"

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        names = ("tokens", "hidden_size", "intermediate_size", "num_experts", "top_k", "rounds", "threads")
        wrong = [f"{name}={getattr(self, name)} must be positive" for name in names if getattr(self, name) < 1]
        more = f"top_k={self.top_k} is more than num_experts={self.num_experts}"
        return wrong + ([more] if self.top_k > self.num_experts else [])


if __name__ == "__main__":
    CONFIG = parse(ExpertsConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import time
from typing import Any

import torch
from transformers import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextMoELayer

from hfcustom.console import show_table


def layer_of(config: ExpertsConfig, way: str) -> Any:
    """Return a layer with the same random weights for every way."""
    sizes = AriaTextConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_num_experts=config.num_experts,
        moe_topk=config.top_k,
        num_attention_heads=1,  # of no account here, but the width must be a multiple of it
    )
    sizes._experts_implementation = way
    layer = AriaTextMoELayer(sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / config.hidden_size**0.5
    return layer.to(config.device, getattr(torch, config.dtype))


def step(layer: Any, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Run forward and backward; return the seconds and the output."""
    layer.zero_grad()
    began = time.perf_counter() if tokens.is_cuda else time.process_time()
    output = layer(tokens)
    output.square().mean().backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if tokens.is_cuda else time.process_time()) - began, output.detach()


def main(config: ExpertsConfig) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, config.tokens, config.hidden_size, generator=generator)
    tokens = tokens.to(config.device, getattr(torch, config.dtype))
    layers = {way: layer_of(config, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    outputs: dict[str, torch.Tensor] = {}
    for _ in range(config.rounds + 1):  # the first one warms up
        for way, layer in layers.items():
            taken, outputs[way] = step(layer, tokens)
            seconds[way].append(taken)
    best = {way: min(taken[1:]) for way, taken in seconds.items()}
    far = {way: float((outputs[way] - outputs["eager"]).abs().max()) for way in WAYS}
    rows = [(way, best[way], f"{best['eager'] / best[way]:.2f}x", f"{far[way]:.0e}") for way in WAYS]
    show_table(("way", "seconds", "faster than the loop", "largest difference"), rows)


if __name__ == "__main__":
    main(CONFIG)
