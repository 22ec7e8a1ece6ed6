"""Checkpoints that releases have written: the present version loads each and goes on as the release itself did."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from golden_run import CUT, GOLDEN, STEPS, WAYS, curve, train, write

import hfcustom

FOLDERS = sorted(GOLDEN.glob("checkpoint-*"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("golden", FOLDERS, ids=lambda folder: folder.name)
def test_a_releases_checkpoint_goes_on(
    golden: Path, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"step-{CUT:06d}"
    shutil.copytree(golden / way / checkpoint, tmp_path / "checkpoints" / checkpoint)
    result = train(way, golden, tmp_path, resume=True)
    assert f"{checkpoint}, step {CUT}." in capsys.readouterr().out and result.step == STEPS
    expected, found = json.loads((golden / way / "expected.json").read_text()), curve(result)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    for then, now in zip(expected, found, strict=True):  # other machines round otherwise
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-4)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-2)


def test_this_release_has_one() -> None:
    if re.fullmatch(r"[\d.]+", hfcustom.__version__):  # else it is on the way to one
        assert f"checkpoint-{hfcustom.__version__}" in {folder.name for folder in FOLDERS}, (
            "python tests/golden_run.py writes it"
        )
    for folder in FOLDERS:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 300_000


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(FileExistsError):
        write(tmp_path / "checkpoint")
