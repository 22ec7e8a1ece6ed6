"""Models of users' own, each written in another way, for tests/test_bundle.py: files by name, of which the first is named.

Each file set has a class `Model` of InternVL's family; {name} stands for the case's name, since modules live in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hfcustom.families.internvl import tiny_config, tiny_processor

BODY = """
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return hidden_states * torch.sigmoid(self.gate(hidden_states))
"""
GATE = '''
import torch
from torch import nn


class Gate(nn.Module):
    """Opens a little."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 1)

    def forward(self, states):
        return states * torch.sigmoid(self.linear(states))
'''
GATED = """
    def __init__(self, config):
        super().__init__(config)
        self.gate = Gate(config.text_config.hidden_size)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return self.gate(hidden_states)
"""
BASE = "CustomInternVLForConditionalGeneration"

CASES: dict[str, dict[str, str]] = {
    # one file with its training loop, as in the README
    "one_file": {
        "one_file.py": f'''#!/usr/bin/env python
# The model of a paper.
"""A file that also trains."""

import hfcustom, torch
from torch import nn
from hfcustom.families.internvl import {BASE}  # the parent
import datasets  # only to train

LIMIT = 1.5  # a constant

@hfcustom.token_loss
def entropy_one(logits, targets, penalty: float = 0.1):
    log_p = logits.log_softmax(-1)
    return -log_p.gather(-1, targets[:, None])[:, 0] + penalty * (log_p.exp() * log_p).sum(-1).clamp(max=LIMIT)


# What rows are made of.
def rows(path):
    return datasets.load_dataset(path)


@hfcustom.register(model_type="one_file_model")
class Model({BASE}):
    default_loss = {{"entropy_one": 1.0, "z_loss": 1e-4}}
    default_connector = {{"name": "average_pool", "size": 2}}
{BODY}

def main():
    from hfcustom import fit
    fit(Model, rows("x"))


if __name__ == "__main__":
    main()
'''
    },
    # aliases, a chain of attributes, a submodule that nobody imports by name, semicolons, a tuple over several lines
    "aliases": {
        "aliases.py": '''
import hfcustom as hc; import torch
import hfcustom.families.internvl
import hfcustom.connectors.grids as grids
from hfcustom.losses import (
    LossContext as Context,  # what a term gets
    term,
)
from torch import nn

@term(count="image_tokens")
def norm_of_aliases(context: Context):
    """The size of image features."""
    norms = context.image_features.float().square().mean(-1).sqrt()
    return (norms - 1).square().sum(), norms.numel()

class Model(hfcustom.families.internvl.CustomInternVLForConditionalGeneration):
    default_loss = {"cross_entropy": 1.0, "norm_of_aliases": {"weight": 0.1}}

    def transform_embeddings(self, embeddings, image_mask):
        assert grids.layout(4, (2, 2)) and hc.losses.IGNORE == -100 and hc.parts.find_parts(self)
        return embeddings
'''
        + BODY
        + "\nhc.register(Model, model_type='aliases_model')\n"
    },
    # all names of a module, and a module whose names lead back
    "stars": {
        "stars.py": f"""
from hfcustom import *
from hfcustom.families.internvl import *
from stars_parts import *

@register(model_type="stars_model")
class Model({BASE}):
    default_connector = "stars_pairs"
{GATED}
""",
        "stars_parts.py": f"""
from hfcustom import connector
{GATE}

@connector
class StarsPairs(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.mix = nn.Linear(2 * hidden_size, hidden_size)

    def num_tokens_out(self, num_tokens):
        return num_tokens // 2

    def forward(self, features):  # (P, N, D)
        return self.mix(features.unflatten(1, (-1, 2)).flatten(2))  # (P, N/2, D)
""",
    },
    # two files that import each other, the loss in a third that only a string of the config names
    "both_ways": {
        "both_ways.py": f"""
import both_ways_gate
import hfcustom
from hfcustom.families.internvl import {BASE}

SCALE = 2.0

@hfcustom.register(model_type="both_ways_model")
class Model({BASE}):
    default_loss = {{"both_ways_loss": 1.0}}

    def __init__(self, config):
        super().__init__(config)
        self.gate = both_ways_gate.Gate(config.text_config.hidden_size)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return self.gate(hidden_states)

    def both_ways_scale(self):
        from both_ways_gate import doubled
        return doubled()
""",
        "both_ways_gate.py": f"""
import both_ways
{GATE}

def doubled():
    return 2 * both_ways.SCALE
""",
        "both_ways_loss.py": """
from hfcustom.losses.contract import token_loss as as_loss
from torch.nn import functional as F

@as_loss
def both_ways_loss(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
""",
    },
    # a package with packages in it, relative imports, what it registers in its __init__, a config and a processor of its own
    "package": {
        "package_vlm/models/vlm.py": f"""
from __future__ import annotations

from typing import TYPE_CHECKING

import hfcustom
import torch
from transformers import AutoImageProcessor, GotOcr2ImageProcessorPil

from hfcustom.families import internvl

from .. import constants
from ..layers import gates as own_gates
from ..layers.gates import Gate
from . import configs

if TYPE_CHECKING:
    import pandas  # which is not needed

    from ..training import loop


class PackageImages(GotOcr2ImageProcessorPil):
    '''Images that are a little darker.'''

    def preprocess(self, images, *args, **kwargs):
        batch = super().preprocess(images, *args, **kwargs)
        batch["pixel_values"] = batch["pixel_values"] - 0.25
        return batch


AutoImageProcessor.register(configs.PackageConfig, image_processor_classes={{"pil": PackageImages}}, exist_ok=True)


class PackageProcessor(internvl.CustomInternVLProcessor):
    '''Says something before each question.'''

    def __call__(self, images=None, text=None, **kwargs):
        texts = [text] if isinstance(text, str) else text
        return super().__call__(images=images, text=[constants.HELLO + text for text in texts], **kwargs)


@hfcustom.register
class Model(internvl.{BASE}):
    config_class = configs.PackageConfig
    processor_class = PackageProcessor
    default_loss = {{"cross_entropy": 1.0, "package_term": 0.5}}
    default_connector = "package_half"

    def __init__(self, config):
        super().__init__(config)
        self.gate = Gate(config.text_config.hidden_size)
        self.post_init()

    def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return own_gates.scaled(self.gate(hidden_states), self.config.my_scale)

    def train_it(self, loop: loop.Loop) -> pandas.DataFrame:
        return loop(self)
""",
        "package_vlm/__init__.py": "from . import registered\nfrom .training.loop import train\n",
        "package_vlm/constants.py": 'HELLO = """Hello.\n\n\n\n\n"""\n\nUNUSED = 3\n',
        "package_vlm/registered.py": """
import hfcustom
from torch import nn

@hfcustom.term(count="image_tokens")
def package_term(context):
    norms = context.image_features.float().square().mean(-1)
    return norms.sum(), norms.numel()

@hfcustom.connector
class PackageHalf(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()

    def num_tokens_out(self, num_tokens):
        return num_tokens // 2

    def forward(self, features):
        return features[:, ::2]
""",
        "package_vlm/layers/__init__.py": "",
        "package_vlm/layers/gates.py": GATE + "\ndef scaled(states, scale):\n    return scale * states\n",
        "package_vlm/models/__init__.py": "",
        "package_vlm/models/configs.py": """
from dataclasses import dataclass
from hfcustom.families.internvl import CustomInternVLConfig as Parent

@dataclass(kw_only=True)
class PackageConfig(Parent):
    model_type = "package_model"
    my_scale: float = 1.25
""",
        "package_vlm/training/__init__.py": "",
        "package_vlm/training/loop.py": """
import accelerate
import datasets
from hfcustom import TrainConfig, fit

class Loop:
    pass

def train(path):
    return fit(TrainConfig(), datasets.load_dataset(path), accelerate.Accelerator())
""",
    },
    # relative imports in a folder without __init__.py, imports in functions, packages that may be missing
    "no_init": {
        "folder/no_init.py": f"""
import hfcustom
import torch
from torch import nn

try:
    import a_package_that_nobody_has as fast
except ImportError:
    fast = None

from hfcustom.families.internvl import {BASE} as Parent

def helper(states):
    from .no_init_helper import scale; return scale(states)

if fast is not None:
    helper = fast.helper

@hfcustom.register(model_type="no_init_model")
class Model(Parent):
{BODY.replace("hidden_states * torch", "helper(hidden_states) * torch")}
""",
        "folder/no_init_helper.py": "def scale(states):\n    return 3 * states\n\n\ndef other():\n    import einops_free as missing; return missing\n",
    },
    # a class that knows its subclasses, a vision seam, a table that a loop fills, a function that is found by its name
    "registry": {
        "registry_vlm.py": """
import hfcustom
import registry_kinds
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration, CustomInternVLConfig

@hfcustom.register(model_type="registry_model")
class Model(CustomInternVLForConditionalGeneration):
    def transform_vision_features(self, features):
        for kind in sorted(registry_kinds.KINDS):
            features = registry_kinds.KINDS[kind](features)
        return registry_kinds.call("by_name", features) * registry_kinds.TABLE[2]
""",
        "registry_kinds.py": """
KINDS = {}
TABLE = {}
for number in range(3):
    TABLE[number] = number / 1.6

class Kind:
    def __init_subclass__(cls):
        KINDS[cls.__name__] = cls()

class Plus(Kind):
    def __call__(self, features):
        return features + 0.5

def by_name(features):
    return features + 0.125

def call(name, *arguments):
    return globals()[name](*arguments)
""",
    },
}
NAMED = {"both_ways": ["both_ways.py", "both_ways_loss.py"]}  # of others the first file


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write files below a folder; return their paths."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [folder / name for name in files]


def save(model_class: Any, folder: Path, processor: Any = None, **config: Any) -> Path:
    """Save a tiny model of InternVL's family and its processor."""
    torch.manual_seed(0)
    tiny = model_class.config_class.adopt(tiny_config())
    for name, value in config.items():
        setattr(tiny, name, value)
    model = model_class(tiny)
    model.save_pretrained(folder)
    made = processor or tiny_processor()
    if type(made) is not model.processor_class and issubclass(model.processor_class, type(made)):
        made.save_pretrained(folder)
        made = model.processor_class.from_pretrained(folder)
    model.match_processor(made).save_pretrained(folder)
    return folder
