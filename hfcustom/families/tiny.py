"""Building blocks of the families' tiny configs and processors: a tokenizer trained on the spot, a chat template, sizes.

Everything is made here without a network, so that tests, recipes and checks can run any family anywhere; the config,
processor and model classes are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

SENTENCES = (
    "What is in this image? Describe the picture in detail.",
    "Read the digits from left to right, row by row: 0 1 2 3 4 5 6 7 8 9",
    "There are three images here; two are red, one is blue. How many of them show a cat?",
    "user assistant system User: Assistant: System:",
)


IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def image_processor(name: str) -> Any:
    """Return an image processor class by name; without torchvision, its PIL twin (same settings, pixels within 0.016).

    Raises ImportError without torchvision for a class that has no twin.
    """
    if is_torchvision_available():
        return getattr(transformers, name)
    if not hasattr(transformers, name + "Pil"):
        raise ImportError(f"{name} works with torchvision only: pip install torchvision")
    return getattr(transformers, name + "Pil")


def video_processor(name: str, **settings: Any) -> Any:
    """Return a video processor, or None without torchvision."""
    return getattr(transformers, name)(**settings) if is_torchvision_available() else None


def token_ids(tokenizer: Any, **tokens: str) -> dict[str, Any]:
    """Return the config's entries for tokens: image="<image>" -> {"image_token_id": 5}."""
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text_config(tokenizer: Any) -> dict[str, Any]:
    """Return the sizes and the special ids of a tiny language model for a tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**TEXT, **ids, "vocab_size": len(tokenizer)}


def train_tokenizer(
    specials: Sequence[str],
    *,
    eos: str,
    pad: str,
    bos: str | None = None,
    named: dict[str, str] | None = None,
    sentences: Iterable[str] = SENTENCES,
    vocab_size: int = 320,
    adds_bos: bool = False,
    late: Sequence[str] = (),
) -> Any:
    """Train a byte-level BPE tokenizer.

    `specials` get ids 0, 1, ..., `late` ones the last ids, `named` become attributes such as `image_token`. With
    `adds_bos` it writes BOS before each text, as those of some checkpoints do, whether or not one stands there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(specials),
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if adds_bos:
        assert bos is not None, "adds_bos needs bos"
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    tokenizer.add_special_tokens(list(late))
    tokens = {"eos_token": eos, "pad_token": pad} | ({"bos_token": bos} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=named or {}, **tokens)


def chat_template(image: str, turn_start: str, turn_end: str, bos: str = "", prompt_end: str | None = None) -> str:
    """Return a Jinja chat template; `{role}` in `turn_start` becomes the role, if there is one, images become `image`.

    `prompt_end` ends turns that are not the assistant's, where those end differently.
    """
    before, role, after = turn_start.partition("{role}")
    name = "{{ message['role'] }}" if role else ""
    end = _literal(turn_end)
    if prompt_end is not None:
        end = "{% if message['role'] == 'assistant' %}" + end + "{% else %}" + _literal(prompt_end) + "{% endif %}"
    return (
        _literal(bos)
        + "{% for message in messages %}"
        + _literal(before)
        + name
        + _literal(after)
        + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        + "{% for block in message['content'] %}"
        + "{% if block['type'] == 'image' %}"
        + _literal(image)
        + "{% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + _literal(before + ("assistant" if role else "") + after)
        + "{% endif %}"
    )


def _literal(text: str) -> str:
    return '{{ "' + text.replace("\n", "\\n") + '" }}' if text else ""


QWEN_TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>{role}\n", "<|im_end|>\n")
