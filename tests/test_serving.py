"""hfcustom lint-serving: each broken class is caught by its rule alone, at its line; clean ones pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from serving_zoo import BROKEN, CLEAN

from hfcustom import cli
from hfcustom.serving import command, replay
from hfcustom.serving.finding import RULES
from hfcustom.serving.target import Served, find_target, of_class

ZOO = Path(__file__).with_name("serving_zoo.py")
WARNED = {"janus", "minicpmv4_6", "mllama"}  # whose stock class or processor this backend does not take


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_class_is_caught_by_its_rule_alone_and_at_its_line(name: str) -> None:
    rule, model_class = BROKEN[name]
    findings = command.look(of_class(model_class))
    assert [finding.rule for finding in findings] == [rule], [str(finding) for finding in findings]
    (finding,) = findings
    assert finding.place is not None and Path(finding.place.file) == ZOO
    line = ZOO.read_text().splitlines()[finding.place.line - 1]
    assert line.endswith("# the line"), f"{finding.place}: {line}"
    assert finding.why and finding.cure
    assert finding.level == ("warning" if rule == "parallel" else "error")


def test_every_rule_is_broken_by_someone() -> None:
    assert {rule for rule, _ in BROKEN.values()} == set(RULES)


@pytest.mark.parametrize("model_class", CLEAN, ids=lambda model_class: model_class.__name__)
def test_a_clean_class_passes(model_class: Any) -> None:
    assert not [str(finding) for finding in command.look(of_class(model_class))]


def test_a_family_has_no_error(family: Family) -> None:
    findings = command.look(of_class(family.model_class))
    assert not [str(finding) for finding in findings if finding.level == "error"]
    assert all(finding.place is None for finding in findings)


REPLAYED = set(
    "aria idefics3 internvl janus llava llava_next llava_onevision qwen2_5_vl qwen2_vl smolvlm video_llava".split()
)


def test_a_family_run_as_a_server_runs_it_has_its_logits(family: Family) -> None:
    served = of_class(family.model_class)
    if family.name in REPLAYED:
        assert replay.measured(served) == 0.0
        return
    try:
        assert replay.measured(served) <= 2e-5
    except replay.CannotReplay:
        assert "not run" in command.was_replayed(served)


def test_a_change_inside_is_really_served() -> None:
    """The attention and features of the inner class are in what was run: without them the logits are others."""
    careful = next(model_class for model_class in CLEAN if model_class.__name__ == "WithCareful")
    served = of_class(careful)
    assert replay.measured(served) <= 2e-5
    inputs = replay.inputs_for(served)
    torch.manual_seed(0)
    model = careful(served.config).eval()
    with torch.no_grad():
        before = replay.serve(model, inputs)
        model.model.brightness.gain.fill_(3.0)
        assert (replay.serve(model, inputs) - before).abs().max() > 1e-3


def test_the_seams_are_told_apart() -> None:
    fates = {name: command.seams(of_class(BROKEN[name][1])) for name in ("OutsideStates", "OutsideConnector")}
    assert fates["OutsideStates"]["hidden states"].startswith("lost: transform_hidden_states")
    assert fates["OutsideStates"]["connector"] == "as stock"
    assert fates["OutsideConnector"]["connector"].startswith("lost: 'average_pool'")
    careful = next(model_class for model_class in CLEAN if model_class.__name__ == "WithCareful")
    assert command.seams(of_class(careful))["inner model"] == "survives: Careful is built by the server"


def test_a_correction_of_stock_is_lost(families: dict[str, Family]) -> None:
    mllama = families["mllama"]
    config = mllama.module.tiny_config()
    config.mask_text_rows = True
    findings = [finding for finding in command.look(Served(mllama.model_class, config)) if finding.level == "error"]
    assert [finding.rule for finding in findings] == ["inner-model"] and "mask_text_rows=True" in findings[0].what


def test_a_checkpoint_of_a_model_type_that_no_server_knows(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path / "own")
    findings = command.look(find_target(str(tmp_path / "own")))
    assert [finding.rule for finding in findings] == ["auto-map"] and "model_type 'custom_internvl'" in findings[
        0
    ].what
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    internvl.processor.save_pretrained(tmp_path / "stock")
    assert not command.look(find_target(str(tmp_path / "stock")))


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{ZOO}:OutsideStates"
    assert cli.main(["lint-serving", target]) == 1
    printed = capsys.readouterr().out
    assert "inner-model" in printed and "serving_zoo.py:" in printed and "1 errors, 0 warnings" in printed
    assert "seam     hidden states       lost" in printed and "hfcustom export" not in printed.partition("seam")[2]
    assert cli.main(["lint-serving", target, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["findings"][0]["rule"] == "inner-model" and content["export"] is False
    assert cli.main(["lint-serving", f"{ZOO}:OwnLoss"]) == 0
    assert "`hfcustom export` makes a checkpoint of the stock class" in capsys.readouterr().out
    assert cli.main(["lint-serving", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RULES)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("intervl", "Did you mean 'internvl'?"),
        ("./nowhere", "There is no folder ./nowhere"),
        (f"{ZOO}:Gain", "no model class of transformers"),
        ("./mine.py", "'./mine.py' is a file; name the class in it as well: ./mine.py:MyModel."),
        ("siglip", "CustomSiglipModel is a contrastive encoder, which generates nothing"),
        (f"{ZOO}:torch", "is no class but of type module"),
        (f"{ZOO}:Nobody", "Unknown model 'Nobody'"),
    ],
)
def test_what_is_no_target_is_said(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lint-serving", target]) == 2
    assert message in capsys.readouterr().err
