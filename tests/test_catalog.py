"""`hfcustom families`: numbers by computation, known totals, a clear answer for what is no family."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import FAMILIES
from family_checks import recorded, source_checks

from hfcustom import cli
from hfcustom.catalog import encoder_facts, family_facts, image_tokens
from hfcustom.connectors import CONNECTORS
from hfcustom.encoders import encoder_names
from hfcustom.external import EXTERNAL, find_external
from hfcustom.families import family_names, load_family, missing_packages
from hfcustom.registry import REGISTERED

TOTALS = {  # published parameter counts, in millions
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": 256,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_247,
    "HuggingFaceM4/Idefics3-8B-Llama3": 8_462,
    "OpenGVLab/InternVL3-1B-hf": 938,
    "OpenGVLab/InternVL3-8B-hf": 7_944,
    "rhymes-ai/Aria": 25_307,
    "Qwen/Qwen2-VL-2B-Instruct": 2_209,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_755,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_411,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 108_642,
    "google/gemma-3-4b-it": 4_300,
    "llava-hf/llava-1.5-7b-hf": 7_063,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7_567,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 894,
    "LanguageBind/Video-LLaVA-7B-hf": 7_366,
    "google/paligemma-3b-pt-224": 2_923,
    "mistral-community/pixtral-12b": 12_683,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 24_011,
    "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16": 33_016,
    "openbmb/MiniCPM-V-4.6": 1_300,
    "deepseek-community/Janus-Pro-7B": 7_408,
    "openai/clip-vit-large-patch14": 428,
    "google/siglip-base-patch16-224": 203,
    "google/siglip-so400m-patch14-384": 878,
}
TOKENS = {  # of 800 x 1300 px with the published settings
    "internvl": 1792,
    "idefics3": 2197,
    "smolvlm": 832,
    "aria": 256,
    "qwen2_vl": 1334,
    "llava": 576,
    "llava_next": 2064,
    "llava_onevision": 8073,
    "video_llava": 256,
    "gemma3": 256,
    "mllama": 1,
    "paligemma": 256,
    "llama4": 1872,
    "molmo2": 1162,
    "pixtral": 2560,
    "mistral3": 1363,
    "minicpmv4_6": 444,
    "nemotron_h_omni": 1025,
}


@pytest.mark.parametrize("name", family_names())
def test_facts_are_whole(name: str) -> None:
    facts = family_facts(name)
    assert (
        facts.checkpoints
        and facts.summary
        and set(facts.seams.values()) <= {"yes", *REGISTERED[f"custom_{name}"].lacks.values()}
    )
    for checkpoint in facts.checkpoints:
        assert checkpoint.parameters == sum(checkpoint.parts.values()) > 1e8
        assert checkpoint.parts["vision"] and checkpoint.parts["language"]
        if checkpoint.id in TOTALS:
            assert checkpoint.parameters / 1e6 == pytest.approx(TOTALS[checkpoint.id], abs=1)
    json.dumps(facts.to_dict())


@pytest.mark.parametrize("name", encoder_names())
def test_facts_of_encoders_are_whole(name: str) -> None:
    facts = encoder_facts(name)
    assert facts.checkpoints and facts.summary and facts.seams["transform_text_features"] == "yes"
    for checkpoint in facts.checkpoints:
        assert checkpoint.parameters / 1e6 == pytest.approx(
            TOTALS.get(checkpoint.id, checkpoint.parameters / 1e6), abs=1
        )
        assert checkpoint.parts["vision"] > checkpoint.parts["language"] * 0.5 > 1e7 and checkpoint.parts["other"] <= 2


@pytest.mark.parametrize("name", FAMILIES)
def test_image_tokens_are_those_of_the_published_settings(name: str) -> None:
    tokens = image_tokens(name)
    assert tokens == TOKENS.get(name, tokens) > 0


def test_what_is_verified_is_what_the_suite_checks() -> None:
    stale = "run `make test ARGS=--record-families` and commit hfcustom/families/verified.json"
    assert sorted(recorded()) == sorted([*family_names(), *encoder_names()]), stale
    assert {check for checks in recorded().values() for check in checks} <= source_checks(), stale
    assert all(len(checks) > 20 for checks in recorded().values()), stale


def test_models_outside_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    for key, model in EXTERNAL.items():
        assert set(model.connectors) <= set(CONNECTORS)
        assert not model.native or model.native in family_names()
        assert (
            find_external(key.upper()) == find_external(model.checkpoint.rpartition("/")[2])
            or "no weights" in model.checkpoint
        )
        assert cli.main(["families", key]) == 0
        assert "known, not native" in capsys.readouterr().out
    assert find_external("Molmo-7B-D-0924") == find_external("molmo") == "molmo-0924"
    assert find_external("allenai/Molmo-7B-D-0924") == "molmo-0924"
    assert find_external("gpt") is None


def test_json_and_one_family_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["families", "internvl", "--json"]) == 0
    (family,) = json.loads(capsys.readouterr().out)["families"]
    assert family["image_tokens"] == 1792 and family["checkpoints"][0]["parts"]["vision"] == 304_012_288
    assert cli.main(["families", "internvl"]) == 0
    shown = capsys.readouterr().out
    assert "InternVLForConditionalGeneration" in shown and "1,792" in shown
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["families", "llava_onevision", "siglip"]) == 0
    shown = capsys.readouterr()
    name = "hfcustom.families.llava_onevision.CustomLlavaOnevisionForConditionalGeneration"
    assert name in "".join(line.strip() for line in shown.out.splitlines())
    assert "0.00M" not in shown.out and shown.err == ""


def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    some = ["internvl", "llava", "qwen2_vl"]
    monkeypatch.setattr("hfcustom.family_table.family_names", lambda: some)
    assert cli.main(["families"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(f"\n{name}: " in shown for name in (*some, "clip", "siglip"))


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families", "intervl"]) == 2
    assert "'intervl'. Did you mean 'internvl'" in capsys.readouterr().err
    assert cli.main(["famlies"]) == 2
    assert "'famlies'. Did you mean 'families'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, hfcustom.cli as c; c.main(['--help']); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "families" in done.stdout


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(load_family("internvl"), "REQUIRES", ("torchvision",), raising=False)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    assert missing_packages("internvl") == ["torchvision"]
    facts: Any = family_facts("internvl")
    assert facts.image_tokens is None and facts.missing_packages == ["torchvision"]
