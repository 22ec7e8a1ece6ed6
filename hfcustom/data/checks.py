"""What is checked of a row without a model: by training as it reads, by `hfcustom preflight` beforehand.

check_* raise RowError for what training refuses; find_warnings says what it takes but a person may want to know. Nothing
heavy is imported, so that the processes of a scan start at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from hfcustom.data.findings import Finding, image_notes
from hfcustom.data.messages import Example
from hfcustom.data.turns import Message, RowError, check_trained

MIN_PIXELS = 16  # of an image; fewer show nothing: spacers, tracking pixels
MIN_SIDE = 4  # pixels; transformers' infer_channel_dimension_format takes 1 and 3 for channels
SMALL_SIDE = 8  # pixels
LONG_TEXT = 100_000  # characters of one row
# control characters, those that turn the direction of text, a byte-order mark, the sign for a lost letter
ODD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]")
PLACEHOLDER = re.compile(r"<(image|img|video|audio)>|<\|(image|image_pad|video_pad|vision_start)\|>", re.IGNORECASE)


def check_row(example: Example, train_on: str = "assistant", min_pixels: int = MIN_PIXELS) -> None:
    """Refuse a row of which nothing is trained on, or with an image too small; RowError names it."""
    for side in (example.messages, *([] if example.rejected is None else [example.rejected])):
        check_trained(side, example.name, train_on)
    check_pixels(example, min_pixels)


def check_pixels(example: Example, min_pixels: int) -> None:
    """Refuse an image with a side that processors take for its colour channels, or of fewer pixels."""
    for at, image in enumerate(example.images):
        size = f"{example.name}, image {at}: {image.width}x{image.height} pixels"
        if min(image.size) < MIN_SIDE:
            raise RowError(
                f"{size}; sides of 1 or 3 pixels are taken for colour channels by some image processors, so {MIN_SIDE} are the "
                "fewest that all families can read. Drop the row, or enlarge the image.",
                "tiny",
            )
        if image.width * image.height < min_pixels:
            raise RowError(
                f"{size}, fewer than min_pixels={min_pixels}; drop the row, or lower min_pixels if such images are meant.",
                "tiny",
            )


def kind_of(example: Example) -> str:
    """Return what a row is, in words: rows of one run are of one kind."""
    if example.rejected is not None:
        return "a pair (chosen, rejected)"
    return "an ordinary row (messages)" if example.preferred is None else "an answer with a label (true or false)"


def check_kind(name: str, kind: str, expected: str | None) -> None:
    """Refuse a row of another kind than the run's others."""
    if expected is not None and kind != expected:
        raise RowError(f"{name} is {kind}, but the first row is {expected}; train on rows of one kind.", "kind")


# ---- warnings -------------------------------------------------------------------------------------------------------


def find_warnings(example: Example) -> list[Finding]:
    """Return what training takes as it is, but may not be meant."""
    return [*image_notes(example), *_about_images(example), *_about_texts(example)]


def _about_images(example: Example) -> Iterator[Finding]:
    for at, image in enumerate(example.images):
        if min(image.size) < SMALL_SIDE:
            size = f"{image.width}x{image.height} pixels, so little is to be seen"
            yield _warning(example, f"image {at}", "small", size)
        elif all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
            yield _warning(example, f"image {at}", "one_colour", "every pixel has the same colour")


def _about_texts(example: Example) -> Iterator[Finding]:
    characters = count_characters(example)
    if characters > LONG_TEXT:
        yield _warning(example, "", "long_text", f"{characters} characters of text, more than {LONG_TEXT}")
    for at, message in enumerate(example.messages):
        texts = [block["text"] for block in message["content"] if block["type"] == "text"]
        joined = "".join(texts)
        if message["role"] == "user" and not joined.strip() and len(texts) == len(message["content"]):
            yield _warning(example, f"message {at}", "empty_question", "the user says nothing")
        if found := PLACEHOLDER.search(joined):
            words = f"the text holds {found[0]!r}, which stays text; an image is a {{'type': 'image'}} block"
            yield _warning(example, f"message {at}", "typed_placeholder", words)
        if odd := ODD.search(joined):
            name = unicodedata.name(odd[0], "a control character")
            words = f"the text holds {odd[0]!a} ({name}), which no reader sees"
            yield _warning(example, f"message {at}", "odd_character", words)


def count_characters(example: Example) -> int:
    """Return the characters of a row's texts, of both answers where there are two."""
    return sum(
        len(block["text"])
        for message in _all_messages(example)
        for block in message["content"]
        if block["type"] == "text"
    )


def _all_messages(example: Example) -> Sequence[Message]:
    return [*example.messages, *(example.rejected or [])]


def _warning(example: Example, field: str, code: str, words: str) -> Finding:
    where = f"{example.name}, {field}" if field else example.name
    return Finding(example.name, f"{where}: {words}.", code, "warning", field)
