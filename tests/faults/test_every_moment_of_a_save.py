"""A save that is cut at any of its changes to the disk: killed, out of space, or without power. A good checkpoint is there always."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from disk import Faulty, Killed, no_space
from torch import nn
from training import short_config, uneven_rows

from hfcustom import commit
from hfcustom.data.feed import Feed
from hfcustom.exits import ConfigError, SaveError
from hfcustom.runs import folder as run_folder
from hfcustom.train import make_optimizer
from hfcustom.training import checkpoint


class Saves:
    """A run's checkpoints without the run: `save(step)` writes weights that are that number."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        config = short_config(folder, max_steps=9, save_steps=1, batch_size=4, **options)
        self.model = tiny_run.build(tiny_run.Run())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.model, config)
        accelerator = Accelerator()
        feed = Feed(uneven_rows(), config, accelerator)
        self.state = checkpoint.Checkpoints(
            config, accelerator, self.model, optimizer, tiny_run.FAMILY.processor, feed
        )

    def fill(self, value: float) -> None:
        for parameter in self.trained:
            nn.init.constant_(parameter, value)

    def save(self, step: int) -> None:
        self.fill(step)
        self.state.save(step, [{"step": step}], [])

    def resume(self) -> int:
        """Resume, and see that the weights are those of the step."""
        self.fill(-1)
        step = self.state.resume()
        if step:
            assert all(bool((p == step).all()) for p in self.trained) and self.state.history == [{"step": step}]
        return step


@pytest.fixture(scope="module")
def resuming(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory.mktemp("saves") / "run", resume=True)


@pytest.fixture(scope="module")
def one_save(resuming: Saves, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint."""
    resuming.save(1)
    place = tmp_path_factory.mktemp("start")
    shutil.copytree(resuming.folder, place, dirs_exist_ok=True)
    return place


@pytest.fixture(params=[1, 2], ids=lambda keep: f"keep {keep}")
def saves(request: pytest.FixtureRequest, resuming: Saves, one_save: Path) -> Iterator[Saves]:
    """The run again at its first checkpoint."""
    shutil.rmtree(resuming.folder)
    shutil.copytree(one_save, resuming.folder)
    resuming.state.config.keep_checkpoints = request.param
    yield resuming
    resuming.state.config.keep_checkpoints = 2


def changes_of(saves: Saves) -> list[tuple[str, str]]:
    """Return the changes to the disk of one save, the second of the run."""
    with pytest.MonkeyPatch.context() as patch:
        faulty = Faulty(saves.folder)
        faulty.install(patch)
        saves.save(2)
    return faulty.log


def again(saves: Saves, one_save: Path) -> None:
    shutil.rmtree(saves.folder)
    shutil.copytree(one_save, saves.folder)


def valid(saves: Saves) -> list[str]:
    return [path.name for path in checkpoint.complete_checkpoints(saves.state.folder) if commit.manifest_holds(path)]


def test_a_save_killed_at_any_change_leaves_a_checkpoint_to_resume_from(saves: Saves, one_save: Path) -> None:
    count, resumed = len(changes_of(saves)), set()
    assert count > 20
    for at in range(count):
        again(saves, one_save)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            faulty = Faulty(saves.folder, at)
            faulty.before = lambda: valid(saves) or pytest.fail("no valid checkpoint at this moment")
            faulty.install(patch)
            saves.save(2)
        resumed.add(saves.resume())
        assert not list(saves.state.folder.glob(".*")), "what the killed run left is cleared"
        saves.save(3)
        assert saves.resume() == 3
    assert resumed == {1, 2}


def test_a_disk_that_is_full_at_any_write_is_told_and_costs_no_checkpoint(saves: Saves, one_save: Path) -> None:
    count, told = len(changes_of(saves)), 0
    for at in range(count):
        again(saves, one_save)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(saves.folder, at, no_space)
            faulty.install(patch)
            try:
                saves.save(2)
            except SaveError as error:
                told += 1
                assert "disk full: need " in str(error) and "have " in str(error) and "step-00000" in str(error)
                assert error.exit_code == 6
            except OSError as error:  # deleting, which needs no room
                assert error.errno == errno.ENOSPC
        assert valid(saves)
        assert saves.resume() in (1, 2)
    assert told > 10


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_deletion(saves: Saves) -> None:
    log = changes_of(saves)
    partial, target = (str(saves.state.folder / name) for name in (".step-000002.partial", "step-000002"))
    renamed = log.index(("rename", partial))
    flushed = {path for name, path in log[:renamed] if name == "fsync"}
    written = {path.replace(".step-000002.partial", "step-000002") for path in flushed}
    present = [str(path) for path in Path(target).rglob("*")]
    assert {*present, target} == written
    last_write = max(at for at, (name, path) in enumerate(log) if name in ("open", "save_file") and partial in path)
    first_flush = min(at for at, (name, path) in enumerate(log) if name == "fsync" and path == partial)
    assert last_write < first_flush
    assert log[renamed + 1] == ("fsync", str(saves.state.folder))
    deleted = [at for at, (_, path) in enumerate(log) if "step-000001" in path]
    assert all(at > renamed + 1 for at in deleted)


def test_files_that_never_reached_the_disk_are_found(saves: Saves, one_save: Path) -> None:
    """A power cut may leave a renamed folder with any of its files empty, had they not been flushed."""
    for path in sorted(path for path in (one_save / "checkpoints" / "step-000001").rglob("*") if path.is_file()):
        again(saves, one_save)
        saves.save(2)
        torn = saves.state.folder / "step-000002" / path.relative_to(one_save / "checkpoints" / "step-000001")
        torn.write_bytes(b"")
        if saves.state.config.keep_checkpoints > 1:
            assert saves.resume() == 1


def test_what_will_not_fit_is_told_before_the_first_step(resuming: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    one = resuming.state.bytes
    assert (
        0.7
        < one / sum(path.stat().st_size for path in tiny_run.newest(resuming.folder).rglob("*") if path.is_file())
        < 30
    )
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 2 * one - 1)
    run_folder.check_room(resuming.folder, one, present=1, to_come=9, keep=1)
    with pytest.raises(ConfigError, match=r"disk full: 3 checkpoints need .* have .*--keep-checkpoints 2"):
        run_folder.check_room(resuming.folder, one, present=0, to_come=9, keep=2)


def test_a_file_that_may_not_grow_any_further_is_a_full_disk(tmp_path: Path) -> None:
    """A limit of the process on the size of files, as a quota has: the error comes out of safetensors itself."""
    import resource

    saves = Saves(tmp_path)
    saves.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(SaveError, match=r"disk full: need .* step 2, have .*step-000001; continue with --resume"):
            saves.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert valid(saves) == ["step-000001"]
    assert [path.name for path in saves.state.folder.iterdir()] == ["step-000001"]
    assert torch.isfinite(saves.trained[0]).all()
