"""hfcustom doctor: healthy models pass, and each broken one is caught by the check that names its fault and by no other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, KINDS, Family
from test_report import HOSTILE, Page
from test_sentinel import edit
from zoo import DRAWN, ZOO

import hfcustom
from hfcustom import cli
from hfcustom.doctor.child import import_class
from hfcustom.doctor.command import line_of, write_page
from hfcustom.doctor.examine import examine
from hfcustom.doctor.finding import CHECKS, Finding, Skipped
from hfcustom.doctor.travel import file_of
from hfcustom.families import load_family
from hfcustom.naming import load_object
from hfcustom.ragged import RaggedImages
from hfcustom.registry import REGISTERED
from hfcustom.testing import check_model

SLOW = ("clean_process", "trainers", "compiled")  # run where they are what is tested
QUICK = [name for name in CHECKS if name not in SLOW]
COSTLY = ("parity", "accumulation", "checkpointing", "lora", "quantized")  # more than all the others: they take turns


HEALTHY = '''
import hfcustom, torch
from torch import nn
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration

@hfcustom.register
class Healthy(CustomInternVLForConditionalGeneration):
    """Three seams, a gate that opens from zero, a connector and two losses."""

    default_connector = "average_pool"
    default_loss = {"cross_entropy": 1.0, "z_loss": 1e-2}

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.text_config.hidden_size, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.post_init()

    def transform_vision_features(self, features):
        return 1.1 * features

    def transform_embeddings(self, embeddings, image_mask):
        return embeddings * (1 + torch.tanh(self.gate(embeddings)))

    def transform_hidden_states(self, hidden_states):
        return 1.2 * hidden_states
'''

USERS_TESTS = """
import hfcustom
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration
from hfcustom.testing import check_model

@hfcustom.register
class Mine(CustomInternVLForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.extra = __import__("torch").nn.Linear(2, 2)
        self.post_init()

    def transform_hidden_states(self, hidden_states):
        return hidden_states

test_mine = check_model(Mine, ["parity", "overrides", "stock_reload"])
"""


def failed(findings: Any) -> dict[str, str]:
    return {finding.check: finding.measured for finding in findings if finding.status == "failed"}


@pytest.mark.parametrize("check", CHECKS)
def test_each_broken_model_is_caught_by_its_check_and_by_no_other(
    check: str, internvl: Family, tmp_path: Path
) -> None:
    """Of the costly checks, one beside its own: each of them meets three broken models or more that it must not find."""
    if check == "clean_process":
        (tmp_path / "drawn.py").write_text(DRAWN)
        target: Any = f"{tmp_path / 'drawn.py'}:Drawn"
    elif check == "upgrade":
        internvl.model().save_pretrained(tmp_path)
        edit(tmp_path, lambda then: then["modules"].append("model.old_tower"))
        target = str(tmp_path)
    else:
        target = hfcustom.register(ZOO[check](internvl.model_class))
    costly = [name for name in COSTLY if name != check]
    in_turn = costly[list(CHECKS).index(check) % len(costly)]
    others = [name for name in QUICK if name not in COSTLY]
    found = failed(examine(target, list(dict.fromkeys([check, in_turn, *others]))))
    assert found.keys() == {check}, found


def test_every_check_has_its_broken_model_and_says_what_to_do() -> None:
    assert CHECKS.keys() == ZOO.keys() | {"clean_process", "upgrade"}
    for check in CHECKS.values():
        assert check.expected and check.why and check.cure.endswith(".")


def test_a_healthy_class_with_every_seam_passes_all_checks(tmp_path: Path) -> None:
    (tmp_path / "healthy.py").write_text(HEALTHY)
    findings = {finding.check: finding for finding in examine(f"{tmp_path / 'healthy.py'}:Healthy")}
    assert findings.keys() == CHECKS.keys()
    assert not failed(findings.values())
    skipped = {name: finding.measured for name, finding in findings.items() if finding.status == "skipped"}
    assert skipped == {
        "stock_reload": "the class adds gate.bias, gate.weight, so the stock class is another model",
        "upgrade": "the target is a class, not a checkpoint that was saved",
    }
    said = findings["overrides"].measured
    assert all(name in said for name in ("transform_vision_features", "transform_embeddings", "connector", "loss"))
    assert "another number of image tokens" in said and "new 2 of 2" in findings["gradients"].measured
    assert "z_loss" in findings["trainers"].measured and "honour_model" in findings["trainers"].measured


@pytest.mark.parametrize("name", [name for name in KINDS if name != "internvl"])
def test_families_of_each_kind_pass(name: str) -> None:
    """What stock itself gets wrong is found, and the correction is the cure."""
    findings = {finding.check: finding for finding in examine(name, QUICK)}
    wrong = failed(findings.values())
    if name == "mllama":
        assert wrong.keys() == {"accumulation", "batch_invariance"}
        assert all("mask_text_rows=True" in findings[check].cure for check in wrong)
    else:
        assert not wrong


WITH_TORCHVISION = [name for name in FAMILIES if getattr(load_family(name), "REQUIRES", ())]
RAGGED = [name for name in WITH_TORCHVISION if issubclass(REGISTERED[f"custom_{name}"], RaggedImages)]


@pytest.mark.parametrize("name", WITH_TORCHVISION)
def test_families_that_need_torchvision_pass_where_it_is(name: str) -> None:
    """Without the clean process, which would lack the operators that conftest.py defines for torchvision's import."""
    traced = ["compiled"] if name in RAGGED[:1] else []  # it takes ten seconds
    assert not failed(examine(name, [*QUICK, "trainers", *traced]))


def test_gradients_name_the_part_and_the_lora_in_it(internvl: Family) -> None:
    broken = hfcustom.register(ZOO["gradients"](internvl.model_class))
    (finding,) = examine(broken, ["gradients"])
    assert "vision 0 of " in finding.measured
    assert "the LoRA in the vision tower gets no gradient" in finding.measured
    assert "vision zero: model.vision_tower." in finding.measured


def test_a_checkpoint_brings_its_own_connector_and_loss(internvl: Family, tmp_path: Path) -> None:
    internvl.model(connector="average_pool", loss="focal").save_pretrained(tmp_path)
    (finding,) = examine(str(tmp_path), ["overrides"])
    assert "connector: another number" in finding.measured and "loss: 0.0e+00 of the logits" in finding.measured
    internvl.model(loss="dpo").save_pretrained(tmp_path)
    (finding,) = examine(str(tmp_path), ["overrides"])
    assert finding.measured == "loss: not examined, the loss 'dpo' wants preference, which made-up rows have not"


def test_a_checkpoint_of_ones_own_class_names_its_file(
    internvl: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "owned.py").write_text(HEALTHY.replace("Healthy", "Owned"))
    owned = load_object(f"{tmp_path / 'owned.py'}:Owned")
    internvl.model(owned).save_pretrained(tmp_path)
    REGISTERED.pop("owned")
    assert cli.main(["doctor", str(tmp_path), "--check", "parity"]) == 2
    assert "--custom my_file.py:MyModel" in capsys.readouterr().err
    REGISTERED["owned"] = owned
    assert (
        cli.main(["doctor", str(tmp_path), "--check", "gradients", "--custom", f"{tmp_path / 'owned.py'}:Owned"]) == 0
    )
    assert "new 2 of 2" in capsys.readouterr().out


def test_a_class_without_a_file_or_module_of_its_own_does_not_travel(internvl: Family) -> None:
    class Inside(internvl.model_class):  # type: ignore[misc, name-defined]
        pass

    inside = hfcustom.register(Inside)
    (finding,) = examine(inside, ["clean_process"])
    assert finding.status == "skipped" and "inside a function" in finding.measured
    inside.__qualname__, inside.__module__ = "Inside", "builtins"  # as in a notebook
    with pytest.raises(Skipped, match="defined in no file"):
        file_of(inside)


def test_the_clean_process_imports_a_package_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "zoo_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("FOUND = 1")
    (package / "inner.py").write_text("from .beside import FOUND")
    monkeypatch.syspath_prepend(tmp_path)
    import_class("zoo_package.inner", package / "inner.py")
    assert sys.modules["zoo_package.inner"].FOUND == 1
    (tmp_path / "found_alone.py").write_text("FOUND = 2")
    import_class("nowhere.found_alone", tmp_path / "found_alone.py")
    assert sys.modules["found_alone"].FOUND == 2


def test_a_misspelt_method_is_told_its_name(internvl: Family) -> None:
    broken = hfcustom.register(ZOO["overrides"](internvl.model_class))
    (finding,) = examine(broken, ["overrides"])
    assert finding.measured == "transform_hidden_state overrides nothing and is never called"
    assert finding.cure == "Did you mean transform_hidden_states? Rename it."


def test_an_override_without_effect_is_a_finding(internvl: Family) -> None:
    class Idle(internvl.model_class):  # type: ignore[misc, name-defined]
        def transform_embeddings(self, embeddings: Any, image_mask: Any) -> Any:
            return embeddings

        def compute_logits(self, hidden_states: Any) -> Any:
            return super().compute_logits(hidden_states)

    (finding,) = examine(hfcustom.register(Idle), ["overrides"])
    assert finding.status == "failed" and "transform_embeddings changes neither logits nor loss" in finding.measured


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_it_in_words_in_json_and_on_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quiet.py").write_text(DRAWN.replace("Drawn", "Quiet").replace("(1.5 + ", "(1 + 0 * "))
    target, page = f"{tmp_path / 'quiet.py'}:Quiet", tmp_path / "page.html"
    assert cli.main(["doctor", target, "--check", "parity", "overrides", "--html", str(page)]) == 1
    said = capsys.readouterr().out
    assert "ok       parity" in said and "failed   overrides" in said and "cure:" in said
    assert said.splitlines()[-1].startswith("1 ok, 1 failed, 0 skipped in ")
    assert "overrides failed" in page.read_text()
    assert cli.main(["doctor", "internvl", "--check", "parity", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["target"] == "internvl" and "parity" in streams.err
    (finding,) = found["findings"]
    assert finding["status"] == "ok" and finding.keys() >= {"measured", "expected", "why", "cure"}
    assert cli.main(["doctor", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CHECKS)


WRONG = {
    "internvll": "Unknown family 'internvll'. Did you mean 'internvl'?.*my_file.py:MyModel",
    "./nowhere": "There is no folder ./nowhere",
    "nowhere.py:Model": "there is no file",
    "{file}:Nothing": "Unknown model 'Nothing'",
    "{file}:json": "is no custom vision-language model",
    "{file}": "is a file; name the class in it as well: .*:MyModel",
    "{file}:built": "is a model that is built already, a .*; name its class instead",
    "{file}:wrapped": r"wrap\(\) leaves InternVLForConditionalGeneration as it is. The doctor builds small copies",
    "{file}:Pairs": "Pairs is a contrastive encoder. The doctor's checks are of models that answer in words",
    "siglip": "'siglip' is a contrastive encoder. .*`hfcustom card`",
    "{encoder}": "is a contrastive encoder, custom_clip",
    "{file}:Unregistered": "Unregistered is not registered.*Put @hfcustom.register above it",
}


OTHERS = """
from hfcustom.encoders.clip import CustomCLIPModel
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration, tiny_config
from transformers import InternVLConfig, InternVLForConditionalGeneration
class Pairs(CustomCLIPModel): pass
built = CustomInternVLForConditionalGeneration(tiny_config())
stock = {**tiny_config().to_dict(), "model_type": "internvl"}
wrapped = hfcustom.wrap(InternVLForConditionalGeneration(InternVLConfig(**stock)), loss="cross_entropy")
"""


@pytest.mark.parametrize("target", WRONG)
def test_what_is_no_target_is_a_mistake_with_a_cure(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"mine_{list(WRONG).index(target)}.py"  # a name is imported once
    text = DRAWN.replace("@hfcustom.register", "import json").replace("Drawn", "Unregistered")
    needs_others = target.partition(":")[2] in ("built", "wrapped", "Pairs")
    file.write_text(text + (OTHERS if needs_others else ""))
    if target == "{encoder}":
        (tmp_path / "config.json").write_text('{"model_type": "custom_clip"}')
    assert cli.main(["doctor", target.format(file=file, encoder=tmp_path), "--check", "parity"]) == 2
    said = capsys.readouterr().err
    assert re.search(WRONG[target], said) and len(said) < 1000


def test_a_mistyped_check_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "internvl", "--check", "packin"]) == 2
    assert "Unknown check 'packin'. Did you mean 'packing'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        cli.main(["doctor"])
    assert usage.value.code == 2
    with pytest.raises(ValueError, match="Unknown check 'packin'"):
        check_model("internvl", leave_out=["packin"])


def test_an_error_of_the_model_is_a_finding(internvl: Family) -> None:
    class Raises(internvl.model_class):  # type: ignore[misc, name-defined]
        def transform_hidden_states(self, hidden_states: Any) -> Any:
            raise KeyError("lost")

    (finding,) = examine(hfcustom.register(Raises), ["batch_invariance"])
    assert (finding.status, finding.measured) == ("failed", "KeyError: 'lost'")


def test_a_class_that_fits_one_checkpoint_only_is_told(internvl: Family) -> None:
    class Large(internvl.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            raise KeyError(config.text_config.layer_types[20])

    with pytest.raises(ValueError, match=r"Large cannot be built .* \(IndexError: .*Read sizes from the config"):
        next(examine(hfcustom.register(Large)))


def test_nothing_in_a_page_is_markup_of_a_model(tmp_path: Path) -> None:
    findings = [Finding("parity", "failed", text, text, text, text, 0.1) for text in HOSTILE]
    write_page(tmp_path / "page.html", HOSTILE[0], findings)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "a", "link"} & set(page.tags)
    assert all(name in line_of(findings[0]) for name in ("expected", "why", "cure"))


# ---- in a user's own tests ------------------------------------------------------------------------------------------

pytest_plugins = ["pytester"]


def test_each_check_is_a_test_in_a_users_repository(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=USERS_TESTS)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*failed   overrides*", "*cure: *"])
    result.stdout.no_fnmatch_line("*test_mine.py:*: Failed")
