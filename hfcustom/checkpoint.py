"""Checkpoints: written whole or not at all, restored exactly, nothing in them that could run code.

output_dir/checkpoints/step-000100/
    model/                what from_pretrained (or PeftModel.from_pretrained) loads, with its processor
    optimizer.safetensors, optimizer.json
    rng-0.safetensors     one a rank: torch, CUDA, numpy and Python generators
    state.json            step, log, losses since the last log line, what decides the order of rows
    stream-0.json         one a rank, of rows that are a stream: where its loading processes stand
    manifest.json         SHA-256 of every other file; a folder without a true manifest is no checkpoint
A folder is written beside its place, flushed to disk, and renamed; the newest valid one is resumed from, and an old one
is deleted only after its successor is in place.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from hfcustom.card import keep_readme, write_beside
from hfcustom.parts import unwrap, wrapped_by_peft
from hfcustom.train_config import TrainConfig

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
        self.pending: list[dict[str, dict[str, float]]] = []  # losses and metrics of the steps since the last log line

    @property
    def unwrapped(self) -> Any:
        """The model without DDP."""
        return unwrapped(self.model)

    def begin(self) -> int:
        """Start afresh at step 0; ValueError when the folder holds another run's checkpoints and none may be deleted."""
        if self.config.overwrite and self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if complete_checkpoints(self.folder):
            raise ValueError(
                f"{self.folder} already holds checkpoints. Continue with --resume, start afresh with --overwrite, or "
                "choose another --output-dir."
            )
        return 0

    def resume(self) -> int:
        """Load the newest valid checkpoint, if there is one, and return its step; damaged ones are set aside and named."""
        if self.accelerator.is_main_process:
            for path in set_damaged_aside(self.folder):
                self.accelerator.print(f"{path.name} is damaged or incomplete: set aside as {DAMAGED}{path.name}.")
        self.accelerator.wait_for_everyone()
        self.resumed = self.newest = next(reversed(complete_checkpoints(self.folder)), None)
        if self.resumed is None:
            self.accelerator.print(f"Nothing to resume in {self.folder}; starting at step 0.")
            return 0
        state = json.loads((self.resumed / "state.json").read_text())
        self._check_order(state["order"])
        self.feed.load(self.resumed)
        load_model(unwrapped(self.model), self.resumed / "model")
        load_optimizer(self.optimizer, self.resumed)
        self.history, self.pending = state["history"], state["pending"]
        self.accelerator.print(f"Resuming from {self.resumed}, step {state['step']}.")
        return state["step"]

    def _check_order(self, then: dict[str, Any]) -> None:
        """Raise ValueError where the rows that are left would be others."""
        now = self.feed.order()
        if "data" not in then:  # written before checkpoints knew
            now.pop("data")
        differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if differ == ["data"]:
            raise ValueError(
                f"{self.resumed} was trained on other data: files, rows or weights have changed since, so that the rows already "
                "seen would be others. Put them back as they were, or start afresh with --overwrite."
            )
        if differ:
            raise ValueError(
                f"{self.resumed} was trained with {_chosen(then, differ)}, this run has {_chosen(now, differ)}: the rows already "
                "seen would be others. Resume with those values, or start afresh with --overwrite."
            )

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

    def save(self, step: int, history: list[dict[str, float]], pending: list[dict[str, dict[str, float]]]) -> Path:
        """Write the checkpoint of a step and delete those beyond `keep_checkpoints`."""
        target = self.folder / f"step-{step:06d}"
        with atomic_folder(target, self.accelerator) as partial:
            if self.accelerator.is_main_process:
                save_model(unwrapped(self.model), self.processor, partial / "model")
                save_optimizer(self.optimizer, partial)
                state = {"step": step, "history": history, "pending": pending, "order": self.feed.order()}
                write_json(partial / "state.json", state)
            self.feed.save(partial)
            save_rng(partial / f"rng-{self.accelerator.process_index}.safetensors")
        if self.accelerator.is_main_process:
            for old in complete_checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.newest = target
        return target

    def model_dir(self) -> Path:
        """Return the newest checkpoint's model."""
        assert self.newest is not None, "nothing was saved"
        return self.newest / "model"

    def publish(self) -> Path:
        """Put the newest checkpoint's model where people look for it, output_dir/model, and return that path."""
        model_dir = self.output_dir / "model"
        if self.accelerator.is_main_process:
            replace_folder(self.model_dir(), model_dir)
        self.accelerator.wait_for_everyone()
        return model_dir


def _chosen(order: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: order[name] for name in names if name in order}


# ---- folders --------------------------------------------------------------------------------------------------------

DAMAGED = "damaged-"


@contextlib.contextmanager
def atomic_folder(target: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, with a manifest, once the block ends without an error."""
    main = accelerator is None or accelerator.is_main_process
    partial = target.with_name(f".{target.name}.partial")
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    yield partial
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if main:
        write_manifest(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    if accelerator is not None:
        accelerator.wait_for_everyone()


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, hard-linked where the disk allows, never half-written under its name."""
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    keep_readme(target, partial)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Share weights between two names; what people edit is a file of its own, so that the other one stays as it was."""
    if not source.endswith(".safetensors"):
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to the end, oldest first."""
    return [path for path in _step_folders(folder) if (path / "manifest.json").is_file()]


def set_damaged_aside(folder: Path) -> list[Path]:
    """Rename checkpoints until the newest is one of which every file is as it was written; return what they were called.

    Left where they are, they would count among the newest to keep, and a good one would be deleted for them.
    """
    damaged: list[Path] = []
    for path in reversed(_step_folders(folder)):
        if manifest_holds(path):
            break
        aside = path.with_name(DAMAGED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        damaged.append(path)
    return damaged


def _step_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file, after flushing each to disk."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        digests[path.relative_to(folder).as_posix()] = _sha256(path)
    write_json(folder / "manifest.json", digests)
    _sync(folder / "manifest.json")
    _sync(folder)


def manifest_holds(folder: Path) -> bool:
    """Whether every file that the manifest names is there and unchanged."""
    try:
        digests = json.loads((folder / "manifest.json").read_text())
        return all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, readable by people."""
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---- model and optimizer --------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> Any:
    """Return the model without DDP, keeping peft's wrapper, whose save and load are its own."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Save a model (or, under peft, its adapter, the modules trained with it and the config) and its processor."""
    if wrapped_by_peft(model):
        model.save_pretrained(folder, save_embedding_layers=False)  # peft would ask the hub for a vocabulary
        config = copy.deepcopy(unwrap(model).config)
        vars(config).pop("quantization_config", None)  # how the base was held while training, not what it is
        config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's own, of headings to be filled in
        write_beside(model, folder, adapter=True)
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_model(model: Any, folder: Path) -> None:
    """Load weights that `save_model` wrote into a model of the same shape; RuntimeError names what does not fit."""
    if wrapped_by_peft(model):
        from peft import set_peft_model_state_dict

        if not (folder / "adapter_model.safetensors").is_file():
            raise RuntimeError(f"{folder} holds no adapter: that run was in full, this one has LoRA; do as then.")
        result: Any = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    else:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        result = model.load_state_dict(state, strict=False)
        missing = [name for name in result.missing_keys if name not in model.all_tied_weights_keys]
        model.tie_weights()
    if missing or result.unexpected_keys:
        raise RuntimeError(f"{folder} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}.")


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write an optimizer's state: tensors to safetensors, the rest to JSON."""
    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for index, state in content["state"].items():
        for name, value in state.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                rest[f"{index}.{name}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", {"param_groups": content["param_groups"], "state": rest})


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what `save_optimizer` wrote; learning rates and decay stay those of the present config."""
    saved = json.loads((folder / "optimizer.json").read_text())
    flat = {**load_file(folder / "optimizer.safetensors"), **saved["state"]}
    present = optimizer.state_dict()["param_groups"]
    then = _names_by_index(saved["param_groups"])
    now = {name: index for index, name in _names_by_index(present).items()}
    if differing := sorted(now.keys() ^ set(then.values())):
        raise RuntimeError(
            f"{folder}: the trained parameters have changed since this checkpoint ({differing[0]} first of "
            f"{len(differing)}); freeze and LoRA as then."
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(now[then[int(index)]], {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": present})


def _names_by_index(groups: list[dict[str, Any]]) -> dict[int, str]:
    """A state_dict numbers parameters through its groups, whose order follows the config's weight decay."""
    numbers = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names", map(str, group["params"]))]
    return dict(zip(numbers, names, strict=True))


# ---- random generators ----------------------------------------------------------------------------------------------


def save_rng(path: Path) -> None:
    """Write the random state of this process."""
    save_file(rng_state(), path)


def load_rng(path: Path) -> None:
    """Restore what `save_rng` wrote."""
    set_rng_state(load_file(path))


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of the torch, CUDA, numpy and Python generators of this process as tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python_words": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda_{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def set_rng_state(tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, *words = tensors["python_words"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python_gauss"].tolist()), None)))
    if cuda := [name for name in tensors if name.startswith("cuda_")]:
        torch.cuda.set_rng_state_all([tensors[f"cuda_{at}"] for at in range(len(cuda))])
