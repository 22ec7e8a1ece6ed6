"""Row -> messages: one row of a data set, checked and brought into the one form that the collator reads.

An ordinary row is {"messages": [{"role", "content"}, ...], "images": [...], "videos": [...]}: content is a string or a list
of blocks {"type": "text", "text": ...}, {"type": "image"} and {"type": "video"}, whose images and videos come in order from
the lists, or inline as {"type": "image", "image": ...}. Other forms are in hfcustom/data/row_forms.py. Both answers of a
preference row see the same images. All other columns of a row are kept as they are (hfcustom/data/columns.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hfcustom.data.images import Fetch, load_image
from hfcustom.data.row_forms import FORM, Parsed, find_form, take_media
from hfcustom.data.turns import Message, RowError, check_answers, place_media, without_weights
from hfcustom.data.video_frames import VIDEO_DEFAULTS, Frames, VideoOptions, load_video


@dataclass(frozen=True)
class Example:
    """A checked row: messages whose content is a list of blocks, and their images in order of appearance."""

    messages: list[Message]  # of a pair, the chosen conversation
    images: list[Image.Image]
    name: str  # where the row comes from, for every message about it
    rejected: list[Message] | None = None  # of a pair, the other conversation, with the same images
    preferred: bool | None = None  # of an answer judged alone
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other keys
    videos: list[Frames] = field(default_factory=list)  # the chosen frames of each, in order of appearance
    used: tuple[str, ...] = field(default=(), compare=False)  # the row's keys that all this was made of
    source: str = field(default="", compare=False)  # of a mixture, which of its sets the row is from


def read_row(
    row: Mapping[str, Any],
    name: str,
    root: Path | None = None,
    video: VideoOptions = VIDEO_DEFAULTS,
    fetch: Fetch | None = None,
) -> Example:
    """Check one row and load its images and videos, those at URLs by `fetch`; RowError names the row, the field, the value and the cure."""
    if not isinstance(row, Mapping):
        raise RowError(f"{name}: {type(row).__name__}, no mapping; a row is {FORM}.")
    given = {key: value for key, value in row.items() if value is not None}  # Arrow fills missing keys with None
    if "completion" in given and "label" in row:
        given["label"] = row["label"]  # of a judged answer a missing label is a mistake
    keys = tuple(given)
    media = take_media(given, name)
    counts = {kind: len(listed) for kind, listed in media.items()}
    parsed = find_form(given, name, counts, keys).take(given, name, counts)
    used = tuple(key for key in keys if key not in given)
    messages, sources = place_media(parsed.turns, media, name)
    rejected = None
    check_answers(messages, f"{name}{', chosen:' if parsed.rejected is not None else ','} message")
    images, videos = _load_media(sources, name, root, video, fetch)
    if parsed.rejected is not None:
        rejected, others = _place_rejected(parsed, media, name)
        check_answers(rejected, f"{name}, rejected: message")
        _check_same_media(sources, others, images, name, root, fetch)
    example = Example(messages, images, name, rejected, parsed.preferred, given, videos=videos, used=used)
    return videos_as_images(example) if video.as_images else example


# ---- images and videos ----------------------------------------------------------------------------------------------


def _place_rejected(
    parsed: Parsed, media: Mapping[str, Sequence[Any]], name: str
) -> tuple[list[Message], dict[str, list[Any]]]:
    """Return the rejected conversation and its sources; it must show as much as the chosen one."""
    assert parsed.rejected is not None
    for kind in media:
        counts = [
            sum(block["type"] == kind for _, turn in side for block in turn["content"])
            for side in (parsed.turns, parsed.rejected)
        ]
        if counts[0] != counts[1]:
            raise RowError(
                f"{name}: chosen has {counts[0]} {{'type': '{kind}'}} blocks and rejected {counts[1]}; both answers are about "
                f"the same {kind}s, so write the same blocks in both."
            )
    return place_media(parsed.rejected, media, name)


def _check_same_media(
    sources: Mapping[str, Sequence[Any]],
    others: Mapping[str, Sequence[Any]],
    images: Sequence[Image.Image],
    name: str,
    root: Path | None,
    fetch: Fetch | None,
) -> None:
    for at, (source, other) in enumerate(zip(sources["image"], others["image"], strict=True)):
        if other is not source and _load_image(other, at, f"{name}, rejected", root, fetch) != images[at]:
            raise RowError(
                f"{name}, image {at}: chosen shows another image than rejected; both answers must be about the same images."
            )
    for at, (source, other) in enumerate(zip(sources["video"], others["video"], strict=True)):
        if other is not source and other != source:
            raise RowError(
                f"{name}, video {at}: chosen shows another video than rejected; both answers must be about the same videos."
            )


def _load_media(
    sources: Mapping[str, Sequence[Any]], name: str, root: Path | None, video: VideoOptions, fetch: Fetch | None
) -> tuple[list[Image.Image], list[Frames]]:
    images = [_load_image(source, at, name, root, fetch) for at, source in enumerate(sources["image"])]
    videos = []
    for at, source in enumerate(sources["video"]):
        try:
            videos.append(load_video(source, root, video, fetch))
        except (ValueError, OSError) as error:
            raise RowError(f"{name}, video {at}: {error}") from error
    return images, videos


def _load_image(source: Any, at: int, name: str, root: Path | None, fetch: Fetch | None) -> Image.Image:
    try:
        return load_image(source, root, fetch)
    except (ValueError, OSError) as error:
        raise RowError(f"{name}, image {at}: {error}") from error


def videos_as_images(example: Example) -> Example:
    """Return an example whose videos are images, a frame a block where the video's block stood."""
    images, videos = iter(example.images), iter(example.videos)
    shown: list[Image.Image] = []
    messages = []
    for message in example.messages:
        blocks: list[dict[str, Any]] = []
        for block in message["content"]:
            if block["type"] == "text":
                blocks.append(block)
                continue
            frames: list[Image.Image] = next(videos) if block["type"] == "video" else [next(images)]
            shown += frames
            blocks += [{"type": "image"} for _ in frames]
        messages.append({**message, "content": blocks})
    if example.rejected is None:
        return replace(example, messages=messages, images=shown, videos=[])
    other = videos_as_images(replace(example, messages=example.rejected, rejected=None))
    return replace(example, messages=messages, images=shown, videos=[], rejected=other.messages)


# ---- splitting off the answer ---------------------------------------------------------------------------------------


def split_answer(example: Example) -> tuple[list[Message], str]:
    """Return the messages before the last assistant turn, and that turn's text; of a pair, the chosen answer's.

    Raises RowError when there is none, and for an answer that is marked as not preferred.
    """
    if example.messages[-1]["role"] != "assistant":
        raise RowError(f"{example.name}: the last turn is not the assistant's, so there is no answer to compare with.")
    if example.preferred is False:
        raise RowError(
            f"{example.name}: label is False, so its answer is not the right one to compare with; evaluate on rows whose "
            "label is true."
        )
    answer = "".join(block["text"] for block in example.messages[-1]["content"] if block["type"] == "text")
    return without_weights(example.messages[:-1]), answer
