"""Checkpoints: written whole or not at all, restored exactly, nothing in them that could run code.

output_dir/checkpoints/step-000100/
    model/                what from_pretrained (or PeftModel.from_pretrained) loads, with its processor
    optimizer.safetensors, optimizer.json     of a model that FSDP has sharded a file a rank (hfcustom/distributed/sharded_checkpoint.py)
    rng-0.safetensors     one a rank: torch, CUDA, numpy and Python generators
    state.json            step, log, losses since the last log line, options, what decides the order of rows
    stream-0.json         one a rank, of rows that are a stream: where its loading processes stand
    ema.safetensors, ema.json   the running average of the trained weights, where there is one; sharded, a file a rank
    spikes.json           losses of the last steps, and which steps are skipped (hfcustom/training/spikes.py)
    manifest.json         SHA-256 of every other file; a folder without a true manifest is no checkpoint
Weights are there once, whole, whether the model is sharded or not: each checkpoint loads anywhere, and with any number of ranks.
A folder is committed as hfcustom/commit.py does; the newest valid one is resumed from, and an old one is deleted only after
its successor is in place.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hfcustom import __version__
from hfcustom.card import write_beside
from hfcustom.commit import atomic_folder, every_rank, remove_folder, replace_folder, sweep, write_json
from hfcustom.distributed import sharded_checkpoint, zero
from hfcustom.distributed.sharding import is_sharded
from hfcustom.distributed.spread import write_spread
from hfcustom.distributed.zero import is_engine
from hfcustom.exits import CheckpointError, ConfigError, SaveError
from hfcustom.parts import unwrap, wrapped_by_peft
from hfcustom.quiet import without_bars
from hfcustom.randomness import load_rng, save_rng
from hfcustom.runs.folder import check_room, checkpoint_bytes, free_bytes, is_disk_full, model_bytes, size
from hfcustom.train_config import TrainConfig
from hfcustom.training.averaging import Average
from hfcustom.training.checkpoint_folders import (
    DAMAGED,
    complete_checkpoints,
    last_good,
    set_damaged_aside,
    to_go_back_to,
)
from hfcustom.training.optimizer_state import load_optimizer, optimizer_content, save_optimizer
from hfcustom.training.resume import (
    BASE_FILE,
    FORMAT,
    base_fingerprint,
    changed_options,
    check_base,
    check_format,
    check_order,
    options_of,
)
from hfcustom.training.spikes import Spikes

if TYPE_CHECKING:
    from hfcustom.data.feed import Feed


class Checkpoints:
    """The checkpoints of one run, all ranks taking part in each call."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        processor: Any,
        feed: Feed,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.processor = processor
        self.feed = feed
        self.output_dir = Path(config.output_dir)
        self.folder = self.output_dir / "checkpoints"
        self.resumed: Path | None = None
        self.newest: Path | None = None
        self.history: list[dict[str, float]] = []
        self.began, self.saving, self.saves = time.monotonic(), 0.0, 0
        self.bytes = checkpoint_bytes(unwrapped(model), optimizer)
        self.pending: list[dict[str, Any]] = []  # losses, metrics and norms of the steps since the last log line
        self.average = Average(self.unwrapped, config.ema_decay, accelerator)
        self.spikes = Spikes(config, accelerator, unwrap(model).losses())
        self.bytes += self.average.bytes
        self.average.announce()

    @property
    def unwrapped(self) -> Any:
        """The model without DDP."""
        return unwrapped(self.model)

    def begin(self) -> int:
        """Start afresh at step 0; ConfigError when the folder holds another run's checkpoints and none may be deleted."""
        if self.config.overwrite and self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if complete_checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} already holds checkpoints. Continue with --resume, start afresh with --overwrite, or "
                "choose another --output-dir."
            )
        self._make_room(0)
        return 0

    def resume(self) -> int:
        """Load the newest valid checkpoint, if there is one, and return its step; damaged ones are set aside and named."""
        if self.accelerator.is_main_process:
            for path, reason in set_damaged_aside(self.folder).items():
                self.accelerator.print(
                    f"{path.name} is damaged or incomplete: set aside as {DAMAGED}{path.name}. {reason}."
                )
        self.accelerator.wait_for_everyone()
        self.resumed = self.newest = next(reversed(complete_checkpoints(self.folder)), None)
        if self.resumed is None:
            self.accelerator.print(f"Nothing to resume in {self.folder}; starting at step 0.")
            self._make_room(0)
            return 0
        state = json.loads((self.resumed / "state.json").read_text())
        check_format(state, self.resumed)
        check_order(state["order"], self.feed.order(), self.config.allow_change, self.resumed)
        if changed := changed_options(state.get("config", {}), self.config, self.resumed):
            self.accelerator.print(changed)
        step = self.load(self.resumed)
        most = self.feed.max_steps
        left = f" Nothing is left to train: max_steps is {most}." if step >= most else ""
        self.accelerator.print(f"Resuming from {self.resumed}, step {step}.{left}")
        self._make_room(step)
        return step

    def go_back(self, before: int, now: int) -> int | None:
        """Load the newest valid checkpoint before a step, else the oldest before `now`; return its step, None without any."""
        chosen: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            chosen = [to_go_back_to(self.folder, before, now)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        self.newest = chosen[0]
        return None if self.newest is None else self.load(self.newest)

    def load(self, folder: Path) -> int:
        """Take everything but the random generators from a checkpoint, and return its step."""
        state = json.loads((folder / "state.json").read_text())
        self.resumed = folder
        self.feed.load(folder)
        load_model(unwrapped(self.model), folder / "model")
        if is_engine(self.model):
            zero.refresh(self.model)
        load_optimizer(self.optimizer, folder)
        self.average.load(folder)
        self.spikes.load(folder)
        self.history, self.pending = state["history"], state["pending"]
        return state["step"]

    def _make_room(self, step: int) -> None:
        """Clear what killed runs have left and see that the checkpoints to come will fit; ConfigError if not."""
        if self.accelerator.is_main_process:
            sweep(self.folder, "step-*")
        left, every = self.feed.max_steps - step, self.config.save_steps or self.feed.max_steps
        if left > 0:
            present = len(complete_checkpoints(self.folder))
            keep, beside = self.config.keep_checkpoints, model_bytes(self.unwrapped) if self.average.bytes else 0
            check_room(self.folder, self.bytes, present, -(-left // every), keep, beside)

    def restore_rng(self) -> None:
        """Set this rank's random generators to where the resumed run had them; a rank it lacked keeps its own seed."""
        if self.resumed is None:
            return
        saved = len(list(self.resumed.glob("rng-*.safetensors")))
        if saved != self.accelerator.num_processes:
            ranks = f"Ranks then: {saved}, now: {self.accelerator.num_processes}"
            self.accelerator.print(f"{ranks}. The rows stay the same, the random numbers of dropout do not.")
        if self.accelerator.process_index < saved:
            load_rng(self.resumed / f"rng-{self.accelerator.process_index}.safetensors")

    def save(self, step: int, history: list[dict[str, float]], pending: list[dict[str, Any]]) -> Path:
        """Write the checkpoint of a step and delete those beyond `keep_checkpoints`; SaveError leaves those before it."""
        target, began = self.folder / f"step-{step:06d}", time.monotonic()
        try:
            with without_bars():
                self._write(target, step, history, pending)
        except (OSError, SafetensorError) as error:  # safetensors writes by itself, and has an error of its own
            raise SaveError(self._failure(error, step)) from error
        if self.accelerator.is_main_process:
            for old in complete_checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                remove_folder(old)
        self.newest = target
        self.saving, self.saves = self.saving + time.monotonic() - began, self.saves + 1
        return target

    def _write(self, target: Path, step: int, history: Any, pending: Any) -> None:
        known: dict[str, str] = {}  # what this rank has hashed as it wrote it
        with atomic_folder(target, self.accelerator, known) as partial:
            if is_sharded(self.model):
                known |= self._write_shards(partial)
            else:
                content = optimizer_content(self.optimizer) if is_engine(self.model) else None  # of all ranks
                if self.accelerator.is_main_process:
                    save_model(unwrapped(self.model), self.processor, partial / "model")
                    save_optimizer(self.optimizer, partial, content)
            if self.accelerator.is_main_process:
                state = {"step": step, "history": history, "pending": pending, "order": self.feed.order()}
                state |= {"config": options_of(self.config), "format": FORMAT, "version": __version__}
                write_json(partial / "state.json", state)
            self.feed.save(partial)
            known |= self.average.save(partial)
            self.spikes.save(partial)
            save_rng(partial / f"rng-{self.accelerator.process_index}.safetensors")

    def _write_shards(self, partial: Path) -> dict[str, str]:
        """Write weights and moments, all ranks together; return this rank's digests."""
        digests = self._write_sharded_model(partial / "model")
        known = {f"model/{name}": digest for name, digest in digests.items()}
        tensors, rest = optimizer_content(self.optimizer)
        _, digests = write_spread(tensors, partial, "optimizer", self.accelerator)
        with every_rank(self.accelerator):
            if self.accelerator.is_main_process:
                write_json(partial / "optimizer.json", rest)
        return known | digests

    def _write_sharded_model(self, folder: Path) -> dict[str, str]:
        """Save the model as save_model() does, all ranks together; return this rank's digests."""
        model, digests, main = unwrapped(self.model), dict[str, str](), self.accelerator.is_main_process
        if wrapped_by_peft(model):
            state, base = sharded_checkpoint.adapter_state(model, self.accelerator), base_fingerprint(unwrap(model))
            with every_rank(self.accelerator):
                if main:
                    save_adapter(model, folder, base, state)
        else:
            digests = sharded_checkpoint.write_weights(model, folder, self.accelerator)
        with every_rank(self.accelerator):
            if main:
                self.processor.save_pretrained(folder)
        return digests

    def _failure(self, error: BaseException, step: int) -> str:
        """Say what kept a checkpoint from being written, and what there is to go on from."""
        cause = f"step {step} cannot be saved in {self.folder}: {error}."
        if is_disk_full(error):
            need, have = size(self.bytes), size(free_bytes(self.folder))
            cause = f"disk full: need {need} for the checkpoint of step {step}, have {have} in {self.folder}."
        return f"{cause} {last_good(self.folder)}"

    def model_dir(self) -> Path:
        """Return the newest checkpoint's model."""
        assert self.newest is not None, "nothing was saved"
        return self.newest / "model"

    def publish(self) -> Path:
        """Put the newest checkpoint's model where people look for it, output_dir/model, and return that path."""
        model_dir = self.output_dir / "model"
        if self.saves:
            share = self.saving / (time.monotonic() - self.began)
            self.accelerator.print(
                f"{self.saves} checkpoint{'s' * (self.saves > 1)} took {self.saving:.1f} s, {share:.1%} of the time."
            )
        averaged = self.average.facts()
        if averaged:  # for good: the model in memory is what is published
            self.average.swap()
        source = self._averaged(averaged) if averaged else self.model_dir()
        if self.accelerator.is_main_process:
            replace_folder(source, model_dir)
            if averaged:
                shutil.rmtree(source)
        self.accelerator.wait_for_everyone()
        return model_dir

    def _averaged(self, facts: dict[str, Any]) -> Path:
        """Save the model as it is in memory, beside its place; return where. Every rank has to call it."""
        folder, main = self.output_dir / ".model.averaged", self.accelerator.is_main_process
        with every_rank(self.accelerator):
            if main:
                shutil.rmtree(folder, ignore_errors=True)
                unwrap(self.model).training_runs[-1].update(facts)
        with without_bars():
            if is_sharded(self.model):
                self._write_sharded_model(folder)
            elif main:
                save_model(self.unwrapped, self.processor, folder)
        return folder


# ---- the model -----------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> Any:
    """Return the model without DDP or DeepSpeed, keeping peft's wrapper, whose save and load are its own."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model) else model


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Save a model (or, under peft, its adapter, the modules trained with it and the config) and its processor."""
    if wrapped_by_peft(model):
        save_adapter(model, folder, base_fingerprint(unwrap(model)))
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_adapter(model: Any, folder: Path, base: dict[str, str], state: dict[str, torch.Tensor] | None = None) -> None:
    """Save what peft has added to a model, and of the model what tells its base from others; `state` has whole tensors."""
    options = {} if state is None else {"state_dict": state}
    model.save_pretrained(folder, save_embedding_layers=False, **options)  # peft would ask the hub for a vocabulary
    config = copy.deepcopy(unwrap(model).config)
    vars(config).pop("quantization_config", None)  # how the base was held while training, not what it is
    config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's own, of headings to be filled in
    write_beside(model, folder, adapter=True)
    write_json(folder / BASE_FILE, base)


def load_model(model: Any, folder: Path) -> None:
    """Load weights that `save_model` wrote into a model of the same shape; CheckpointError names what does not fit."""
    if wrapped_by_peft(model):
        if not (folder / "adapter_model.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no adapter: that run was in full, this one has LoRA; do as then.")
        check_base(unwrap(model), folder)
    if is_sharded(model):
        missing, unexpected, differing = sharded_checkpoint.read_weights(model, folder)
        if differing:
            raise CheckpointError(f"{folder} does not fit the model: {differing[0]} and {len(differing) - 1} more.")
    else:
        with _fitting(folder):
            missing, unexpected = _load_whole(model, folder)
    if missing or unexpected:
        raise CheckpointError(f"{folder} does not fit the model: missing {missing}, unexpected {unexpected}.")


def _load_whole(model: Any, folder: Path) -> tuple[list[str], list[str]]:
    if wrapped_by_peft(model):
        from peft import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
        return missing, result.unexpected_keys
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name not in model.all_tied_weights_keys]
    model.tie_weights()
    return missing, result.unexpected_keys


@contextlib.contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch: another size
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
