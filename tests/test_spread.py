"""Tensors spread over files: about equally large, in order, read whole, and by transformers' loader; shards are in test_sharding.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hfcustom.commit import sha256
from hfcustom.distributed import spread
from hfcustom.distributed.spread import Spread, plan_files, write_spread

TENSORS = {f"layer.{at}": torch.arange(float(100 * (at % 3) + 1)) for at in range(9)} | {"step": torch.tensor(3.0)}


@pytest.mark.parametrize("ranks", [1, 2, 4, 64])
def test_each_tensor_is_in_one_file_and_files_are_about_equally_large(ranks: int) -> None:
    files = plan_files(TENSORS, "model", ranks)
    assert [name for names in files.values() for name in names] == list(TENSORS)
    assert len(files) == min(ranks, len(files)) and all(files.values())
    assert list(files)[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    sizes = [sum(4 * TENSORS[name].numel() for name in names) for names in files.values()]
    assert max(sizes) <= sum(sizes) / len(sizes) + 4 * max(tensor.numel() for tensor in TENSORS.values())


def test_a_rank_holds_no_more_than_a_file_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spread, "FILE_BYTES", 1000)
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
    files, digests = write_spread(TENSORS, tmp_path, "model", alone)  # type: ignore[arg-type]
    assert len(files) > 3 and digests == {path.name: sha256(path) for path in tmp_path.iterdir()}
    found = Spread(sorted(tmp_path.iterdir()))
    assert found.homes.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.shape(name) == tuple(tensor.shape) and torch.equal(found.read_like(name, tensor), tensor)


def test_a_file_that_cannot_be_written_is_an_error_after_all_shards_were_given(tmp_path: Path) -> None:
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
    with pytest.raises(Exception, match="No such file"):
        write_spread(TENSORS, tmp_path / "absent", "model", alone)  # type: ignore[arg-type]
