"""The change card as it is used: its snippet in a process of its own, and `hfcustom card` for every kind of target."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT, Family
from test_card import card_file, saved, snippet  # noqa: F401

from hfcustom import cli
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.naming import load_object
from hfcustom.registry import REGISTERED


def test_the_snippet_runs_in_a_clean_process(internvl: Family, tmp_path: Path, my_file: Path) -> None:
    model = internvl.model(load_object(f"{my_file}:MyVLM"))
    text = saved(model, tmp_path / "model")
    model.match_processor(internvl.module.tiny_processor()).save_pretrained(tmp_path / "model")
    program = snippet(text) + "print(type(model).__name__, type(processor).__name__)\n"
    paths = f"{tmp_path}:{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths, "PATH": ""}
    done = forked.run([sys.executable, "-c", program], cwd=tmp_path / "model", env=environment)
    assert (done.returncode, done.stdout) == (0, "MyVLM CustomInternVLProcessor\n"), done.stderr


def test_a_bundle_s_snippet_trusts_its_code(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.config.auto_map = {"AutoConfig": "code.Config"}
    text = snippet(saved(model, tmp_path))
    assert "from_pretrained(folder, trust_remote_code=True)" in text
    assert "import hfcustom" not in text


def test_the_command_prints_what_was_saved(
    internvl: Family, tmp_path: Path, my_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = internvl.model(load_object(f"{my_file}:MyVLM"))
    text = saved(model, tmp_path / "model")
    custom = ["--custom", f"{my_file}:MyVLM"]
    assert cli.main(["card", str(tmp_path / "model"), *custom]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["card", f"{my_file}:MyVLM"]) == 0
    assert "This is of the class alone, with the sizes of OpenGVLab/" in capsys.readouterr().out
    assert cli.main(["card", "internvl", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stock_class"] == "InternVLForConditionalGeneration"
    (tmp_path / "model" / "README.md").unlink()
    assert cli.main(["card", str(tmp_path / "model"), *custom, "--write"]) == 0
    assert (tmp_path / "model" / "README.md").read_text() == text
    (tmp_path / "model" / "README.md").write_text("Mine.\n")
    assert cli.main(["card", str(tmp_path / "model"), *custom, "--write"]) == 1
    assert "is your own and stays" in capsys.readouterr().err


def test_the_card_of_a_stock_folder_names_the_folder(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    assert cli.main(["card", str(tmp_path / "stock")]) == 0
    assert "Its weights began as stock (a local folder)." in capsys.readouterr().out


@pytest.mark.parametrize("name", encoder_names())
def test_the_command_knows_encoders_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = saved(REGISTERED[f"custom_{name}"](load_encoder(name).tiny_config()), tmp_path)
    assert cli.main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("internvll", "Unknown family 'internvll'. Did you mean 'internvl'?"),
        ("./nowhere", "There is no folder ./nowhere"),
        ("missing.py:MyVLM", "there is no file"),
        ("{file}", "is a file; name the class in it as well: "),
        ("{folder}", "holds no config.json. Do you mean"),
        ("{file}:one", "is no class but of type CLIPConfig; name the class of the model"),
        ("{file}:CLIPConfig", "CLIPConfig is no custom model: a subclass of a family or an encoder of hfcustom"),
    ],
)
def test_what_is_no_target_is_named(
    target: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"no_target_of_a_card_{len(said)}.py"  # a name is imported once
    file.write_text("from transformers import CLIPConfig\none = CLIPConfig()\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert cli.main(["card", target.format(file=file, folder=tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_an_encoder_by_name_and_a_class_without_a_family_have_cards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["card", "clip"]) == 0
    assert "with the sizes of openai/clip-vit-base-patch32" in capsys.readouterr().out
    file = tmp_path / "without_a_family.py"
    file.write_text(WITHOUT_FAMILY)
    assert cli.main(["card", f"{file}:WithoutFamily"]) == 0
    assert "with the sizes of WithoutFamilyConfig's defaults" in capsys.readouterr().out


WITHOUT_FAMILY = """
import hfcustom
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
class WithoutFamilyConfig(CustomConfig, LlavaConfig):
    model_type = "without_family"
@hfcustom.register
class WithoutFamily(CustomVLM, LlavaForConditionalGeneration):
    config_class = WithoutFamilyConfig
    processor_class = LlavaProcessor
"""
