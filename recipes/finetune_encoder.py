"""Train a contrastive encoder (CLIP, SigLIP) on images and their texts: a checkpoint on your rows, or a small CLIP on digits.

    python recipes/finetune_encoder.py
    accelerate launch recipes/finetune_encoder.py --model openai/clip-vit-base-patch32 --data pairs.jsonl --lora
    accelerate launch recipes/finetune_encoder.py --model google/siglip-base-patch16-224 --data pairs.jsonl --freeze vision

The first needs no network and less than a minute of one free CPU core: 500 steps on scans of one digit each, down to a loss
of 1.6 (the 32 rows of a step share ten texts, so that no model reaches 0). Then, of 1,000 pictures of scans that it has
never seen, 91 % are nearest to the text of their digit, and each of the ten texts is nearest to a picture of its digit.
A row is {"image": ..., "text": ...} (JSONL, a folder of `datasets`, or a data set's name on the hub). A step compares each
image with the texts of all its `batch_size` rows, whatever the micro-batches and processes. Writes checkpoints,
metrics.jsonl and the model, which the stock class loads too, to --output-dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from hfcustom.exits import exit_codes
from hfcustom.options import parse
from hfcustom.train_config import HubOptions, ImageOptions, TrainConfig


@dataclass(kw_only=True)
class FinetuneEncoderConfig(HubOptions, ImageOptions, TrainConfig):
    """TrainConfig with this recipe's defaults, and what to train on what."""

    output_dir: Annotated[str, "folder for everything this recipe writes"] = "outputs/finetune_encoder"
    model: Annotated[str, "folder or hub id of the checkpoint; by default a small CLIP from nothing"] = ""
    data: Annotated[str, "rows of an image and its text; by default scanned digits"] = ""
    split: Annotated[str | None, "split of the rows where there are several; by default train"] = None
    eval_data: Annotated[str | None, "held-out rows, retrieved every eval_steps and at the end"] = None
    eval_split: Annotated[str | None, "split of the held-out rows where there are several; by default train"] = None
    eval_rows: Annotated[int, "held-out rows to retrieve among"] = 1000
    loss: Annotated[str | None, "contrastive or sigmoid_contrastive; by default the encoder's own"] = None
    custom: Annotated[str | None, "your own class, my_file.py:MyModel; by default the encoder's"] = None
    freeze: Annotated[list[str], "parts to keep as they are: vision, language (the text tower), connector"] = field(
        default_factory=list
    )
    lora: Annotated[bool, "train LoRA matrices instead of all weights"] = False
    lora_parts: Annotated[list[str], "parts that get LoRA"] = field(default_factory=lambda: ["vision", "language"])
    lora_rank: Annotated[int, "rank of the LoRA matrices"] = 16

    # what the data hold is compared, wherever they lie
    may_change = TrainConfig.may_change | {
        "eval_data",
        "eval_split",
        "eval_rows",
        "data",
        "image_root",
        "image_hosts",
        "image_downloads",
    }

    def problems(self) -> list[str]:
        """Return what is missing, contradictory or out of range."""
        rules = [
            (
                bool(self.model) == bool(self.data),
                f"model={self.model!r} and data={self.data!r}: give both, or neither",
            ),
            (bool(self.data) or not self.eval_data, "eval_data has no effect without --data: digits bring their own"),
            (bool(self.model) or not self.lora, "lora needs --model: there is nothing to adapt in random weights"),
            (bool(self.model) or not self.custom, "custom has no effect without --model"),
            (bool(self.model) or not self.freeze, "freeze has no effect without --model"),
            (not (self.lora and self.freeze), "freeze has no effect with --lora, which freezes all it does not name"),
            (
                not self.data or bool(self.eval_data) or not self.eval_steps,
                "eval_steps has no effect without --eval-data",
            ),
            (self.eval_rows > 0, f"eval_rows={self.eval_rows} must be positive"),
        ]
        for name in ("lora_parts", "lora_rank"):
            rules.append((self.lora or name not in self.sources, f"{name} has no effect without --lora"))
        wrong = self.hub_problems() + self.image_problems()
        return super().problems() or wrong + [message for holds, message in rules if not holds]


if __name__ == "__main__":
    CONFIG = parse(FinetuneEncoderConfig, __doc__)  # answers --help and a mistyped flag before torch is imported

import torch
from accelerate.utils import set_seed

import hfcustom
from hfcustom import console
from hfcustom.card import add_results
from hfcustom.data.digits import digit_captions
from hfcustom.data.feed import first_example
from hfcustom.encoders import class_of, clip
from hfcustom.hub import check_upload, upload_result
from hfcustom.naming import load_object
from hfcustom.train import process_state

TRAIN_ROWS, WIDTH, LAYERS = 6000, 96, 3  # of the small CLIP
# of its training, where no flag says another
OPTIONS = {"lr": 2e-3, "weight_decay": 0.1, "beta2": 0.99, "max_steps": 500, "log_steps": 50}


def small_clip(config: FinetuneEncoderConfig) -> tuple[Any, Any]:
    """Return a CLIP of 0.5 M random weights for pictures of 28 px, and its processor; give the config its options."""
    for name in OPTIONS.keys() - config.sources.keys():
        setattr(config, name, OPTIONS[name])
        config.sources[name] = "for the small CLIP"
    torch.set_num_threads(1)  # a second one costs such a model more than it brings
    tiny, sizes = (
        clip.tiny_config(),
        {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS},
    )
    towers = {name: {**getattr(tiny, name).to_dict(), **sizes} for name in ("text_config", "vision_config")}
    clip_config = clip.CustomCLIPConfig(**towers, projection_dim=WIDTH, loss=config.loss)
    return clip.CustomCLIPModel(clip_config), clip.tiny_processor()


def load_model(config: FinetuneEncoderConfig) -> tuple[Any, Any]:
    """Return the model, with what is to be trained of it, and its processor."""
    custom = config.custom and hfcustom.register(load_object(config.custom, "custom model"))
    model_class = custom or class_of(config.model)
    options = {} if config.loss is None else {"loss": config.loss}
    model = model_class.from_pretrained(config.model, dtype="float32", **options)
    processor = model_class.processor_class.from_pretrained(config.model)
    if config.freeze:
        hfcustom.freeze(model, config.freeze)
    return hfcustom.lora(model, config.lora_parts, rank=config.lora_rank) if config.lora else model, processor


def load_data(config: FinetuneEncoderConfig) -> tuple[Any, Any]:
    """Return rows to train on, and held-out rows or None."""
    if not config.data:
        return digit_captions(TRAIN_ROWS), digit_captions(config.eval_rows, "held_out")
    images: dict[str, Any] = {name: getattr(config, name) for name in ("image_root", "image_hosts", "image_downloads")}
    held_out = config.eval_data and hfcustom.load_rows(config.eval_data, config.eval_split, **images)
    return hfcustom.load_rows(config.data, config.split, **images), held_out and held_out[: config.eval_rows]


def main(config: FinetuneEncoderConfig) -> dict[str, float]:
    """Run the recipe; return the recall on held-out rows, nothing where there are none."""
    is_main = process_state().is_main_process
    console.out.quiet = not is_main  # every fact is printed once, not once a rank
    if is_main:
        check_upload(config)
    set_seed(config.seed)
    rows, held_out = load_data(config)
    model, processor = load_model(config) if config.model else small_clip(config)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        return hfcustom.retrieval_recall(model, processor, held_out, share=True)

    console.show_start(model, processor, first_example(rows, config), config)
    result = hfcustom.fit(model, processor, rows, config, evaluate=evaluate if config.eval_steps else None)
    result.exit_if_interrupted()
    recall = evaluate(model, result.step) if held_out else {}
    if held_out:
        console.show_table(("held-out rows", *recall), [(len(held_out), *recall.values())])
    if held_out and is_main:
        data = {"data": config.eval_data or "scanned digits", "split": config.eval_split, "rows": len(held_out)}
        add_results(model, result.model_dir, recall, **data)
    console.out.print(f"The model is in {result.model_dir}.")
    if config.push_to_hub and is_main:
        console.out.print(f"The model is uploaded: {upload_result(config, result.model_dir)}")
    return recall


if __name__ == "__main__":
    with exit_codes():
        main(CONFIG)
