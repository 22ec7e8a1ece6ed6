"""How few image tokens are enough? Train one small model with several connectors and compare accuracy, tokens and time.

    python recipes/reduce_tokens.py

Offline, about 5 minutes on one CPU core: the same InternVL reads grids of scanned digits with all of its 16 image tokens, and
with connectors that leave 4 of them or 1, each from the same start, for as many steps. Scores by generation on scans that no
training has seen. Writes outputs/reduce_tokens/result.png (accuracy against tokens, and against time) and results.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from hfcustom.exits import exit_codes
from hfcustom.options import parse
from hfcustom.train_config import TrainConfig


@dataclass(kw_only=True)
class ReduceConfig(TrainConfig):
    """TrainConfig with the defaults of this comparison."""

    output_dir: Annotated[str, "folder for everything this recipe writes"] = "outputs/reduce_tokens"
    max_steps: Annotated[int | None, "steps of each training"] = 350
    lr: Annotated[float, "peak learning rate"] = 2e-3
    beta2: Annotated[float, "AdamW second-moment decay"] = 0.99
    weight_decay: Annotated[float, "AdamW weight decay of matrices"] = 0.1
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 30
    log_steps: Annotated[int, "steps between log lines"] = 50
    overwrite: Annotated[bool, "start afresh, deleting what an earlier run of this recipe left"] = True
    train_rows: Annotated[int, "training rows to make"] = 6000
    held_out_rows: Annotated[int, "held-out rows to score"] = 200
    only: Annotated[list[str], "which to compare, by name; all by default"] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what is wrong with the options, in words."""
        wrong = [name for name in self.only if name not in CONNECTORS]
        return super().problems() + [f"only: {name!r} is none of {', '.join(CONNECTORS)}" for name in wrong]


PERCEIVER = {"name": "perceiver_resampler", "num_queries": 4, "num_heads": 4, "num_layers": 1}
CONNECTORS = {  # what is compared: the connector in a config, None for none
    "none": None,
    "average_pool": {"name": "average_pool", "size": 2},
    "pixel_shuffle": {"name": "pixel_shuffle", "size": 2},
    "perceiver": {**PERCEIVER, "start": "random"},
    "perceiver_average": {**PERCEIVER, "start": "average"},
    "pixel_shuffle_4": {"name": "pixel_shuffle", "size": 4},
}

if __name__ == "__main__":
    CONFIG = parse(ReduceConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

import hfcustom
import quickstart
from hfcustom import console
from hfcustom.data.digits import digit_rows
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration
from hfcustom.training.checkpoint import write_json


@dataclass(frozen=True)
class Result:
    """What one connector came to."""

    name: str
    image_tokens: int  # of one picture
    parameters: int  # of the connector
    accuracy: float  # share of held-out digits right
    seconds: float  # of processor time a step


def build(connector: dict[str, Any] | None, seed: int) -> tuple[CustomInternVLForConditionalGeneration, Any]:
    """Return the quick start's small InternVL with a connector, and a processor that writes as many placeholders."""
    set_seed(seed)
    processor = quickstart.build_processor()
    config = quickstart.build_model(processor).config.to_dict()
    for name in ("model_type", "connector", "loss"):
        del config[name]
    set_seed(seed)  # the same start for all
    model = CustomInternVLForConditionalGeneration(
        CustomInternVLForConditionalGeneration.config_class(**config, connector=connector)
    )
    return model, model.match_processor(processor)


def compare(name: str, train: Any, held_out: Any, config: ReduceConfig) -> Result:
    """Train the model with one connector and score it on rows it has not seen."""
    model, processor = build(CONNECTORS[name], config.seed)
    print(f"== {name}: {model.tokens_per_crop()} image tokens a picture")
    settings = dataclasses.replace(config, output_dir=f"{config.output_dir}/{name}")
    started = time.process_time()
    result = hfcustom.fit(model, processor, train, settings)
    seconds = (time.process_time() - started) / (config.max_steps or 1)
    result.exit_if_interrupted()
    answers = hfcustom.generate_answers(model, processor, held_out, max_new_tokens=16, title=f"answering: {name}")
    weights = sum(p.numel() for p in model.custom_connector.parameters()) if model.custom_connector else 0
    return Result(name, model.tokens_per_crop(), weights, hfcustom.character_accuracy(answers), seconds)


def draw(path: Path, results: list[Result]) -> None:
    """Draw accuracy against image tokens and against time, each point with its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    sides = {
        "image tokens of a picture": [result.image_tokens for result in results],
        "processor milliseconds a training step": [1000 * result.seconds for result in results],
    }
    for axes, (label, values) in zip(panels, sides.items(), strict=True):
        for value, result in zip(values, results, strict=True):
            axes.plot(value, 100 * result.accuracy, "o", markersize=8)
            above = any(0 < result.accuracy - other.accuracy < 0.05 for other in results)  # two names must not meet
            axes.annotate(
                result.name, (value, 100 * result.accuracy), (6, 7 if above else -14), textcoords="offset points"
            )
        axes.set_xlabel(label)
        axes.margins(0.25, 0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out digits read right, %")
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(sorted(set(sides["image tokens of a picture"])))
    panels[0].get_xaxis().set_major_formatter("{x:.0f}")
    figure.suptitle("One small model, the same training, different connectors")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: ReduceConfig) -> None:
    train = digit_rows(config.train_rows, "train", "read")
    held_out = digit_rows(config.held_out_rows, "held_out", "read")
    results = [compare(name, train, held_out, config) for name in config.only or CONNECTORS]
    rows = [(r.name, r.image_tokens, r.parameters, r.accuracy, 1000 * r.seconds) for r in results]
    print()
    console.show_table(("connector", "image tokens", "its weights", "digits right", "processor ms a step"), rows)
    folder = Path(config.output_dir)
    write_json(folder / "results.json", [dataclasses.asdict(result) for result in results])
    draw(folder / "result.png", results)
    print(f"The picture is {folder / 'result.png'}, the numbers are in {folder / 'results.json'}.")


if __name__ == "__main__":
    with exit_codes():
        main(CONFIG)
