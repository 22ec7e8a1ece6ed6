"""Fingerprints of data: another byte, row or name is seen; another time or place is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import picture
from source_files import numbered

from hfcustom.data import fingerprint
from hfcustom.data.fingerprint import files_fingerprint, rows_fingerprint


@pytest.mark.parametrize("whole", [2**28, 100])
def test_a_file_is_known_by_its_bytes(whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", whole)
    monkeypatch.setattr(fingerprint, "PIECE", 64)
    monkeypatch.setattr(fingerprint, "PIECES", 8)
    content = bytes(range(256)) * 8
    seen = set()
    for at in (None, 0, 10, len(content) - 1):  # the first and the last piece among them
        changed = bytearray(content)
        if at is not None:
            changed[at] ^= 1
        (tmp_path / "a").write_bytes(changed)
        seen.add(files_fingerprint([tmp_path / "a"], tmp_path))
    assert len(seen) == 4
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").write_bytes(changed)
    os.utime(tmp_path / "b" / "a", (1, 1))
    assert files_fingerprint([tmp_path / "b" / "a"], tmp_path / "b") in seen
    (tmp_path / "a").write_bytes(changed[:-1])
    assert files_fingerprint([tmp_path / "a"], tmp_path) not in seen
    (tmp_path / "a").rename(tmp_path / "c")
    assert files_fingerprint([tmp_path / "c"], tmp_path) not in seen


def test_rows_in_memory_are_known_by_their_number_and_words() -> None:
    rows = [{**numbered(at), "images": [picture(at)], "score": at / 2} for at in range(200)]
    same = [{**numbered(at), "images": [picture(at)], "score": at / 2} for at in range(200)]
    assert rows_fingerprint(rows) == rows_fingerprint(same) != rows_fingerprint(rows[:-1])
    assert rows_fingerprint([*rows[:-1], numbered(7)]) != rows_fingerprint(rows)
    assert rows_fingerprint([{**rows[0], "score": 1.0}, *rows[1:]]) != rows_fingerprint(rows)
    assert rows_fingerprint([]) != rows_fingerprint([{}])
