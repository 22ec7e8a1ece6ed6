"""What the benchmark trains: tasks (a model's shapes and rows) and their batches, the same tensors for every variant.

Task -> InternVL config; Task -> {"input_ids": (B, T), "attention_mask": (B, T), "labels": (B, T), "pixel_values": (P, C, H, W)}.
Ids, pixels and weights are random but seeded, so that a process of its own can make the same ones. No tokenizer is
involved: what a step costs depends on how many tokens there are, not on which.
Letters: B rows, T text tokens, P images, C channels, H W pixels, V vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE = -100
PAD = 0
FIRST_ID = 16  # smaller ids are kept for special tokens
PATCH = 14  # pixels


@dataclass(frozen=True)
class Row:
    """The size of one chat row; its answer is its end."""

    length: int
    images: int
    supervised: int


@dataclass(frozen=True)
class Shape:
    """The size of a transformer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Task:
    """A model's shapes and the rows of one step."""

    name: str
    about: str
    vocabulary: int
    text: Shape
    vision: Shape
    image_size: int
    rows: tuple[Row, ...]
    groups: tuple[str, ...] = ()  # what a run without --groups compares
    dtype: str = "float32"

    @property
    def image_tokens(self) -> int:
        """Return the tokens of one image: a quarter of its patches."""
        return (self.image_size // PATCH) ** 2 // 4

    @property
    def image_token_id(self) -> int:
        """Return the placeholder's id."""
        return self.vocabulary - 7


@dataclass(frozen=True)
class Job:
    """What one worker builds."""

    variant: str
    objective: str
    lora: bool
    task: Task
    dtype: str
    device: str


def stock_config(task: Task) -> Any:
    """Return the stock InternVLConfig of a task."""
    from transformers import AutoConfig, InternVLConfig

    text, vision = task.text, task.vision
    return InternVLConfig(
        text_config=AutoConfig.for_model(
            "qwen2",
            vocab_size=task.vocabulary,
            hidden_size=text.hidden,
            intermediate_size=text.intermediate,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=PAD,
        ),
        vision_config={
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": [task.image_size, task.image_size],
            "patch_size": [PATCH, PATCH],
        },
        image_token_id=task.image_token_id,
        image_seq_length=task.image_tokens,
        tie_word_embeddings=False,
    )


def fill_weights(model: torch.nn.Module) -> None:
    """Give every matrix seeded values that depend on its name alone; vectors keep their constant initial values."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(plain_name(name).encode()))
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 0.02, generator=generator)
        parameter.data.copy_(values)


def plain_name(name: str) -> str:
    """Return a parameter's name without what peft puts around it."""
    for extra in ("base_model.model.", "base_layer.", "default."):
        name = name.replace(extra, "")
    return name


# ---- batches --------------------------------------------------------------------------------------------------------


def make_batch(task: Task, objective: str) -> dict[str, torch.Tensor]:
    """Return one step's tensors on the CPU, in float32; for "dpo" the rows are [chosen 0, rejected 0, chosen 1, ...]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = step_rows(task, objective)
    longest = max(row.length for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), PAD),  # (B, T)
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORE),
    }
    images: list[torch.Tensor] = []
    ids = torch.empty(0)
    for at, row in enumerate(rows):
        before, ids = ids, _row_ids(task, row, generator)  # (T,)
        pixels = torch.randn(row.images, 3, task.image_size, task.image_size, generator=generator)  # (P, C, H, W)
        if objective == "dpo" and at % 2:  # the same prompt and images as the row before
            ids[: -row.supervised] = before[: row.length - row.supervised]
            pixels = images[-1]
        images.append(pixels)
        batch["input_ids"][at, : row.length] = ids
        batch["attention_mask"][at, : row.length] = 1
        batch["labels"][at, row.length - row.supervised : row.length] = ids[-row.supervised :]
    if any(row.images for row in rows):
        batch["pixel_values"] = torch.cat(images)  # (P, C, H, W)
    if objective == "dpo":
        batch["preference"] = torch.tensor([1.0, -1.0]).repeat(len(rows) // 2)  # (B,)
    return batch


def step_rows(task: Task, objective: str) -> tuple[Row, ...]:
    """Return the rows of a step; for "dpo" each of the task's first half is there twice, the second with another's answer."""
    if objective != "dpo":
        return task.rows
    half = len(task.rows) // 2
    rows = []
    for chosen, other in zip(task.rows[:half], task.rows[half:], strict=False):
        rejected = Row(chosen.length - chosen.supervised + other.supervised, chosen.images, other.supervised)
        rows += [chosen, rejected]
    return tuple(rows)


def _row_ids(task: Task, row: Row, generator: torch.Generator) -> torch.Tensor:
    """Return a row's ids (T,): images, each between two marks, then text, the answer last."""
    import torch

    ids = torch.randint(FIRST_ID, task.image_token_id, (row.length,), generator=generator)  # (T,)
    for at in range(row.images):
        start = 2 + at * (task.image_tokens + 2)
        assert start + task.image_tokens <= row.length - row.supervised, f"{row} has no room for its images"
        ids[start : start + task.image_tokens] = task.image_token_id
    return ids


def count_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Count the labels (B, T) that a previous position predicts."""
    return (labels[:, 1:] != IGNORE).sum()


# ---- the tasks ------------------------------------------------------------------------------------------------------


def scaling_task(vocabulary: int, length: int) -> Task:
    """Return two rows of text of one length, 12 % of it supervised, on a small body."""
    row = Row(length, 0, max(length * 12 // 100, 1))
    shape = Shape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=2)
    return Task("scaling", "two rows of text on a small body", vocabulary, shape, shape, 28, (row, row))


SMALL = Shape(layers=4, hidden=256, intermediate=1024, heads=4, kv_heads=4)
TINY = Shape(layers=2, hidden=32, intermediate=64, heads=2, kv_heads=2)

TASKS: dict[str, Task] = {
    "B": Task(
        "B",
        "the shapes of InternVL3-1B, LoRA on the language model",
        vocabulary=151_674,
        text=Shape(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2),
        vision=Shape(layers=24, hidden=1024, intermediate=4096, heads=16, kv_heads=16),
        image_size=448,
        rows=(Row(1045, 3, 138), Row(612, 2, 66), Row(207, 0, 24)),
        groups=("lora-cross_entropy",),
        dtype="bfloat16",
    ),
    "T": Task(
        "T",
        "a tiny body with a real vocabulary",
        vocabulary=151_674,
        text=SMALL,
        vision=SMALL,
        image_size=112,
        rows=(
            Row(147, 1, 24),
            Row(118, 3, 23),
            Row(650, 1, 125),
            Row(701, 4, 36),
            Row(288, 3, 43),
            Row(174, 2, 30),
        ),
        groups=("full-cross_entropy", "full-focal", "lora-cross_entropy", "lora-dpo"),
    ),
    "tiny": Task(
        "tiny",
        "a smoke test; its times mean nothing",
        vocabulary=512,
        text=TINY,
        vision=TINY,
        image_size=28,
        rows=(Row(24, 1, 3), Row(40, 2, 5), Row(16, 0, 2), Row(31, 1, 4)),
        groups=("full-cross_entropy", "full-focal", "lora-cross_entropy", "lora-dpo"),
    ),
}
