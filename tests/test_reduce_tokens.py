"""recipes/reduce_tokens.py: short trainings are scored, tabled and drawn; the same start for every connector."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
import pytest
import reduce_tokens
import torch
from conftest import RECIPES, ROOT
from PIL import Image

from hfcustom.options import ConfigError, read

SMALL = "--max-steps 2 --train-rows 24 --held-out-rows 4 --batch-size 4 --only none pixel_shuffle perceiver"


def test_a_short_run_compares_and_draws(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(RECIPES / "reduce_tokens.py"),
        *SMALL.split(),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    done = forked.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["name"], r["image_tokens"]) for r in results] == [("none", 16), ("pixel_shuffle", 4), ("perceiver", 4)]
    assert all(0 <= r["accuracy"] <= 1 and r["seconds"] > 0 for r in results)
    assert results[0]["parameters"] == 0 < results[1]["parameters"]
    assert Image.open(tmp_path / "out" / "result.png").size[0] > 1000
    assert "image tokens" in done.stdout and "result.png" in done.stdout


def test_every_connector_starts_from_the_same_weights() -> None:
    models = {name: reduce_tokens.build(spec, seed=3) for name, spec in reduce_tokens.CONNECTORS.items()}
    first = models["none"][0].state_dict()
    for model, _ in models.values():
        mine = model.state_dict()
        assert all(torch.equal(mine[name], tensor) for name, tensor in first.items())
    tokens = {name: model.tokens_per_crop() for name, (model, _) in models.items()}
    fours = dict.fromkeys(("average_pool", "pixel_shuffle", "perceiver", "perceiver_average"), 4)
    assert tokens == {"none": 16, **fours, "pixel_shuffle_4": 1}


def test_an_unknown_connector_is_named() -> None:
    with pytest.raises(ConfigError, match="only: 'pool' is none of none, average_pool"):
        read(reduce_tokens.ReduceConfig, None, ["--only", "pool"])
