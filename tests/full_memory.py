"""A device that has memory for so many tokens: a larger forward, or its backward, fails as CUDA's allocator does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import nn

from hfcustom.custom_model import CustomModel

Where = Literal["forward", "backward", "amid backward", "first look"]
OUT = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Room:
    """What runs there, and where it fails."""

    def __init__(self, tokens: int, where: Where, times: int) -> None:
        self.tokens, self.where, self.times = tokens, where, times
        self.sizes: list[int] = []
        self.random: list[torch.Tensor] = []  # state of the generator before each forward
        self.held: list[Any] = []  # of failed attempts

    @property
    def failures(self) -> int:
        return sum(size > self.tokens for size in self.sizes)

    def run(self, call: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the call of a model in training."""
        assert not [held for held in self.held if held() is not None], "a failed attempt is kept alive"
        self.sizes.append(kwargs["input_ids"].numel())
        self.random.append(torch.get_rng_state())
        if self.sizes[-1] <= self.tokens or self.where == "first look" or len(self.held) == self.times:
            return call(model, *args, **kwargs)
        gc.disable()  # what is freed is freed by the code under test
        hooks = []
        if self.where == "amid backward":
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            hooks.append(embeddings.register_forward_hook(lambda *given: Full.apply(given[-1])))
        out = call(model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        self.held.append(weakref.ref(out.loss))
        gc.enable()
        if self.where == "forward":
            raise torch.OutOfMemoryError(OUT)
        if self.where == "backward":
            out.loss = Full.apply(out.loss)
        return out

    def look(self, call: Any, model: Any, batch: Any) -> Any:
        """Stand in for the first look at a micro-batch."""
        if self.where == "first look" and batch["input_ids"].numel() > self.tokens:
            self.sizes.append(batch["input_ids"].numel())
            raise torch.OutOfMemoryError(OUT)
        return call(model, batch)


class Full(torch.autograd.Function):
    """Memory runs out when the backward pass comes here."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError(OUT)


@contextmanager
def room_for(tokens: int, where: Where = "forward", times: int = 1000) -> Iterator[Room]:
    """Let models in training run in so much memory, which runs out at most so many times."""
    from hfcustom.base import CustomVLM

    room, call, look = Room(tokens, where, times), nn.Module.__call__, CustomVLM.loss_summaries

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(self, CustomModel) and self.training
        return room.run(call, self, *args, **kwargs) if ours else call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", run)
        patch.setattr(CustomVLM, "loss_summaries", lambda *args: room.look(look, *args))
        yield room
