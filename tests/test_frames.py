"""Frame selection: the contract for every method, correlation against a direct loop, known cuts, sources, the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from encoder_cases import Encoder, encoders
from PIL import Image

import hfcustom
from hfcustom import cli
from hfcustom.data.frames import (
    FRAME_SELECTORS,
    QUERY_METHODS,
    Clip,
    MissingInputError,
    as_clip,
    files,
    open_clip,
    option_names,
    scene_starts,
)
from hfcustom.data.frames.clip import MemoryClip
from hfcustom.data.frames.differences import best_correlation
from hfcustom.data.frames.embeddings import best_apart
from hfcustom.data.frames.example import example_clip
from hfcustom.data.frames.scenes import share

ENCODERS = encoders()
CLIP = ENCODERS["clip"]


def options_of(method: str) -> dict[str, Any]:
    takes_model = "model" in option_names(FRAME_SELECTORS[method])
    return {"model": CLIP.model(), "processor": CLIP.processor} if takes_model else {}


def noise(count: int) -> np.ndarray:
    """Return frames that differ, (F, 20, 30, 3)."""
    return np.stack([np.asarray(picture(seed, (30, 20))) for seed in range(count)])


CLIPS = {
    "differing": noise(7),
    "unchanging": np.repeat(noise(1), 7, 0),
    "black": np.zeros((7, 20, 30, 3), np.uint8),
    "one frame": noise(1),
}


@pytest.mark.parametrize("method", FRAME_SELECTORS)
def test_every_method_keeps_the_contract(method: str) -> None:
    options = options_of(method)
    for name, frames in CLIPS.items():
        for k in (1, 3, len(frames), len(frames) + 5):
            found = hfcustom.select_frames(frames, method, k, query="a cat", clip_fps=2, **options)
            assert found == sorted(set(found)) and all(type(at) is int and 0 <= at < len(frames) for at in found), name
            assert len(found) <= k if method == "fps" else len(found) == min(k, len(frames)), (name, k)
            assert found == hfcustom.select_frames(frames, method, k, query="a cat", clip_fps=2, **options)
    for wrong in (0, -1, 2.5, True, "8"):
        with pytest.raises(ValueError, match=f"k={wrong!r} must be a whole number"):
            hfcustom.select_frames(frames, method, wrong, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown option of frame method"):
        hfcustom.select_frames(frames, method, 1, no_such_option=1)


def test_methods_that_look_at_a_query_are_those_listed() -> None:
    for method in FRAME_SELECTORS:
        try:
            hfcustom.select_frames(noise(2), method, 1, clip_fps=1, **options_of(method))
        except MissingInputError as error:
            assert method in QUERY_METHODS and "--query" in str(error)
        else:
            assert method not in QUERY_METHODS


@pytest.mark.parametrize("method", ["pixel_l1", "pixel_l2", "cross_correlation", "embedding"])
def test_spreading_methods_begin_in_the_middle_and_take_blank_frames_last(method: str) -> None:
    options = options_of(method)
    assert hfcustom.select_frames(noise(9), method, 1, **options) == [4]
    even = hfcustom.select_frames(np.repeat(noise(1), 9, 0), method, 3, **options)
    assert even == [0, 4, 8]
    frames = noise(6)
    frames[3] = 0
    assert 3 not in hfcustom.select_frames(frames, method, 5, **options)
    assert hfcustom.select_frames(frames, method, 6, **options) == list(range(6))


def direct_correlation(first: np.ndarray, second: np.ndarray, max_shift: int) -> float:
    """Return the best of the correlation coefficients of what two pictures share, a shift at a time."""
    side, best = len(first), -1.0
    for y in range(-max_shift, max_shift + 1):
        for x in range(-max_shift, max_shift + 1):
            a = first[max(0, -y) : side - max(0, y), max(0, -x) : side - max(0, x)]
            b = second[max(0, y) : side - max(0, -y), max(0, x) : side - max(0, -x)]
            best = max(best, float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]))
    return best


@pytest.mark.parametrize("max_shift", [0, 3, 6])
def test_correlation_by_fft_is_that_of_a_direct_loop(max_shift: int) -> None:
    rng = np.random.default_rng(0)
    frames, one = rng.random((4, 12, 12), dtype=np.float32), rng.random((12, 12), dtype=np.float32)
    frames[2, 2:, 1:] = 0.4 * one[:-2, :-1] + 0.1  # moved, and darker
    expected = [direct_correlation(one, frame, max_shift) for frame in frames]
    np.testing.assert_allclose(best_correlation(frames, one, max_shift), expected, atol=1e-5)
    pairs = [best_correlation(frames[at : at + 1], frames[at - 1], max_shift)[0] for at in range(4)]
    np.testing.assert_allclose(best_correlation(frames, np.roll(frames, 1, 0), max_shift), pairs, atol=1e-6)
    if max_shift >= 2:
        assert expected[2] == pytest.approx(1, abs=1e-5)
    assert best_correlation(np.ones((1, 12, 12), np.float32), one, max_shift) == [0]


def covered(indices: list[int], starts: list[int], length: int) -> set[int]:
    return {int(np.searchsorted(starts, at, side="right")) - 1 for at in indices if at < length}


def test_known_cuts_are_found_and_covered() -> None:
    clip, cuts = example_clip()
    black = 4  # the scene that shows nothing
    assert scene_starts(clip) == cuts
    scenes = set(range(len(cuts))) - {black}
    for method in ("scenes", "cross_correlation"):
        assert covered(hfcustom.select_frames(clip, method, len(scenes)), cuts, len(clip)) == scenes
    assert len(covered(hfcustom.select_frames(clip, "uniform", len(scenes)), cuts, len(clip)) - {black}) < len(scenes)
    assert hfcustom.select_frames(clip, "scenes", 1) == [cuts[1] // 2]  # the longest scene's middle
    assert black in covered(hfcustom.select_frames(clip, "scenes", len(clip)), cuts, len(clip))


def test_scenes_share_frames_and_blank_ones_give_way() -> None:
    assert share([10, 4, 30], [True, True, True], 2) == [1, 0, 1]
    assert share([10, 4, 30], [True, True, True], 6) == [2, 1, 3]
    assert share([10, 4, 30], [True, True, False], 14) == [10, 4, 0]
    frames = noise(5)[[0] * 6 + [1] * 6]
    frames[2:4] = 0  # the middle of the first scene, if it were one
    found = hfcustom.select_frames(frames, "scenes", 4)
    assert not {2, 3} & set(found)


def test_rates_follow_the_times_of_the_clip() -> None:
    clip = as_clip(noise(10), clip_fps=5)
    assert hfcustom.select_frames(clip, "fps", 8, fps=1) == [2, 7]
    assert hfcustom.select_frames(clip, "fps", 1, fps=1) == [5]
    assert hfcustom.select_frames(clip, "fps", 99, fps=60) == list(range(10))
    clip = as_clip(noise(4))
    clip.times = np.array([0.0, 9.0, 9.1, 9.2])  # the first frame is shown nearly all the time
    assert hfcustom.select_frames(clip, "fps", 3, fps=1) == [0, 3]
    with pytest.raises(MissingInputError, match="clip_fps"):
        hfcustom.select_frames(noise(4), "fps", 2)
    with pytest.raises(ValueError, match="fps=0 must be above 0"):
        hfcustom.select_frames(clip, "fps", 2, fps=0)
    with pytest.raises(ValueError, match="clip_fps=0 of the clip is no frame rate"):
        hfcustom.select_frames(noise(4), "fps", 2, clip_fps=0)


class Long(Clip):
    """A clip that counts the frames that are alive."""

    def __init__(self, count: int) -> None:
        super().__init__("long", count)
        self.seen: list[int] = []

    def read(self, step: int = 1) -> Iterator[Image.Image]:
        for index in range(0, len(self), step):
            self.seen.append(index)
            yield picture(index, (8, 8))


def test_a_long_clip_is_looked_at_in_part_and_no_frame_is_kept_whole() -> None:
    clip = Long(1000)
    found = hfcustom.select_frames(clip, "pixel_l1", 4, max_candidates=50)
    assert clip.seen == list(range(0, 1000, 20)) and set(found) <= set(clip.seen)
    assert clip.small(20).pixels.nbytes == 50 * 32 * 32
    assert len(clip.seen) == 50  # kept
    assert len(hfcustom.select_frames(Long(100), "pixel_l1", 60, max_candidates=10)) == 60  # k wins
    assert hfcustom.select_frames(Long(1000), "uniform", 2) == [250, 750]
    with pytest.raises(ValueError, match="max_candidates=0 must be at least 1"):
        hfcustom.select_frames(clip, "pixel_l1", 4, max_candidates=0)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=lambda encoder: encoder.name)
def test_embeddings_are_the_models_own(encoder: Encoder, tmp_path: Path) -> None:
    frames = [picture(seed) for seed in range(6)]
    model = encoder.model()
    query = "two dogs and a cat"
    inputs = encoder.processor(
        text=[query],
        images=frames,
        padding="max_length",
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = model(**inputs)
    scores = (outputs.image_embeds @ outputs.text_embeds.T)[:, 0]
    best = scores.topk(2).indices.sort().values.tolist()
    options = {"model": model, "processor": encoder.processor}
    assert hfcustom.select_frames(frames, "query", 2, query, min_gap=0, batch_size=4, **options) == best
    likeness = outputs.image_embeds @ outputs.image_embeds[3]
    assert hfcustom.select_frames(frames, "embedding", 2, **options) == sorted([3, int(likeness.argmin())])
    model.save_pretrained(tmp_path)
    encoder.processor.save_pretrained(tmp_path)
    assert hfcustom.select_frames(frames, "query", 2, query, min_gap=0, model=str(tmp_path)) == best
    with pytest.raises(ValueError, match="tokens long, the model reads"):
        hfcustom.select_frames(frames, "query", 2, "a cat " * 99, **options)


def test_a_query_takes_frames_apart() -> None:
    scores = np.array([0.1, 0.9, 0.8, 0.7, 0.2, 0.6])
    assert best_apart(scores, 3, 0) == [1, 2, 3]
    assert best_apart(scores, 2, 1) == [1, 3]
    assert best_apart(scores, 4, 2) == [1, 5, 2, 3]  # too few lie apart: the rest by score


def test_models_that_cannot_embed_are_named() -> None:
    with pytest.raises(MissingInputError, match="needs a model"):
        hfcustom.select_frames(noise(2), "embedding", 1)
    with pytest.raises(ValueError, match="pass processor="):
        hfcustom.select_frames(noise(2), "embedding", 1, model=CLIP.model())
    with pytest.raises(ValueError, match="Linear has no get_image_features"):
        hfcustom.select_frames(noise(2), "embedding", 1, model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="batch_size=0"):
        hfcustom.select_frames(noise(2), "embedding", 1, batch_size=0, **options_of("embedding"))


def same(clip: Any, frames: np.ndarray) -> bool:
    return np.array_equal(np.stack([np.asarray(one) for one in as_clip(clip)]), frames)


def test_frames_come_from_memory_and_files(tmp_path: Path) -> None:
    frames = noise(12)
    tensor = torch.from_numpy(frames)
    pictures = [Image.fromarray(frame) for frame in frames]
    for clip in (frames, tensor, tensor.permute(0, 3, 1, 2), tensor / 255, pictures, list(frames)):
        assert same(clip, frames)
    np.save(tmp_path / "clip.npy", frames)
    (tmp_path / "folder").mkdir()
    for at, frame in enumerate(pictures):
        frame.save(tmp_path / f"folder/frame_{at}.png")  # frame_10 sorts before frame_2 by its letters
    (tmp_path / "folder/notes.txt").write_text("no picture")
    pictures = [Image.fromarray(frame) for frame in frames]  # Pillow keeps settings of the last file in a picture
    pictures[0].save(tmp_path / "clip.tiff", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], lossless=True, duration=250)
    for name in ("clip.npy", "folder", "clip.tiff", "clip.webp"):
        clip = open_clip(tmp_path / name)
        assert same(clip, frames), name
        assert [np.asarray(one).tolist() for one in clip.pictures([2, 11])] == frames[[2, 11]].tolist()
        with pytest.raises(ValueError, match="must be in increasing order, from 0 to 11"):
            clip.pictures([3, 3])
    times = open_clip(tmp_path / "clip.webp").times
    assert times is not None and times.tolist() == [at / 4 for at in range(12)]
    assert open_clip(tmp_path / "folder").times is None and open_clip(tmp_path / "folder", 2).times is not None
    assert isinstance(open_clip(tmp_path / "clip.npy"), MemoryClip)
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=[100] * 11 + [900])
    assert open_clip(tmp_path / "clip.gif").times.tolist() == pytest.approx([at / 10 for at in range(12)])  # type: ignore[union-attr]


WRONG_FRAMES = {
    "no frames": (np.zeros((0, 4, 4, 3), np.uint8), "has no frames"),
    "no list": ([], "has no frames"),
    "one picture": (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\); frames are uint8"),
    "a range": (np.full((1, 4, 4, 3), 255.0), "floats from 0 to 1"),
    "not finite": (np.full((1, 4, 4, 3), np.nan), "floats from 0 to 1"),
    "wide": (np.ones((1, 4, 4, 3), np.uint16), "holds uint16 from 1 to 1"),
    "objects": (np.array([[[[None] * 3]]]), "is object of shape"),
    "grey": ([np.zeros((4, 4), np.uint8)], r"Frame 0 is uint8 of shape \(4, 4\)"),
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
def test_frames_that_are_none_are_named(name: str) -> None:
    frames, message = WRONG_FRAMES[name]
    with pytest.raises(ValueError, match=message):
        hfcustom.select_frames(frames, "pixel_l1", 1)


def test_files_that_are_no_clip_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.gif").write_text("no picture")
    (tmp_path / "script.gif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "film.doc").write_text("")
    (tmp_path / "empty").mkdir()
    picture().save(tmp_path / "long.gif", save_all=True, append_images=[picture(1), picture(2)])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "long.gif").read_bytes()[:-900])
    expected = {
        "objects.npy": "is no .npy array of numbers",
        "text.gif": "is no readable BMP",
        "script.gif": "is no readable BMP",
        "film.doc": "has no suffix of a clip",
        "empty": "holds no picture",
        "cut.gif": "cut.gif",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            list(open_clip(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="is no file and no folder"):
        open_clip(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="is a URL"):
        open_clip("https://example.org/clip.mp4")
    monkeypatch.setattr(files, "MAX_ANIMATION_PIXELS", 4000)
    with pytest.raises(ValueError, match="has 3 frames, 4500 pixels together; at most 4000"):
        open_clip(tmp_path / "long.gif")
    monkeypatch.setattr(files, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="has 50x30 pixels"):
        open_clip(tmp_path / "long.gif")


def test_a_function_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "mine_frames.py").write_text(
        "def last(frames, k, query=None, skip=0):\n    return range(len(frames) - k - skip, len(frames) - skip)\n"
    )
    found = hfcustom.select_frames(noise(5), f"{tmp_path}/mine_frames.py:last", 2, skip=1)
    assert found == [2, 3]
    for wrong in ([], [1, 0], [1, 1], [-1], [5], [0, 1, 2]):
        with pytest.raises(ValueError, match="'<lambda>' returned .* it must return 1 to 2 places"):
            hfcustom.select_frames(noise(5), lambda frames, k, query=None, wrong=wrong: wrong, 2)
    with pytest.raises(ValueError, match="Unknown frame method 'unifrm'. Did you mean 'uniform'"):
        hfcustom.select_frames(noise(5), "unifrm", 2)


def test_the_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CLIP.model().save_pretrained(tmp_path / "clip")
    CLIP.processor.save_pretrained(tmp_path / "clip")
    sheet = tmp_path / "new/sheet.png"
    more = ["--model", str(tmp_path / "clip"), "--query", "a cat", "--max-candidates", "60", "--json"]
    assert cli.main(["frames", "--example", "--compare", "--output", str(sheet), *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["frames"], found["k"], found["scenes"]) == (239, 8, 8)
    assert {row["method"] for row in found["methods"]} == FRAME_SELECTORS.keys()
    for row in found["methods"]:
        assert len(row["indices"]) == len(row["times"]) == 8 and 1 <= row["scenes_covered"] <= 8
    with Image.open(sheet) as image:
        assert image.width > 900 and image.height > 100 * len(FRAME_SELECTORS) and len(image.getcolors() or []) > 50
    assert cli.main(["frames", "--example", "--compare", "-k", "3"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 8" in printed and "needs a model" in printed  # what cannot run says why
    picture().save(tmp_path / "one.gif")
    out, kept = str(tmp_path / "sheet.jpg"), tmp_path / "kept"
    assert cli.main(["frames", str(tmp_path / "one.gif"), "-k", "9", "--output", out, "--frames-dir", str(kept)]) == 0
    assert capsys.readouterr().out.startswith("0\n") and (tmp_path / "sheet.jpg").exists()
    assert [file.name for file in kept.iterdir()] == ["frame_000000.png"]


MISTAKES = {
    "no clip": ([], "Name one clip"),
    "two clips": (["a.gif", "--example"], "Name one clip"),
    "k": (["--example", "-k", "0"], "-k 0 must be at least 1"),
    "method": (["--example", "--method", "scens"], "Did you mean 'scenes'"),
    "no query": (["--example", "--method", "query"], "(--query)"),
    "no model": (["--example", "--method", "embedding"], "(--model)"),
    "idle query": (["--example", "--query", "cat"], "--query has no effect on uniform"),
    "idle option": (["--example", "--max-candidates", "9"], "--max-candidates has no effect on uniform"),
    "output": (["--example", "--output", "sheet.txt"], "must end in"),
    "compare": (["--example", "--compare", "--method", "fps"], "leave one of them out"),
    "cuts": (["--example", "--cuts", "9999"], "from 0 to 238"),
    "file": (["missing.mp4"], "is no file and no folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    assert cli.main(["frames", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("hfcustom frames: ") and not printed.out


def test_a_video_without_its_decoder_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        open_clip(tmp_path / "clip.mp4")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as videos: upright, on its side, and as an AVI; each 25th frame is a key frame."""
    av = pytest.importorskip("av", reason="videos are decoded by PyAV: pip install av")
    folder = tmp_path_factory.mktemp("videos")
    for name, turned in (("clip.mp4", 0), ("turned.mp4", 90), ("clip.mkv", 0), ("clip.avi", 0)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=24, options={"g": "25"})
            stream.bit_rate = 4_000_000
            stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
            if turned:
                stream.set_display_rotation(turned)
            for picture in example_clip()[0].read(1 if name == "clip.mp4" else 8):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    return folder


def test_a_video_is_decoded_frame_by_frame(videos: Path) -> None:
    example, cuts = example_clip()
    clip = open_clip(videos / "clip.mp4")
    assert len(clip) == len(example) and clip.times is not None
    np.testing.assert_allclose(clip.times, example.times, atol=1e-3)
    wanted = [0, 61, 120, 237, 238]
    by_seeking, in_order = clip.pictures(wanted), Clip.pictures(clip, wanted)
    for index, first, second in zip(wanted, by_seeking, in_order, strict=True):
        assert np.array_equal(np.asarray(first), np.asarray(second))
        truth = np.asarray(example.frames[index]).astype(int)
        assert np.abs(np.asarray(first) - truth).mean() < 16, index
    assert np.abs(clip.small().pixels.astype(int) - example.small().pixels).mean() < 6
    assert scene_starts(clip) == cuts
    assert hfcustom.select_frames(videos / "clip.mp4", "fps", 20) == hfcustom.select_frames(example, "fps", 20)
    turned = open_clip(videos / "turned.mp4")
    assert turned.pictures([0])[0].size == (90, 160)
    upright = np.rot90(example.frames[0]).astype(int)
    assert np.abs(np.asarray(turned.pictures([0])[0]) - upright).mean() < 16
    for name in ("clip.mkv", "clip.avi"):
        clip = open_clip(videos / name)
        assert (len(clip), len(list(clip)), len(clip.small().pixels)) == (30, 30, 30)
        assert clip.times is not None and clip.times[1] > 0
        assert len(clip.pictures([0, 29])) == 2


def test_a_video_that_is_none_is_named(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfcustom.data.frames import video

    (videos / "empty.mp4").write_bytes(b"")
    (videos / "cut.mp4").write_bytes((videos / "clip.mp4").read_bytes()[:5000])
    (videos / "list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{videos}/clip.mp4\n#EXT-X-ENDLIST\n"
    )
    for name in ("empty.mp4", "cut.mp4", "list.mp4"):  # the last would lead FFmpeg to another file
        with pytest.raises(ValueError, match=f"{name} is no video that can be decoded"):
            open_clip(videos / name)
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 10_000)
    with pytest.raises(ValueError, match="has 239 frames of 14400 pixels"):
        open_clip(videos / "clip.mp4")
