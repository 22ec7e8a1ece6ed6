"""Control tokens typed into texts: `<|im_end|>`, `<image>` and the like in a row are words, never turns or images.

Each that a text holds is replaced by a stand-in, one character that neither the texts nor the tokenizer know, before the
chat template and the processor see it; a copy of the tokenizer then writes the stand-in as the tokens of the words. Rows
without such text take no other path than ever.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding
from transformers.utils import logging

from hfcustom.data.messages import Example
from hfcustom.data.turns import Message, RowError
from hfcustom.naming import unknown

logger = logging.get_logger("hfcustom")

STAND_INS = range(0xF0000, 0x10FFFE)  # Unicode's private planes: never a letter, a blank or part of a word
Cut = tuple[int, int]


class ControlTokens:
    """The control tokens of a processor: special tokens, marks of images and what the chat template writes around turns.

    Other added tokens (PaliGemma's <loc0001>, <think> where no template writes it) are words that the tokenizer has of its
    own, and stay. `allowed` names control tokens that texts may hold as such, <|box_start|> for one; ValueError for one that
    the tokenizer does not have, or that stands for an image.
    """

    def __init__(self, processor: Any, allowed: Sequence[str] = ()) -> None:
        added = processor.tokenizer.added_tokens_decoder
        self.marks = image_marks(processor)
        plain = _plain_turns(processor)
        tokens = {
            token.content
            for token in added.values()
            if token.special or token.content in self.marks or (token.content in plain and not token.content.isspace())
        }
        for name in allowed:
            if name in self.marks:
                raise ValueError(
                    f"allowed_tokens has {name!r}, a mark of images; write images as {{'type': 'image'}} blocks."
                )
            if name not in tokens:
                cure = "These are the control tokens; leave out of allowed_tokens what is none."
                raise ValueError(unknown("token in allowed_tokens", name, sorted(tokens), cure))
        self.tokens = tokens.union(self.marks).difference(allowed)
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._told: set[str] = set()
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def shield(self, processor: Any, examples: Sequence[Example]) -> tuple[Any, list[Example]]:
        """Return a processor and examples whose texts hold stand-ins; both as they are where no text holds a control token."""
        cuts = [[list(self.cuts(message)) for message in example.messages] for example in examples]
        found = [words for row in cuts for message in row for _, _, words in message]
        if not found:
            return processor, list(examples)
        texts = "".join(block["text"] for row in examples for turn in row.messages for block in text_blocks(turn))
        taken = set(texts)
        free = (chr(code) for code in STAND_INS if chr(code) not in taken)
        stand_ins = dict(zip(dict.fromkeys(found), free, strict=False))
        for row, at in zip(examples, cuts, strict=True):
            self._tell(row.name, {words for message in at for _, _, words in message})
        shielded = [
            replace(
                row,
                messages=[_replace(message, cut, stand_ins) for message, cut in zip(row.messages, at, strict=True)],
            )
            for row, at in zip(examples, cuts, strict=True)
        ]
        return text_processor(processor, {char: words for words, char in stand_ins.items()}), shielded

    def cuts(self, message: Message) -> Iterator[tuple[int, Cut, str]]:
        """Yield (block, span, words) of control tokens; one that lies across blocks is cut where the blocks meet."""
        numbered = enumerate(message["content"])
        for kind, run in groupby(numbered, key=lambda item: item[1]["type"]):
            blocks = [(at, block["text"]) for at, block in run] if kind == "text" else []
            joined = "".join(text for _, text in blocks)
            for match in self.pattern.finditer(joined):
                start = 0
                for at, text in blocks:
                    begin, end = max(match.start() - start, 0), min(match.end() - start, len(text))
                    start += len(text)
                    if begin < end:
                        yield at, (begin, end), text[begin:end]

    def _tell(self, name: str, words: set[str]) -> None:
        for token in sorted(words & self.tokens - self._told):
            self._told.add(token)
            logger.warning(
                f"{name}: a text holds {token!r}; there and in later rows it is encoded as text, not as this control token. "
                "If the token itself is meant, name it in allowed_tokens."
            )


def text_blocks(message: Message) -> list[dict[str, Any]]:
    """Return a message's blocks of text."""
    return [block for block in message["content"] if block["type"] == "text"]


def _replace(message: Message, cuts: Sequence[tuple[int, Cut, str]], stand_ins: Mapping[str, str]) -> Message:
    """Return a message with stand-ins in its texts."""
    content = [dict(block) for block in message["content"]]
    for at, (start, end), words in reversed(cuts):  # the last first, so that the others stay where they are
        text = content[at]["text"]
        content[at]["text"] = text[:start] + stand_ins[words] + text[end:]
    return {**message, "content": content}


# ---- which tokens ----------------------------------------------------------------------------------------------------


def image_marks(processor: Any) -> set[str]:
    """Return the tokens that stand for images, videos and sounds, or around them."""
    tokenizer = processor.tokenizer
    ids = {*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids} - {None}
    tokens = {*processor.all_special_multimodal_tokens, *tokenizer.convert_ids_to_tokens(sorted(ids))}
    written = _written_between(processor, [{"type": "image"}])
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return tokens | {token for token in added if token in written}


def _written_between(processor: Any, blocks: list[dict[str, Any]]) -> str:
    """Return what the template writes for blocks between two words, nothing where it does not write the words."""
    content = [{"type": "text", "text": "before"}, *blocks, {"type": "text", "text": "after"}]
    return _render(processor, [{"role": "user", "content": content}]).partition("before")[2].rpartition("after")[0]


def _plain_turns(processor: Any) -> str:
    """Return what the template writes around a question and an answer."""
    words = [{"type": "text", "text": "words"}]
    question = [{"role": "user", "content": words}]
    prompt = _render(processor, question, add_generation_prompt=True)
    whole = _render(processor, [*question, {"role": "assistant", "content": words}])
    return f"{prompt}\n{whole.rpartition('words')[2]}"


def _render(processor: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """Return what the template makes of messages, nothing where it refuses them: rows will say why."""
    try:
        return str(processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError):
        return ""


# ---- encoding stand-ins as the words they stand for -------------------------------------------------------------------


def text_processor(processor: Any, words: Mapping[str, str]) -> Any:
    """Return a copy of a processor whose tokenizer writes each stand-in as the words that it stands for."""
    tokenizer = copy.copy(processor.tokenizer)
    kind = type(tokenizer)  # extended rather than wrapped: processors ask a tokenizer for much else
    tokenizer.__class__ = type(f"Text{kind.__name__}", (TextTokenizer, kind), {})
    tokenizer.words = dict(words)
    processor = copy.copy(processor)
    processor.tokenizer = tokenizer
    return processor


def spell_out(processor: Any, text: str) -> str:
    """Return a text with the words that its stand-ins stand for."""
    tokenizer = processor.tokenizer
    table = (
        {ord(char): words for char, words in tokenizer.words.items()} if isinstance(tokenizer, TextTokenizer) else {}
    )
    return text.translate(table)


class TextEncoding(BatchEncoding):
    """What a TextTokenizer returns: tokens can be asked for by their characters, as Idefics3's processor does."""

    def __init__(self, data: Mapping[str, Any], offsets: Sequence[Sequence[Cut]]) -> None:
        super().__init__(dict(data))
        self.offsets = offsets

    def char_to_token(  # type: ignore[override]
        self, batch_or_char_index: int, char_index: int, sequence_index: int = 0
    ) -> int | None:
        """Return the token of a row that a character is in, None where it is in none."""
        row = enumerate(self.offsets[batch_or_char_index])
        return next((at for at, (start, end) in row if start <= char_index < end), None)


class TextTokenizer:
    """Mixin before the class of a tokenizer: stand-ins become the tokens of their words, each at the stand-in's offset."""

    words: dict[str, str]
    _tokenizer: Any

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as stock does; a batch with stand-ins is cut at them."""
        if isinstance(text, str) or not any(char in row for row in text or () for char in self.words):
            return super().__call__(text, *args, **kwargs)  # type: ignore[misc]
        bare = {"padding": False, "return_offsets_mapping": True, "return_tensors": None}
        plain = super().__call__(["" for _ in text], *args, **{**kwargs, **bare})  # type: ignore[misc]
        rows = [self._encode(row, kwargs.get("add_special_tokens", True)) for row in text]
        ids, offsets = zip(*rows, strict=True)
        features: dict[str, Any] = {"input_ids": list(ids), "attention_mask": [[1] * len(row) for row in ids]}
        if "token_type_ids" in plain:
            features["token_type_ids"] = [[0] * len(row) for row in ids]
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
        padded: BatchEncoding = self.pad(features, **{name: kwargs[name] for name in names if name in kwargs})  # type: ignore[attr-defined]
        left = (kwargs.get("padding_side") or self.padding_side) == "left"  # type: ignore[attr-defined]
        blanks = [[(0, 0)] * (len(row) - len(own)) for row, own in zip(padded["input_ids"], offsets, strict=True)]
        pairs = zip(offsets, blanks, strict=True)
        padded = TextEncoding(padded.data, [blank + row if left else row + blank for row, blank in pairs])
        if kwargs.get("return_offsets_mapping"):
            padded["offset_mapping"] = padded.offsets
        return padded.convert_to_tensors(kwargs.get("return_tensors"))

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[Cut]]:
        """Return the ids of a text, and of each the span of characters that it is from."""
        backend = self._tokenizer
        backend.no_truncation()
        backend.no_padding()
        ids, offsets, start = [], [], 0
        for piece in re.split(f"([{''.join(self.words)}])", text):
            if piece in self.words:
                new = _encode_words(backend, self.words[piece])
                spans = [(0, 1)] * len(new)
            elif start == 0:
                new, spans = _encode_piece(backend, piece)
            else:
                new, spans = _after_newline(lambda words: _encode_piece(backend, words), piece)
            ids += new
            offsets += [(start + begin, start + end) for begin, end in spans]
            start += len(piece)
        return _with_ends(backend, ids, offsets) if add_special_tokens else (ids, offsets)


def _encode_piece(backend: Any, piece: str) -> tuple[list[int], list[Cut]]:
    encoding = backend.encode(piece, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _after_newline(encode: Callable[[str], tuple[list[int], list[Cut]]], piece: str) -> tuple[list[int], list[Cut]]:
    """Encode what stands inside of a text: after a line break, so that no tokenizer puts a blank before it."""
    newline, _ = encode("\n")
    ids, offsets = encode("\n" + piece)
    if ids[: len(newline)] != newline:
        return encode(piece)
    return ids[len(newline) :], [(max(start - 1, 0), max(end - 1, 0)) for start, end in offsets[len(newline) :]]


def _encode_words(backend: Any, words: str) -> list[int]:
    """Return the ids of words among which no added token is; letter by letter where the words themselves are one."""
    added = backend.get_added_tokens_decoder()
    for parts in ([words], list(words)):
        ids = [
            token
            for part in parts
            for token in _after_newline(lambda text: (_encode_plain(backend, text), []), part)[0]
        ]
        if not any(token in added for token in ids):
            return ids
    raise RowError(
        f"The tokenizer cannot write {words!r} as text: it makes the control token of it. Leave it out of the rows."
    )


def _encode_plain(backend: Any, text: str) -> list[int]:
    """Tokenize without looking for added tokens: the backend's own steps, its list of them left out."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    splits = [text]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for split in splits for token in backend.model.tokenize(split)]


def _with_ends(backend: Any, ids: list[int], offsets: list[Cut]) -> tuple[list[int], list[Cut]]:
    """Add the tokens that the tokenizer writes around each text."""
    around = backend.encode("a", add_special_tokens=True)
    inner = [at for at, special in enumerate(around.special_tokens_mask) if not special]
    before, after = around.ids[: inner[0]], around.ids[inner[-1] + 1 :]
    return [*before, *ids, *after], [*[(0, 0)] * len(before), *offsets, *[(0, 0)] * len(after)]
