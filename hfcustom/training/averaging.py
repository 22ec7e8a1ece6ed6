"""The running average of trained weights (EMA): kept beside them, evaluated and published in their place, never trained.

trained parameters, decay -> Average. After each step that was applied, average = d * average + (1 - d) * weights, with
d = min(decay, (1 + t) / (10 + t)) at the t-th one, so that the average forgets where it began however short the run is: the
warm-up of TensorFlow's ExponentialMovingAverage(num_updates) and diffusers' EMAModel. What averaging weights is worth: Polyak
and Juditsky 1992; Izmailov et al. 2018, https://arxiv.org/abs/1803.05407. Of weights that FSDP shards each rank averages its shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hfcustom.commit import write_json
from hfcustom.distributed.sharding import forget_whole, is_sharded, local_part
from hfcustom.distributed.spread import Spread, write_spread
from hfcustom.exits import CheckpointError
from hfcustom.runs.folder import size

STEM, FACTS = "ema", "ema.json"


class Average:
    """The average of a model's trained weights, in float32 on their device; of none of them where `decay` is None."""

    def __init__(self, model: nn.Module, decay: float | None, accelerator: Accelerator) -> None:
        self.model, self.decay, self.accelerator = model, decay, accelerator
        named = model.named_parameters() if decay is not None else ()
        self.trained = {name: p for name, p in named if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.trained.items()}
        self.updates = 0
        if narrow := [name for name, value in self.values.items() if value.dtype.itemsize < 4]:
            raise ValueError(f"{narrow[0]} is trained in {self.values[narrow[0]].dtype}, too coarse for an average.")

    @property
    def bytes(self) -> int:
        """What the average takes, in memory and in a checkpoint."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    def announce(self) -> None:
        """Say that there is one."""
        if self.values:
            count = sum(value.numel() for value in self.values.values())
            self.accelerator.print(
                f"ema_decay={self.decay}: a running average of {count:,} trained parameters, {size(self.bytes)} beside them; "
                "it is what is evaluated and published."
            )

    def update(self) -> None:
        """Take in the weights after a step that was applied."""
        if self.decay is None:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(local_part(self.values[name]), local_part(weight.detach())) for name, weight in self.trained.items()]
        get_ema_multi_avg_fn(decay)([average for average, _ in pairs], [weight for _, weight in pairs], self.updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average, one tensor at a time, to the last bit."""
        for name, parameter in self.trained.items():
            weight, average = local_part(parameter.detach()), local_part(self.values[name])
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        forget_whole(self.model)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the average; afterwards, and after an error, it is what is trained."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def facts(self) -> dict[str, Any]:
        """Return what the record of a run says of published weights; nothing where they are those of the last step."""
        return {} if self.decay is None else {"averaged": {"decay": self.decay, "steps": self.updates}}

    def save(self, folder: Path) -> dict[str, str]:
        """Write the average into a checkpoint, a file a rank where it is sharded; return digests of what this rank has hashed."""
        if self.decay is None:
            return {}
        main, digests = self.accelerator.is_main_process, dict[str, str]()
        if is_sharded(self.model):
            _, digests = write_spread(self.values, folder, STEM, self.accelerator)
        elif main:
            save_file(
                {name: value.contiguous() for name, value in self.values.items()}, folder / f"{STEM}.safetensors"
            )
        if main:
            write_json(folder / FACTS, {"decay": self.decay, "updates": self.updates})
        return digests

    def load(self, folder: Path) -> None:
        """Go on with the average of a checkpoint; one that has none lets it begin with the weights that were loaded."""
        if self.decay is None:
            return
        if not (folder / FACTS).is_file():
            self.accelerator.print(f"{folder} holds no average of the weights; it begins here.")
            self.updates = 0
            for name, parameter in self.trained.items():
                local_part(self.values[name]).copy_(local_part(parameter.detach()))
            return
        saved = Spread(sorted(folder.glob(f"{STEM}*.safetensors")))
        if differing := sorted(self.values.keys() ^ saved.homes.keys()):
            raise CheckpointError(
                f"{folder / FACTS}: the trained parameters have changed since ({differing[0]} first of {len(differing)}); "
                "freeze and LoRA as then."
            )
        self.updates = json.loads((folder / FACTS).read_text())["updates"]
        for name, value in self.values.items():
            local_part(value).copy_(local_part(saved.read_like(name, value)))
