"""Damage to any file of a checkpoint is found before the first step, its file is named, and the checkpoint before is taken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from damage import DAMAGES, kinds_of_files, two_checkpoints, wrongs
from test_every_moment_of_a_save import Saves

QUICK = 150


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Saves, Path]:
    return two_checkpoints(tmp_path_factory.mktemp("damage"))


def test_random_damage_is_found_and_named_and_gives_way(
    good: tuple[Saves, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("DAMAGES", QUICK))
    assert wrongs(*good, count, lambda: capsys.readouterr().out) == []


@pytest.mark.parametrize("file", [*kinds_of_files(), "manifest.json", "stream-0.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_kind_of_damage_to_each_kind_of_file(
    good: tuple[Saves, Path], file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = wrongs(*good, 1, lambda: capsys.readouterr().out, [(damage, file)])
    assert found == []


def test_other_folders_that_look_alike_are_left_alone(good: tuple[Saves, Path]) -> None:
    saves, place = good
    shutil.rmtree(saves.folder)
    shutil.copytree(place, saves.folder)
    for name in ("step-000002.bak", "step-2", "step-best", "notes"):
        (saves.state.folder / name).mkdir()
    assert saves.resume() == 2
    assert {path.name for path in saves.state.folder.iterdir()} >= {"step-000002.bak", "step-2", "step-best", "notes"}
