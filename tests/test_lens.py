"""hfcustom lens: every token told in every family, labels where they belong, and exit code 1 where they do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row, picture
from test_report import HOSTILE, Page

from hfcustom import cli
from hfcustom.data.collate import Collator
from hfcustom.data.messages import read_row
from hfcustom.data.view import View, view_row
from hfcustom.lens import fold_lines, total_tables
from hfcustom.lens_page import write_page

COLLATORS = """
from hfcustom import Collator


def everything(processor):
    collate = Collator(processor)

    def all_labels(rows):
        batch = collate(rows)
        return batch | {"labels": batch["input_ids"].clone()}

    return all_labels


def shifted(processor):
    collate = Collator(processor)

    def early(rows):
        batch = collate(rows)
        return batch | {"labels": batch["labels"].roll(-1, 1)}

    return early


def none(processor):
    return lambda rows: {"input_ids": Collator(processor)(rows)["input_ids"]}
"""


def look(family: Family, row: dict[str, Any], **options: Any) -> View:
    (view,) = view_row(family.processor, read_row(row, "the row"), **options)
    return view


def test_every_token_of_every_family_has_its_role_kind_picture_and_label(family: Family) -> None:
    view = look(family, chat_row(2, seed=3))
    batch = Collator(family.processor)([chat_row(2, seed=3)])
    assert [token.id for token in view.tokens] == batch["input_ids"][0].tolist()
    assert [-100 if t.label is None else t.label for t in view.tokens] == batch["labels"][0].tolist()
    assert view.problems == []
    assert {token.role for token in view.tokens if token.kind != "padding"} <= {"user", "assistant"}
    assert dict(view.label_counts()) == {"assistant": len(view.labelled())}
    said = family.processor.tokenizer.decode([token.id for token in view.labelled()])
    assert "It is 3 of 0." in said
    images = [token for token in view.tokens if token.kind == "image"]
    assert {token.image for token in images} == {0, 1}
    assert [token.image for token in images] == sorted(token.image for token in images)  # type: ignore[type-var]
    for number, tiles in enumerate(view.tiles):
        own = {token.tile for token in images if token.image == number}
        assert own in ({None}, set(range(len(tiles))))
    user = "".join(t.text for t in view.tokens if t.role == "user" and t.kind == "text")
    assert "What is number 3?".replace(" ", "") in user.replace(" ", "").replace("\u2581", "")


def test_tiles_are_the_pictures_that_the_tower_gets(families: dict[str, Family]) -> None:
    row = chat_row(1)
    row["images"] = [picture(size=(84, 56))]
    view = look(families["internvl"], row)
    pixels = Collator(families["internvl"].processor)([row])["pixel_values"]
    (tiles,) = view.tiles
    assert len(tiles) == len(pixels) > 2
    assert {token.tile for token in view.tokens if token.kind == "image"} == set(range(len(tiles)))
    corner = [tile.getpixel((0, 0)) for tile in tiles]
    assert corner[0] == pytest.approx(row["images"][0].getpixel((0, 0)), abs=40)
    assert len({tile.tobytes() for tile in tiles}) == len(tiles)


def test_positions_are_those_that_the_model_uses(families: dict[str, Family]) -> None:
    family = families["qwen2_vl"]
    model, batch = family.model(), Collator(family.processor)([chat_row(2)])
    seen: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(**batch)
    view = look(family, chat_row(2), place=model.place_tokens)
    assert [list(token.position) for token in view.tokens] == seen[0][-3:, 0].T.tolist()
    assert len({token.position[1:] for token in view.tokens}) > len({token.position[0] for token in view.tokens})
    plain = look(family, chat_row(0), place=model.place_tokens)
    assert [token.position for token in plain.tokens] == [(at, at, at) for at in range(len(plain.tokens))]


def test_a_pair_is_two_views_and_weights_are_shown(internvl: Family) -> None:
    row = chat_row(1)
    prompt, answer = row["messages"][:-1], row["messages"][-1]["content"]
    pair = {"prompt": prompt, "chosen": answer, "rejected": "No.", "images": row["images"]}
    views = view_row(internvl.processor, read_row(pair, "the row"))
    assert [view.name for view in views] == ["the row, chosen", "the row, rejected"]
    row["messages"][-1]["weight"] = 0.25
    assert {token.weight for token in look(internvl, row).labelled()} == {0.25}


def test_padding_is_told(internvl: Family) -> None:
    def padded(rows: Any) -> Any:
        batch = Collator(internvl.processor)([*rows, chat_row(4)])
        return {name: value[:1] if name != "pixel_values" else value for name, value in batch.items()}

    view = look(internvl, chat_row(0), collate=padded)
    assert view.counts()["padding"] and view.tokens[-1].kind == "padding" and not view.problems
    assert sum(len(run) for run in view.runs()) == len(view.tokens)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows, a picture and collators of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "lens_collators", raising=False)  # the file of another test
    picture().save("cat.png")
    rows = [chat_row(1), chat_row(2, seed=1)]
    for row in rows:
        row["images"] = ["cat.png"] * len(row["images"])
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("lens_collators.py").write_text(COLLATORS)
    return tmp_path


def lens(*arguments: str) -> int:
    return cli.main(["lens", *arguments])


def test_rows_are_read_as_the_options_of_training_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save("clip.gif", save_all=True, append_images=[picture(seed) for seed in range(1, 5)])
    content = [{"type": "video"}, {"type": "text", "text": "What? <end_of_turn>"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    Path("videos.jsonl").write_text(json.dumps(row | {"videos": ["clip.gif"]}) + "\n")
    mixture = '{"videos.jsonl": 0.5, "rows.jsonl": 0.5}'
    options = ["--train-on", "all", "--video-as-images", "--max-frames", "3", "--allowed-tokens", "<end_of_turn>"]
    assert (
        lens(mixture, "--family", "gemma3", "--json", *options) == 0
    )  # whose published settings lack a chat template
    (view,) = json.loads(capsys.readouterr().out)
    assert {token["image"] for token in view["tokens"] if token["kind"] == "image"} == {0, 1, 2}
    assert {token["role"] for token in view["tokens"] if token["label"] is not None} == {"user", "assistant"}
    assert sum(token["text"] == "<end_of_turn>" for token in view["tokens"]) == 3  # one of them typed
    assert lens("rows.jsonl", "--family", "nano", "--collate", "lens_collators.py:none", "--train-on", "all") == 2
    assert "have no effect with --collate" in capsys.readouterr().err


def test_a_row_is_shown_with_its_totals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lens("rows.jsonl", "--family", "internvl", "--row", "0", "1") == 0
    shown = capsys.readouterr().out
    for piece in (
        "rows.jsonl, line 1",
        "rows.jsonl, line 2",
        "<IMG_CONTEXT> x 256",
        "labels by role",
        "assistant",
        "would be padding",
    ):
        assert piece in shown
    assert shown.isascii()


def test_json_holds_every_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        lens("--family", "internvl", "--image", "cat.png", "--question", "What?", "--answer", "A cat.", "--json") == 0
    )
    (view,) = json.loads(capsys.readouterr().out)
    assert (
        sum(view["kinds"].values()) == len(view["tokens"])
        and view["kinds"]["image"] == 256 * view["images"][0]["tiles"]
    )
    assert view["problems"] == []


@pytest.mark.parametrize(
    ("collator", "words"),
    [("everything", "image tokens carry a label"), ("shifted", "must not shift them")],
)
def test_labels_where_none_may_be_end_with_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str], collator: str, words: str
) -> None:
    assert lens("rows.jsonl", "--family", "internvl", "--collate", f"lens_collators.py:{collator}") == 1
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rows.jsonl", "--family", "internvl", "--row", "2"], "has 2 rows, from 0 to 1; there is no row 2"),
        (["rows.jsonl", "--family", "intern"], "Did you mean 'internvl'?"),
        (["nothing.jsonl", "--family", "internvl"], "There is no file nothing.jsonl"),
        (["rows.jsonl", "--model", "./nothing"], "There is no folder ./nothing"),
        (["rows.jsonl", "--family", "internvl", "--collate", "lens_collators.py:none"], "but no labels"),
        (["--family", "internvl", "--image", "dog.png", "--question", "What?", "--answer", "Yes."], "dog.png"),
    ],
)
def test_what_cannot_be_shown_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert lens(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["rows.jsonl"], ["--family", "internvl"], ["rows.jsonl", "--family", "a", "--model", "b"]]
)
def test_the_command_line_says_what_is_missing(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        lens(*arguments)


def test_rows_and_families_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lens("rows.jsonl", "--family", "internvl", "--compare", "1") == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl, line 1 (-) against rows.jsonl, line 2 (+)" in shown and "+<IMG_CONTEXT>  image  x" in shown
    assert lens("rows.jsonl", "--family", "internvl", "--compare", "llava") == 0
    shown = capsys.readouterr().out
    assert "-<IMG_CONTEXT>  image  x" in shown and "+<image>  image  x 576" in shown
    assert lens("rows.jsonl", "--family", "internvl", "--compare", "0") == 0
    assert "the same tokens" in capsys.readouterr().out


def test_a_model_of_ones_own_is_read(folder: Path, internvl: Family, capsys: pytest.CaptureFixture[str]) -> None:
    model = internvl.model(connector="average_pool")
    model.save_pretrained("mine")
    model.match_processor(internvl.module.tiny_processor()).save_pretrained("mine")
    assert lens("rows.jsonl", "--model", "mine", "--json") == 0
    (view,) = json.loads(capsys.readouterr().out)
    assert view["kinds"]["image"] == view["images"][0]["tiles"]  # 4 tokens a tile, pooled to 1


def test_the_page_shows_each_tile_and_escapes_every_text(folder: Path, internvl: Family) -> None:
    for number, words in enumerate(HOSTILE):
        row = chat_row(1)
        row["messages"][0]["content"][-1]["text"] = words
        view = look(internvl, row)
        view.name = words
        write_page(folder / f"{number}.html", [view])
        tags = Page((folder / f"{number}.html").read_text(encoding="utf-8")).tags
        assert not {"script", "a", "link", "iframe"} & set(tags)
        tiles = len(view.tiles[0])
        assert tags.count("img") == 1 + 2 * tiles  # the picture, its tiles, and each tile where its tokens stand
    assert not list(folder.glob(".*partial"))


def test_totals_add_up(internvl: Family) -> None:
    view = look(internvl, chat_row(2))
    (_, _, kinds), (_, _, labels) = total_tables([view])
    assert sum(row[1] for row in kinds) == len(view.tokens) and sum(row[1] for row in labels) == len(view.labelled())
    assert sum(row[2] for row in kinds) == pytest.approx(1.0)


def test_equal_lines_of_a_difference_are_folded() -> None:
    assert fold_lines(["--- ", "+++ ", "@@ -1 @@", "+a", "+a", "+a", "-b", "+a"]) == [
        "@@ -1 @@",
        "+a  x 3",
        "-b",
        "+a",
    ]
