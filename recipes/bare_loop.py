"""The quick start's model trained without fit(): every step of the loop in one file, to read and to take apart.

    accelerate launch recipes/bare_loop.py

Prints the same losses as `hfcustom.fit` on the same rows (a test holds them equal). What fit() adds is around the loop,
not in it: checkpoints, resuming, trackers, signals. About 20 seconds on two CPU cores; the loss falls from 5.6 to 1.5.
"""

from __future__ import annotations

import argparse
import math

if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.parse_args()  # answers --help before torch is imported

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from hfcustom.data.collate import Collator
from hfcustom.data.digits import digit_rows
from hfcustom.data.order import step_rows
from hfcustom.data.sources import Examples
from quickstart import build_model, build_processor

STEPS, BATCH_SIZE, MICRO_BATCH_SIZE = 60, 32, 16
PEAK_LR, MIN_LR_RATIO, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 2e-3, 0.1, 20, 0.1, 1.0


def learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine down to MIN_LR_RATIO of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK_LR * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Decay matrices, but no bias, norm or embedding."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embed" not in name].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )


def main(num_rows: int = 2000, steps: int = STEPS) -> list[float]:
    accelerator = Accelerator()
    set_seed(0)
    rows = Examples(digit_rows(num_rows))
    processor = build_processor()
    model = build_model(processor)  # config.loss: cross_entropy and feature_energy, see quickstart.py
    weights = {item.loss.name: item.weight for item in model.losses()}
    collate = Collator(processor)
    set_seed(0, device_specific=True)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model))
    prepared.train()
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        wanted = step_rows(len(rows), step, BATCH_SIZE, seed=0)
        batches = [
            collate([rows[index] for index in wanted[first : first + MICRO_BATCH_SIZE]])
            for first in range(0, BATCH_SIZE, MICRO_BATCH_SIZE)
        ]
        divisors = model.loss_counts(batches)  # {"cross_entropy": supervised tokens, "feature_energy": image tokens}
        losses = dict.fromkeys(weights, 0.0)
        for batch in batches:
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            accelerator.backward(prepared(**batch, loss_divisors=divisors).loss)
            for name, value in model.loss_values.items():
                losses[name] += float(value.sum) / divisors[name]
        accelerator.clip_grad_norm_(prepared.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        history.append(sum(weights[name] * loss for name, loss in losses.items()))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {history[-1]:.4f}  {losses}")
    return history


if __name__ == "__main__":
    main()
