"""Rows with videos: which frames are seen, where they may come from, and what processors and labels make of them."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, picture
from transformers.utils import is_torchvision_available

from hfcustom.data.collate import Collator
from hfcustom.data.messages import RowError, read_row
from hfcustom.data.packing import pack_rows
from hfcustom.data.video_frames import VideoOptions
from hfcustom.families import family_names, load_family
from hfcustom.losses import IGNORE
from hfcustom.packed import why_not_packed
from hfcustom.registry import REGISTERED

FRAMES = [picture(seed, (56, 56)) for seed in range(8)]
WHOLE = VideoOptions(max_frames=99)


def row(*videos: Any, answer: str = "A cat.") -> dict[str, Any]:
    content = [*({"type": "video"} for _ in videos), {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "videos": list(videos)}


def write_gif(path: Path, **options: Any) -> Path:
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], loop=0, **options)
    return path


# ---- which frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pictures", "paths", "bytes"])
def test_the_middles_of_equal_stretches_of_a_list_of_frames_are_seen(kind: str, tmp_path: Path) -> None:
    frames: list[Any] = list(FRAMES)
    if kind != "pictures":
        for at, frame in enumerate(FRAMES):
            frame.save(tmp_path / f"{at}.png")
            frames[at] = f"{at}.png" if kind == "paths" else (tmp_path / f"{at}.png").read_bytes()
    (seen,) = read_row(row(frames), "row", tmp_path, VideoOptions(max_frames=4)).videos
    assert [frame.tobytes() for frame in seen] == [FRAMES[at].tobytes() for at in (1, 3, 5, 7)]
    (seen,) = read_row(row(frames), "row", tmp_path, WHOLE).videos
    assert len(seen) == 8


@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_animation_is_a_video_with_its_own_times(as_bytes: bool, tmp_path: Path) -> None:
    path = write_gif(tmp_path / "a.gif", duration=250)
    source = path.read_bytes() if as_bytes else "a.gif"
    (seen,) = read_row(row(source), "row", tmp_path, VideoOptions(max_frames=2)).videos
    assert (seen.indices, seen.total, seen.fps) == ([2, 6], 8, pytest.approx(4.0))
    assert len(read_row(row({"bytes": path.read_bytes(), "path": None}), "row", None, WHOLE).videos[0]) == 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the video has no frames"),
        (7, "A video is a list of frames, bytes or a path, not int"),
        (b"nonsense", "is no readable"),
        ("../a.gif", "lies outside"),
        ("https://example.org/a.mp4", "is a URL; none is fetched"),
        ("gone.mp4", "is no file below"),
        (["../0.png"], "lies outside"),
        ([picture(), "zip://0.png::a.zip"], "is a URL"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # the same in each process
)
def test_a_wrong_video_is_named_with_its_row(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=rf"^row 3, video 0: .*{message}"):
        read_row(row(source), "row 3", tmp_path / "rows", WHOLE)


def test_a_method_that_is_none_and_no_frames_are_told() -> None:
    with pytest.raises(ValueError, match="Unknown frame method 'unifrom'. Did you mean 'uniform'"):
        VideoOptions(method="unifrom")
    with pytest.raises(ValueError, match="max_frames=0 must be positive"):
        VideoOptions(max_frames=0)


def test_frames_as_images_stand_where_their_video_stood() -> None:
    image = picture(77)
    mixed = row(FRAMES[:2], FRAMES[4:])
    mixed["messages"][0]["content"].insert(1, {"type": "image", "image": image})
    example = read_row(mixed, "row", None, VideoOptions(max_frames=2, as_images=True))
    kinds = [block["type"] for block in example.messages[0]["content"]]
    assert kinds == ["image"] * 5 + ["text"] and example.videos == []
    expected = [*FRAMES[:2], image, FRAMES[5], FRAMES[7]]
    assert [shown.tobytes() for shown in example.images] == [shown.tobytes() for shown in expected]
    ask, answers = mixed["messages"][0], ({"role": "assistant", "content": words} for words in ("Yes.", "No."))
    pair = {
        "videos": mixed["videos"],
        **{side: [ask, answer] for side, answer in zip(("chosen", "rejected"), answers, strict=True)},
    }
    both = read_row(pair, "row", None, VideoOptions(max_frames=2, as_images=True))
    assert both.rejected is not None and both.rejected[0] == both.messages[0] == example.messages[0]


# ---- processors -----------------------------------------------------------------------------------------------------


def reads_videos(name: str) -> bool:
    load_family(name)
    bases = REGISTERED[f"custom_{name}"].processor_class.__mro__
    return any("video_processor" in inspect.signature(base.__init__).parameters for base in bases)


SAME_LENGTH = ("internvl", "llava_onevision", "smolvlm", "video_llava")  # stock stacks the videos of a batch


def with_videos(family: Family) -> Any:
    """Return a processor whose template writes a video, as those on the hub do."""
    processor, config = copy.copy(family.processor), family.module.tiny_config().to_dict()
    mark = processor.video_token
    if "vision_start_token_id" in config:
        mark = mark.join(processor.tokenizer.decode(config[f"vision_{at}_token_id"]) for at in ("start", "end"))
    condition = "{% if block['type'] == 'image' %}"
    assert condition in processor.chat_template
    written = "{% if block['type'] == 'video' %}{{ \"" + mark + '" }}{% el' + condition.removeprefix("{% ")
    processor.chat_template = processor.chat_template.replace(condition, written)
    return processor


@pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")
@pytest.mark.parametrize("name", [name for name in family_names() if reads_videos(name)])
def test_a_video_reaches_the_model_and_carries_no_label(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    processor = with_videos(family)
    rows = [row(FRAMES), row(answer="A dog."), row(FRAMES[1:] + FRAMES[:1], answer="A hen.")]
    alone = name == "nemotron_h_omni"
    batch = Collator(processor)([read_row(each, f"row {at}") for at, each in enumerate(rows[: 1 if alone else 3])])
    for ids, labels, answer in zip(batch["input_ids"], batch["labels"], ("A cat.", "A dog.", "A hen."), strict=False):
        words = processor.tokenizer.decode(ids[labels != IGNORE])
        assert words.strip().startswith(answer) and len(words) < 30  # and the end of the turn
    model = family.model()
    with torch.no_grad():
        logits = model(**batch).logits
        others = [read_row(row(FRAMES[::-1]), "row"), *rows[1:]][: 1 if alone else 3]
        assert not torch.equal(model(**Collator(processor)(others)).logits, logits)
    short = [*rows[:1], row(FRAMES[:4])]
    if alone:
        with pytest.raises(
            ValueError, match="one row a call where there is a video, not 2: train with micro_batch_size=1"
        ):
            Collator(processor)(rows[:2])
    elif name in SAME_LENGTH:
        with pytest.raises(ValueError, match="videos of 4 and of 8 frames, but .* takes one number.* Set max_frames"):
            Collator(processor)(short)
    else:
        assert model(**Collator(processor)(short)).logits.isfinite().all()


@pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")
@pytest.mark.parametrize("name", [name for name in family_names() if reads_videos(name)])
def test_packed_rows_with_videos_equal_separate_ones(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    model, collate = family.model(), Collator(with_videos(family))
    rows = [row(FRAMES), row(answer="A dog."), row(FRAMES[::-1], answer="A hen.")]
    if name in ("molmo2", "nemotron_h_omni"):
        kinds = [collate([read_row(each, "row")]) for each in (beside(), row(FRAMES))]
        with pytest.raises(ValueError, match="takes images or videos in one micro-batch, not both"):
            pack_rows(kinds, family.model_class.merge_images)
    else:
        rows.insert(2, beside())
    singles = [collate([read_row(each, f"row {at}")]) for at, each in enumerate(rows)]
    if reason := why_not_packed(model):
        pytest.skip(f"not packed: {reason}")
    with torch.no_grad():
        separate = torch.cat([model(**single, return_logits=True).logits[0] for single in singles])  # (T, V)
        packed = model(**pack_rows(singles, type(model).merge_images), return_logits=True).logits[0]
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=2e-6)


def beside(answer: str = "A pig.") -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture(3)]}


ONE_KIND = ("molmo2", "nemotron_h_omni", "smolvlm")  # write images and videos into one field, or over each other


@pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")
@pytest.mark.parametrize("name", [name for name in family_names() if reads_videos(name)])
def test_an_image_beside_a_video_is_seen_or_refused(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    model, collate = family.model(), Collator(with_videos(family))
    both = row(FRAMES)
    both["messages"][0]["content"].insert(0, {"type": "image"})
    both["images"] = [picture(5)]
    if name in ONE_KIND:
        with pytest.raises(
            RowError, match="row 0: .*takes images or videos in one .*, not both: set video_as_images=True"
        ):
            collate([read_row(both, "row 0")])
        with pytest.raises(
            ValueError, match="not both: set video_as_images=True|one row a call where there is a video"
        ):
            collate([read_row(row(FRAMES), "row 0"), read_row(beside(), "row 1")])
        return
    assert model(**collate([read_row(both, "row 0")])).logits.isfinite().all()
    for rows in ([row(FRAMES), beside()], [beside(), row(FRAMES)]):
        examples = [read_row(each, f"row {at}") for at, each in enumerate(rows)]
        batch = collate(examples)
        with torch.no_grad():
            together = model(**batch, return_logits=True).logits  # (2, T, V)
            for at, example in enumerate(examples):
                single = collate([example])
                alone = model(**single, return_logits=True).logits[0]  # (t, V)
                torch.testing.assert_close(together[at, : len(alone)], alone, rtol=1e-5, atol=2e-6)


def test_a_family_without_videos_and_a_template_without_them_say_what_to_do(families: dict[str, Family]) -> None:
    example = read_row(row(FRAMES[:2]), "row 4")
    with pytest.raises(
        RowError, match="row 4: a video, but CustomLlavaProcessor takes none; set video_as_images=True"
    ):
        Collator(families["llava"].processor)([example])
    shown = read_row(row(FRAMES[:2]), "row 4", None, VideoOptions(as_images=True))
    batch = Collator(families["llava"].processor)([shown])
    assert batch.images == 2 and len(batch["pixel_values"]) == 2
    internvl = families["internvl"]
    with pytest.raises(
        RowError, match="row 4: 1 videos, but the chat template writes '<video>' 0 times.*knows videos"
    ):
        Collator(internvl.processor)([example])
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="Videos need torchvision: pip install torchvision"):
            Collator(with_videos(internvl))([example])
