"""embedding, query: frames by what CLIP, SigLIP or any model with `get_image_features` makes of them.

A frame becomes a vector of length 1, (D,), and so does a text; how alike two are is their product, the cosine.
`model` is a name on the hub, a folder, or a model; then `processor` is its processor, a name and a folder bring their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hfcustom.data.frames.clip import BLANK, Clip, MissingInputError, shrink
from hfcustom.data.frames.farthest import farthest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

MAX_CANDIDATES = 1024  # frames embedded: of a longer clip every second, third, ... one


def embedding(
    clip: Clip,
    k: int,
    query: str | None = None,
    model: str | PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    max_candidates: int = MAX_CANDIDATES,
    batch_size: int = 16,
) -> list[int]:
    """Return k frames far from each other by 1 - the cosine of their embeddings; the middle frame first.

    Frames in which nothing is to be seen (black, white) come last. Raises MissingInputError without a model.
    """
    encoder = Encoder.of(model, processor, "embedding")
    step = clip.step_for(max_candidates, k)
    vectors, blank = embed_frames(clip, encoder, step, batch_size)  # (N, D), (N,)
    places = farthest(lambda place: 1 - vectors @ vectors[place], blank, range(min(k, len(vectors))))
    return sorted(step * place for place in places)


def by_query(
    clip: Clip,
    k: int,
    query: str | None = None,
    model: str | PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    max_candidates: int = MAX_CANDIDATES,
    batch_size: int = 16,
    min_gap: int | None = None,
) -> list[int]:
    """Return the k frames whose embeddings are most like the query's, but none within `min_gap` frames of a better one.

    Neighbours show the same, so that the gap (without one, a quarter of the clip's length / k) makes room for others; what
    it leaves open is filled by score. Raises MissingInputError without a query or a model.
    """
    if query is None or not query.strip():
        raise MissingInputError("The method query scores frames by a text; pass query='what to look for' (--query).")
    if min_gap is not None and min_gap < 0:
        raise ValueError(f"min_gap={min_gap} must be at least 0: frames around a chosen one that are passed over.")
    encoder = Encoder.of(model, processor, "query")
    step = clip.step_for(max_candidates, k)
    vectors, blank = embed_frames(clip, encoder, step, batch_size)  # (N, D), (N,)
    scores = np.where(blank, -2.0, vectors @ encoder.embed_text(query))  # (N,)
    gap = len(clip) // (4 * k) if min_gap is None else min_gap
    return sorted(step * place for place in best_apart(scores, min(k, len(scores)), gap / step))


def best_apart(scores: np.ndarray, k: int, gap: float) -> list[int]:
    """Return the places of the k highest scores that lie more than `gap` apart, filled up by score."""
    order = np.argsort(-scores, kind="stable").tolist()
    chosen: list[int] = []
    for place in order:
        if len(chosen) < k and all(abs(place - other) > gap for other in chosen):
            chosen.append(place)
    left = (place for place in order if place not in set(chosen))
    return [*chosen, *itertools.islice(left, k - len(chosen))]


def embed_frames(clip: Clip, encoder: Encoder, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the embedding of each `step`-th frame, (N, D), and which frames show nothing, (N,)."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    total = -(-len(clip) // step)
    vectors, blank = [], []
    for batch in _batches(iter(clip.track(clip.read(step), f"embedding {clip.name}", total)), batch_size):
        vectors.append(encoder.embed_images(batch))
        blank += [shrink(picture).std() < BLANK for picture in batch]
    if not vectors:
        raise ValueError(f"{clip.name}: not one frame could be decoded; is the file damaged?")
    return np.concatenate(vectors), np.array(blank)


def _batches(pictures: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    while batch := list(itertools.islice(pictures, size)):
        yield batch


class Encoder:
    """A model and its processor: pictures or a text -> float32 vectors of length 1."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor: Any = processor

    @classmethod
    def of(cls, model: Any, processor: Any, method: str) -> Encoder:
        """Return the encoder that a name, a folder or a model stands for."""
        if model is None:
            raise MissingInputError(
                f"The method {method} needs a model that embeds pictures and texts; pass model='openai/clip-vit-base-patch32' "
                "(--model), another CLIP or SigLIP, or a folder."
            )
        if isinstance(model, cls):
            return model
        if isinstance(model, str):
            return load(model, processor)
        if not callable(getattr(model, "get_image_features", None)):
            raise ValueError(
                f"model={type(model).__name__} has no get_image_features(); pass a CLIP, a SigLIP, or a name."
            )
        if processor is None:
            raise ValueError(
                f"With a {type(model).__name__} as model pass processor= too, the one that it was trained with."
            )
        return cls(model, processor)

    def embed_images(self, pictures: list[Image.Image]) -> np.ndarray:
        """Return the vectors of pictures, (n, D)."""
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return self._vectors("get_image_features", {"pixel_values": pixels.to(self.model.dtype)})

    def embed_text(self, text: str) -> np.ndarray:
        """Return the vector of a text, (D,), padded as in the training of the checkpoints; ValueError for one too long."""
        longest: int = self.model.config.get_text_config().max_position_embeddings
        tokens = self.processor.tokenizer(text, padding="max_length", max_length=longest, return_tensors="pt")
        if (length := tokens["input_ids"].shape[1]) > longest:
            raise ValueError(f"The query {text!r:.80} is {length} tokens long, the model reads {longest}; shorten it.")
        return self._vectors("get_text_features", dict(tokens))[0]

    def _vectors(self, method: str, inputs: dict[str, Any]) -> np.ndarray:
        import torch

        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            vectors = getattr(self.model, method)(**inputs, return_dict=True).pooler_output.float()  # (n, D)
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        self.model.train(was_training)
        found: np.ndarray = vectors.numpy(force=True)
        return found


def load(name: str, processor: Any = None) -> Encoder:
    """Load a model of a name on the hub or a folder, one of hfcustom's encoders too, on the GPU if there is one."""
    import torch
    from transformers import AutoModel, AutoProcessor

    from hfcustom.encoders import encoder_names, load_encoder

    for encoder in encoder_names():  # registers the custom classes, so that the Auto classes find them
        load_encoder(encoder)
    model = AutoModel.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    if not callable(getattr(model, "get_image_features", None)):
        raise ValueError(
            f"{name!r} is a {type(model).__name__}, which has no get_image_features(); name a CLIP or SigLIP."
        )
    return Encoder(model, processor or AutoProcessor.from_pretrained(name))
