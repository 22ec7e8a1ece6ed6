"""Train a vision-language model from nothing, written out in hfcustom/nano, until it reads scanned digits.

    python recipes/nano_scratch.py

Offline, about 80 seconds on one free CPU core: 400 steps on pictures of four digits each down to a loss of 0.02, then the saved
model is loaded and reads scans it has never seen: 98 % of the digits right. Writes outputs/nano_scratch/result.html and
result.png. The model has 0.6 M parameters; --width and --layers make it larger, everything else is as at full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hfcustom.exits import exit_codes
from hfcustom.options import parse
from hfcustom.train_config import TrainConfig


@dataclass(kw_only=True)
class NanoScratchConfig(TrainConfig):
    """TrainConfig with this recipe's defaults, and the sizes of the model."""

    output_dir: Annotated[str, "folder for everything this recipe writes"] = "outputs/nano_scratch"
    max_steps: Annotated[int | None, "optimiser steps"] = 400
    lr: Annotated[float, "peak learning rate"] = 2e-3
    beta2: Annotated[float, "AdamW second-moment decay"] = 0.99
    weight_decay: Annotated[float, "AdamW weight decay of matrices"] = 0.1
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 30
    log_steps: Annotated[int, "steps between log lines"] = 50
    overwrite: Annotated[bool, "start afresh, deleting what an earlier run of this recipe left"] = True
    train_rows: Annotated[int, "training rows to make"] = 6000
    held_out_rows: Annotated[int, "held-out rows to score"] = 200
    width: Annotated[int, "hidden size of tower and decoder, a multiple of 32"] = 96
    layers: Annotated[int, "layers of the tower, and of the decoder"] = 3
    threads: Annotated[int, "CPU threads"] = 1

    def __post_init__(self) -> None:
        self.overwrite = self.overwrite and not self.resume

    def problems(self) -> list[str]:
        """Return what is out of range, in words."""
        rules = [
            (self.width > 0 and self.width % 32 == 0, f"width={self.width} must be a multiple of 32"),
            (self.layers > 0, f"layers={self.layers} must be positive"),
            (self.threads > 0, f"threads={self.threads} must be positive"),
        ]
        return super().problems() or [message for holds, message in rules if not holds]


if __name__ == "__main__":
    CONFIG = parse(NanoScratchConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfcustom
from hfcustom import console
from hfcustom.card import add_results
from hfcustom.data.digits import ORDINALS, TASKS, digit_rows
from hfcustom.families import nano, tiny
from hfcustom.report import Report, draw_result
from hfcustom.train import process_state

IMAGE_SIZE, PATCH_SIZE, SCALE = (
    32,
    8,
    2,
)  # 2 x 2 digits; 4 x 4 patches; a square of 2 x 2 patches, one digit, is a token


def build_processor() -> nano.CustomNanoVLMProcessor:
    """Return a processor around a tokenizer trained on the prompts."""
    prompts = ["user\nassistant\n", *ORDINALS, TASKS["read"][0]]
    return nano.CustomNanoVLMProcessor(
        tiny.image_processor("SiglipImageProcessor")(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tiny.train_tokenizer(
            nano.SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", named=nano.NAMED_TOKENS, sentences=prompts
        ),
        chat_template=nano.CHAT_TEMPLATE,
    )


def build_model(
    processor: nano.CustomNanoVLMProcessor, width: int, layers: int
) -> nano.CustomNanoVLMForConditionalGeneration:
    """Return a model with random weights, and let the processor write as many placeholders as it makes tokens."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    text = {**tiny.text_config(processor.tokenizer), **sizes, "initializer_range": 0.07}
    config = nano.CustomNanoVLMConfig(
        vision_config={**sizes, "num_attention_heads": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        text_config=text,
        scale_factor=SCALE,
        image_token_id=processor.image_token_id,
    )
    model = nano.CustomNanoVLMForConditionalGeneration(config)
    model.match_processor(processor)
    return model


def write_report(folder: Path, history: list, answers: list, accuracy: float, parts: list, stages: list) -> None:
    """Write result.html and result.png: the curve, held-out rows with what was answered, parts, times."""
    report = Report("NanoVLM from scratch")
    report.text(f"Share of digits read right on scans that no training row shows: {accuracy:.3f}.")
    report.curves({"reading": history}, ["loss"])
    report.heading("Held-out rows")
    report.answers(answers[:24])
    report.heading("Parts")
    report.parts(parts)
    report.heading("Time")
    report.table(("stage", "seconds"), stages)
    report.write(folder / "result.html")
    draw_result(folder / "result.png", {"reading": history}, {"read": answers})


def main(config: NanoScratchConfig) -> float:
    """Run the recipe; return the share of held-out digits that are read right."""
    if process_state().num_processes > 1:
        raise SystemExit(
            "This recipe runs in one process: python recipes/nano_scratch.py --threads 4 uses four cores."
        )
    torch.set_num_threads(config.threads)
    set_seed(config.seed)
    folder, stages = Path(config.output_dir), console.Stages()
    with stages("make rows from scanned digits"):
        train, held_out = digit_rows(config.train_rows), digit_rows(config.held_out_rows, "held_out")
    with stages("build the model and train it"):
        processor = build_processor()
        model = build_model(processor, config.width, config.layers)
        console.show_start(model, processor, train[0], config)
        result = hfcustom.fit(model, processor, train, config)
        result.exit_if_interrupted()
    with stages("load what was saved, and let it read unseen scans"):
        again = AutoModelForImageTextToText.from_pretrained(result.model_dir)
        reader = AutoProcessor.from_pretrained(result.model_dir)
        answers = hfcustom.generate_answers(again, reader, held_out, max_new_tokens=16)
        accuracy = hfcustom.character_accuracy(answers)
        scored = {"data": "scanned digits", "split": "held_out", "rows": len(held_out)}
        add_results(again, result.model_dir, {"character_accuracy": accuracy}, **scored)
    write_report(folder, result.history, answers, accuracy, hfcustom.part_table(model), stages.rows())
    console.show_table(("stage", "seconds"), stages.rows())
    print(
        f"\nDigits read right: {accuracy:.3f}. The report is in {folder / 'result.html'}, the model in {result.model_dir}."
    )
    return accuracy


if __name__ == "__main__":
    with exit_codes():
        main(CONFIG)
