"""What the model sees of a row: each token with its role, its kind, the image and tile it stands for, and its label.

row -> [View], two for a pair of answers. The tokens and labels are those of a collator (hfcustom/data/collate.py, or the
user's own); what they mean is found by encoding the row here once more, with the processor's record of what it wrote where.
Letters: T text tokens, P image crops, H W pixels.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfcustom.data.collate import Collator, process, split_pair
from hfcustom.data.columns import TOKEN_WEIGHTS
from hfcustom.data.control import ControlTokens
from hfcustom.data.labels import expanded_position, tokens_inside
from hfcustom.data.messages import Example
from hfcustom.losses import IGNORE

NEVER_LABELLED = ("image", "mark", "padding", "video")
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
Collate = Callable[[Sequence[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Token:
    """One position of a row."""

    at: int
    id: int
    text: str
    role: str  # of the message it belongs to; "" where that cannot be told
    kind: str  # text, control (what marks turns), image, video, mark (what stands around them), padding
    label: int | None  # what is to be predicted here, None where nothing is
    weight: float  # of the label in a loss that takes weights
    position: tuple[int, ...]  # one number, or time, height and width
    image: int | None = None
    tile: int | None = None


@dataclass
class View:
    """One row (or one answer of a pair) as the model gets it."""

    name: str
    tokens: list[Token]
    pictures: list[Image.Image]
    tiles: list[list[Image.Image]]  # of each picture, the crops that the vision tower gets; none where it gets patches
    problems: list[str] = field(default_factory=list)

    def labelled(self) -> list[Token]:
        """Return the tokens that carry a label."""
        return [token for token in self.tokens if token.label is not None]

    def counts(self) -> Counter[str]:
        """Return the number of tokens of each kind."""
        return Counter(token.kind for token in self.tokens)

    def label_counts(self) -> Counter[str]:
        """Return the number of label tokens of each role; of images and their marks by kind."""
        return Counter(
            token.kind if token.kind in NEVER_LABELLED else token.role or "unknown role" for token in self.labelled()
        )

    def runs(self) -> Iterator[list[Token]]:
        """Yield the tokens, those of one tile, and padding, together."""

        def key(token: Token) -> Any:
            if token.kind == "padding":
                return "padding"
            return (token.image, token.tile, token.label is None) if token.kind == "image" else token.at

        for _, run in groupby(self.tokens, key):
            yield list(run)


def view_row(
    processor: Any,
    example: Example,
    collate: Collate | None = None,
    place: Callable[[Any], torch.Tensor] | None = None,
) -> list[View]:
    """Return what a collator makes of a row, an answer a View; `place` finds positions: batch -> (1 or 3, B, T).

    Raises RowError for a row that cannot be used, ValueError for a collator that returns no input_ids or labels.
    """
    collate = collate or Collator(processor, columns=(TOKEN_WEIGHTS,))
    control = collate.control if isinstance(collate, Collator) else ControlTokens(processor)
    batch = collate([example])
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"The collator returned {', '.join(batch) or 'nothing'}, but no {name}.")
    answers = split_pair(example)
    if len(batch["input_ids"]) != len(answers):
        raise ValueError(
            f"The collator made {len(batch['input_ids'])} rows of one; give one that keeps rows apart, without packing."
        )
    positions = _positions(batch) if place is None else place(batch)  # (1 or 3, B, T)
    meanings = [_meaning(processor, control, answer) for answer in answers]
    return [
        _view(processor, answer, meaning, batch, at, positions[:, at])
        for at, (answer, meaning) in enumerate(zip(answers, meanings, strict=True))
    ]


@dataclass
class _Meaning:
    """What this toolkit's own encoding of a row says about its tokens."""

    ids: list[int]
    roles: list[str]
    images: list[int | None]  # which picture a token was written for
    placeholders: frozenset[int]
    videos: frozenset[int]
    control: frozenset[int]
    marks: frozenset[int]


def _view(
    processor: Any,
    example: Example,
    meaning: _Meaning,
    batch: Mapping[str, torch.Tensor],
    at: int,
    places: torch.Tensor,
) -> View:
    ids, labels = batch["input_ids"][at].tolist(), batch["labels"][at].tolist()
    mask = batch["attention_mask"][at].tolist() if "attention_mask" in batch else [1] * len(ids)
    weights = batch[TOKEN_WEIGHTS][at].tolist() if TOKEN_WEIGHTS in batch else [1.0] * len(ids)
    roles, images = _carry_over(meaning, ids)
    crops = _crops(batch, processor)
    counts = Counter(
        i for i, token in zip(images, ids, strict=True) if i is not None and token in meaning.placeholders
    )
    shares = _share_crops(len(crops), [counts[image] for image in range(len(example.images))])
    tokens, seen = [], Counter[int]()
    for where, token in enumerate(ids):
        image, kind = images[where], _kind(token, mask[where], meaning, images[where])
        tile = None
        if kind == "image" and image is not None:
            tile = seen[image] * shares[image] // counts[image] if shares and shares[image] else None
            seen[image] += 1
        tokens.append(
            Token(
                at=where,
                id=token,
                text=processor.tokenizer.decode([token]),
                role=roles[where],
                kind=kind,
                label=None if labels[where] == IGNORE else labels[where],
                weight=0.0 if labels[where] == IGNORE else weights[where],
                position=tuple(places[:, where].tolist()),
                image=image,
                tile=tile,
            )
        )
    view = View(example.name, tokens, list(example.images), _deal(crops, shares, len(example.images)))
    view.problems = list(_problems(view))
    return view


def _meaning(processor: Any, control: ControlTokens, example: Example) -> _Meaning:
    reader, (shielded,) = control.shield(processor, [example])
    plain = [
        {"role": turn["role"], "content": [_bare(block) for block in turn["content"]]} for turn in shielded.messages
    ]
    text = reader.apply_chat_template(plain)
    features = process(reader, [text], [shielded], padding_side="right", with_offsets=True)
    offsets, replaced = features["offset_mapping"][0], (features.get("text_replacement_offsets") or [[]])[0]
    ids = features["input_ids"][0].tolist()
    roles = [""] * len(ids)
    for role, start, end in _message_spans(reader, plain, text):
        inside = tokens_inside(offsets, *(expanded_position(char, replaced) for char in (start, end)))
        for at in inside.nonzero().flatten().tolist():
            roles[at] = role
    images: list[int | None] = [None] * len(ids)
    written: Counter[int] = Counter()
    for number, record in enumerate(record for record in replaced if record["type"] == "image"):
        for at in tokens_inside(offsets, *record["new_span"]).nonzero().flatten().tolist():
            images[at] = number
            written[ids[at]] += bool(processor.tokenizer.decode([ids[at]]).strip())  # lines end between rows of tiles
    alone = [at for at, token in enumerate(ids) if token in processor.image_token_ids]
    if not written and len(alone) == len(example.images):  # one token a picture, which nothing was written for
        images = [alone.index(at) if at in alone else None for at in range(len(ids))]
    vocabulary = processor.tokenizer.get_vocab()
    placeholders = frozenset([written.most_common(1)[0][0]] if written else set(processor.image_token_ids) - {None})
    videos = frozenset(set(processor.video_token_ids) - {None})
    known, marks = (
        frozenset(vocabulary[token] for token in tokens if token in vocabulary)
        for tokens in (control.tokens, control.marks)
    )
    return _Meaning(ids, _fill(roles), images, placeholders, videos, known, marks)


def _bare(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "weight"}


def _message_spans(processor: Any, messages: list[dict[str, Any]], text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (role, start, end) of each message in the rendered text, as far as the template writes one after the other."""
    start = 0
    for at, message in enumerate(messages):
        upto = text if at == len(messages) - 1 else processor.apply_chat_template(messages[: at + 1])
        if not text.startswith(upto):
            return
        yield message["role"], start, len(upto)
        start = len(upto)


def _fill(roles: list[str]) -> list[str]:
    """Give tokens without a character of their own (a BOS in front) the role of what follows."""
    last = ""
    for at in reversed(range(len(roles))):
        last = roles[at] = roles[at] or last
    return roles


def _carry_over(meaning: _Meaning, ids: list[int]) -> tuple[list[str], list[int | None]]:
    """Return role and picture of each token of a batch, which another collator may have encoded otherwise."""
    if ids[: len(meaning.ids)] == meaning.ids:
        rest = len(ids) - len(meaning.ids)
        return [*meaning.roles, *[""] * rest], [*meaning.images, *[None] * rest]
    roles: list[str] = [""] * len(ids)
    images: list[int | None] = [None] * len(ids)
    matcher = difflib.SequenceMatcher(None, meaning.ids, ids, autojunk=False)
    for first, second, size in matcher.get_matching_blocks():
        roles[second : second + size] = meaning.roles[first : first + size]
        images[second : second + size] = meaning.images[first : first + size]
    return roles, images


def _kind(token: int, real: int, meaning: _Meaning, image: int | None) -> str:
    if not real:
        return "padding"
    if token in meaning.placeholders:
        return "image"
    if token in meaning.videos:
        return "video"
    if image is not None or token in meaning.marks:
        return "mark"
    return "control" if token in meaning.control else "text"


def _positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the places that a model gives to tokens by default: real ones counted from 0. (1, B, T)"""
    if "position_ids" in batch:
        given = batch["position_ids"]
        return given if given.ndim == 3 else given[None]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    return (mask.cumsum(1) - 1).clamp(min=0)[None]


# ---- tiles ----------------------------------------------------------------------------------------------------------


def _crops(batch: Mapping[str, torch.Tensor], processor: Any) -> list[Image.Image]:
    """Return the crops that the vision tower gets, (P, 3, H, W), as pictures; none where it gets patches."""
    values = next((batch[name] for name in PIXELS if name in batch), None)
    if values is None or values.ndim < 4 or values.shape[-3] != 3:
        return []
    pixels = values.float().flatten(0, -4)  # (P, 3, H, W)
    pixels = pixels[pixels.flatten(1).abs().amax(1) > 0]  # families pad with empty crops
    mean, std = (
        torch.as_tensor(np.asarray(getattr(processor.image_processor, name), dtype=np.float32)).view(-1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    colours = ((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()  # (P, H, W, 3)
    return [Image.fromarray(crop) for crop in colours]


def _share_crops(num_crops: int, placeholders: Sequence[int]) -> list[int]:
    """Return how many crops each picture became, from its placeholders; [] where they do not tell."""
    total = sum(placeholders)
    if num_crops == 0 or total == 0:
        return []
    if total % num_crops == 0 and not any(count % (total // num_crops) for count in placeholders):
        return [count // (total // num_crops) for count in placeholders]
    if num_crops == len(placeholders):
        return [1] * num_crops
    return [num_crops] if len(placeholders) == 1 else []


def _deal(crops: list[Image.Image], shares: Sequence[int], num_images: int) -> list[list[Image.Image]]:
    if not shares:
        return [crops] if num_images == 1 else [[] for _ in range(num_images)]
    rest = iter(crops)
    return [[next(rest) for _ in range(share)] for share in shares]


# ---- what is wrong --------------------------------------------------------------------------------------------------


def _problems(view: View) -> Iterator[str]:
    """Yield what must never be: labels on images, on padding, or of another token; a row without any."""
    named = {
        "image": "image tokens",
        "mark": "marks around images",
        "padding": "tokens of padding",
        "video": "video tokens",
    }
    for kind, words in named.items():
        wrong = [token for token in view.labelled() if token.kind == kind]
        if wrong:
            yield (
                f"{len(wrong)} {words} carry a label, the first {wrong[0].text!r} at {wrong[0].at}: the model is trained "
                "to write what it cannot say. Set their labels to -100."
            )
    other = [token for token in view.labelled() if token.label != token.id]
    if other:
        yield (
            f"{len(other)} labels are not the token at their place, the first at {other[0].at}: labels are shifted by the "
            "model, so a collator must not shift them."
        )
    if not view.labelled():
        yield "No token carries a label, so there is nothing to learn from the row."
    if view.pictures and not view.counts()["image"]:
        yield f"The row has {len(view.pictures)} pictures and no image token."
