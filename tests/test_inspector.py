"""`hfcustom inspect`: what it says of each family is what the processor does, and docs/families.md is what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, ROOT, Family
from filelock import FileLock
from PIL import Image
from transformers.utils import is_torchvision_available

from hfcustom import cli
from hfcustom.encoders import encoder_names
from hfcustom.families import family_names, load_family
from hfcustom.inspector import command, record
from hfcustom.inspector.examine import LAYOUT_SIZES, Inspection, inspect_target
from hfcustom.inspector.formula import SIZES, Count, find_formula, find_tile_rule, unpadded
from hfcustom.inspector.markdown import family_book, overview_row, section_of, table
from hfcustom.inspector.settings import own_settings
from hfcustom.inspector.small import SmallModel
from hfcustom.inspector.switch import find_switch
from hfcustom.inspector.target import find_subject
from hfcustom.inspector.tokens import fold, placeholder_runs
from hfcustom.inspector.views import Looker
from hfcustom.inspector.words import sections

BOOK = ROOT / "docs" / "families.md"
KNOWN: dict[str, tuple[int, tuple[int, int], int]] = {  # of 800 x 1300: image tokens, rows and columns, views in all
    "aria": (256, (0, 0), 1),
    "chameleon": (1024, (0, 0), 1),
    "gemma3": (256, (0, 0), 1),
    "idefics2": (320, (2, 2), 5),
    "idefics3": (2197, (4, 3), 13),
    "internvl": (1792, (3, 2), 7),
    "llama4": (1872, (4, 3), 13),
    "llava_next": (2064, (2, 2), 5),
    "llava_onevision": (8073, (4, 3), 13),
    "minicpmv4_6": (444, (3, 2), 7),
    "mistral3": (1363, (0, 0), 1),
    "mllama": (1, (2, 2), 4),
    "molmo2": (1162, (0, 0), 2),
    "nemotron_h_omni": (1025, (0, 0), 1),
    "pixtral": (2560, (0, 0), 1),
    "qwen2_vl": (1334, (0, 0), 1),
    "smolvlm": (832, (4, 3), 13),
}
FEWEST = {  # tokens and views with the switch that leaves fewest
    "idefics2": (64, 1),
    "idefics3": (169, 1),
    "internvl": (256, 1),
    "llama4": (144, 1),
    "llava_next": (936, 2),
    "llava_onevision": (1215, 2),
    "minicpmv4_6": (60, 1),
    "mllama": (1, 1),
    "molmo2": (392, 2),
    "smolvlm": (64, 1),
}


# ---- every family, with published settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *encoder_names()])
def test_what_docs_families_md_says_is_what_is_found(name: str, request: pytest.FixtureRequest) -> None:
    """`make docs` writes the section anew, and this test with it: one run of a family is long enough."""
    if is_torchvision_available() and not needs_torchvision(name):
        pytest.skip("docs/families.md shows this family as it is without torchvision")
    found = inspect_target(name)
    if request.config.getoption("--write-docs"):
        write_section(found)
    book = BOOK.read_text(encoding="utf-8")
    cure = "run `make docs` and commit docs/families.md"
    assert section_of(found) in book, cure
    assert "| " + " | ".join(overview_row(found)) + " |" in book, cure
    json.dumps(found.to_dict())
    assert found.stages and found.views and found.architecture.parts
    assert [tensor.name for tensor in found.layout.tensors if not tensor.axes] == []
    if found.tokens is None:
        assert found.encoder is not None and found.encoder["tokens_in_tower"] > 1 < found.encoder["vector"]
        return
    assert found.tokens.formula is not None and found.tokens.checked == len(SIZES)
    assert found.tokens.count == KNOWN.get(name, (found.tokens.count,))[0]
    if name in KNOWN:
        assert (found.grid, len(found.views)) == KNOWN[name][1:]
    assert found.switch is not None
    best = found.switch.off[:1]
    assert [(way.tokens, way.views) for way in best] == ([FEWEST[name]] if name in FEWEST else [])


def needs_torchvision(name: str) -> bool:
    return name in family_names() and "torchvision" in getattr(load_family(name), "REQUIRES", ())


def write_section(found: Inspection) -> None:
    """Put a family's section, and its line in the table, in the place of those that the book has."""
    with FileLock(Path(tempfile.gettempdir()) / "hfcustom-families-md.lock"):
        text = BOOK.read_text(encoding="utf-8") if BOOK.is_file() else ""
        old = _sections(text)
        rows = dict(re.findall(r"^\| \[(\w+)\]\(#\w+\) (\|.*)$", text, re.M))
        old[found.name] = section_of(found)
        rows[found.name] = "| " + " | ".join(overview_row(found)[1:]) + " |"
        names = [name for name in (*family_names(), *encoder_names()) if name in old]
        head = family_book([found], {}).partition("| [")[0]
        lines = [f"| [{name}](#{name}) {rows[name]}" for name in names]
        BOOK.write_text(
            head + "\n".join(lines) + "\n\n" + "\n\n".join(old[name] for name in names) + "\n", encoding="utf-8"
        )


def _sections(text: str) -> dict[str, str]:
    pieces = re.split(r"^(?=## )", text, flags=re.M)[1:]
    return {piece.split()[1]: piece.rstrip("\n") for piece in pieces}


def test_docs_families_md_has_every_family_once_and_nothing_else() -> None:
    book = BOOK.read_text(encoding="utf-8")
    names = [*family_names(), *encoder_names()]
    assert re.findall(r"^## (\S+)$", book, re.M) == names
    assert re.findall(r"^\| \[(\w+)\]", book, re.M) == names
    assert book.startswith(family_book([], {}).partition("\n")[0]) and book.isascii()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_is_a_query_in_the_families_whose_connector_has_queries(name: str) -> None:
    """Those with a resampler; chameleon and mllama put no feature in the place of a token."""
    expected = None if name in ("chameleon", "mllama") else name in ("aria", "idefics2")
    assert SmallModel(find_subject(name)).token_sees_all() is expected


# ---- its parts, with small processors --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, internvl: Family) -> Path:
    """A stock checkpoint."""
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "tiny")
    internvl.processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def four_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas are found from four sizes of pictures: that all are tried is tested with every family."""
    monkeypatch.setattr("hfcustom.inspector.examine.SIZES", ((224, 224), *LAYOUT_SIZES))


@pytest.fixture
def found(folder: Path, four_sizes: None) -> Inspection:
    return inspect_target(str(folder))


@pytest.mark.parametrize(
    ("tokens", "folded"),
    [
        (["<a>"], "<a>"),
        (["<a>"] * 3, "<a>*3"),
        (["<s>", *["<i>"] * 4, "</s>"], "<s> <i>*4 </s>"),
        (["<i>", "<i>", "<b>"] * 3, "(<i>*2 <b>) * 3"),
        (
            ["<r1c1>", "<i>", "<r1c2>", "<i>", "\n", "<r2c1>", "<i>", "<r2c2>", "<i>", "\n"],
            "((<r1..2c1..2> <i>) * 2 \\n) * 2",
        ),
        (["<i>", "\n", "<i>", "\n", "\n", "<g>"], "(<i> \\n) * 2 \\n <g>"),
        ([" ", "x"], "_ x"),
    ],
)
def test_texts_are_folded(tokens: list[str], folded: str) -> None:
    assert fold(tokens) == folded


def test_views_are_where_the_processor_cut_them(internvl: Family) -> None:
    look = Looker(internvl.processor).look((200, 300))
    assert look.grid() == (3, 2) and look.overviews() == 1 and len(look.views) == 7 == look.crops()
    for at, view in enumerate(look.tiles()):
        row, column = divmod(at, 2)
        assert view.box == pytest.approx((100 * column, 100 * row, 100 * column + 100, 100 * row + 100), abs=4)
        assert view.size == (28, 28) and view.filled == (0, 0, 28, 28)
    assert look.views[-1].is_whole((200, 300)) and look.seen() == 1.0


def test_what_is_cut_off_and_what_is_padding_is_seen(families: dict[str, Family]) -> None:
    cropped = Looker(families["llava"].processor).look((200, 400))
    assert cropped.seen() == pytest.approx(0.5, abs=0.02)
    assert cropped.views[0].box == pytest.approx((0, 100, 200, 300), abs=4)
    padded = Looker(families["janus"].processor).look((100, 200))
    left, top, right, bottom = padded.views[0].filled
    assert padded.seen() == 1.0 and (top, bottom) == (0, padded.views[0].size[1])
    assert (right - left) / (bottom - top) == pytest.approx(0.5, abs=0.1)


def test_steps_are_those_that_ran_with_their_values(internvl: Family) -> None:
    look = Looker(internvl.processor).look((200, 300))
    steps = {stage.name: stage for stage in record.stages(look.steps)}
    assert list(steps)[0] == "convert_to_rgb" and list(steps)[-2:] == ["rescale", "normalize"]
    assert (
        steps["crop_image_to_patches"].values["max_patches"] == 12 and len(steps["crop_image_to_patches"].after) == 7
    )
    assert steps["normalize"].values["mean"] == pytest.approx(internvl.processor.image_processor.image_mean, abs=1e-5)
    off = Looker(internvl.processor).look((200, 300), crop_to_patches=False, do_normalize=False)
    assert [stage.name for stage in record.stages(off.steps)] == ["convert_to_rgb", "resize", "rescale"]


def test_a_failing_processor_is_not_watched_for_ever() -> None:
    with pytest.raises(ZeroDivisionError):
        record.record(lambda: 1 // 0)
    assert sys.getprofile() is None


def counts_of(family: Family) -> list[Count]:
    looker, subject = Looker(family.processor), find_subject(family.name)
    assert subject.placeholder is not None
    looks = [looker.look(size) for size in SIZES]
    runs = [tuple(placeholder_runs(look.features, subject.placeholder)) for look in looks]
    return [Count(look.size, sum(run), look, run) for look, run in zip(looks, runs, strict=True)]


def test_a_formula_that_is_wrong_once_is_not_shown(internvl: Family) -> None:
    counts = counts_of(internvl)
    formula = find_formula(counts)
    assert formula is not None and formula.text.startswith("4 x (rows x columns + 1)")
    assert find_formula([*counts[:-1], replace(counts[-1], tokens=counts[-1].tokens + 1)]) is None
    rule = find_tile_rule(counts, own_settings(internvl.processor))
    assert rule == "the grid of at most 12 tiles whose shape is nearest to the image's"
    assert find_tile_rule(counts, {**own_settings(internvl.processor), "max_patches": 7}) is None


def test_the_part_of_a_canvas_that_is_no_padding() -> None:
    assert unpadded((800, 1300), (2, 2), 24, 0) == (48, 30)  # 48 * 31 + 576 = 2064 tokens, LLaVA-NeXT
    assert unpadded((1300, 800), (2, 2), 24, 0) == (30, 48)
    assert (
        unpadded((2000, 2000), (6, 6), 27, 9) == (81, 81) != unpadded((2000, 2000), (6, 6), 27, 0)
    )  # at most 9 tiles' worth


def test_a_switch_works_only_where_the_model_takes_it(families: dict[str, Family]) -> None:
    """The pinpoints of LLaVA-NeXT in a call change the pixels, and neither the text nor the model's config."""
    subject = find_subject("llava_next")
    switch = find_switch(subject, Looker(subject.processor), (800, 1300), SmallModel(subject))
    assert [way.code for way in switch.off] == [
        "processor.image_processor.image_grid_pinpoints = [[336, 336]]; model.config.image_grid_pinpoints = [[336, 336]]"
    ]
    assert [way.code for way in switch.wrong if way.refused] == ["processor(..., image_grid_pinpoints=[[336, 336]])"]


def test_a_switch_that_is_on_already_is_offered(families: dict[str, Family]) -> None:
    subject = find_subject("gemma3")
    switch = find_switch(subject, Looker(subject.processor), (800, 1300), SmallModel(subject))
    assert (
        not switch.off and switch.on[0].code == "processor(..., do_pan_and_scan=True)" and switch.on[0].tokens == 768
    )
    assert [way.code for way in switch.wrong] == ["processor.image_processor.do_pan_and_scan = True"]


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_looked_at_with_its_own_processor(found: Inspection) -> None:
    assert found.tokens is not None and found.tokens.formula is not None
    assert found.tokens.formula.startswith("4 x (rows x columns + 1)") and found.tokens.count == 28
    assert found.architecture.image_size == [28, 28] and not found.architecture.checkpoints
    pixels = next(tensor for tensor in found.layout.tensors if tensor.name == "pixel_values")
    assert pixels.axes == ("views", "colours", "height in pixels", "width in pixels") and pixels.shape[1:] == (
        3,
        28,
        28,
    )
    assert "where the processor pads by itself" in found.layout.padding
    assert found.switch is not None and found.switch.off[0].code == "processor(..., crop_to_patches=False)"


def test_a_base_checkpoint_without_a_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    found = inspect_target(str(folder))
    assert "without a chat template" in found.source and found.layout.tensors


def test_a_class_of_ones_own_is_looked_at_with_its_connector(tmp_path: Path, four_sizes: None) -> None:
    (tmp_path / "one_per_tile.py").write_text(
        "from hfcustom.families.idefics3 import CustomIdefics3ForConditionalGeneration\n\n\n"
        "class OnePerTile(CustomIdefics3ForConditionalGeneration):\n"
        '    default_connector = {"name": "average_pool", "size": 13}\n'
    )
    found = inspect_target(f"{tmp_path / 'one_per_tile.py'}:OnePerTile")
    assert found.tokens is not None and found.tokens.count == 13 and "OnePerTile" in found.architecture.model_class
    assert any(part.name == "new" or part.name == "connector" for part in found.architecture.parts)


def test_a_connector_of_ones_own_makes_queries_of_tokens(tmp_path: Path, four_sizes: None) -> None:
    (tmp_path / "queried.py").write_text(
        "from hfcustom.families.internvl import CustomInternVLForConditionalGeneration\n\n\n"
        "class Queried(CustomInternVLForConditionalGeneration):\n"
        '    default_connector = {"name": "perceiver_resampler", "num_queries": 64}\n'
    )
    found = inspect_target(f"{tmp_path / 'queried.py'}:Queried")
    assert found.tokens is not None and found.tokens.count == 7 * 64
    assert found.tokens.queries is True and found.tokens.grids is None
    assert found.switch is not None and found.switch.off[0].tokens == 64


def test_a_class_that_cannot_be_built_small_is_looked_at_all_the_same(tmp_path: Path, four_sizes: None) -> None:
    (tmp_path / "large.py").write_text(
        "from hfcustom.families.llava import CustomLlavaForConditionalGeneration\n\n\n"
        "class Large(CustomLlavaForConditionalGeneration):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        assert config.get_text_config().hidden_size == 4096\n"
    )
    found = inspect_target(f"{tmp_path / 'large.py'}:Large")
    assert found.tokens is not None and found.tokens.count == 576
    assert found.tokens.queries is None and found.tokens.grids is None  # nobody was there to ask


def test_a_folder_of_an_encoder(tmp_path: Path) -> None:
    from hfcustom.encoders import siglip

    siglip.CustomSiglipModel(siglip.tiny_config()).save_pretrained(tmp_path)
    siglip.tiny_processor().save_pretrained(tmp_path)
    found = inspect_target(str(tmp_path), (300, 200))
    assert found.encoder == {"tokens_in_tower": 16, "vector": 32} and found.tokens is None and found.seen == 1.0


# ---- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["inspect", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_everything_that_it_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], four_sizes: None
) -> None:
    photo = tmp_path / "photo & co.jpg"
    Image.effect_noise((320, 200), 60).save(photo)
    page, drawing = tmp_path / "new" / "page.html", tmp_path / "drawing.png"
    words = ("--image", str(photo), "--html", str(page), "--plot", str(drawing))
    code, out, _ = run(capsys, str(folder), "--json", *words)
    assert code == 0 and json.loads(out)["size"] == [320, 200] and json.loads(out)["tokens"]["count"] > 4
    text = page.read_text()
    assert text.count("data:image/png;base64") == 1 and "<script" not in text and "&lt;IMG_CONTEXT&gt;" in text
    with Image.open(drawing) as drawn:
        assert drawn.width > 500 and len(drawn.convert("RGB").getcolors(2**24) or []) > 50
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []
    assert run(capsys, str(folder), "--markdown", "--size", "320x200")[1].startswith(f"## {folder}")


def test_two_are_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, four_sizes: None
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, str(folder), "paligemma", "--size", "320x200")
    assert code == 0 and "PaliGemmaForConditionalGeneration" in out and "InternVLForConditionalGeneration" in out
    code, out, _ = run(capsys, str(folder), str(folder), "--markdown")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert code == 0 and len(rows) > 15 and all(mine == theirs.removesuffix(" |") for _, mine, theirs in rows)


def test_all_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, found: Inspection
) -> None:
    def one(name: str, size: Any) -> Inspection:
        if name == "molmo2":
            raise ImportError("molmo2 needs torchvision: pip install torchvision")
        return replace(found, name=name)

    monkeypatch.setattr(command, "inspect_target", one)
    code, out, _ = run(capsys, "--all", "--markdown")
    assert code == 0 and "## internvl" in out and "## clip" in out
    assert "## molmo2\n\nmolmo2 needs torchvision: pip install torchvision" in out
    assert set(json.loads(run(capsys, "--all", "--json")[1])["missing"]) == {"molmo2"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["intervl"], "Did you mean 'internvl'"),
        (["molmo-0924"], "The nearest family is molmo2"),
        ([], "0 targets; name one"),
        (["clip", "siglip", "llava"], "3 targets"),
        (["./nowhere"], "There is no folder ./nowhere"),
        (["OpenGVLab/InternVL3-1B-hf"], "hfcustom inspect internvl"),
        (["clip", "--size", "big"], "--size 'big' is no size; write width x height"),
        (["clip", "--size", "9x900"], "sides must be 16 at least"),
        (["clip", "--image", "nowhere.png"], "There is no file nowhere.png"),
        (["clip", "--image", "a.png", "--size", "9x9"], "--size has no effect beside --image"),
        (["clip", "--plot", "a.gif"], "must end in .png"),
        (["clip", "--json", "--markdown"], "leave one of them out"),
        (["--all"], "--all prints --markdown or --json"),
        (["--all", "clip"], "name no target beside it"),
        (["nowhere.py:Model"], "there is no file"),
    ],
)
def test_mistakes_are_told_with_the_cure(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and said in err and "Traceback" not in err and not out


def test_a_family_that_lacks_a_package_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hfcustom.inspector.target.missing_packages", lambda name: ["torchvision"])
    code, _, err = run(capsys, "internvl")
    assert code == 2 and "pip install torchvision" in err


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, hfcustom.cli as c\ntry: c.main(['inspect', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "--markdown" in done.stdout


def test_sections_are_short_enough_for_a_screen_or_two(found: Inspection) -> None:
    assert sum(len(section.rows) + 2 for section in sections(found)) < 60
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
