"""Videos in every family that reads them: what a connector makes of the frames of a real one, and what it is refused.

Needs torchvision, as video processors do: tests/test_torchvision.py runs it in a process that has it. What can be shown
without is in tests/test_ragged.py and tests/test_llava_videos.py.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, picture
from test_patches import KINDS, looking
from test_two_encoders import CONNECTORS, awake
from transformers.utils import is_torchvision_available

from hfcustom.connectors import frames_together
from hfcustom.families import family_names, load_family
from hfcustom.registry import REGISTERED

pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")

AVERAGE = {"name": "frame_average", "frames": 2}
DEDUP = {"name": "temporal_dedup", "frames": 2, "keep_ratio": 0.75}
TWO = CONNECTORS["cross_attend"]
IDENTITIES = [{"name": "average_pool", "size": 1}, {**AVERAGE, "frames": 1}, {**DEDUP, "keep_ratio": 1.0}, TWO]
ASKING = {"name": "token_pruning", "by": "question"}
REDUCING: list[dict[str, Any]] = [{"name": "average_pool"}, AVERAGE, DEDUP, ASKING]
ONE_A_CALL = ("nemotron_h_omni",)  # stock's processor takes a single video
ONE_A_ROW = (*ONE_A_CALL, "molmo2")
FRAMES = {name: 4 for name in ("nemotron_h_omni", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl")}  # of 8 pictures


def reads_videos(name: str) -> bool:
    load_family(name)
    bases = REGISTERED[f"custom_{name}"].processor_class.__mro__
    return any("video_processor" in inspect.signature(base.__init__).parameters for base in bases)


NAMES = [name for name in family_names() if reads_videos(name)]


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def matched(family: Family, spec: Any) -> tuple[Any, Any]:
    model = family.model(connector=spec)
    return model, model.match_processor(copy.deepcopy(family.processor))


def clip(seed: int, pictures: int = 8) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture(10 * seed + at, (28, 28))) for at in range(pictures)])  # (F, H, W, C)


def rows_of(model: Any, processor: Any, *rows: list[Any], **videos_kwargs: Any) -> dict[str, torch.Tensor]:
    """Return prompts with the videos of each row, as the processor writes them."""
    config, token = model.config.to_dict(), processor.video_token
    if "vision_start_token_id" in config:
        around = [processor.tokenizer.decode(config[f"vision_{at}_token_id"]) for at in ("start", "end")]
        token = token.join(around)
    metadata = [
        [{"fps": 1, "total_num_frames": len(video), "frames_indices": list(range(len(video)))} for video in row]
        for row in rows
    ]
    timed = {"video_metadata": metadata if len(rows) > 1 else metadata[0]}
    batch = processor(
        text=[f"{token * len(row)} what?" for row in rows],
        videos=rows if len(rows) > 1 else rows[0],
        videos_kwargs={"do_sample_frames": False, **videos_kwargs},
        return_tensors="pt",
        padding=True,
        **(timed if "NemotronH" not in type(processor).__name__ else {}),  # which knows no list of them
    )
    return {name: value for name, value in batch.items() if name in model._input_names}


@pytest.mark.parametrize("spec", REDUCING, ids=lambda spec: spec["name"])
def test_a_real_video_is_reduced_frame_by_frame_and_generates_the_same_with_a_cache(family: Family, spec: Any) -> None:
    model, processor = matched(family, spec)
    batch = rows_of(model, processor, [clip(0)])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.custom_connector.register_forward_hook(lambda module, args, found: seen.append((args[0], found)))
    with torch.no_grad():
        model(**batch)
    given, found = (torch.cat([tokens for pair in seen for tokens in pair[at]]) for at in (0, 1))
    assert sum(len(frames) for frames, _ in seen) == FRAMES.get(family.name, 8)
    assert len(found) < len(given)
    assert all(len(frames) % frames_together(model.custom_connector) == 0 for frames, _ in seen)
    plain = rows_of(family.model(), family.processor, [clip(0)])
    assert plain["input_ids"].shape[1] - batch["input_ids"].shape[1] == len(given) - len(found)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, whole = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, whole)


def test_a_real_video_is_as_in_stock_where_nothing_reduces_it(family: Family) -> None:
    model, stock = family.model(), family.model(family.stock_class)
    batch = rows_of(model, family.processor, [clip(0)])
    with torch.no_grad():
        logits = model(**batch).logits
        assert not torch.equal(model(**rows_of(model, family.processor, [clip(1)])).logits, logits)
        if family.name in ONE_A_CALL:
            with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
                stock(**batch)
        else:
            assert torch.equal(logits, stock(**batch).logits)
        for spec in IDENTITIES:
            same, processor = matched(family, spec)
            again = rows_of(same, processor, [clip(0)])
            assert torch.equal(again["input_ids"], batch["input_ids"])
            assert torch.equal(same(**again).logits, logits), spec


@pytest.mark.parametrize("kind", KINDS)
def test_a_connector_that_looks_at_pictures_gets_that_of_each_frame(family: Family, kind: str) -> None:
    model = looking(family, kind)
    processor = model.match_processor(copy.deepcopy(family.processor))
    colours = np.linspace(0, 255, 8).round()
    grey = np.broadcast_to(colours[:, None, None, None], (8, 28, 28, 3)).astype(np.uint8)  # one grey a picture
    with torch.no_grad():
        model(**rows_of(model, processor, [grey]))
    video = processor.video_processor
    mean, std = (
        torch.tensor(vars(video).get(f"norm_{at}") or getattr(video, f"image_{at}")) for at in ("mean", "std")
    )
    frames = FRAMES.get(family.name, 8)
    expected = (torch.tensor(colours[:: 8 // frames] / 255)[:, None] - mean) / std  # (F, 3), of two pictures the first
    if family.name == "molmo2" and not video.do_rescale:  # without a checkpoint's settings bytes stay as they are
        expected = torch.tensor(colours)[:, None].expand(-1, 3)
    seen = [picture for _, pictures, _ in model.custom_connector.seen for picture in pictures]  # (3, H, W) each
    assert len(seen) == frames and all(torch.allclose(picture, picture[:, :1, :1], atol=1e-5) for picture in seen)
    torch.testing.assert_close(torch.stack([picture[:, 0, 0] for picture in seen]).double(), expected.double())


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_added_towers_see_videos_and_generate_the_same_with_a_cache(family: Family, connector: Any) -> None:
    model, processor = awake(family, connector)
    batch = rows_of(model, processor, [clip(0)])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, whole = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, whole)
    asleep = family.corrected(connector=connector)
    with torch.no_grad():
        assert not torch.allclose(asleep(**batch).logits, model(**batch).logits)


def test_the_question_of_a_video_is_its_rows(family: Family) -> None:
    if family.name in ONE_A_CALL:
        return
    model, processor = matched(family, ASKING)
    told: list[torch.Tensor] = []
    model.custom_connector.register_forward_hook(
        lambda module, args, given, made: told.extend(
            words[mask] for words, mask in zip(given["question"], given["question_mask"], strict=True)
        ),
        with_kwargs=True,
    )
    batch = rows_of(model, processor, [clip(0)], [clip(1)])
    table = model.get_input_embeddings().weight
    what, which = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("what?", " wheel"))
    batch["input_ids"][1, -len(which) :] = torch.tensor(which)  # the second row asks something else at its end
    with torch.no_grad():
        model(**batch)
    ends = [words[-1] for words in told]
    assert all(torch.equal(word, table[what[-1]]) for word in ends[: len(ends) // 2])
    assert all(torch.equal(word, table[which[-1]]) for word in ends[len(ends) // 2 :])


def test_clips_are_those_of_one_video(family: Family) -> None:
    model, processor = matched(family, AVERAGE)
    short = 8 * 3 // FRAMES.get(family.name, 8)  # pictures of a video with 3 frames
    first, second = clip(0, short), clip(1, short)
    rows = [[[first]]]
    rows += [] if family.name in ONE_A_CALL else [[[first], [second]]]
    rows += [] if family.name in ONE_A_ROW else [[[first, second]]]
    for odd in rows:
        with torch.no_grad(), pytest.raises(ValueError, match="takes 2 neighbouring (crops|frames) together, but"):
            model(**rows_of(model, processor, *odd))
    if family.name in ONE_A_CALL:
        return
    with torch.no_grad():
        together = model(**rows_of(model, processor, [clip(0)], [clip(1)])).logits
        for at in range(2):
            alone = rows_of(model, processor, [clip(at)])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(together[at, :length], model(**alone).logits[0], rtol=1e-4, atol=2e-6)


# ---- what single families add ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_an_image_before_a_video_is_no_frame_of_it(families: dict[str, Family], name: str) -> None:
    _, processor = matched(families[name], AVERAGE)
    written = processor.image_token * 2  # a crop
    texts = [f"{processor.image_token}{processor.video_token}{processor.image_token}"]
    with pytest.raises(ValueError, match=r"a video of row 0 is crops 1 to 2, so some would be taken together"):
        processor.get_text_with_replacements(texts, [written, written], [written * 2])
    processor.get_text_with_replacements(texts, [written * 2, written], [written * 2])


@pytest.mark.parametrize("name", ["minicpmv4_6"])
def test_frames_in_slices_or_stacks_are_refused(families: dict[str, Family], name: str) -> None:
    model, processor = matched(families[name], AVERAGE)
    large = np.stack([np.asarray(picture(at, (60, 60))) for at in range(2)])
    with pytest.raises(ValueError, match="video 0 has frames of 4 slices, .* Pass slice_mode=False in videos_kwargs"):
        rows_of(model, processor, [large])
    with pytest.raises(ValueError, match="but stack_frames=2 puts .* Pass stack_frames=1"):
        processor(text=["<|video_pad|>"], videos=[large], stack_frames=2)
    with torch.no_grad():
        model(**rows_of(model, processor, [large], slice_mode=False))
    whole, follows = (matched(families[name], spec) for spec in (None, "average_pool"))
    counts = [
        int((rows_of(*pair, [large])["input_ids"] == processor.video_token_id).sum()) for pair in (whole, follows)
    ]
    assert counts == [2 * 5 * 4, 2 * 5 * 1]  # the whole frame and 4 slices
    with torch.no_grad():
        follows[0](**rows_of(*follows, [large]))


def test_stocks_pruning_of_videos_is_refused(families: dict[str, Family]) -> None:
    family = families["nemotron_h_omni"]
    model = family.model(video_pruning_rate=0.5)
    with pytest.raises(ValueError, match="video_pruning_rate=0.5, but stock's pruning does not run"):
        model(**rows_of(model, family.processor, [clip(0)]))
