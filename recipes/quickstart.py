"""Read real handwriting with a vision-language model of your own, then teach it a second task with LoRA on 8 bits.

    accelerate launch recipes/quickstart.py

Offline, on two CPU cores, in about 3 minutes: build a small InternVL with a token-reducing connector and a
two-term loss (both below), train it on grids of scanned digits, score it by generation on scans it has never seen, load
it in 8 bits, add LoRA to its language model and teach it to read backwards, merge the adapter into the full-precision
weights, and load the result in a fresh process. Writes outputs/quickstart/result.html and result.png.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from hfcustom.exits import exit_codes
from hfcustom.options import parse
from hfcustom.train_config import TrainConfig


@dataclass(kw_only=True)
class QuickstartConfig(TrainConfig):
    """TrainConfig with the quick start's own defaults and sizes."""

    output_dir: Annotated[str, "folder for everything this recipe writes"] = "outputs/quickstart"
    max_steps: Annotated[int | None, "steps of the first training"] = 600
    lora_steps: Annotated[int, "steps of the LoRA training"] = 250
    lora_rank: Annotated[int, "rank of the LoRA matrices"] = 16
    lora_lr: Annotated[float, "peak learning rate of the LoRA training"] = 4e-3
    lr: Annotated[float, "peak learning rate of the first training"] = 2e-3
    beta2: Annotated[float, "AdamW second-moment decay"] = 0.99
    weight_decay: Annotated[float, "AdamW weight decay of matrices"] = 0.1
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 30
    log_steps: Annotated[int, "steps between log lines"] = 50
    overwrite: Annotated[bool, "start afresh, deleting what an earlier run of this recipe left"] = True
    train_rows: Annotated[int, "training rows to make"] = 6000
    held_out_rows: Annotated[int, "held-out rows to score"] = 200

    def __post_init__(self) -> None:
        self.overwrite = self.overwrite and not self.resume


if __name__ == "__main__":
    CONFIG = parse(QuickstartConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

# ---- your model: everything that differs from stock InternVL --------------------------------------------------------

import subprocess
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import concatenate_datasets
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

import hfcustom
from hfcustom import console
from hfcustom.card import add_results
from hfcustom.data.digits import ORDINALS, TASKS, digit_rows
from hfcustom.families import internvl, tiny
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration, CustomInternVLProcessor
from hfcustom.report import Report, draw_result
from hfcustom.train import process_state


@hfcustom.connector
class MergeNeighbours(nn.Module):
    """Join 2 x 2 neighbouring image tokens into one: (P, N, D) -> (P, N / 4, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        side = int(features.shape[1] ** 0.5)
        grid = features.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3)  # (P, h, w, 2, 2, D)
        return self.proj(grid.flatten(3).flatten(1, 2))

    def num_tokens_out(self, num_tokens: int) -> int:
        return num_tokens // 4


@hfcustom.term(count="image_tokens")
def feature_energy(context: hfcustom.LossContext) -> tuple[torch.Tensor, int]:
    """Mean square of what the connector feeds the language model, summed over image tokens, so that it stays bounded."""
    energy = context.image_features.float().square().mean(-1)  # (P, M)
    return energy.sum(), energy.numel()


class DigitReader(CustomInternVLForConditionalGeneration):
    """InternVL with a quarter of the image tokens and a loss of two terms."""

    default_connector = "merge_neighbours"
    default_loss = {"cross_entropy": 1.0, "feature_energy": 1e-3}


hfcustom.register(DigitReader)


# ---- the recipe -----------------------------------------------------------------------------------------------------

IMAGE_SIZE = 32  # pixels: one tile shows a 2 x 2 grid of digits


def build_processor() -> CustomInternVLProcessor:
    """Return InternVL's own processor around a tokenizer trained on the prompts."""
    prompts = ["user\nassistant\n", *ORDINALS, *(question for question, _ in TASKS.values())]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CustomInternVLProcessor(
        image_processor=tiny.image_processor("GotOcr2ImageProcessor")(size=size, max_patches=1),
        tokenizer=tiny.train_tokenizer(
            internvl.SPECIAL_TOKENS,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            named=internvl.NAMED_TOKENS,
            sentences=prompts,
        ),
        video_processor=tiny.video_processor("InternVLVideoProcessor", size=size),
        chat_template=internvl.CHAT_TEMPLATE,
    )


def build_model(processor: CustomInternVLProcessor) -> DigitReader:
    """Return a DigitReader of 0.6 M parameters with random weights: 16 patches a tile, merged into 4 image tokens."""
    width = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "initializer_range": 0.07}
    config = DigitReader.config_class(
        vision_config={
            **width,
            "num_attention_heads": 4,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [8, 8],
            "layer_scale_init_value": 1.0,
        },
        text_config=AutoConfig.for_model("qwen2", **{**tiny.text_config(processor.tokenizer), **width}),
        downsample_ratio=1.0,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
    )
    model = DigitReader(config)
    model.match_processor(processor)
    return model


def score(model: torch.nn.Module, processor: CustomInternVLProcessor, rows: dict[str, object]) -> dict[str, list]:
    """Let the model answer the held-out rows of every task."""
    return {
        task: hfcustom.generate_answers(model, processor, rows[task], max_new_tokens=16, title=f"answering: {task}")
        for task in rows
    }


def tune_backwards(
    base: Path, processor: CustomInternVLProcessor, config: QuickstartConfig
) -> tuple[torch.nn.Module, list]:
    """Load the trained model in 8 bits, check what was converted, and train LoRA on its language model."""
    quantization = hfcustom.quantization_config(base, "8bit")
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=quantization)
    rows = [(row.part, row.name, row.kind, row.count) for row in hfcustom.check_quantization(model)]
    console.show_table(("part", "weight matrix", "class after loading", "layers"), rows)
    model = hfcustom.lora(model, "language", rank=config.lora_rank)
    tuning = dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}/backwards",
        max_steps=config.lora_steps,
        lr=config.lora_lr,
        connector_lr=config.lr / 10,
    )
    few = config.train_rows // 4  # some rows of the first task keep it from being forgotten
    train = concatenate_datasets([digit_rows(config.train_rows - few, task="backwards"), digit_rows(few, task="read")])
    console.show_start(model, processor, train[0], tuning)
    return model, run(model, processor, train, tuning)


def run(model: torch.nn.Module, processor: CustomInternVLProcessor, rows: object, config: TrainConfig) -> list:
    """Train and return the history; a signal ends the recipe here, with everything saved."""
    result = hfcustom.fit(model, processor, rows, config)
    result.exit_if_interrupted()
    return result.history


def load_elsewhere(model: torch.nn.Module, processor: CustomInternVLProcessor, row: dict, folder: Path) -> None:
    """Save a model, then load it through the Auto classes and a pipeline in a fresh process and compare logits."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    batch = hfcustom.Collator(processor)([row])
    del batch["labels"]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    save_file({**batch, "logits": logits}, folder.parent / "reference.safetensors")
    row["images"][0].save(folder.parent / "question.png")
    here = Path(__file__).resolve()
    command = [
        sys.executable,
        here.parent / "load_anywhere.py",
        folder,
        "--code",
        here,
        "--image",
        folder.parent / "question.png",
    ]
    command += ["--question", TASKS["backwards"][0], "--reference", folder.parent / "reference.safetensors"]
    subprocess.run(command, check=True)


def write_report(path: Path, histories: dict, tables: dict, answers: dict, accuracy: list, stages: list) -> None:
    """Write the page: accuracies, curves a term, held-out rows with pictures, part tables, times."""
    report = Report("hfcustom quick start")
    report.text("A small InternVL with its own connector and loss, trained on scans that it is then not tested on.")
    report.heading("Accuracy on held-out scans (share of digits right)")
    report.table(("task", "after training", "after LoRA on 8 bits", "merged, full precision"), accuracy)
    report.heading("Losses")
    report.curves(histories, ["loss", "cross_entropy", "feature_energy"])
    for task, rows in answers.items():
        report.heading(f"Held-out rows: {TASKS[task][0]}")
        report.answers(rows[:24])
    for title, rows in tables.items():
        report.heading(title)
        report.parts(rows)
    report.heading("Time")
    report.table(("stage", "seconds"), stages)
    report.write(path)
    draw_result(path.with_name("result.png"), histories, answers)


def main(config: QuickstartConfig) -> None:
    if process_state().num_processes > 1:
        raise SystemExit(
            "The quick start runs in one process: accelerate launch --num_processes 1 recipes/quickstart.py"
        )
    output_dir = Path(config.output_dir)
    stages, tables, histories = console.Stages(), {}, {}
    set_seed(config.seed)
    with stages("make rows from scanned digits"):
        held_out = {task: digit_rows(config.held_out_rows, "held_out", task) for task in TASKS}
        train = digit_rows(config.train_rows, "train", "read")
    with stages("build and train the model"):
        processor = build_processor()
        model = build_model(processor)
        console.show_start(model, processor, train[0], config)
        histories["reading"] = run(model, processor, train, config)
        tables["Parts while training"] = hfcustom.part_table(model)
    with stages("score it on unseen scans, by generation"):
        before = score(model, processor, held_out)
    with stages("teach it to read backwards: LoRA on 8 bits"):
        tuned, histories["backwards"] = tune_backwards(output_dir / "model", processor, config)
        tables["Parts under LoRA"] = hfcustom.part_table(tuned)
        after = score(tuned, processor, held_out)
    with stages("merge into full precision, load in a fresh process"):
        merged = hfcustom.merge_adapter(output_dir / "backwards" / "model", output_dir / "model")
        one_image = next(row for row in held_out["backwards"] if len(row["images"]) == 1)
        load_elsewhere(merged, processor, one_image, output_dir / "merged")
        final = score(merged, processor, held_out)
    runs = (before, after, final)
    accuracy = [(task, *(hfcustom.character_accuracy(run[task]) for run in runs)) for task in TASKS]
    for task, *_, share in accuracy:
        scored = {"data": f"scanned digits, {task}", "split": "held_out", "rows": config.held_out_rows}
        add_results(merged, output_dir / "merged", {"character_accuracy": share}, **scored)
    print()
    console.show_table(("share of digits right", "after training", "after LoRA on 8 bits", "merged"), accuracy)
    console.show_table(("stage", "seconds"), stages.rows())
    answers = {"read": before["read"], "backwards": final["backwards"]}
    write_report(output_dir / "result.html", histories, tables, answers, accuracy, stages.rows())
    print(f"\nThe model is in {output_dir / 'merged'}, the report in {output_dir / 'result.html'}.")


if __name__ == "__main__":
    with exit_codes():
        main(CONFIG)
