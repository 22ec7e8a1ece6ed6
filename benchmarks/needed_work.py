"""The arithmetic that a step cannot do without, and how fast this machine multiplies matrices.

Needed is the forward and backward of real tokens (no padding), of the head on supervised positions only, of the vision
tower, and for DPO of the reference's forward; what is frozen needs no weight gradient, and a frozen tower no backward.
Counted from the model's own modules, built on the meta device. Element-wise work is not counted.
Letters: T text tokens of one row, M supervised tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from tasks import Job, Row, Shape, Task, step_rows, stock_config

SQUARE = 1024
REPEATS = 3


def needed_flop(job: Job) -> float:
    """Return the floating-point operations of a job's step; a multiply-add is two."""
    task, lora = job.task, job.lora
    rows = step_rows(task, job.objective)
    products = 2.0 if lora else 3.0  # forward, gradient of the input, gradient of the weight
    tokens, images = sum(row.length for row in rows), sum(row.images for row in rows)
    supervised = sum(row.supervised for row in rows)
    weights = linear_weights(task)
    attention = sum(attention_flop(row, task.text) for row in rows)
    head = 2.0 * supervised * weights["head"]
    body = 2.0 * tokens * weights["language"]
    total = products * (head + body) + 3.0 * attention
    if lora:
        total += 3.0 * 2.0 * tokens * lora_weights(task)
    patches = 4 * task.image_tokens
    tower = 2.0 * images * (patches + 1) * weights["vision"]
    tower += task.vision.layers * images * 4.0 * (patches + 1) ** 2 * task.vision.hidden
    tower += 2.0 * images * task.image_tokens * weights["connector"]
    total += tower if lora else 3.0 * tower
    if job.objective == "dpo":
        total += head + body + attention
    return total


def attention_flop(row: Row, shape: Shape) -> float:
    """Return a causal forward's scores and mixing over all layers: half of two products of T x T x D."""
    return shape.layers * 2.0 * row.length * row.length * shape.hidden


def linear_weights(task: Task) -> dict[str, int]:
    """Return the weights of the matrix products by part; every one is used once a token, patch or image token."""
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = InternVLForConditionalGeneration(stock_config(task))
    counts = {"connector": 0, "head": 0, "language": 0, "vision": 0}
    parts = {"vision_tower": "vision", "multi_modal_projector": "connector", "language_model": "language"}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            part = next((part for path, part in parts.items() if path in name), "head")
            counts[part] += module.weight.numel()
    return counts


def lora_weights(task: Task) -> int:
    """Return the LoRA weights on the language model's projections."""
    from variants import LORA_RANK

    text = task.text
    kv = text.hidden * text.kv_heads // text.heads
    sizes = 2 * (text.hidden + text.hidden) + 2 * (text.hidden + kv) + 3 * (text.hidden + text.intermediate)
    return text.layers * LORA_RANK * sizes


# ---- the limit ------------------------------------------------------------------------------------------------------


def measure_matmul(job: Job) -> dict[str, float]:
    """Return operations a second of three products, the best of a few runs each: square, like the head, like the body."""
    task = job.task
    tokens, supervised = sum(row.length for row in task.rows), sum(row.supervised for row in task.rows)
    shapes = {
        "square": (SQUARE, SQUARE, SQUARE),
        "head": (supervised, task.text.hidden, task.vocabulary),
        "body": (tokens, task.text.hidden, task.text.intermediate),
    }
    return {name: _rate(shape, job) for name, shape in shapes.items()}


def _rate(shape: tuple[int, int, int], job: Job) -> float:
    rows, inner, columns = shape
    options: dict[str, Any] = {"device": job.device, "dtype": getattr(torch, job.dtype)}
    left, right = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    out = torch.empty(rows, columns, **options)
    torch.mm(left, right, out=out)
    flop = 2.0 * rows * inner * columns
    calls = max(1, int(1e9 // flop)) if job.device == "cpu" else max(1, int(1e12 // flop))
    best = 0.0
    for _ in range(REPEATS):
        began = _now(job.device)
        for _ in range(calls):
            torch.mm(left, right, out=out)
        best = max(best, calls * flop / (_now(job.device) - began))
    return best


def _now(device: str) -> float:
    """Return seconds: of the processor for one thread on a CPU, which other processes do not disturb, else of the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()
