"""What `hfcustom plan` is told: every option of a recipe, and the GPUs; and what the recipe makes of it.

A recipe can be planned when it has a config class (a TrainConfig) and load_model(config) -> model, processor; its
load_data(config) -> rows, held-out rows and choose_what_trains(model, config) are used where there are such. recipes/finetune.py is the recipe unless one is named.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hfcustom.naming import import_file, unknown
from hfcustom.options import ConfigError, read
from hfcustom.train_config import TrainConfig

GPUS = {  # GiB that PyTorch can have of a card, about
    "a10": 22.0,
    "a100": 79.2,
    "a100-40gb": 39.4,
    "a6000": 47.5,
    "b200": 178.0,
    "h100": 79.1,
    "h200": 139.8,
    "l4": 22.0,
    "l40s": 44.5,
    "rtx3090": 23.6,
    "rtx4090": 23.5,
    "rtx5090": 31.4,
    "t4": 14.6,
    "v100": 31.7,
}
PLANNED = "(a planned batch)"


@dataclass(kw_only=True)
class PlanFields:
    """Options that a plan has beside its recipe's."""

    family: Annotated[str, "plan the first published checkpoint of a family, in place of model"] = ""
    tokens: Annotated[int | None, "tokens of each row of a micro-batch, in place of data"] = None
    crops: Annotated[int, "image crops of such a row (images, in families that do not crop)"] = 1
    image_size: Annotated[str, "width x height of their images in pixels"] = "448x448"
    scan_rows: Annotated[int, "rows of data that are read for the longest, evenly spread; 0 for all"] = 256
    gpus: Annotated[int, "GPUs that share batch_size"] = 1
    shard: Annotated[
        Literal["none", "fsdp", "zero2", "zero3"], "what the GPUs share besides; fit() does fsdp in place of zero3"
    ] = "none"
    memory: Annotated[float | None, "GiB of a GPU"] = None
    gpu: Annotated[str, f"a GPU by name: {', '.join(GPUS)}"] = ""
    advice: Annotated[
        Literal["auto", "always", "never"],
        "try what could be changed; auto: unless the plan fits the GPU that is named",
    ] = "auto"
    json: Annotated[bool, "print JSON"] = False

    def plan_problems(self) -> list[str]:
        """Return what is wrong with the plan's own options, in words."""
        given: Any = self
        in_stages = bool(vars(given).get("stages"))  # each of which is asked for its data
        rules = [
            (self.tokens is None or self.tokens > 0, f"tokens={self.tokens} must be positive"),
            (self.crops >= 0, f"crops={self.crops} must not be negative"),
            (self.scan_rows >= 0, f"scan_rows={self.scan_rows} must not be negative"),
            (self.gpus > 0, f"gpus={self.gpus} must be positive"),
            (self.shard == "none" or self.gpus > 1, f"shard={self.shard} has no effect with one GPU: --gpus 2"),
            (
                not (given.offload_activations and self.shard != "none"),
                f"offload_activations does not go with shard={self.shard}, whose gathered weights it would copy along",
            ),
            (self.memory is None or self.memory > 0, f"memory={self.memory} must be positive"),
            (self.memory is None or not self.gpu, "memory and gpu exclude each other"),
            (not self.gpu or self.gpu.lower() in GPUS, unknown("gpu", self.gpu, GPUS)),
            (
                in_stages or given.data != PLANNED or self.tokens is not None,
                "data is missing: --data rows.jsonl, or --tokens 2048",
            ),
            (
                given.data == PLANNED or self.tokens is None,
                f"data={given.data!r} and tokens={self.tokens} exclude each other",
            ),
            (not (self.family and given.model != self.family), f"family={self.family} and model exclude each other"),
        ]
        for name in ("crops", "image_size"):
            rules.append(
                (self.tokens is not None or name not in given.sources, f"{name} has no effect without tokens")
            )
        problems = [message for holds, message in rules if not holds]
        try:
            self.picture_size()
        except ValueError as error:
            problems.append(str(error))
        return problems

    def picture_size(self) -> tuple[int, int]:
        """Return width and height; ValueError for what is none."""
        width, _, height = self.image_size.lower().partition("x")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise ValueError(f"image_size={self.image_size!r} is no width x height; write 448x448")
        return int(width), int(height)

    def gpu_memory(self) -> float | None:
        """Return GiB of the GPU that was named; None where none was."""
        return GPUS[self.gpu.lower()] if self.gpu else self.memory


def plan_config_of(config_class: type[Any]) -> type[Any]:
    """Return a recipe's config with a plan's options; what the recipe must have and a plan has not is filled in."""

    def __post_init__(self: Any) -> None:
        self.model = self.model or self.family or (PLANNED if self.custom else "")
        self.data = self.data or PLANNED

    def problems(self: Any) -> list[str]:
        return [*config_class.problems(self), *self.plan_problems()]

    namespace = {"__post_init__": __post_init__, "problems": problems, "__module__": __name__}
    planned: type[Any] = dataclasses.make_dataclass(
        "PlanConfig", [], bases=(PlanFields, config_class), namespace=namespace, kw_only=True
    )
    return planned


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, and what of it a plan runs."""

    path: Path
    config_class: type[Any]
    load_model: Callable[[Any], tuple[Any, Any]]
    load_data: Callable[[Any], tuple[Any, Any]] | None
    choose_what_trains: Callable[[Any, Any], Any] | None

    def build(self, config: Any) -> tuple[Any, Any]:
        """Return the model as it is trained, and its processor."""
        model, processor = self.load_model(config)
        return (self.choose_what_trains(model, config) if self.choose_what_trains else model), processor

    def batches(self, core: Any, processor: Any, config: Any) -> list[Any]:
        """Return the costliest micro-batches of the recipe's data, or those of the shape that was asked for."""
        from hfcustom.plan.batches import planned_batches, shaped_batches

        if config.tokens is not None:
            return shaped_batches(core, processor, config)
        if self.load_data is None:
            raise ValueError(
                f"{self.path} has no load_data(config) -> rows, held-out rows; give --tokens and --crops."
            )
        changed = copy.copy(config)
        changed.eval_data = None
        return planned_batches(core, processor, config, self.load_data(changed)[0])

    def stages(self, config: Any) -> dict[str, Any]:
        """Return the config of each stage by its name; of the one training there is under no name."""
        given = vars(config).get("stages")
        if not given:
            return {"": config}
        return {stage["name"]: each for stage, each in zip(given, config.in_stages(), strict=True)}


def load_recipe(path: str | None) -> Recipe:
    """Import a recipe, recipes/finetune.py unless one is named; ConfigError for a file that is none."""
    beside = Path(__file__).resolve().parents[2] / "recipes" / "finetune.py"
    file = next(
        (file for file in ([Path(path)] if path else [Path("recipes/finetune.py"), beside]) if file.is_file()), None
    )
    if file is None:
        cure = "check the path." if path else "name one: hfcustom plan path/to/finetune.py ..."
        raise ConfigError(f"There is no recipe {path or 'recipes/finetune.py'}; {cure}")
    module = import_file(file.resolve())
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, TrainConfig) and value.__module__ == module.__name__
    ]
    known = vars(module)
    if len(classes) != 1 or "load_model" not in known:
        raise ConfigError(
            f"{file} cannot be planned: a recipe has one config class (a TrainConfig) and load_model(config) -> model, processor."
        )
    return Recipe(file, classes[0], known["load_model"], known.get("load_data"), known.get("choose_what_trains"))


def read_plan(argv: Sequence[str], description: str) -> tuple[Any, Recipe]:
    """Return the config of a command line, [RECIPE.py] [my_file.py:MyModel] --flags, and its recipe; ConfigError for mistakes."""
    argv, recipe = list(argv), None
    while argv and not argv[0].startswith("-"):
        word = argv.pop(0)
        if word.rpartition(":")[0].endswith(".py"):
            argv += ["--custom", word]
        elif word.endswith(".py") and recipe is None:
            recipe = word
        else:
            raise ConfigError(
                f"{word!r} is no recipe (a .py file) and no class (my_file.py:MyModel); a checkpoint is --model {word}"
            )
    found = load_recipe(recipe)
    return read(plan_config_of(found.config_class), description, argv), found
