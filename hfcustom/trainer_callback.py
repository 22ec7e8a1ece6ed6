"""LossCallback: named losses in the logs of transformers.Trainer and of trl, and the step that scheduled weights read.

Each micro-batch's `model.loss_values` -> {name: mean, f"{name}_weighted": share of the loss} beside "loss", averaged over
the logged steps and the ranks as Trainer averages "loss" itself, so that they sum to it; a loss of weight 1 stands for
its own share.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from accelerate.utils import gather_object, reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfcustom.base import CustomVLM
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.losses import LossValue
from hfcustom.parts import unwrap
from hfcustom.training.step_plan import plan_step

PLANNED: WeakSet[Trainer] = WeakSet()  # trainers that show their model each step whole


class LossCallback(TrainerCallback):
    """Add every named loss to a Trainer's logs: `LossCallback.add_to(trainer)`.

    `add_to` also lets the model see each step as a whole, so that terms are divided as exactly as by fit().
    Trainer calls trackers (wandb, tensorboard) before the callbacks that it is given, so `callbacks=[LossCallback()]`
    reaches the printed log and `state.log_history` only; `add_to` puts it before them.
    """

    def __init__(self) -> None:
        self._is_first = False
        self._weighted: list[str] = []  # losses whose share is not their value
        self._taken: dict[str, LossValue] = {}  # what an earlier forward left on the model
        self._begin_window()

    @classmethod
    def add_to(cls, trainer: Trainer) -> LossCallback:
        """Put the callback before the trainer's trackers and return it; one that the trainer has already is moved."""
        callbacks = trainer.callback_handler.callbacks
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is not None:
            callbacks.remove(found)
        if trainer not in PLANNED:
            _plan_steps(trainer)
        chosen = found or cls()
        chosen._is_first = True
        callbacks.insert(0, chosen)
        return chosen

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a model without named losses; say when trackers would not see them."""
        _core(model)
        if args.report_to and not self._is_first:
            warnings.warn(
                f"report_to={args.report_to} will not see the named losses: use LossCallback.add_to(trainer) in place of "
                "callbacks=[LossCallback()].",
                stacklevel=2,
            )
        self._begin_window()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Tell the model the optimiser step, which scheduled weights read."""
        core = _core(model)
        core.loss_step = state.global_step
        self._taken = core.loss_values

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Take the losses of a micro-batch that is not the step's last."""
        self._take(_core(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Take the losses of the step's last micro-batch."""
        core = _core(model)
        self._take(core)
        if not self._shares:
            raise RuntimeError(
                f"The trainer did not compute the losses of {type(core).__name__}. With trl's SFTTrainer call "
                "hfcustom.honour_model(trainer) before train(); hfcustom.why_bypassed(trainer) says what replaces them. A "
                "forward of your own must call super().forward(labels=...)."
            )
        self._steps += 1
        self._weighted = [item.loss.name for item in core.losses() if item.is_weighted]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means since the last log line, over all ranks, to a line of training."""
        if logs is None or "loss" not in logs or not self._steps:
            return
        local = torch.stack([*self._shares.values(), *self._means.values()]).float()
        # Trainer counts the tokens of all ranks and multiplies by their number, or each rank counts its own.
        values = reduce(local, "sum" if args.average_tokens_across_devices else "mean").tolist()
        shares = dict(zip(self._shares, values, strict=False))
        means = dict(zip(self._means, values[len(shares) :], strict=True))
        found = {name: mean / self._steps for name, mean in means.items()}
        if len(shares) > 1:
            found |= {f"{name}_weighted": shares[name] / self._steps for name in self._weighted}
        found |= self._recorded()
        logs.update(found)
        state.log_history[-1].update(found)  # the line that Trainer has just appended
        self._begin_window()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop counting steps: another loop has to count its own."""
        _core(model).loss_step = None

    def _recorded(self) -> dict[str, float]:
        """Return the means of what terms recorded, over all ranks; a rank may have had nothing to record."""
        sums: dict[str, list[float]] = {}
        for rank in gather_object([{name: value.tolist() for name, value in self._metrics.items()}]):
            for name, (total, count) in rank.items():
                before = sums.get(name, [0.0, 0.0])
                sums[name] = [before[0] + total, before[1] + count]
        return {name: total / count for name, (total, count) in sums.items() if count}

    def _begin_window(self) -> None:
        self._steps = 0
        self._shares: dict[str, torch.Tensor] = {}  # sums over the window's micro-batches, on this rank
        self._means: dict[str, torch.Tensor] = {}
        self._weighted = []
        self._metrics: dict[str, torch.Tensor] = {}  # what terms recorded: sum and count, (2,)

    def _take(self, core: CustomVLM) -> None:
        if core.loss_values is self._taken:
            return
        self._taken = core.loss_values
        for name, value in self._taken.items():
            _add(self._shares, name, value.share)
            _add(self._means, name, value.mean)
        for name, sum_and_count in core.loss_metrics.items():
            _add(self._metrics, name, sum_and_count)


def _plan_steps(trainer: Trainer) -> None:
    """Let the model see each step as a whole, as fit() does: what every loss counts in it, and terms across its rows.

    Trainer itself hands the number of labels on. Where each rank counts for itself, that is all there is.
    """
    PLANNED.add(trainer)
    original = trainer.get_batch_samples

    def planned(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, num_items = original(*args, **kwargs)
        core = _core(trainer.model)
        alone = trainer.accelerator.num_processes == 1
        core.step_plan = []
        if batches and core.config.loss != "stock" and (alone or trainer.args.average_tokens_across_devices):
            core.step_plan = plan_step(core, batches, trainer.accelerator)
        return batches, num_items

    trainer.get_batch_samples = planned  # type: ignore[method-assign]


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _core(model: Any) -> CustomVLM:
    core = unwrap(model)
    if isinstance(core, CustomDualEncoder):
        raise TypeError(
            f"LossCallback has nothing to add to {type(core).__name__}: Trainer compares the pairs of each micro-batch, whose one "
            "loss it logs itself. hfcustom.fit compares those of the whole step."
        )
    if not isinstance(core, CustomVLM):
        raise TypeError(
            f"LossCallback reads the named losses of a custom model; load the {type(core).__name__} with its family's "
            "custom class."
        )
    return core
