"""FeatureCache and TowerCache: what frozen vision parts make of each image, computed once and put in their place.

FeatureCache: pixels -> [vision tower -> connector] -> (n, D) an image, its placeholders in order -> language model.
TowerCache, where the connector trains: pixels -> [vision tower] -> (p, patches, D_vision) an image -> seams, connector, ...
A video's features are kept as an image's are, where `get_video_features` is asked for them.
On a hit of all images of a batch nothing in brackets runs; on a hit of some, theirs are put in the place of what is computed. What
is stored is what the forward gets, in its dtype, so that a hit changes no bit. Everything that could change it is in the folder's
name (fingerprint).
Letters: P crops, p crops of an image, N tokens of a crop, n tokens of an image, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hfcustom.base import CustomVLM
from hfcustom.cache.fingerprint import digest_of, source_digest, versions, weights_digest
from hfcustom.cache.store import Entry, ShardStore
from hfcustom.ragged import RaggedImages

METHOD = "get_image_features"
VIDEO_METHOD = "get_video_features"


@dataclass
class Picture:
    """One image or video of a batch: its key in the store, its tokens and crops, what the store held when the batch was made."""

    key: str
    tokens: int = 0
    crops: int = 0
    found: Entry | None = None
    is_video: bool = False


class FeatureCache:
    """Stands in for `get_image_features` of a model while it is trained on batches whose pictures are known."""

    method = METHOD

    def __init__(self, core: CustomVLM, store: ShardStore) -> None:
        self.core: Any = core
        self.store = store
        self.hits = self.misses = 0
        self._pictures: Sequence[Picture] = ()
        self._videos: Sequence[Picture] = ()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the method, and the one of videos, and leave them as they were found."""
        holder = self.holder()
        videos = self.method == METHOD and hasattr(type(holder), VIDEO_METHOD)
        self.core.feature_cache = self
        try:
            with self._replaced(holder, self.method, self._serve_pictures):
                with self._replaced(holder, VIDEO_METHOD, self._serve_videos) if videos else nullcontext():
                    yield
        finally:
            self.core.feature_cache = None
            self.store.flush()

    @contextmanager
    def _replaced(self, holder: nn.Module, method: str, serve: Callable[..., Any]) -> Iterator[None]:
        seam = holder.__dict__.get(method)
        stock = getattr(holder, method)
        holder.__dict__[method] = lambda *args, **kwargs: serve(stock, args, kwargs)
        try:
            yield
        finally:
            del holder.__dict__[method]
            if seam is not None:
                holder.__dict__[method] = seam

    def holder(self) -> nn.Module:
        """Return the module whose method is replaced."""
        module: nn.Module = self.core.get_submodule(self.core.inner_path())
        return module

    @contextmanager
    def serving(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """Know the images and the videos of the batch that runs, each in the order of their placeholders."""
        for picture in pictures:
            if picture.found is None:
                picture.found = self.store.get(picture.key)
        found = sum(picture.found is not None for picture in pictures)
        self.hits, self.misses = self.hits + found, self.misses + len(pictures) - found
        self._pictures = [picture for picture in pictures if not picture.is_video]
        self._videos = [picture for picture in pictures if picture.is_video]
        try:
            yield
        finally:
            self._pictures = self._videos = ()

    def _serve_pictures(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._serve(self._pictures, stock, args, kwargs)

    def _serve_videos(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve videos; in some families frames pass the method of images, which are not those of the batch then."""
        pictures, self._pictures = self._pictures, ()
        try:
            return self._serve(self._videos, stock, args, kwargs)
        finally:
            self._pictures = pictures

    def _serve(
        self, pictures: Sequence[Picture], stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not pictures:
            return stock(*args, **kwargs)
        missing = sum(picture.found is None for picture in pictures)
        if missing:
            outputs = stock(*args, **{**kwargs, "return_dict": True} if "return_dict" in kwargs else kwargs)
            self._keep(outputs, pictures)
        if missing < len(pictures):
            outputs = self._put_together(pictures)
        return outputs.to_tuple() if kwargs.get("return_dict") is False else outputs

    def _store(self, picture: Picture, entry: Entry) -> None:
        if any(tensor.requires_grad for tensor in entry[0].values()):
            raise ValueError(
                "cache_features: what trains changes the image features, though no parameter of the parts below does. Leave "
                "cache_features out for this model."
            )
        if picture.found is None:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in entry[0].items()}
            picture.found = (tensors, entry[1])
            self.store.put(picture.key, *picture.found)

    def _keep(self, outputs: Any, pictures: Sequence[Picture]) -> None:
        """Store what was computed of pictures that are not known yet; (P, N, D), or a sequence of (tokens, D)."""
        pooled = outputs.pooler_output
        listed = isinstance(pooled, list | tuple)
        flat = torch.cat(list(pooled)) if listed else pooled.flatten(0, -2)  # (all tokens, D)
        lengths = [picture.tokens for picture in pictures]
        if len(flat) != sum(lengths):
            raise ValueError(
                f"cache_features: the model made {len(flat)} tokens, the text has {sum(lengths)} placeholders for its {len(pictures)} images "
                "or videos, so it is not known which are of which. Leave cache_features out."
            )
        passed = self.core._pass
        seen = None if passed is None or isinstance(self.core, RaggedImages) else passed.image_features
        shape = {"listed": listed, "crop": None if listed else pooled.shape[-2]}
        shape["seen"] = None if seen is None or pictures[0].is_video else seen.shape[1]
        for picture, features in zip(pictures, flat.split(lengths), strict=True):
            self._store(picture, ({"features": features}, shape))

    def _put_together(self, pictures: Sequence[Picture]) -> Any:
        """Return the features of all pictures in the form in which the model makes them."""
        device = self.core.get_input_embeddings().weight.device
        entries = [picture.found for picture in pictures if picture.found is not None]
        for picture, (tensors, _) in zip(pictures, entries, strict=True):
            if len(tensors["features"]) != picture.tokens:
                raise ValueError(
                    f"cache_features: {self.store.folder} holds {len(tensors['features'])} tokens of image {picture.key}, its text "
                    f"has {picture.tokens} placeholders. Delete the folder."
                )
        features = [tensors["features"].to(device, non_blocking=True) for tensors, _ in entries]  # (n, D) each
        shape, flat = entries[0][1], torch.cat(features)  # (all tokens, D)
        passed = self.core._pass
        if passed is not None and passed.records and not pictures[0].is_video:
            passed.image_features = flat[None] if shape["seen"] is None else flat.unflatten(0, (-1, shape["seen"]))
        pooled: Any = features if shape["listed"] else flat.unflatten(0, (-1, shape["crop"]))  # (P, N, D)
        return BaseModelOutputWithPooling(pooler_output=pooled)


class TowerCache(FeatureCache):
    """Stands in for the forward of the vision tower, whose hooks, the seams, run as ever."""

    method = "forward"

    def holder(self) -> nn.Module:
        """Return the vision tower."""
        module: nn.Module = self.core.get_submodule(self.core.stock_parts().paths["vision"][0])
        return module

    def _keep(self, outputs: Any, pictures: Sequence[Picture]) -> None:
        """Store what is read of the tower's outputs: the last features, or the layers that the config names."""
        tensors, count = self._read(outputs)
        crops = [picture.crops for picture in pictures]
        if any(len(tensor) != sum(crops) for tensor in tensors.values()) or not all(crops):
            raise ValueError(
                f"cache_features: the vision tower saw {len(next(iter(tensors.values())))} crops, the processor made {crops} of "
                f"{len(pictures)} images, so it is not known which are of which image. Leave cache_features out."
            )
        split = {name: tensor.split(crops) for name, tensor in tensors.items()}
        for at, picture in enumerate(pictures):
            self._store(picture, ({name: parts[at] for name, parts in split.items()}, {"states": count}))

    def _read(self, outputs: Any) -> tuple[dict[str, torch.Tensor], int | None]:
        """Return the features that the model reads, by name, (P, patches, D_vision), and how many hidden states there are."""
        if isinstance(outputs, torch.Tensor):
            return {"tensor": outputs}, None
        layers = self.core.config.to_dict().get("vision_feature_layer", -1)
        layers = [layers] if isinstance(layers, int) else list(layers)
        states = outputs.hidden_states
        tensors = {} if states is None else {f"state {layer % len(states)}": states[layer] for layer in layers}
        if states is None or -1 in layers:
            tensors["last"] = outputs.last_hidden_state
        return tensors, None if states is None else len(states)

    def _put_together(self, pictures: Sequence[Picture]) -> Any:
        """Return the tower's outputs for all pictures."""
        entries = [picture.found for picture in pictures if picture.found is not None]
        device, names, count = self.core.device, entries[0][0], entries[0][1]["states"]
        read = {name: torch.cat([tensors[name].to(device) for tensors, _ in entries]) for name in names}
        if "tensor" in read:
            return read["tensor"]
        states = None if count is None else tuple(read.get(f"state {layer}") for layer in range(count))
        return BaseModelOutputWithPooling(last_hidden_state=read.get("last"), hidden_states=states)  # type: ignore[arg-type]


def fingerprint(core: Any, processor: Any, precision: str | None, *, tower: bool = False) -> str:
    """Return the digest of all that image features depend on besides the image; of the `tower` alone, or of all below."""
    modules = dict(modules_below(core, tower=tower))
    config = {
        name: value
        for name, value in core.config.to_dict().items()
        if name not in ("loss", "text_config", "_name_or_path", "architectures", "quantization_config")
    }
    inner = [module for part in modules.values() for module in part.modules()]
    attention = sorted({str(m.config._attn_implementation) for m in inner if isinstance(m, PreTrainedModel)})
    settings = {
        name: value
        for name, value in processor.to_dict().items()
        if name not in ("chat_template", "tokenizer", "video_processor")
    }
    return digest_of(
        [
            weights_digest({**modules, **({} if tower else _loose(core))}),
            config,
            attention,
            settings,
            processor.image_processor.to_dict(),
            source_digest((*{*map(type, inner)}, type(core), type(processor), type(processor.image_processor))),
            precision,
            core.device.type,
            versions(),
        ]
    )


def modules_below(core: Any, *, tower: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that image features pass, by path; the `tower` alone, or the connector too."""
    paths = core.stock_parts().paths
    for path in (*paths["vision"], *(() if tower else paths["connector"])):
        found = core.get_submodule(path.rpartition(".")[0]).__dict__["_modules"].get(path.rpartition(".")[2])
        if found is not None:
            yield path, found
    if core.custom_connector is not None and not tower:
        yield "custom_connector", core.custom_connector


def _loose(core: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that are a part by themselves, as LLaVA-NeXT's newline."""
    paths = core.stock_parts().paths
    known = dict(core.named_parameters())
    return {path: known[path] for path in (*paths["vision"], *paths["connector"]) if path in known}
