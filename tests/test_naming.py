"""Names: the nearest match, snake_case, and objects out of a file of the user's own."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfcustom.naming import import_file, load_object, snake_case, unknown


@pytest.fixture(autouse=True)
def restore_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "naming_subject.py"
    path.write_text("import json\nclass Reader:\n    pass\n_hidden = 1\nNUMBER = 3\n")
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PairPool", "pair_pool"),
        ("MyInternVL", "my_intern_vl"),
        ("VLMReader", "vlm_reader"),
        ("Reader", "reader"),
        ("already_snake", "already_snake"),
        ("Pool2x2", "pool2x2"),
        ("Idefics3Reader", "idefics3_reader"),
        ("HTTPServerV2", "http_server_v2"),
    ],
)
def test_snake_case(name: str, expected: str) -> None:
    assert snake_case(name) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("loss", "focall", ["z_loss", "focal"]),
            "Unknown loss 'focall'. Did you mean 'focal'? Allowed: focal, z_loss.",
        ),
        (("loss", "xyz", ["focal"]), "Unknown loss 'xyz'. Allowed: focal."),
        (("key", 3, {"lr": 1, "3d": 2}), "Unknown key 3. Did you mean '3d'? Allowed: 3d, lr."),
        (("part", "x", []), "Unknown part 'x'. Allowed: nothing."),
        (("part", None, ["a"], "Name one."), "Unknown part None. Allowed: a. Name one."),
    ],
)
def test_unknown_names_value_nearest_allowed_and_cure(arguments: tuple, expected: str) -> None:
    assert unknown(*arguments) == expected


def test_an_object_is_loaded_from_a_file_once(file: Path) -> None:
    reader = load_object(f"{file}:Reader")
    assert reader.__module__ == "naming_subject"
    assert load_object(f"{file}:Reader") is reader
    assert load_object(f"{file}:NUMBER") == 3
    assert import_file(file) is sys.modules["naming_subject"]


def test_a_module_that_is_no_longer_known_by_its_name_is_not_taken(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiprocessing keeps as __mp_main__ what runpy ran as __main__."""
    stale = types.ModuleType("__main__")
    stale.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "__mp_main__", stale)
    assert import_file(file).__name__ == "naming_subject"


def test_another_spelling_of_the_path_is_the_same_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = load_object(f"{file}:Reader")
    monkeypatch.chdir(file.parent)
    assert load_object("naming_subject.py:Reader") is reader
    assert load_object("./naming_subject.py:Reader") is reader


def test_a_file_that_is_imported_already_is_not_run_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    import naming_subject  # type: ignore[import-not-found]

    assert load_object(f"{file}:Reader") is naming_subject.Reader


@pytest.mark.parametrize(
    "spec", ["Reader", "module:Reader", "file.py", "file.py:", "file.py:two words", ":Reader", ""]
)
def test_a_malformed_spec_is_told_the_form(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"custom model '{spec}' is not of the form path/to/file.py:Name"):
        load_object(spec, "custom model")


def test_a_missing_file_and_a_missing_name_are_named(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"loss 'gone.py:Reader': there is no file .*gone.py"):
        load_object("gone.py:Reader", "loss")
    with pytest.raises(
        AttributeError, match=r"naming_subject.py: Unknown loss 'Raeder'. Did you mean 'Reader'\? Allowed:"
    ):
        load_object(f"{file}:Raeder", "loss")
    with pytest.raises(AttributeError) as error:
        load_object(f"{file}:Raeder", "loss")
    assert "_hidden" not in str(error.value)


def test_a_file_named_like_another_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("Reader = 1\n")
    with pytest.raises(ImportError, match=r"cannot be imported as 'json': that name is taken by .*Rename the file"):
        load_object(f"{tmp_path / 'json.py'}:Reader")


def test_a_file_that_fails_leaves_no_half_of_a_module(tmp_path: Path) -> None:
    broken = tmp_path / "naming_broken.py"
    broken.write_text("Reader = 1\nraise RuntimeError('at import')\n")
    with pytest.raises(RuntimeError, match="at import"):
        load_object(f"{broken}:Reader")
    assert "naming_broken" not in sys.modules
    broken.write_text("Reader = 2\n")
    assert load_object(f"{broken}:Reader") == 2
