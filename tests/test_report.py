"""The page about a run: whole, self-contained, and safe whatever a data set or a model says."""

from __future__ import annotations

import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family, picture
from PIL import Image

from hfcustom.data.messages import Example
from hfcustom.evaluate import Answer
from hfcustom.parts import part_table
from hfcustom.report import Report, draw_result

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</div></body></html><h1>mine</h1>",
    "<a href='https://example.org'>here</a>",
    "<style>body { display: none }</style><link rel=stylesheet href=//example.org/a.css>",
    "&lt;b&gt; & &amp;",
    "<!-- ",
    "$x_{$ \\frac $1",
    "[/bold] {braces} %s",
    "\u4e2d\U0001f600",
]


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]

    def images(self) -> list[Image.Image]:
        prefix = "data:image/png;base64,"
        sources = self.values("src")
        assert all(source.startswith(prefix) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(prefix)))) for source in sources]


def answer(said: str = "yes", truth: str = "yes", question: str = "Is it?", images: int = 1) -> Answer:
    return Answer(Example([], [picture(seed) for seed in range(images)], "row"), question, said, truth)


def written(report: Report, folder: Path) -> Page:
    report.write(folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # a glyph that matplotlib's font lacks, a title without room
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_string_is_shown_as_text_wherever_it_stands(text: str, tmp_path: Path) -> None:
    harmless, hostile = Report("title"), Report(text)
    for report, words in ((harmless, "plain"), (hostile, text)):
        report.heading(words)
        report.text(words)
        report.table((words, "b"), [(words, 1)])
        report.answers([answer(words, words, words), answer(words, "other", words)])
        report.curves({"run": [{"step": 1, words: 1.0}]}, [words])
    expected, page = written(harmless, tmp_path / "a"), written(hostile, tmp_path / "b")
    assert page.tags == expected.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in expected.attributes]
    assert "".join(page.words).count(text) >= 10  # title, h1, h2, p, two cells, two cards of question and answer, ...


def full_report(internvl: Family) -> Report:
    report = Report("A run")
    report.heading("Losses")
    report.curves({"run": [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]}, ["loss", "missing"])
    report.answers([answer(images=2)])
    report.parts(part_table(internvl.model()))
    return report


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_the_page_runs_no_script_and_reaches_nowhere(internvl: Family, tmp_path: Path) -> None:
    page = written(full_report(internvl), tmp_path)
    assert not {"script", "link", "iframe", "object", "embed", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset", "action")]
    assert all(source.startswith("data:") for source in page.values("src"))
    raw = (tmp_path / "report.html").read_text()
    assert "://" not in raw and "url(" not in raw and "@import" not in raw
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_pictures_are_embedded_as_they_are(tmp_path: Path) -> None:
    report = Report("Answers")
    report.answers([answer(images=2), answer(images=0)])
    images = written(report, tmp_path).images()
    assert [np.asarray(image).tolist() for image in images] == [np.asarray(picture(seed)).tolist() for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_a_card_shows_question_answer_truth_and_whether_it_is_right(tmp_path: Path) -> None:
    report = Report("Answers")
    report.answers([answer("12", "12", "Read."), answer("", "34", "And this?")])
    page = written(report, tmp_path)
    assert page.values("class") == ["cards", "card", "quiet", "right", "quiet", "card", "quiet", "wrong", "quiet"]
    shown = [words for words in page.words if words.strip()]
    assert shown[-6:] == ["Read.", "12", "truth: 12", "And this?", "(nothing)", "truth: 34"]


def test_the_part_table_shows_what_is_trained_and_frozen(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.lm_head.requires_grad_(False)
    model.lm_head.to(dtype=torch.bfloat16)
    report = Report("Parts")
    report.parts(part_table(model))
    shown = [words for words in written(report, tmp_path).words if words.strip()]
    count = model.lm_head.weight.numel()
    line = ["head", "lm_head", f"{count:,}", "0", f"{count:,}", f"{2 * count:,}", "bfloat16"]
    assert shown[-len(line) :] == line
    vision = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    at = shown.index("model.vision_tower")
    assert shown[at + 1 : at + 5] == [f"{vision:,}", f"{vision:,}", "0", f"{4 * vision:,}"]


def test_curves_are_a_chart_a_name_with_a_line_a_history(tmp_path: Path) -> None:
    histories = {
        "first": [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": 1.0}],
        "second": [{"step": 1, "lr": 0.2}],
    }
    report = Report("Curves")
    report.curves(histories, ["loss", "lr", "missing"])
    page = written(report, tmp_path)
    assert page.values("aria-label") == ["loss", "lr"] and page.values("class").count("legend") == 2
    assert (page.tags.count("polyline"), page.tags.count("circle"), page.tags.count("img")) == (1, 2, 0)
    assert ["first 1" in words for words in page.words].count(True) == 1


# ---- writing --------------------------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_out_of_json_does_not_lose_the_page(tmp_path: Path) -> None:
    report = Report("Odd")
    report.text("before \ud800 after")
    assert "before ? after" in "".join(written(report, tmp_path).words)


def fail_to_replace(source: Any, target: Any) -> None:
    raise OSError("disk full")


def fail_half_way(self: Path, text: str, **options: Any) -> None:
    self.write_bytes(text[: len(text) // 2].encode())
    raise OSError("disk full")


@pytest.mark.parametrize(("target", "failure"), [(os, fail_to_replace), (Path, fail_half_way)])
def test_a_failed_write_keeps_the_old_page_and_leaves_nothing_else(
    target: Any, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Report("old").write(tmp_path / "report.html")
    old = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr(target, "replace" if target is os else "write_text", failure)
    with pytest.raises(OSError, match="disk full"):
        Report("new").write(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == old


def test_the_folder_is_made_and_the_page_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.html"
    Report("first").write(path)
    Report("second").write(path)
    assert "second" in path.read_text() and "first" not in path.read_text()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_drawn_result_is_a_picture_whatever_the_answers_say(tmp_path: Path) -> None:
    history = {"run": [{"step": 1, "loss": 1.0}]}
    rows = [answer(said, images=1) for said in HOSTILE]
    draw_result(
        tmp_path / "a" / "result.png", history, {"read": rows[:5], "more": rows[5:], "few": [answer(images=2)]}
    )
    with Image.open(tmp_path / "a" / "result.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > image.height > 100
    draw_result(tmp_path / "b.png", history, {"dollars": [answer("$x_{$"), answer("$\\frac$")]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.png"]
