"""What every test shares: no network, the families by enumeration, small models, rows and pictures made on the spot."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from traceback import StackSummary
from types import ModuleType
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
TORCHVISION = os.environ.get("HFCUSTOM_TORCHVISION")  # a folder with torchvision, for tests/test_torchvision.py
if TORCHVISION:
    from torch import library

    sys.path.append(TORCHVISION)
    OPERATORS = library.Library("torchvision", "DEF")  # a CPU torch lacks the two that torchvision's import wants
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfcustom.connectors import CONNECTORS
from hfcustom.data.collate import Collator
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.families import family_names, load_family, missing_packages
from hfcustom.losses import LOSSES
from hfcustom.ragged import RaggedImages
from hfcustom.registry import REGISTERED

pytest_plugins = ["family_checks"]

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(RECIPES))  # recipes import each other by name, as they do when run
torch.set_num_threads(1)  # tiny models: a second thread costs more than it does, the more on a busy machine


@dataclass(frozen=True)
class Family:
    """One family under test: its module, its classes, and tiny instances of them."""

    name: str
    module: ModuleType

    @cached_property
    def model_class(self) -> Any:
        return REGISTERED[f"custom_{self.name}"]

    @cached_property
    def stock_class(self) -> Any:
        return self.model_class.stock_class()

    @cached_property
    def processor(self) -> Any:
        return self.module.tiny_processor()

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of the stock graph; not each family has a connector between its images and its language model."""
        return self.model().stock_parts().present()

    def model(self, model_class: Any = None, seed: int = 0, **config: Any) -> Any:
        """Return a tiny model in eval mode, the same weights for the same seed."""
        tiny = self.module.tiny_config()
        model_class = model_class or self.model_class
        if not issubclass(model_class, self.model_class):
            tiny = stock_config(model_class, tiny)
        else:
            tiny = model_class.config_class.adopt(tiny)
        for name, value in config.items():
            assert hasattr(tiny, name), name
            setattr(tiny, name, value)
        torch.manual_seed(seed)
        model = model_class(tiny).eval()
        if hasattr(self.module, "wake"):  # what starts at zero, so that images have an effect in a random model
            self.module.wake(model)
        return model

    def corrected(self, model_class: Any = None, **config: Any) -> Any:
        """Return a tiny model with what its class corrects of stock, for what stock gets wrong in this family."""
        return self.model(model_class, **dict.fromkeys(self.model_class.corrections, True), **config)

    def batch(self, images: list[int], processor: Any = None) -> dict[str, torch.Tensor]:
        """Return a training batch with a row for each number of images."""
        return dict(
            Collator(processor or self.processor)([chat_row(count, seed) for seed, count in enumerate(images)])
        )


def stock_config(stock_class: Any, config: Any) -> Any:
    """Return the stock parent's config with the values of a custom one."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("connector", "loss", "model_type")}
    return stock_class.config_class(**values)


def assert_same_model(first: Any, second: Any, batch: dict[str, torch.Tensor]) -> None:
    """Tensors are equal bit for bit; logits to rounding, since where a tensor lies in memory picks the kernel."""
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    with torch.no_grad():
        torch.testing.assert_close(first(**batch).logits, second(**batch).logits, rtol=1e-5, atol=1e-6)


@contextmanager
def quick_dynamo() -> Iterator[None]:
    """Leave out what dynamo only measures and logs: how long guards take, and the functions and stacks that traces name.

    That is a sixth of its time, and changes nothing that it computes; a name that a release of torch drops is an error here.
    """
    with (
        patch("torch._dynamo.guards.profile_guard_manager", lambda *arguments: 0.0),
        patch("torch._dynamo.symbolic_convert.get_funcname", lambda *arguments: None),
        patch("torch._dynamo.exc._extract_stack_with_positions", StackSummary),
    ):
        yield


def assert_compiles(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Logits of the compiled model equal those of eager.

    The eager forward comes first, since transformers' first one installs hooks under a lock, where dynamo starts anew at
    each layer; with scalars and what nonzero() finds captured most families are one graph, which is traced in a third of
    the time of their pieces. Where sizes of images are read from tensors, dynamo cannot guard on what it captures.
    """
    torch._dynamo.reset()
    whole = not isinstance(model, RaggedImages)
    captured = torch._dynamo.config.patch(capture_scalar_outputs=whole, capture_dynamic_output_shape_ops=whole)
    with torch.no_grad(), captured, quick_dynamo():
        expected = model(**inputs).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)


def picture(seed: int = 0, size: tuple[int, int] = (50, 30)) -> Image.Image:
    """Return noise with a bright corner, so that pictures differ in large and in small."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] //= 1 + seed % 5
    return Image.fromarray(pixels)


def chat_row(num_images: int, seed: int = 0, turns: int = 1) -> dict[str, Any]:
    """Return a row whose images are interleaved with text, with an answer a turn."""
    content: list[dict[str, Any]] = []
    for at in range(num_images):
        content += [{"type": "text", "text": f"picture {at}: "}, {"type": "image"}]
    content.append({"type": "text", "text": f"What is number {seed}?"})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for turn in range(turns):
        if turn:
            messages.append({"role": "user", "content": f"and {turn}?"})
        messages.append({"role": "assistant", "content": f"It is {seed} of {turn}."})
    return {"messages": messages, "images": [picture(10 * seed + at) for at in range(num_images)]}


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return {name: Family(name, load_family(name)) for name in family_names()}


for encoder in encoder_names():
    load_encoder(encoder)  # families are imported below: what a test imports first, restore_registries would forget

# Families whose processor needs torchvision are tried by tests/test_torchvision.py, in a process that has it.
FAMILIES = [name for name in family_names() if not missing_packages(name)]


# One family of each kind: experts, crops, packed tiles, cross-attention, images of their own sizes with M-RoPE.
KINDS = [name for name in ("aria", "internvl", "llava_next", "mllama", "qwen2_vl") if name in FAMILIES]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


@pytest.fixture
def internvl(families: dict[str, Family]) -> Family:
    return families["internvl"]


@cache
def shares_fixture(file: str) -> bool:
    return bool(re.search(r"^@pytest.fixture\(scope=.module", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run files with a fixture of their module in one process each, so that it is made once; other tests go anywhere.

    `--dist loadgroup` of pytest-xdist 3.8 would do this with marks, which pytest 9.2 no longer passes on.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_fixture(file) else nodeid

    return ByFixture(config, log)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to another machine is an error."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else "local"
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_registries() -> Iterator[None]:
    mappings: list[dict[Any, Any]] = [REGISTERED, CONFIG_MAPPING._extra_content, LOSSES, CONNECTORS]
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)
