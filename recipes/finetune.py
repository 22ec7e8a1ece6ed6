"""Fine-tune a checkpoint of any family on your own rows, in full or with LoRA, on 8 or 4 bits.

    accelerate launch recipes/finetune.py --model OpenGVLab/InternVL3-1B-hf --data rows.jsonl --lora
    accelerate launch recipes/finetune.py --config run.yaml --lr 1e-4 --load-in 8bit --lora
    accelerate launch recipes/finetune.py --model ... --data ... --custom my_file.py:MyModel --freeze vision

Several trainings after one another, as LLaVA's (https://arxiv.org/abs/2304.08485, section 4.2), are stages of one config file:
each has a name and the options that differ in it, starts from the model that the one before has saved, and has a folder of
its own below output_dir. --resume goes on in the stage that was interrupted:

    stages:
      - {name: align, data: captions.jsonl, train: [connector], lr: 1.0e-3, batch_size: 256}
      - {name: instruct, data: chats.jsonl, train: [connector, language], lr: 2.0e-5, batch_size: 128}

A row is {"messages": [...], "images": [...]}, or of another form that README.md lists, in a file, a folder, a data set on the
hub, or several of them with weights. Writes checkpoints, metrics.jsonl, report.html and the model to --output-dir, and with
--merge a full-precision model without adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hfcustom.exits import ConfigError, exit_codes
from hfcustom.options import parse, with_values
from hfcustom.train_config import HubOptions, ImageOptions, TrainConfig

FOR_ALL_STAGES = (
    *("model", "custom", "output_dir", "stages", "resume", "overwrite", "trackers"),
    *("push_to_hub", "hub_revision", "hub_public"),
)


@dataclass(kw_only=True)
class FinetuneConfig(HubOptions, ImageOptions, TrainConfig):
    """TrainConfig, what to train on what, and where to upload it."""

    model: Annotated[str, "folder or hub id of the checkpoint"] = ""
    data: Annotated[
        str | dict[str, float],
        "training rows: a .jsonl, .json, .csv, .parquet or .tar file, a folder, a name on the hub, or a JSON mapping of "
        "several to weights",
    ] = ""
    split: Annotated[str | None, "split of the training rows where there are several; by default train"] = None
    streaming: Annotated[bool, "read rows in the order of the files instead of drawing them from all"] = False
    shuffle_buffer: Annotated[int, "rows of a stream that are shuffled among each other, with the order of shards"] = 0
    max_frames: Annotated[int, "frames of a video that are seen"] = 8
    frame_method: Annotated[str, "which frames those are, a method of `hfcustom frames`"] = "uniform"
    video_as_images: Annotated[bool, "give the frames of a video to the model as images"] = False
    eval_data: Annotated[
        str | dict[str, float] | None,
        "held-out rows, answered by generation every eval_steps and at the end; named as those of data",
    ] = None
    eval_split: Annotated[str | None, "split of the held-out rows where there are several; by default train"] = None
    eval_rows: Annotated[int, "held-out rows to answer"] = 200
    max_new_tokens: Annotated[int, "longest answer in tokens"] = 64
    custom: Annotated[str | None, "your own class, my_file.py:MyModel; by default the family's"] = None
    connector: Annotated[str | dict[str, Any] | None, "token-reduction module, a name or a JSON mapping"] = None
    loss: Annotated[str | dict[str, Any] | None, "a name, my_file.py:my_loss, or a JSON mapping of weights"] = None
    teacher: Annotated[str | None, "a frozen checkpoint to distil from, with the same tokenizer"] = None
    reference: Annotated[
        str | None,
        "a frozen checkpoint to compare with in preference losses; by default the model without its adapter",
    ] = None
    freeze: Annotated[list[str], "parts to keep as they are: vision, connector, language, head"] = field(
        default_factory=list
    )
    train: Annotated[list[str], "the only parts that are trained, in place of freeze"] = field(default_factory=list)
    attention_only: Annotated[list[str], "parts of which only the attention layers are trained"] = field(
        default_factory=list
    )
    last_layers: Annotated[dict[str, int], 'parts of which only the last layers are trained, {"vision": 4}'] = field(
        default_factory=dict
    )
    lora: Annotated[bool, "train LoRA matrices instead of the parts in lora_parts"] = False
    lora_parts: Annotated[list[str], "parts that get LoRA"] = field(default_factory=lambda: ["language"])
    lora_rank: Annotated[int | dict[str, int], 'rank of the LoRA matrices, or {"vision": 8, "language": 32}'] = 16
    lora_alpha: Annotated[int | dict[str, int] | None, "their scale times the rank; by default twice the rank"] = None
    lora_kind: Annotated[
        Literal["lora", "rslora", "dora"], "rslora: scale by the root of the rank; dora: lengths beside directions"
    ] = "lora"
    lora_experts: Annotated[bool, "LoRA on the routed experts too, each with matrices of its own"] = False
    lora_dropout: Annotated[float, "dropout before the LoRA matrices"] = 0.0
    train_full: Annotated[list[str], "parts trained in full beside LoRA, such as connector"] = field(
        default_factory=list
    )
    load_in: Annotated[Literal["8bit", "4bit"] | None, "quantise the language model; needs lora"] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, "weights; by default float32, or as stored with lora"
    ] = None
    merge: Annotated[bool, "after LoRA, also write the adapter merged into full-precision weights"] = False
    stages: Annotated[list[dict[str, Any]], "trainings after one another: for each its name and what differs"] = field(
        default_factory=list
    )

    def in_stages(self) -> list[FinetuneConfig]:
        """Return the config of each stage, this one where there are none; ConfigError for what a stage cannot set."""
        return [self._stage(at) for at in range(len(self.stages))] if self.stages else [self]

    def _stage(self, at: int) -> FinetuneConfig:
        values = dict(self.stages[at])
        name = values.pop("name", None)
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"stage {at + 1}: name={name!r} must be a word of letters, digits and underscores")
        if wrong := [key for key in FOR_ALL_STAGES if key in values]:
            raise ConfigError(f"stage {name!r}: {wrong[0]} is for all stages; set it beside `stages`")
        stage = with_values(self, values, f"stage {name!r}")
        stage.stages = []
        stage.sources.pop("stages", None)
        stage.push_to_hub, stage.hub_revision, stage.hub_public = None, None, False  # the last one's model goes there
        stage.output_dir = str(Path(self.output_dir) / f"{at + 1}-{name}")
        stage.merge = stage.merge or (stage.lora and at + 1 < len(self.stages))  # the next one trains all of it
        return stage

    def _stage_problems(self) -> list[str]:
        names = [stage.get("name") for stage in self.stages]
        found = [f"two stages are called {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
        for at, name in enumerate(names):
            try:
                found += [f"stage {name!r}: {problem}" for problem in self._stage(at).problems()]
            except ConfigError as error:
                found.append(str(error))
        return found

    # what the data hold is compared, wherever they lie
    may_change = TrainConfig.may_change | {
        "eval_data",
        "eval_split",
        "eval_rows",
        "max_new_tokens",
        "merge",
        "data",
        "image_root",
        "image_hosts",
        "image_downloads",
    }

    def problems(self) -> list[str]:
        """Return what is missing, contradictory or out of range, in each stage where there are some."""
        if self.stages:
            return self.hub_problems() + self._stage_problems()
        rules = [
            (bool(self.model), "model is missing: --model folder-or-hub-id"),
            (bool(self.data), "data is missing: --data rows.jsonl"),
            (
                self.lora or not self.load_in,
                f"load_in={self.load_in} needs --lora: quantised weights cannot be trained",
            ),
            (self.lora or not self.merge, "merge has no effect without --lora"),
            (
                self.lora or not self.train_full,
                "train_full has no effect without --lora; everything not frozen is trained",
            ),
            (not (self.lora and self.freeze), "freeze has no effect with --lora, which freezes all it does not name"),
            (not (self.lora and self.attention_only), "attention_only has no effect with --lora"),
            (
                not set(self.freeze) & set(self.attention_only),
                f"freeze={self.freeze} and attention_only={self.attention_only} name a part twice",
            ),
            (self.eval_data is not None or self.eval_steps is None, "eval_steps has no effect without --eval-data"),
            (not (self.lora and self.train), "train has no effect with --lora, which trains what lora_parts name"),
            (not (self.lora and self.last_layers), "last_layers has no effect with --lora"),
            (not (self.freeze and self.train), f"freeze={self.freeze} and train={self.train} exclude each other"),
            (self.eval_rows > 0, f"eval_rows={self.eval_rows} must be positive"),
            (self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be positive"),
            (0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} must be in [0, 1)"),
            (self.max_frames > 0, f"max_frames={self.max_frames} must be positive"),
            (self.shuffle_buffer >= 0, f"shuffle_buffer={self.shuffle_buffer} must not be negative"),
            (self.streaming or not self.shuffle_buffer, "shuffle_buffer has no effect without --streaming"),
            (not self.streaming or self.max_steps is not None, "streaming needs --max-steps: a stream has no length"),
        ]
        for name in ("lora_parts", "lora_rank", "lora_alpha", "lora_kind", "lora_experts", "lora_dropout"):
            rules.append((self.lora or name not in self.sources, f"{name} has no effect without --lora"))
        wrong = self.hub_problems() + self.image_problems()
        return super().problems() + wrong + [message for holds, message in rules if not holds]


if __name__ == "__main__":
    CONFIG = parse(FinetuneConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

from accelerate.utils import set_seed

import hfcustom
from hfcustom import console
from hfcustom.card import add_results
from hfcustom.data.feed import first_example
from hfcustom.evaluate import first_rows, match_by_source
from hfcustom.families import class_of
from hfcustom.hub import check_upload, upload_result
from hfcustom.losses import import_losses
from hfcustom.naming import load_object
from hfcustom.train import process_state


def load_model(config: FinetuneConfig) -> tuple[Any, Any]:
    """Return the model, quantised where asked, and its processor."""
    if (Path(config.model) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{config.model} is an adapter: train on the model it was merged into (--merge), or --resume it."
        )
    custom = config.custom and hfcustom.register(load_object(config.custom, "custom model"))
    model_class = custom or class_of(config.model)
    options: dict[str, Any] = {"dtype": config.dtype or ("auto" if config.lora else "float32")}
    options |= {"connector": config.connector} if config.connector is not None else {}
    options |= {"loss": import_losses(config.loss)} if config.loss is not None else {}
    if config.load_in:
        options["quantization_config"] = hfcustom.quantization_config(
            config.model, config.load_in, model_class=model_class
        )
        device = process_state().device
        options |= {} if device.type == "cpu" else {"device_map": {"": device}}
    model = model_class.from_pretrained(config.model, **options)
    if config.load_in:
        rows = [(row.part, row.name, row.kind, row.count) for row in hfcustom.check_quantization(model)]
        console.show_table(("part", "weight matrix", "class after loading", "layers"), rows)
    add_companions(model, config)
    processor = model_class.processor_class.from_pretrained(config.model)
    return model, model.match_processor(processor)


def add_companions(model: Any, config: FinetuneConfig) -> None:
    """Give the model its frozen teacher and reference."""
    if config.teacher and not any("teacher" in item.loss.inputs for item in model.losses()):
        raise ConfigError(f"teacher={config.teacher} has no effect: none of {model.config.loss!r} distils.")
    if config.reference and not any(item.loss.is_term for item in model.losses()):
        raise ConfigError(
            f"reference={config.reference} has no effect: none of {model.config.loss!r} compares with one."
        )
    for path, take in ((config.teacher, model.set_teacher), (config.reference, model.set_reference)):
        if path:
            take(class_of(path).from_pretrained(path, dtype=config.dtype or "auto"))


def choose_what_trains(model: Any, config: FinetuneConfig) -> Any:
    """Freeze parts, whole or but for their attention or last layers, or wrap the model with LoRA."""
    if config.lora:
        return hfcustom.lora(
            model,
            config.lora_parts,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            train=config.train_full,
            experts=config.lora_experts,
            rslora=config.lora_kind == "rslora",
            dora=config.lora_kind == "dora",
        )
    if config.freeze:
        hfcustom.freeze(model, config.freeze)
    if config.train:
        hfcustom.train_only(model, config.train)
    for part, count in config.last_layers.items():
        hfcustom.freeze(model, part, keep_last=count)
    if config.attention_only:
        hfcustom.freeze(model, config.attention_only, keep="attention")
    return model


def load_data(config: FinetuneConfig) -> tuple[Any, Any]:
    """Return rows to train on, and held-out rows or None; a row that cannot be scored is an error here already."""
    media = ("max_frames", "frame_method", "video_as_images", "image_root", "image_hosts", "image_downloads")
    read: dict[str, Any] = {name: getattr(config, name) for name in media}
    streams = {"streaming": config.streaming, "shuffle_buffer": config.shuffle_buffer}
    rows = hfcustom.load_rows(config.data, config.split, **streams, **read)
    if not config.eval_data:
        return rows, None
    return rows, first_rows(hfcustom.load_rows(config.eval_data, config.eval_split, **read), config.eval_rows)


def check_data(config: FinetuneConfig, stages: list[FinetuneConfig]) -> None:
    """Open the data of later stages now: ConfigError for what would be found missing after hours of the first."""
    for at, stage in enumerate(stages[1:], 1):
        try:
            load_data(stage)
        except ConfigError as error:
            raise ConfigError(f"stage {config.stages[at]['name']!r}: {error}") from error


def main(config: FinetuneConfig) -> None:
    is_main = process_state().is_main_process
    console.out.quiet = not is_main  # every fact is printed once, not once a rank
    if is_main:
        check_upload(config)
    stages, folder = config.in_stages(), config.model
    check_data(config, stages)
    for at, stage in enumerate(stages):
        if len(stages) > 1:
            console.out.print(f"stage {at + 1} of {len(stages)}, {config.stages[at]['name']}: from {folder}")
        stage.model = folder
        folder = str(run(stage))
    console.out.print(f"The model is in {folder}.")
    if config.push_to_hub and is_main:
        console.out.print(f"The model is uploaded: {upload_result(config, Path(folder))}")


def run(config: FinetuneConfig) -> Path:
    """Train, score, merge where asked; return the folder of the full model, or of the adapter."""
    rows, held_out = load_data(config)
    set_seed(config.seed)  # of new modules and LoRA matrices
    model, processor = load_model(config)
    model = choose_what_trains(model, config)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        options = {"max_new_tokens": config.max_new_tokens, "allowed_tokens": config.allowed_tokens}
        answers = hfcustom.generate_answers(model, processor, held_out, share=True, **options)
        hfcustom.keep_samples(config.output_dir, step, answers)
        return match_by_source(answers)

    console.show_start(model, processor, first_example(rows, config), config)
    result = hfcustom.fit(model, processor, rows, config, evaluate=evaluate if config.eval_steps else None)
    result.exit_if_interrupted()
    if held_out:
        matches = evaluate(model, result.step)
        console.show_table(("held-out rows", *matches), [(len(held_out), *matches.values())])
        if process_state().is_main_process:
            facts = {"data": config.eval_data, "split": config.eval_split, "rows": len(held_out)}
            add_results(model, result.model_dir, matches, **facts)
    if not config.merge:
        return result.model_dir
    console.out.print(f"The adapter is in {result.model_dir}; it is merged into full-precision weights.")
    folder = Path(config.output_dir) / "merged"
    if process_state().is_main_process:
        hfcustom.merge_adapter(result.model_dir, config.model).save_pretrained(folder)
        processor.save_pretrained(folder)
    process_state().wait_for_everyone()
    return folder


if __name__ == "__main__":
    with exit_codes():
        main(CONFIG)
