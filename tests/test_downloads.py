"""Pictures at addresses: kept in a folder, fetched once, and read by rows, preflight, lens and training like any other."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Family, picture
from huggingface_hub import constants
from source_files import numbered, write_jsonl
from web import PNG, Site, serving

import hfcustom
from hfcustom.cli import main
from hfcustom.data import fetch as fetch_module
from hfcustom.data.downloads import Downloads, default_folder, make_downloads
from hfcustom.data.images import ImageError, load_image
from hfcustom.data.messages import RowError
from hfcustom.data.sources import load_rows


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch_module, "sleep", lambda seconds: None)
    with serving() as found:
        yield found


def kept(site: Site, folder: Path) -> Downloads:
    found = make_downloads([site.host], folder)
    assert found is not None
    return found


def row(number: int, *images: str) -> dict[str, Any]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": f"Number {number}."}
    return {"messages": [{"role": "user", "content": content}, answer], "images": list(images)}


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_picture_is_fetched_once_for_all_who_ask(site: Site, tmp_path: Path) -> None:
    first = kept(site, tmp_path / "a")
    assert first(site.url()) == first(site.url() + "#part") == kept(site, tmp_path / "a")(site.url()) == PNG
    assert pickle.loads(pickle.dumps(first))(site.url()) == PNG
    assert site.paths() == ["/ok.png"]


def test_the_same_picture_at_two_addresses_is_kept_once(site: Site, tmp_path: Path) -> None:
    for path in ("ok.png", "ok.png?2"):
        assert kept(site, tmp_path)(site.url(path)) == PNG
    assert len(list(tmp_path.glob("addresses/*/*.json"))) == 2
    (picture,) = tmp_path.glob("pictures/*/*")
    assert picture.read_bytes() == PNG


def test_several_at_once_fetch_it_once(site: Site, tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(kept(site, tmp_path)(site.url("short.png")))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [PNG] * 4
    assert site.paths() == ["/short.png"] * 3  # the attempts of one


def test_what_is_kept_needs_no_network(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = kept(site, tmp_path)
    downloads(site.url())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert downloads(site.url()) == PNG
    with pytest.raises(
        ImageError, match="other.png' is not in .*HF_HUB_OFFLINE=1 forbids to fetch it; fetch the images"
    ):
        downloads(site.url("other.png"))


def test_a_process_asks_for_what_failed_no_second_time(site: Site, tmp_path: Path) -> None:
    downloads = kept(site, tmp_path)
    told = []
    for _ in range(2):
        with pytest.raises(ImageError, match="status 404") as caught:
            downloads(site.url("gone.png"))
        told.append((str(caught.value), caught.value.code))
    assert told[0] == told[1] and site.paths() == ["/gone.png"]


@pytest.mark.parametrize("damage", ["picture", "record", "gone", "deep", "pipe", "huge"])
def test_a_damaged_file_is_fetched_again(damage: str, site: Site, tmp_path: Path) -> None:
    downloads = kept(site, tmp_path)
    downloads(site.url())
    (record,), (file,) = tmp_path.glob("addresses/*/*.json"), tmp_path.glob("pictures/*/*")
    if damage == "gone":
        file.unlink()
    elif damage == "deep":
        record.write_text("[" * 100_000)
    elif damage == "pipe":
        record.unlink()
        os.mkfifo(record)  # nobody will ever write into it
    elif damage == "huge":
        os.truncate(file, 2**40)  # of which nothing is on the disk
    else:
        damaged = file if damage == "picture" else record
        damaged.write_bytes(damaged.read_bytes()[:-3])
    assert downloads(site.url()) == PNG
    assert downloads(site.url()) == PNG
    assert site.paths() == ["/ok.png"] * 2


@pytest.mark.parametrize(
    ("path", "reason"), [("page.html", "no readable BMP.*first bytes are b'<html>Sign"), ("cut.png", "damaged")]
)
def test_what_is_no_picture_is_not_kept(path: str, reason: str, site: Site, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ImageError, match=rf"image '{site.url(path)}' is no readable.*{reason}|{reason}"):
            kept(site, tmp_path)(site.url(path))
    assert not list(tmp_path.glob("pictures/*/*")) + list(tmp_path.glob("addresses/*/*"))
    assert len(site.seen) == 2


def test_a_host_that_is_no_longer_listed_is_refused_though_kept(site: Site, tmp_path: Path) -> None:
    kept(site, tmp_path)(site.url())
    other = make_downloads(["cdn.example.org"], tmp_path)
    assert other is not None
    with pytest.raises(ImageError, match="none of the allowed hosts"):
        other(site.url())


def test_a_folder_that_cannot_be_used_is_no_fault_of_the_row(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    data = write_jsonl(tmp_path / "rows.jsonl", row(0, site.url()))
    rows = load_rows(data, image_hosts=[site.host], image_downloads=tmp_path / "file")
    with pytest.raises(RuntimeError, match="cannot be used: .*name another folder as image_downloads"):
        rows[0]


def test_the_folder_is_the_hubs_unless_named() -> None:
    assert default_folder() == Path(constants.HF_HOME) / "hfcustom" / "images"
    assert make_downloads([]) is None
    with pytest.raises(ValueError, match="image_downloads='x' has no effect without image_hosts"):
        make_downloads([], "x")


# ---- images that hold themselves ------------------------------------------------------------------------------------


def test_a_data_url_holds_its_image() -> None:
    data = base64.b64encode(PNG).decode()
    for head in ("data:image/png;base64,", "DATA:;BASE64,"):
        assert load_image(head + data).size == (40, 30)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,####", "is no base64: .*Encode its bytes anew"),
        ("data:image/png,abc", "is no 'data:image/png;base64,...'"),
        ("data:", "is no 'data:image/png;base64,...'"),
        ("data:text/html;base64," + base64.b64encode(b"<html>").decode(), "is no readable BMP"),
    ],
)
def test_a_wrong_data_url_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(url)


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows_at(site: Site, tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    data = write_jsonl(tmp_path / "rows.jsonl", *rows)
    return load_rows(data, image_hosts=[site.host], image_downloads=tmp_path / "kept", **options)


def test_rows_read_pictures_at_addresses_beside_files(site: Site, tmp_path: Path) -> None:
    picture(9).save(tmp_path / "own.png")
    inline = {"messages": [{"role": "user", "content": [{"type": "image", "url": site.url()}, "What?"]}]}
    inline["messages"].append({"role": "assistant", "content": "Number 1."})
    rows = rows_at(site, tmp_path, row(0, site.url(), "own.png"), inline)
    assert [[image.size for image in rows[at].images] for at in range(2)] == [[(40, 30), picture(9).size], [(40, 30)]]


def test_all_ways_to_read_rows_know_the_hosts(site: Site, tmp_path: Path) -> None:
    data = {write_jsonl(tmp_path / f"{name}.jsonl", row(at, site.url())): 1.0 for at, name in enumerate("ab")}
    options: dict[str, Any] = {"image_hosts": [site.host], "image_downloads": tmp_path / "kept"}
    assert [example.images[0].size for example in load_rows(data, **options)] == [(40, 30)] * 2
    stream = load_rows(data, streaming=True, **options)
    assert [part.fetch is not None for part in stream.parts().values()] == [True, True]
    folder = write_jsonl(tmp_path / "folder" / "metadata.jsonl", {"file_name": site.url(), "text": "Green."})
    assert load_rows(Path(folder).parent, **options)[0].images[0].size == (40, 30)
    assert site.paths() == ["/ok.png"]


def test_frames_may_be_at_addresses_and_a_video_may_not(site: Site, tmp_path: Path) -> None:
    ask = {"role": "user", "content": [{"type": "video"}, "What?"]}
    film = {"messages": [ask, {"role": "assistant", "content": "Number 0."}], "videos": [[site.url(), site.url()]]}
    rows = rows_at(site, tmp_path, film, {**film, "videos": [site.url("a.mp4")]})
    assert [frame.size for frame in rows[0].videos[0]] == [(40, 30)] * 2
    with pytest.raises(RowError, match="line 2, video 0: '.*a.mp4' is a URL; none is fetched"):
        rows[1]


@pytest.mark.parametrize(
    ("path", "code"), [("gone.png", "fetch"), ("page.html", "undecodable"), ("to?https://evil.org/a.png", "url")]
)
def test_a_failure_is_one_of_the_row(path: str, code: str, site: Site, tmp_path: Path) -> None:
    from hfcustom.data.findings import Finding

    rows = rows_at(site, tmp_path, numbered(0), row(1, site.url(path)))
    with pytest.raises(RowError, match=r"rows.jsonl, line 2, image 0: ") as caught:
        rows[1]
    found = Finding.of(caught.value, rows.name_of(1))
    assert (found.field, found.code) == ("image 0", code)
    assert site.url(path).partition("?")[0] in found.reason


def test_without_hosts_the_message_names_the_flag(tmp_path: Path) -> None:
    rows = load_rows(write_jsonl(tmp_path / "rows.jsonl", row(0, "https://cdn.example.org/a.png")))
    with pytest.raises(RowError, match="is a URL; none is fetched. Name its host in image_hosts .--image-hosts."):
        rows[0]


# ---- commands and training ------------------------------------------------------------------------------------------


def test_preflight_fetches_and_names_what_cannot_be_had(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", row(0, site.url()), row(1, site.url("gone.png")), row(2, site.url()))
    command = ["preflight", data, "--image-hosts", site.host, "--image-downloads", str(tmp_path / "kept")]
    assert main([*command, "--output", str(tmp_path / "bad.jsonl"), "--json", "--max-bad-share", "0.5"]) == 1
    found = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["row"], line["code"]) for line in found if line["severity"] == "error"] == [
        ("rows.jsonl, line 2", "fetch")
    ]
    assert json.loads(capsys.readouterr().out)["rows"]["bad"] == 1
    assert site.paths() == ["/ok.png", "/gone.png"]


@pytest.mark.parametrize("options", [["--image-hosts", "*"], ["--image-downloads", "x"]])
def test_a_wrong_list_ends_the_command(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", numbered(0))
    assert main(["preflight", data, *options]) == 2
    assert "image_hosts" in capsys.readouterr().err


def test_lens_shows_a_row_with_an_address(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lens", "--family", "internvl", "--image-downloads", str(tmp_path), "--json"]
    asked = ["--image", site.url(), "--question", "What?", "--answer", "Green."]
    assert main([*command, *asked, "--image-hosts", site.host]) == 0
    assert json.loads(capsys.readouterr().out)[0]["images"][0]["size"] == [40, 30]
    assert main([*command, *asked, "--image-hosts", "cdn.example.org"]) == 2
    assert "none of the allowed hosts (cdn.example.org)" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
def test_training_on_addresses_equals_training_on_files(
    cached: bool, families: dict[str, Family], site: Site, tmp_path: Path
) -> None:
    family = families["internvl"]
    (tmp_path / "own.png").write_bytes(PNG)
    sources = {"own": "own.png", "web": site.url()}
    weights = {}
    for name, source in sources.items():
        rows = rows_at(site, tmp_path / name, *(row(at, source) for at in range(3)), row(3, site.url("gone.png")))
        shutil.copy(tmp_path / "own.png", tmp_path / name / "own.png")
        config = hfcustom.TrainConfig(
            output_dir=str(tmp_path / name / "run"),
            max_steps=4,
            batch_size=2,
            on_bad_row="skip",
            max_bad_share=0.5,
            cache_images=str(tmp_path / name / "cache") if cached else None,
        )
        model = family.model()
        result = hfcustom.fit(model, family.processor, rows, config)
        weights[name] = {key: value.clone() for key, value in model.state_dict().items()}
        (bad,) = (tmp_path / name / "run" / "bad_rows.jsonl").read_text().splitlines()
        assert json.loads(bad)["code"] == "fetch"
        assert result.step == 4
    assert all((weights["own"][key] == value).all() for key, value in weights["web"].items())
    assert site.paths().count("/ok.png") == 1


def test_a_run_goes_on_without_the_network_as_if_nothing_had_been(
    families: dict[str, Family], site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading processes and epochs share the folder; a run resumed offline ends like one that was not interrupted."""
    family = families["internvl"]
    rows = rows_at(site, tmp_path, *(row(at, site.url(f"ok.png?{at}")) for at in range(4)))
    ends = []
    for name, stops in {"whole": [4], "resumed": [2, 4]}.items():
        for stop in stops:
            model = family.model()
            fixed = {"batch_size": 2, "num_workers": 2, "schedule": "constant", "resume": stop > stops[0]}
            config = hfcustom.TrainConfig(output_dir=str(tmp_path / name), max_steps=stop, **fixed)  # type: ignore[arg-type]
            hfcustom.fit(model, family.processor, rows, config)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        ends.append(model.state_dict())
    assert all((ends[1][key] == value).all() for key, value in ends[0].items())
    assert sorted(site.paths()) == [f"/ok.png?{at}" for at in range(4)]
