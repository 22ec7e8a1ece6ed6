"""Images and videos of different sizes in one batch: placeholders, features and positions agree, whatever the connector."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, Family, chat_row, picture
from loss_cases import packed
from transformers.utils import is_torchvision_available

import hfcustom.mrope
from hfcustom.data.collate import Collator
from hfcustom.data.messages import read_row
from hfcustom.families import load_family
from hfcustom.mrope import MRopeImages
from hfcustom.ragged import RaggedImages
from hfcustom.registry import REGISTERED

SIZES = [[(70, 28), (42, 42)], [], [(28, 70)], [(42, 70), (70, 28), (28, 28)]]  # width, height of each row's images
CONNECTORS = {
    "none": None,
    "pooled": "average_pool",
    "queries": {"name": "perceiver_resampler", "num_queries": 3, "num_heads": 4},
}


def families_with(mixin: type) -> list[str]:
    return [name for name in FAMILIES if load_family(name) and issubclass(REGISTERED[f"custom_{name}"], mixin)]


# An image that is several grids, a base view and tiles, is tested in tests/test_anyres.py.
ONE_GRID = [
    name
    for name in families_with(RaggedImages)
    if REGISTERED[f"custom_{name}"].image_grids is not RaggedImages.image_grids  # type: ignore[attr-defined]
]


@pytest.fixture(params=families_with(RaggedImages))
def ragged(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


@pytest.fixture(params=families_with(MRopeImages))
def mrope(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def rows_of(sizes: list[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    rows = [chat_row(len(row), seed) for seed, row in enumerate(sizes)]
    for at, (row, wanted) in enumerate(zip(rows, sizes, strict=True)):
        row["images"] = [picture(10 * at + image, size) for image, size in enumerate(wanted)]
    return rows


def matched(family: Family, connector: Any) -> tuple[Any, Any]:
    """Return a model and a processor that writes as many placeholders as it makes tokens."""
    model = family.model(connector=connector)
    return model, model.match_processor(copy.deepcopy(family.processor))


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """What average_pool of size 2 leaves: the last row and column of an odd grid stay by themselves."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def positions_seen(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the positions that reach the language model, (3, B, T)."""
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0][-3:]


def expected_positions(kinds: list[int], grids: dict[int, Any], interval: int = 1) -> torch.Tensor:
    """Walk over a row's tokens (0 text, 1 image, 2 video) with the (frames, rows, columns) of its images and videos."""
    found: list[tuple[int, int, int]] = []
    start = at = 0
    while at < len(kinds):
        if kinds[at] == 0:
            found.append((start, start, start))
            start, at = start + 1, at + 1
            continue
        frames, rows, columns = next(grids[kinds[at]])
        step = interval if kinds[at] == 2 else 1
        found += [
            (start + step * f, start + r, start + c)
            for f in range(frames)
            for r in range(rows)
            for c in range(columns)
        ]
        at += frames * rows * columns
        start = max(max(place) for place in found) + 1
    return torch.tensor(found).T  # (3, T)


def assert_rows_equal_alone(model: Any, together: dict[str, Any], alone: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        logits = model(**together).logits
        for at, row in enumerate(alone):
            length = row["input_ids"].shape[1]
            torch.testing.assert_close(logits[at, :length], model(**row).logits[0], rtol=1e-4, atol=2e-6)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_a_batch_of_sizes_equals_its_rows_alone(ragged: Family, connector: Any) -> None:
    model, processor = matched(ragged, connector)
    collate, rows = Collator(processor), rows_of(SIZES)
    assert_rows_equal_alone(model, dict(collate(rows)), [dict(collate([row])) for row in rows])


@pytest.mark.parametrize("name", ONE_GRID)
def test_placeholders_and_features_follow_each_images_grid(name: str, families: dict[str, Family]) -> None:
    model, processor = matched(families[name], "average_pool")
    collate, rows = Collator(processor), rows_of(SIZES)
    batch = dict(collate(rows))
    grids = model.image_grids(batch)  # of an image, or of each of its views
    assert len(set(grids)) > 1 and any(side % 2 for grid in grids for side in grid)
    own = [model.image_grids(dict(collate([row]))) if row["images"] else [] for row in rows]
    assert grids == [grid for row in own for grid in row]
    expected = [sum(int(np.prod(halved(grid))) for grid in row) for row in own]
    assert (batch["input_ids"] == model.placeholder_token_id).sum(1).tolist() == expected
    with torch.no_grad():
        context = model.loss_context(batch, batch["labels"])
    assert context.image_features.shape[:2] == (1, sum(expected))


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_padded_generation_with_cache_equals_rows_alone(ragged: Family, connector: Any) -> None:
    model, processor = matched(ragged, connector)
    rows = [read_row(row, "row") for row in rows_of(SIZES)]
    texts = [processor.apply_chat_template(row.messages[:1], add_generation_prompt=True) for row in rows]
    images = [row.images for row in rows]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = [model.generate(**inputs, **options, use_cache=use_cache)[:, -4:] for use_cache in (True, False)]
    assert torch.equal(*together)
    for at, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=[text], images=[own] if own else None, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[0, -4:], together[0][at])


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_positions_follow_each_images_grid(mrope: Family, connector: Any) -> None:
    model, processor = matched(mrope, connector)
    batch = dict(Collator(processor)(rows_of(SIZES)))
    left = [halved(grid) if connector else grid for grid in model.image_grids(batch)]
    grids = iter([(1, *grid) for grid in left])
    positions = positions_seen(model, batch)  # (3, B, T)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        kinds = (batch["input_ids"][row, mask] == model.placeholder_token_id).long().tolist()
        assert torch.equal(positions[:, row, mask], expected_positions(kinds, {1: grids}))


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
@pytest.mark.parametrize("sizes", [SIZES, [[], []]], ids=["images", "text"])
def test_packed_rows_train_as_padded_ones(mrope: Family, sizes: Any, connector: Any) -> None:
    """Stock keeps rows apart only by position_ids of four kinds; here those that restart will do, as in any family."""
    model, processor = matched(mrope, connector)
    batch = dict(Collator(processor)(rows_of(sizes)))
    found = []
    for layout in (batch, packed(batch)):
        model.zero_grad()
        loss = model.train()(**layout).loss
        loss.backward()
        found.append((loss.detach(), model.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


def test_vision_features_are_seen_in_image_order(mrope: Family) -> None:
    """An image's first row of tokens comes first in what the seam sees, in towers that sort patches by windows too."""
    seen: list[torch.Tensor] = []

    class Watched(mrope.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            seen.append(features)
            return features

    model = mrope.model(Watched)
    model.model.visual.blocks = torch.nn.ModuleList()  # no attention: a patch is seen as it was embedded
    batch = dict(Collator(mrope.processor)(rows_of([[(56, 56)]])))
    row = len(batch["pixel_values"]) // 4
    changed = {**batch, "pixel_values": batch["pixel_values"].index_fill(0, torch.arange(row), 0.0)}
    with torch.no_grad():
        model(**batch)
        model(**changed)
    differs = (seen[0] != seen[1]).any(-1)[0]  # (patches,)
    assert differs[:row].all() and not differs[row:].any()


# ---- keys that silently change attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[1], [2, 0, 1], [0, 0]], ids=["image", "mixed", "text"])
def test_the_collator_passes_what_positions_are_made_of(mrope: Family, images: list[int]) -> None:
    batch = mrope.batch(images)
    name = mrope.model_class.position_input
    assert batch[name].shape == batch["input_ids"].shape
    if name == "mm_token_type_ids":
        assert torch.equal(batch[name] == 1, batch["input_ids"] == mrope.model().placeholder_token_id)


def test_images_without_what_positions_are_made_of_are_not_passed_over_in_silence(
    mrope: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(hfcustom.mrope.logger, "warning_once", said.append, raising=False)
    model, batch = mrope.model(), mrope.batch([1])
    lacking = {name: value for name, value in batch.items() if name != model.position_input}
    with torch.no_grad():
        model(**batch)
        model(**mrope.batch([0]))
        assert not said
        with suppress(ValueError):  # Qwen2-VL's own; others go on
            model(**lacking)
    assert len(said) == 1 and f"got images without {model.position_input}" in said[0]


# ---- videos ---------------------------------------------------------------------------------------------------------

Size = tuple[int, int, int]  # frames, rows and columns of patches
IMAGE: Size = (1, 6, 4)
VIDEOS: list[list[Size]] = [[(2, 4, 10), (1, 6, 6)], [], [(3, 6, 10)]]  # of each row, beside an image
SECONDS = ("second_per_grid_ts", "video_second_per_grid")  # how long a frame lasts, in families that ask
PATCH = 3 * 2 * 7 * 7


def halved_patches(size: Size) -> Size:
    """The size of an image or video that has as many tokens of its own as average_pool leaves of this one."""
    rows, columns = halved((size[1] // 2, size[2] // 2))
    return size[0], 2 * rows, 2 * columns


def video_batch(model: Any, processor: Any, videos: list[list[Size]] = VIDEOS, image: Size = IMAGE) -> dict[str, Any]:
    """Return rows with an image and with videos of these sizes as the processor lays them out, without torchvision."""
    processor = copy.copy(processor)
    processor.video_processor = SimpleNamespace(merge_size=2)
    start, end = (
        processor.tokenizer.decode(getattr(model.config, f"vision_{at}_token_id")) for at in ("start", "end")
    )
    sizes = [size for row in videos for size in row]
    grids = {"image_grid_thw": torch.tensor([image] * len(videos)), "video_grid_thw": torch.tensor(sizes).view(-1, 3)}
    texts, at = [], iter(range(len(sizes)))
    for row in range(len(videos)):
        written = [processor.replace_image_token(grids, row)]
        written += [processor.replace_video_token(grids, next(at), load_audio_from_video=False) for _ in videos[row]]
        texts.append(" and ".join(start + tokens + end for tokens in written) + "?")
    batch = dict(processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
    if model.position_input == "mm_token_type_ids":
        batch["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(batch["input_ids"].tolist()))
    batch |= {"pixel_values": pixels([image] * len(videos)), "image_grid_thw": grids["image_grid_thw"]}
    if sizes:
        batch |= {"pixel_values_videos": pixels(sizes), "video_grid_thw": grids["video_grid_thw"]}
        asked = inspect.signature(model.forward).parameters
        batch |= {name: torch.full((len(sizes),), 0.5) for name in SECONDS if name in asked}
    return batch


def pixels(sizes: list[Size]) -> torch.Tensor:
    """Return the patches of images or videos, the same for the same size, (patches, pixels)."""
    generators = [torch.Generator().manual_seed(sum(size)) for size in sizes]
    return torch.cat(
        [torch.randn(int(np.prod(size)), PATCH, generator=g) for size, g in zip(sizes, generators, strict=True)]
    )


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_a_batch_of_videos_equals_its_rows_alone(mrope: Family, connector: Any) -> None:
    model, processor = matched(mrope, connector)
    alone = [video_batch(model, processor, [row]) for row in VIDEOS]
    assert_rows_equal_alone(model, video_batch(model, processor), alone)


def test_a_video_without_overrides_is_bit_equal_to_stock(mrope: Family) -> None:
    model, stock = mrope.model(), mrope.model(mrope.stock_class)
    batch = video_batch(model, mrope.processor)
    identity = mrope.model(connector={"name": "average_pool", "size": 1})
    with torch.no_grad():
        logits = stock(**batch).logits
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(identity(**batch).logits, logits)


def test_placeholders_and_positions_of_a_video_are_those_of_a_smaller_one(mrope: Family) -> None:
    model, processor = matched(mrope, "average_pool")
    plain = mrope.model()
    batch = video_batch(model, processor)
    smaller = [[halved_patches(size) for size in row] for row in VIDEOS]
    twin = video_batch(plain, mrope.processor, smaller, halved_patches(IMAGE))
    assert torch.equal(batch["input_ids"], twin["input_ids"])
    assert len(batch["pixel_values_videos"]) > len(twin["pixel_values_videos"])
    assert torch.equal(positions_seen(model, batch), positions_seen(plain, twin))


def test_a_video_is_reduced_frame_by_frame(mrope: Family) -> None:
    model, plain = mrope.model(connector="average_pool"), mrope.model()
    sizes = VIDEOS[0]
    inputs = {"pixel_values_videos": pixels(sizes), "video_grid_thw": torch.tensor(sizes)}
    with torch.no_grad():
        found = model.get_video_features(**inputs).pooler_output
        given = plain.get_video_features(**inputs).pooler_output
        for (frames, rows, columns), video, tokens in zip(sizes, given, found, strict=True):
            grid = rows // 2, columns // 2
            expected = torch.cat([model.custom_connector(frame[None], grid)[0] for frame in video.chunk(frames)])
            torch.testing.assert_close(tokens, expected)
            assert len(tokens) == frames * int(np.prod(halved(grid)))


def test_frames_of_two_videos_are_never_taken_together(mrope: Family) -> None:
    model, plain = mrope.model(connector={"name": "frame_average", "frames": 2}), mrope.model()
    sizes: list[Size] = [(2, 4, 10), (4, 4, 10)]
    with torch.no_grad():
        inputs = {"pixel_values_videos": pixels(sizes), "video_grid_thw": torch.tensor(sizes)}
        found = model.get_video_features(**inputs).pooler_output
        for video, tokens in zip(plain.get_video_features(**inputs).pooler_output, found, strict=True):
            torch.testing.assert_close(tokens, video.view(-1, 2, 10, 64).mean(1).flatten(0, 1))
        alone: list[Size] = [(1, 4, 10), (1, 4, 10)]
        with pytest.raises(ValueError, match="frame_average frames=2 takes 2 neighbouring crops together, but 1 came"):
            model.get_video_features(pixel_values_videos=pixels(alone), video_grid_thw=torch.tensor(alone))


def test_the_vision_seam_sees_each_frame_of_a_video_and_losses_see_images(mrope: Family) -> None:
    seen: list[int] = []

    class Doubled(mrope.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            seen.append(features.shape[1])
            return 2 * features

    model = mrope.model(Doubled)
    batch = video_batch(model, mrope.processor, [[(2, 4, 10)]])
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, mrope.model()(**batch).logits)
        context = model.loss_context(batch, batch["input_ids"])
    assert seen[:3] == [24, 40, 40]
    assert context.vision_features.shape[:2] == (1, 24) and context.image_features.shape[:2] == (1, 6)


def test_a_processor_that_was_not_matched_for_a_video_is_told_so(mrope: Family) -> None:
    model = mrope.model(connector="average_pool")
    batch = video_batch(model, mrope.processor)
    only = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(
        ValueError, match=r"74 video placeholders, the connector 'average_pool' made .*match_processor"
    ):
        model(**only)


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_video_generation_with_cache_equals_generation_without(mrope: Family, connector: Any) -> None:
    model, processor = matched(mrope, connector)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batch = video_batch(model, processor, [VIDEOS[0]])
    cached, plain = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_a_real_video_passes_the_processor(mrope: Family, connector: Any) -> None:
    model, processor = matched(mrope, connector)
    video = np.stack([np.asarray(picture(seed, (70, 42))) for seed in range(6)])  # (F, H, W, C)
    config = model.config
    text = processor.tokenizer.decode(
        [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
    )
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="Videos need torchvision: pip install torchvision"):
            processor(text=[text], videos=[video])
        return
    batch = processor(text=[text + " what?"], videos=[video], return_tensors="pt", do_sample_frames=False)
    (size,) = batch["video_grid_thw"].tolist()
    frames, rows, columns = halved_patches(size) if connector else size
    assert int((batch["input_ids"] == config.video_token_id).sum()) == frames * rows * columns // 4
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
