"""TrainConfig: the options of hfcustom.train.fit, whose defaults are a recipe; a recipe's own config adds fields to it.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from hfcustom.naming import PARTS, unknown


@dataclass(kw_only=True)
class TrainConfig:
    """Options of one training run; each annotation is the flag's help."""

    output_dir: Annotated[str, "folder for checkpoints, metrics and the final model"] = "outputs/run"
    max_steps: Annotated[int | None, "optimiser steps; by default what `epochs` asks for"] = None
    epochs: Annotated[float, "passes over the training rows; instead of max_steps, not beside it"] = 1.0
    batch_size: Annotated[int, "rows of one optimiser step, over all processes"] = 32
    micro_batch_size: Annotated[int | None, "rows of one forward on one device; by default batch_size / processes"] = (
        None
    )
    packing: Annotated[
        bool, "pack rows without padding into micro-batches of pack_tokens tokens; losses and gradients stay the same"
    ] = False
    pack_tokens: Annotated[
        int | None, "tokens of one packed micro-batch, those of images included; by default 4096"
    ] = None
    pack_crops: Annotated[
        int | None,
        "image crops of one packed micro-batch at most (images, in families that do not crop); by default any",
    ] = None
    lr: Annotated[float, "peak learning rate"] = 2e-4
    connector_lr: Annotated[float | None, "peak learning rate of the connector and of new modules"] = None
    vision_lr: Annotated[float | None, "peak learning rate of the vision tower"] = None
    part_lr: Annotated[dict[str, float], 'peak learning rate of parts, {"head": 1e-5, "new": 1e-3}'] = field(
        default_factory=dict
    )
    weight_decay: Annotated[float, "AdamW weight decay of matrices; biases, norms and embeddings have none"] = 0.01
    part_weight_decay: Annotated[dict[str, float], "weight decay of the matrices of parts, likewise"] = field(
        default_factory=dict
    )
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"],
        "8bit: moments of large matrices in 8 bits; paged: they move to the CPU when a GPU is full (bitsandbytes)",
    ] = "adamw"
    beta2: Annotated[float, "AdamW second-moment decay"] = 0.95
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 20
    schedule: Annotated[Literal["cosine", "linear", "constant"], "learning rate after the warm-up"] = "cosine"
    min_lr_ratio: Annotated[float, "final learning rate as a share of the peak (cosine and linear)"] = 0.1
    max_grad_norm: Annotated[float, "clip the gradient's global norm; 0 turns clipping off"] = 1.0
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        "bf16 computes under autocast and keeps trained weights in float32; by default bf16 if any weight is 16-bit",
    ] = None
    ema_decay: Annotated[
        float | None,
        "evaluate and publish a running average of the trained weights, of which a step keeps this share: 0.99 to 0.9999",
    ] = None
    neftune_alpha: Annotated[
        float, "uniform noise on text embeddings while training (NEFTune): 5 to 15 in its paper; 0 is none"
    ] = 0.0
    gradient_checkpointing: Annotated[bool, "recompute layers in the backward pass to save memory"] = False
    try_costliest: Annotated[
        bool | None,
        "run the costliest batch first, without a step, so that memory runs out at once or never; by default on a GPU",
    ] = None
    auto_micro_batch: Annotated[
        bool, "halve the micro-batches until the costliest fits; steps keep their rows, losses and gradients"
    ] = False
    split_on_oom: Annotated[
        bool,
        "a micro-batch that memory is not enough for is cut in two, with the same losses and gradients; else the run ends",
    ] = True
    offload_activations: Annotated[
        bool, "keep what the backward pass needs in the CPU's memory meanwhile: slower, and less of the GPU's"
    ] = False
    max_length: Annotated[int | None, "longest row in tokens; a longer one is an error that names it"] = None
    train_on: Annotated[
        Literal["assistant", "last", "all"],
        "the text that carries labels: the assistant's turns, the last of them, or prompts too",
    ] = "assistant"
    allowed_tokens: Annotated[
        list[str], "control tokens that the rows' texts hold as such (<|box_start|> ...); others typed in are text"
    ] = field(default_factory=list)
    min_pixels: Annotated[int, "fewest pixels of an image; a row with a smaller one cannot be used"] = 16
    on_bad_row: Annotated[
        Literal["error", "skip"], "a row that cannot be used stops the run, or is left out, named and counted"
    ] = "error"
    max_bad_share: Annotated[float, "share of the rows that may be left out before the run stops (exit code 4)"] = 0.01
    cache_images: Annotated[
        str | None, "folder for what the image processor makes of each image, read back instead of made again"
    ] = None
    cache_features: Annotated[
        str | None,
        "folder for what the frozen vision tower and connector make of each image, in place of running them",
    ] = None
    max_cache_gb: Annotated[float, "size of a cache folder beyond which nothing more is put into it"] = 100.0
    exclude: Annotated[
        str | None, "a bad_rows.jsonl of `hfcustom preflight` or a run: the rows it names are left out beforehand"
    ] = None
    seed: Annotated[int, "seed of initialisation, row order and dropout"] = 0
    num_workers: Annotated[int, "data-loading processes"] = 0
    log_steps: Annotated[int, "steps between log lines"] = 10
    mfu: Annotated[
        bool | None,
        "log the share of the device's matrix products a second that the model's arithmetic takes; by default on a GPU",
    ] = None
    eval_steps: Annotated[
        int | None, "steps between evaluations; none by default, the recipe evaluates at the end"
    ] = None
    save_steps: Annotated[int | None, "steps between checkpoints; by default only at the end"] = None
    keep_checkpoints: Annotated[int, "newest checkpoints to keep"] = 2
    on_spike: Annotated[
        Literal["warn", "rewind", "stop"],
        "a loss far above those before it is named with its rows; rewind goes back to the last checkpoint and skips its step",
    ] = "warn"
    spike_factor: Annotated[
        float, "how far: this many times what losses deviate from their median by (1.48 MAD); 0 looks for no spikes"
    ] = 10.0
    spike_window: Annotated[int, "steps that a loss is compared with; while there are fewer than half, with none"] = 50
    spike_rewinds: Annotated[int, "times that on_spike=rewind may go back before the run stops (exit code 5)"] = 3
    row_seconds: Annotated[
        float, "longest time for reading one row; a loading process that is stuck for longer is given up (exit code 8)"
    ] = 300.0
    rank_seconds: Annotated[
        float, "longest time that a process waits for another before the run is given up (exit code 8)"
    ] = 600.0
    resume: Annotated[bool, "continue from the newest checkpoint in output_dir"] = False
    allow_change: Annotated[
        list[str], "with resume: options whose change since the checkpoint is accepted, `data` for other rows"
    ] = field(default_factory=list)
    overwrite: Annotated[bool, "start afresh, deleting the checkpoints that output_dir already holds"] = False
    trackers: Annotated[list[str], "tensorboard, wandb, trackio or any other tracker of Accelerate"] = field(
        default_factory=list
    )

    # options that may change when a run is resumed; any other is refused, see hfcustom/training/resume.py
    may_change: ClassVar[frozenset[str]] = frozenset(
        (
            *(
                "max_steps",
                "epochs",
                "micro_batch_size",
                "packing",
                "pack_tokens",
                "pack_crops",
                "gradient_checkpointing",
                "try_costliest",
                "auto_micro_batch",
                "split_on_oom",
                "offload_activations",
            ),
            *("lr", "connector_lr", "vision_lr", "part_lr", "weight_decay", "part_weight_decay", "beta2"),
            *("warmup_steps", "schedule", "min_lr_ratio"),
            *("on_spike", "spike_factor", "spike_window", "spike_rewinds"),
            *("max_grad_norm", "max_bad_share", "cache_images", "cache_features", "max_cache_gb", "num_workers"),
            *(
                "log_steps",
                "mfu",
                "eval_steps",
                "save_steps",
                "keep_checkpoints",
                "row_seconds",
                "rank_seconds",
                "trackers",
            ),
            *("output_dir", "resume", "overwrite", "allow_change"),
        )
    )

    sources: dict[str, str] = field(init=False, default_factory=dict)  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is of a wrong type or out of range, in words; empty when the config is usable."""
        from hfcustom.options import wrong_types

        if wrong := wrong_types(self):
            return wrong
        rules = [
            (self.max_steps is None or self.max_steps > 0, f"max_steps={self.max_steps} must be positive"),
            (0 < self.epochs < math.inf, f"epochs={self.epochs} must be positive and finite"),
            (
                self.max_steps is None or ("epochs" not in self.sources and self.epochs == type(self).epochs),
                f"epochs={self.epochs} has no effect beside max_steps={self.max_steps}, which says when to stop; leave one out "
                "(max_steps: null in a --config file where it is a recipe's default)",
            ),
            (self.batch_size > 0, f"batch_size={self.batch_size} must be positive"),
            (self.lr > 0, f"lr={self.lr} must be positive"),
            (self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative"),
            (0 <= self.beta2 < 1, f"beta2={self.beta2} must be in [0, 1)"),
            (self.min_pixels >= 0, f"min_pixels={self.min_pixels} must not be negative"),
            (self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative"),
            (0 <= self.min_lr_ratio <= 1, f"min_lr_ratio={self.min_lr_ratio} must be in [0, 1]"),
            (self.max_grad_norm >= 0, f"max_grad_norm={self.max_grad_norm} must not be negative"),
            (self.ema_decay is None or 0 < self.ema_decay < 1, f"ema_decay={self.ema_decay} must be between 0 and 1"),
            (
                0 <= self.neftune_alpha < math.inf,
                f"neftune_alpha={self.neftune_alpha} must be finite and not negative",
            ),
            (self.num_workers >= 0, f"num_workers={self.num_workers} must not be negative"),
            (self.log_steps > 0, f"log_steps={self.log_steps} must be positive"),
            (not (self.resume and self.overwrite), "resume and overwrite exclude each other"),
            (0 <= self.max_bad_share <= 1, f"max_bad_share={self.max_bad_share} must be in [0, 1]"),
            (
                self.on_bad_row == "skip" or "max_bad_share" not in self.sources,
                "max_bad_share has no effect without on_bad_row=skip",
            ),
            (self.max_cache_gb > 0, f"max_cache_gb={self.max_cache_gb} must be positive"),
            (
                self.cache_images or self.cache_features or "max_cache_gb" not in self.sources,
                "max_cache_gb has no effect without cache_images or cache_features",
            ),
            (self.keep_checkpoints > 0, f"keep_checkpoints={self.keep_checkpoints} must be positive"),
        ]
        rules += self._rules_of_micro_batches()
        rules += self._rules_of_numbers()
        for name in (
            "micro_batch_size",
            "pack_tokens",
            "pack_crops",
            "eval_steps",
            "save_steps",
            "max_length",
            "connector_lr",
            "vision_lr",
        ):
            value = getattr(self, name)
            rules.append((value is None or value > 0, f"{name}={value} must be positive"))
        rules += self._rules_of_parts()
        rules += self._rules_of_going_on()
        rules += self._rules_of_spikes()
        return [message for holds, message in rules if not holds]

    def _rules_of_numbers(self) -> list[tuple[bool, str]]:
        names = ("lr", "weight_decay", "connector_lr", "vision_lr", "rank_seconds")
        rules = [(getattr(self, name) != math.inf, f"{name}={getattr(self, name)} must be finite") for name in names]
        rules.append((0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2**32)"))
        for name, own in (("part_lr", self.part_lr), ("part_weight_decay", self.part_weight_decay)):
            rules += [(value != math.inf, f"{name}: {value} of {part} must be finite") for part, value in own.items()]
        return rules

    def _rules_of_micro_batches(self) -> list[tuple[bool, str]]:
        halves = self.try_costliest is not False or not self.auto_micro_batch
        micro = self.micro_batch_size
        whole = micro is None or micro <= 0 or self.batch_size % micro == 0
        rules = [
            (
                whole,
                f"batch_size={self.batch_size} rows cannot be shared out in micro-batches of micro_batch_size={micro}; choose a "
                "batch_size that is a multiple of it",
            ),
            (
                not (self.packing and self.micro_batch_size is not None),
                f"micro_batch_size={self.micro_batch_size} and packing exclude each other: pack_tokens says how large a "
                "micro-batch is",
            ),
            (halves, "auto_micro_batch has no effect with try_costliest=False"),
        ]
        for name in ("pack_tokens", "pack_crops"):
            value = getattr(self, name)
            rules.append((value is None or self.packing, f"{name}={value} has no effect without packing"))
        return rules

    def _rules_of_parts(self) -> list[tuple[bool, str]]:
        rules = []
        for name, own in (("part_lr", self.part_lr), ("part_weight_decay", self.part_weight_decay)):
            for part, value in own.items():
                rules.append((part in PARTS, unknown(f"part in {name}:", part, PARTS)))
                sound = value > 0 if name == "part_lr" else value >= 0
                rules.append(
                    (
                        sound,
                        f"{name}: {value} of {part} must {'be positive' if name == 'part_lr' else 'not be negative'}",
                    )
                )
        for flag in ("vision_lr", "connector_lr"):
            part = flag.removesuffix("_lr")
            twice = getattr(self, flag) is not None and part in self.part_lr
            rules.append((not twice, f"{flag} and part_lr both name the {part}; leave one out"))
        return rules

    def _rules_of_spikes(self) -> list[tuple[bool, str]]:
        least = 4  # fewer losses have no spread
        rules = [
            (0 <= self.spike_factor < math.inf, f"spike_factor={self.spike_factor} must be finite and not negative"),
            (self.spike_window >= least, f"spike_window={self.spike_window} must be at least {least}"),
            (self.spike_rewinds > 0, f"spike_rewinds={self.spike_rewinds} must be positive"),
            (
                self.on_spike == "warn" or self.spike_factor != 0,
                f"on_spike={self.on_spike} has no effect with spike_factor=0",
            ),
            (
                self.on_spike != "rewind" or self.save_steps is not None,
                "on_spike=rewind has no checkpoint to go back to without save_steps",
            ),
        ]
        for name in ("spike_window", "spike_rewinds"):
            without = self.on_spike != "rewind" if name == "spike_rewinds" else self.spike_factor == 0
            cause = "on_spike=rewind" if name == "spike_rewinds" else "a spike_factor"
            rules.append((not without or name not in self.sources, f"{name} has no effect without {cause}"))
        return rules

    def _rules_of_going_on(self) -> list[tuple[bool, str]]:
        known = {"data", *(each.name for each in fields(self) if each.init)}
        return [
            (self.row_seconds > 0, f"row_seconds={self.row_seconds} must be positive"),
            (self.rank_seconds > 0, f"rank_seconds={self.rank_seconds} must be positive"),
            (self.resume or not self.allow_change, f"allow_change={self.allow_change} has no effect without resume"),
            *((name in known, unknown("option in allow_change", name, known)) for name in self.allow_change),
        ]


@dataclass(kw_only=True)
class HubOptions:
    """Options of a recipe that uploads what it has trained."""

    push_to_hub: Annotated[str | None, "name on the hub (owner/name) to upload the model to at the end"] = None
    hub_revision: Annotated[str | None, "branch to upload to; by default main"] = None
    hub_public: Annotated[bool, "make the repository public; by default it is private"] = False

    def hub_problems(self) -> list[str]:
        """Return what is wrong with these options, in words."""
        if self.push_to_hub is None:
            given = {"hub_revision": self.hub_revision, "hub_public": self.hub_public}
            return [f"{name} has no effect without --push-to-hub" for name, value in given.items() if value]
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.push_to_hub)
        except ValueError as error:
            return [f"push_to_hub={self.push_to_hub!r} is no name on the hub: {str(error).strip().splitlines()[0]}"]
        return []


@dataclass(kw_only=True)
class ImageOptions:
    """Options of a recipe that reads images of rows."""

    image_root: Annotated[str | None, "folder below which images are read; by default that of the rows"] = None
    image_hosts: Annotated[
        list[str], "hosts from which images at URLs are fetched: cdn.example.org, *.example.org for those below it"
    ] = field(default_factory=list)
    image_downloads: Annotated[
        str | None, "folder where fetched images are kept for good; by default hfcustom/images in HF_HOME"
    ] = None

    def image_problems(self) -> list[str]:
        """Return what is wrong with these options, in words."""
        from hfcustom.data.hosts import host_problems

        return host_problems(self.image_hosts, self.image_downloads)
