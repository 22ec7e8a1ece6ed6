"""hfcustom bundle: what it says of what cannot travel, of a model that is another one elsewhere, and of large models."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from bundle_cases import BASE, BODY, save, write_files
from safetensors.torch import load_file

import hfcustom
from hfcustom import cli
from hfcustom.bundle import verify
from hfcustom.bundle.cargo import find_cargo
from hfcustom.bundle.code import Code
from hfcustom.bundle.command import write_bundle
from hfcustom.bundle.folder import fill_folder, license_file
from hfcustom.bundle.modules import import_code, place_of
from hfcustom.bundle.verify import Verdict, _check_names
from hfcustom.families import internvl
from hfcustom.registry import REGISTERED

HEAD = f"import hfcustom, torch\nfrom torch import nn\nfrom hfcustom.families.internvl import {BASE}\n"
MODEL = f"\n@hfcustom.register(model_type='refused')\nclass Refused({BASE}):\n"
PLAIN = f"{MODEL}{BODY}"


def hidden(expression: str, before: str = "") -> str:
    """Return a file whose model adds an expression to the hidden states."""
    method = f"    def transform_hidden_states(self, hidden_states):\n        return hidden_states + {expression}\n"
    return f"{HEAD}{before}{MODEL}{method}"


@pytest.fixture(autouse=True)
def quick_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that load a bundle are forked from one without hfcustom; tests/test_bundle.py starts real ones."""
    monkeypatch.setattr(verify, "subprocess", forked)


@pytest.fixture(autouse=True)
def own_modules() -> Iterator[None]:
    """Forget modules of the same name that another test has imported."""
    path, before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("refused", "helper", "losses_apart"):
            del sys.modules[name]


def prepare(folder: Path, text: str, **others: str) -> tuple[Path, Path]:
    """Write refused.py, save a checkpoint of its class, and return both."""
    files = {"refused.py": text, **{f"{name}.py": other for name, other in others.items()}}
    code = write_files(folder, files)[0]
    (module,), _ = import_code([code])
    return save(module.Refused, folder / "checkpoint"), code


CANNOT = {
    "a file beside it": (
        hidden("SIZE", "from pathlib import Path\nSIZE = len(str(Path(__file__).parent)) * 0.0\n"),
        r"refused.py:5: __file__ is read, which in a bundle is a file in transformers' cache.*register_buffer",
    ),
    "a computed module": (
        hidden("load('math').pi", "import importlib\ndef load(name):\n    return importlib.import_module(name)\n"),
        r"refused.py:6: importlib.import_module\(name\) imports a module by a name that is computed.*from my_module import",
    ),
    "a module by a string": (
        hidden("__import__('helper').one()"),
        r"refused.py:8: __import__\('helper'\) imports .* or one of your own by a string",
    ),
    "a data file": (
        hidden("float(open('table.txt').read())"),
        r"refused.py:8: open\('table.txt'\) names the file .*table.txt, which would not be in the bundle.*model.config",
    ),
    "a family by name": (
        HEAD + "Base = hfcustom.load_family('internvl')." + BASE + MODEL.replace(f"({BASE})", "(Base)") + BODY,
        r"refused.py:4: this needs load_family of hfcustom.families, which imports modules by names that it computes.*Import "
        r"what you use by name \(from hfcustom.families.internvl import",
    ),
    "a docstring that reads as an import": (
        f'{HEAD}{MODEL}    """Use it like this:\n\n    from .another_file import x\n    """\n{BODY}',
        r"refused.py: a line in a docstring .* `from .another_file import ...`.*look for another_file.py.*Reword",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_code_that_cannot_travel_is_refused_with_its_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = CANNOT[kind]
    (tmp_path / "table.txt").write_text("0")
    monkeypatch.chdir(tmp_path)
    checkpoint, code = prepare(tmp_path, text, helper="def one():\n    return 0\n")
    with pytest.raises(ValueError, match=message):
        write_bundle(checkpoint, tmp_path / "out", [code])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_nothing_reaches_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unused = "import importlib\ndef train():\n    return open(__file__), importlib.import_module('x' + 'y'), hfcustom.load_family('a')\n"
    checkpoint, code = prepare(tmp_path, HEAD + unused + PLAIN)
    verdict = write_bundle(checkpoint, "out", [code], how="none")
    assert verdict.facts == ["not verified"] and "importlib" not in (tmp_path / "out/refused.py").read_text()


def test_a_path_of_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, code = prepare(tmp_path, f"{HEAD}WHERE = '{tmp_path}/rows'\n{MODEL}    where = WHERE\n{BODY}")
    with pytest.raises(
        ValueError, match=r"refused.py:5 holds a path of this machine, .*: WHERE = .*environment variable"
    ):
        write_bundle(checkpoint, tmp_path / "out", [code], how="none")
    code.write_text(HEAD + PLAIN)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "my_rows": str(tmp_path / "rows")}))
    with pytest.raises(
        ValueError, match=r"config.json:\d+ holds a path of this machine, .*Take it out of .*checkpoint"
    ):
        write_bundle(checkpoint, tmp_path / "out", [code], how="none")


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    return prepare(tmp_path, HEAD + PLAIN)


def change_config(checkpoint: Path, **values: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


def as_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    shutil.copytree(folder, folder / "model")
    (folder / "config.json").unlink()


def without_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def of_stock(folder: Path) -> None:
    change_config(folder, model_type="internvl")


def of_nobody(folder: Path) -> None:
    change_config(folder, model_type="nobody")


def with_a_strange_loss(folder: Path) -> None:
    change_config(folder, loss={"cross_entropi": 1.0})


def with_a_strange_connector(folder: Path) -> None:
    change_config(folder, connector={"name": "averagepool"})


def lacking_a_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (as_adapter, r"is an adapter \(adapter_config.json\). Merge it into its base first: hfcustom.merge_adapter"),
        (quantised, r"is quantised \(bitsandbytes\).*Bundle the full-precision checkpoint"),
        (without_config, r"holds no config.json. Do you mean .*checkpoint.model\?"),
        (without_weights, r"holds no model.safetensors. Load the model and save it again"),
        (pickled, r"holds only pytorch_model.bin, which runs code when it is read"),
        (without_processor, r"holds no processor.*Refused.processor_class.from_pretrained"),
        (of_stock, r"model_type 'internvl': transformers itself loads it.*MyModel.from_pretrained"),
        (of_nobody, r"model_type 'nobody'.*--code names register .*refused.*; put @hfcustom.register above"),
        (
            with_a_strange_loss,
            r"Unknown loss 'cross_entropi'. Did you mean 'cross_entropy'.*--code my_file.py my_losses.py",
        ),
        (with_a_strange_connector, r"Unknown connector 'averagepool'. Did you mean 'average_pool'"),
        (lacking_a_shard, r"names '../model-1.safetensors', which is not in the folder"),
    ],
)
def test_a_checkpoint_that_is_no_whole_model_is_refused(
    spoil: Any, message: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, code = plain
    spoil(checkpoint)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_bundle(checkpoint, tmp_path / "out", [code], how="none")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_command_line_says_what_is_wrong(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, code = map(str, plain)
    out = tmp_path / "out"
    REGISTERED.pop("refused")
    for arguments, message in (
        (
            [checkpoint, str(out)],
            "model_type 'refused', which no family of hfcustom has. Name the file .*: --code my_file.py.",
        ),
        ([checkpoint, str(out), "--code", "nothing.py"], "There is no file .*nothing.py"),
        ([checkpoint, str(out), "--code", "my.ipynb"], "my.ipynb is a notebook. Write its class into a .py file"),
        ([checkpoint, str(out), "--code", f"{code}:Refused"], "refused.py:Refused: name the file alone"),
        ([checkpoint, str(out), "--code", "my.txt"], "my.txt is no Python file"),
        ([f"{checkpoint}x", str(out), "--code", code], "There is no folder .*checkpointx"),
        (
            [checkpoint, str(tmp_path), "--code", code],
            "is there already and not empty. Delete it, or name another folder",
        ),
    ):
        assert cli.main(["bundle", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_class_in_a_notebook_or_in_a_function_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inside(internvl.CustomInternVLForConditionalGeneration):
        pass

    hfcustom.register(Inside, model_type="inside")
    checkpoint = save(Inside, tmp_path / "checkpoint")
    with pytest.raises(
        ValueError, match=r"Inside is defined inside a function or a class.*Move it to the top of its file"
    ):
        write_bundle(checkpoint, tmp_path / "out")
    monkeypatch.setattr(Inside, "__module__", "__main__")
    with pytest.raises(
        ValueError, match=r"defined in a notebook or a prompt.*%%writefile my_file.py.*--code my_file.py"
    ):
        write_bundle(checkpoint, tmp_path / "out")


def test_files_are_found_as_they_import_each_other(tmp_path: Path) -> None:
    files = write_files(
        tmp_path, {"a/__init__.py": "", "a/b/__init__.py": "", "a/b/c.py": "", "d/e.py": "from .f import g\n"}
    )
    found = {file.relative_to(tmp_path).as_posix(): place_of(file) for file in files}
    assert found["a/b/c.py"] == (tmp_path, "a.b.c")
    assert found["a/b/__init__.py"] == (tmp_path, "a.b")
    assert found["d/e.py"] == (tmp_path, "d.e")


def test_a_model_that_is_another_one_elsewhere_is_not_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its code looks at its own name; exit code 1, and nothing is left."""
    checkpoint, code = prepare(tmp_path, hidden("(0.5 if __name__ == 'refused' else 0.0) * torch.arange(64)"))
    assert cli.main(["bundle", str(checkpoint), str(tmp_path / "out"), "--code", str(code)]) == 1
    printed = capfd.readouterr().out
    assert "FAILED: logits differs by up to " in printed and "FAILED: loss differs" in printed
    assert f"{tmp_path / 'out'} was not written.\n" in printed
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_large_model_is_compared_on_a_small_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a processor that did not follow the connector, which is put right, into a folder that is empty."""
    monkeypatch.setattr("hfcustom.bundle.verify.FULL_BYTES", 0)
    text = HEAD + MODEL + "    default_connector = 'average_pool'\n" + BODY
    checkpoint, code = prepare(tmp_path, text)
    internvl.tiny_processor().save_pretrained(checkpoint)
    (tmp_path / "out").mkdir()
    assert cli.main(["bundle", str(checkpoint), str(tmp_path / "out"), "--code", str(code)]) == 0
    printed = capfd.readouterr().out
    assert "did not follow the model's connector 'average_pool'; that in the bundle does" in printed
    assert "compared on a small copy, since the weights are 0.0 GiB" in printed
    stored = len(load_file(checkpoint / "model.safetensors"))
    assert f"{stored} of {stored} tensors of the weights are in the model that the code builds" in printed
    processor = json.loads((tmp_path / "out/processor_config.json").read_text())
    assert processor["connector"] == {"hidden_size": 64, "name": "average_pool"}
    assert (tmp_path / "out/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_tensors_that_the_code_does_not_build_are_found(tmp_path: Path, plain: tuple[Path, Path]) -> None:
    from safetensors.torch import save_file

    checkpoint, code = plain
    cargo = find_cargo(checkpoint, [code])
    flat = Code(cargo)
    (tmp_path / "bundle").mkdir()
    fill_folder(cargo, flat, tmp_path / "bundle")
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, "strange.weight": torch.ones(1)}, tmp_path / "bundle/model.safetensors", {"format": "pt"})
    verdict = _check_names(cargo, tmp_path / "bundle", Verdict(), flat.user_modules())
    assert verdict.faults == [f"the code builds no tensor 'strange.weight' (1 of {len(tensors) + 1} are not found)"]


def test_the_license_is_found_where_pip_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcustom.bundle.folder.PACKAGE", tmp_path / "hfcustom")

    class Installed:
        files = ()

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed)
    with pytest.raises(FileNotFoundError, match=r"LICENSE is not beside the package.*Install hfcustom again"):
        license_file()
    (tmp_path / "LICENSE").write_text("text")
    assert license_file() == tmp_path / "LICENSE"


# ---- what is local --------------------------------------------------------------------------------------------------


def test_modules_elsewhere_on_the_path_come_along_and_installed_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder on PYTHONPATH is the user's; site-packages is not, unless the model's class is in it."""
    write_files(tmp_path / "lib", {"helper.py": "def one():\n    return 0\n"})
    write_files(tmp_path / "site-packages", {"installed_helper.py": "def two():\n    return 0\n"})
    for folder in ("lib", "site-packages"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    before = "import helper\nfrom installed_helper import two\n"
    checkpoint, code = prepare(tmp_path / "mine", hidden("helper.one() + two()", before))
    flat = Code(find_cargo(checkpoint, [code]))
    assert flat.user_modules() == ["helper", "refused"]
    assert "from . import helper\nfrom installed_helper import two\n" in flat.files["refused.py"]
    (tmp_path / "bundle").mkdir()
    fill_folder(flat.cargo, flat, tmp_path / "bundle")
    assert "installed_helper\n" in (tmp_path / "bundle/requirements.txt").read_text()


def test_a_class_in_an_installed_package_comes_along(tmp_path: Path) -> None:
    checkpoint, code = prepare(tmp_path / "site-packages", HEAD + PLAIN)
    assert Code(find_cargo(checkpoint, [code])).user_modules() == ["refused"]
    assert Code(find_cargo(checkpoint)).user_modules() == ["refused"]  # imported already


def test_a_named_file_of_which_nothing_is_needed_is_left_out_and_said(
    tmp_path: Path, plain: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, code = plain
    (extra,) = write_files(tmp_path / "more", {"losses_apart.py": "def unused():\n    return 1\n"})
    arguments = [str(checkpoint), str(tmp_path / "out"), "--no-verify", "--code", str(code), str(extra)]
    assert cli.main(["bundle", *arguments]) == 0
    assert "Nothing of losses_apart is needed, so it is left out.\n" in capfd.readouterr().out
    assert not (tmp_path / "out/losses_apart.py").exists()


def test_two_modules_never_share_a_file(tmp_path: Path) -> None:
    """`a_b` beside `a.b`, and a module named as the entry file."""
    files = {
        "refused.py": HEAD
        + "import a_b\nfrom a.b import two\nimport modeling_refused as entry\n"
        + PLAIN.replace("hidden_states * torch", "hidden_states * (a_b.one() + two() + entry.three()) * torch"),
        "a_b.py": "def one():\n    return 1\n",
        "a/__init__.py": "",
        "a/b.py": "def two():\n    return 2\n",
        "modeling_refused.py": "def three():\n    return 3\n",
    }
    code = write_files(tmp_path, files)[0]
    (module,), _ = import_code([code])
    try:
        flat = Code(find_cargo(save(module.Refused, tmp_path / "checkpoint"), [code]))
    finally:
        for name in ("a", "a.b", "a_b", "modeling_refused"):
            sys.modules.pop(name, None)
    assert flat.user_modules() == ["a.b", "a_b", "modeling_refused", "refused"]
    assert "return 2" in flat.files["a_b.py"] and "return 1" in flat.files["a_b_2.py"]
    assert (
        "from . import a_b_2 as a_b\nfrom .a_b import two\nfrom . import modeling_refused_2 as entry"
        in flat.files["refused.py"]
    )
    assert (
        "return 3" in flat.files["modeling_refused_2.py"] and "class Refused" not in flat.files["modeling_refused.py"]
    )
