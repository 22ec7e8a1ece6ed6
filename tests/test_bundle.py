"""hfcustom bundle: every family and code of every style loads without hfcustom, with equal logits; what cannot travel is refused."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from bundle_cases import CASES, NAMED, save, write_files
from conftest import FAMILIES, ROOT, Family
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from transformers.dynamic_module_utils import get_imports, get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfcustom.bundle.cargo import Cargo, find_cargo
from hfcustom.bundle.code import Code
from hfcustom.bundle.folder import fill_folder
from hfcustom.bundle.modules import Modules, import_code
from hfcustom.bundle.reach import reach
from hfcustom.bundle.rewrite import flat_names, write_modules
from hfcustom.bundle.verify import Verdict, expect, judge, run_child
from hfcustom.connectors import CONNECTORS
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.families import family_names, load_family
from hfcustom.losses import LOSSES
from hfcustom.registry import REGISTERED

ENCODERS = encoder_names()


def checkpoint_of(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """Save the checkpoint of a family, an encoder or a case; return it with the code to name."""
    if name in CASES:
        write_files(folder / name, CASES[name])
        code = [folder / name / file for file in NAMED.get(name, list(CASES[name])[:1])]
        modules, _ = import_code(code)
        save(modules[0].Model, folder / name / "checkpoint")
        settings = folder / name / "checkpoint/processor_config.json"
        if name == "package":  # whose images are its own
            settings.write_text(settings.read_text().replace('"GotOcr2ImageProcessor"', '"PackageImages"'))
        return folder / name / "checkpoint", code
    family = Family(name, load_encoder(name) if name in ENCODERS else load_family(name))
    model, processor = family.model(), family.processor
    model.save_pretrained(folder / name / "checkpoint")
    (processor if name in ENCODERS else model.match_processor(processor)).save_pretrained(folder / name / "checkpoint")
    return folder / name / "checkpoint", []


@pytest.fixture(scope="module")
def bundled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Verdict, Cargo, Code]]]:
    """Bundle families, encoders and cases, those that tests ask for, load all in one process without hfcustom, and compare."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    asked |= {"one_file", "package", "no_init"}  # which tests name themselves
    folder = tmp_path_factory.mktemp("bundled")
    tables: list[dict[Any, Any]] = [REGISTERED, CONFIG_MAPPING._extra_content, LOSSES, CONNECTORS]
    before, path = [dict(table) for table in tables], list(sys.path)
    made, jobs, expected = {}, [], []
    for name in (name for name in (*FAMILIES, *ENCODERS, *CASES) if name in asked):
        checkpoint, files = checkpoint_of(name, folder)
        cargo = find_cargo(checkpoint, files)
        code, bundle = Code(cargo), folder / f"{name}_bundle"
        bundle.mkdir()
        fill_folder(cargo, code, bundle)
        tensors, job = expect(cargo, bundle, folder)
        made[name] = (bundle, cargo, code)
        jobs.append(job)
        expected.append(tensors)
    said = run_child(jobs, [module for _, _, code in made.values() for module in code.user_modules()])
    found = {}
    for (name, (bundle, cargo, code)), job, tensors, one in zip(made.items(), jobs, expected, said, strict=True):
        found[name] = (bundle, judge(cargo, one, tensors, Path(job["results"])), cargo, code)
    yield found
    sys.path[:] = path
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


Bundled = dict[str, tuple[Path, Verdict, Cargo, Code]]


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS, *CASES])
def test_a_bundle_computes_the_same_without_hfcustom(name: str, bundled: Bundled) -> None:
    """Inputs, logits, loss and generated tokens, through AutoModel and the others, AutoProcessor and pipeline()."""
    _, verdict, _, _ = bundled[name]
    assert verdict.faults == []
    assert any("inputs and loss bit-equal, logits" in fact for fact in verdict.facts)
    assert name in ENCODERS or "generated tokens equal, with cache and without" in verdict.facts


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS, *CASES])
def test_a_bundle_wants_transformers_and_nothing_else(name: str, bundled: Bundled) -> None:
    folder, _, cargo, code = bundled[name]
    allowed = {
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "tokenizers",
        "yaml",
        "huggingface_hub",
        *sys.stdlib_module_names,
    }
    for file in folder.glob("*.py"):
        assert set(get_imports(file)) <= allowed, file.name
        assert all(Path(wanted).is_file() for wanted in get_relative_import_files(file)), file.name
        text = file.read_text()
        compile(text, file.name, "exec")
        assert "from hfcustom import" not in text.replace(">>> ", "") or file.name.startswith("hfcustom_")
    copied = {Path(wanted).name for wanted in get_relative_import_files(folder / f"{code.entry}.py")}
    assert copied | {f"{code.entry}.py"} == {
        file.name for file in folder.glob("*.py")
    }  # transformers copies those only
    at_home = ("data", "train", "card", "changes", "hub", "record", "sentinel")
    assert not [file for name in at_home for file in folder.glob(f"hfcustom_{name}*")], "of no use to whoever loads it"
    assert (folder / "LICENSE.hfcustom").read_text() == (ROOT / "LICENSE").read_text()
    requirements = (folder / "requirements.txt").read_text()
    assert "torch>=2.10\n" in requirements and "transformers>=5.20\n" in requirements
    assert "num2words" in requirements or name != "smolvlm"
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoProcessor"} - auto_map.keys() <= {"AutoProcessor"}


def test_the_card_of_a_bundle_loads_the_bundle(bundled: Bundled) -> None:
    folder = bundled["one_file"][0]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "penalty * (log_p.exp() * log_p).sum(-1)" in card.text
    snippet = card.text.partition("## Load it\n\n```python\n")[2].partition("```")[0]
    assert "import one_file" not in snippet and snippet.count("trust_remote_code=True") == 2
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys\nsys.modules['hfcustom'] = None\n{snippet}print(type(model).__name__)",
    ]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "cache of the card"), "PYTHONPATH": ""}
    done = forked.run(command, cwd=folder, env=environment)
    assert done.returncode == 0 and done.stdout == "Model\n", done.stderr[-2000:]
    record = json.loads((folder / "hfcustom.json").read_text())
    assert record["relies_on"]["class"] == "Model" and record["origin"] is None


# ---- the text -------------------------------------------------------------------------------------------------------


def test_only_imports_change_and_what_is_not_needed_goes(bundled: Bundled) -> None:
    folder = bundled["one_file"][0]
    text = (folder / "one_file.py").read_text()
    assert text.startswith('#!/usr/bin/env python\n# The model of a paper.\n"""A file that also trains."""\n\n')
    assert "from . import hfcustom_names as hfcustom\nimport torch\n" in text
    family = "from .hfcustom_families_internvl import CustomInternVLForConditionalGeneration  # the parent\n"
    assert f"{family}\nLIMIT = 1.5  # a constant\n" in text
    assert not [
        gone for gone in ("datasets", "def rows", "# What rows", "def main", "__main__", "fit") if gone in text
    ]
    assert text.endswith("torch.sigmoid(self.gate(hidden_states))\n")
    names = (folder / "hfcustom_names.py").read_text()
    assert '"token_loss": ("hfcustom_losses", "token_loss")' in names and '"fit"' not in names
    assert "Apache License 2.0 (LICENSE.hfcustom" in (folder / "hfcustom_base.py").read_text()


def test_modules_become_flat_names(bundled: Bundled) -> None:
    folder, _, _, code = bundled["package"]
    text = (folder / "package_vlm_models_vlm.py").read_text()
    for line in (
        "from . import hfcustom_families_internvl as internvl",
        "from . import package_vlm_constants as constants",
        "from . import package_vlm_layers_gates as own_gates",
        "from .package_vlm_layers_gates import Gate",
        "from . import package_vlm_models_configs as configs",
    ):
        assert f"\n{line}\n" in text
    assert (
        "pandas" not in text.replace("pandas.DataFrame", "") and not (folder / "package_vlm_training_loop.py").exists()
    )
    assert "UNUSED" not in (folder / "package_vlm_constants.py").read_text()
    assert "from . import package_vlm_registered\n" in (folder / "package_vlm.py").read_text()
    assert json.loads((folder / "processor_config.json").read_text())["image_processor"]["auto_map"] == {
        "AutoImageProcessor": "modeling_package_model.PackageImages"
    }
    assert code.auto_map()["AutoProcessor"] == "modeling_package_model.PackageProcessor"


def test_what_only_some_uses_need_is_a_comment(bundled: Bundled) -> None:
    lines = (bundled["no_init"][0] / "requirements.txt").read_text().splitlines()
    assert "# a_package_that_nobody_has, for some uses only" in lines
    assert not [line for line in lines if "einops_free" in line or "hfcustom" in line]


def test_the_same_input_gives_the_same_bytes(bundled: Bundled, tmp_path: Path) -> None:
    """Also in a process whose strings hash otherwise."""
    folder, _, cargo, _ = bundled["package"]
    files = [str(path) for path in (cargo.folders[0] / "package_vlm/models/vlm.py",)]
    command = [
        sys.executable,
        "-m",
        "hfcustom.cli",
        "bundle",
        str(cargo.checkpoint),
        "again",
        "--no-verify",
        "--code",
        *files,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, again = (
        {path.name: path.read_bytes() for path in where.iterdir()} for where in (folder, tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert not [name for name in first if first[name] != again[name]]


# ---- elsewhere ------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
sys.path.append(sys.argv[1])
for name in ("hfcustom", "accelerate", "peft", "datasets", "one_file"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is there")
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from PIL import Image
trusted = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained("me/my-model", **trusted)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=[text], images=[[Image.new("RGB", (90, 60), "red")]], return_tensors="pt")
logits = {}
model = AutoModelForImageTextToText.from_pretrained("me/my-model", **trusted).eval()
with torch.no_grad():
    logits = model(**inputs).logits
model.train()(**inputs, labels=inputs["input_ids"].where(inputs["attention_mask"] == 0, 5)).loss.backward()
assert model.gate.weight.grad.abs().sum() > 0
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
again = AutoModel.from_pretrained(sys.argv[2], **trusted).eval()
assert type(AutoProcessor.from_pretrained(sys.argv[2], **trusted)).__name__ == type(processor).__name__
with torch.no_grad():
    assert torch.equal(again(**inputs).logits, logits)
print("RESULT", float(logits.double().sum()))
"""


def clean_site(folder: Path) -> Path:
    """Return a folder of packages with torch, transformers, what reads images and chat templates, and what these require."""
    wanted, done = ["torch", "transformers", "pillow", "jinja2"], set()
    folder.mkdir()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in done:
            continue
        done.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another machine
            continue
        requirements = [Requirement(text) for text in found.requires or ()]
        wanted += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."} - {"__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    assert "hfcustom" not in done
    return folder


def test_a_name_on_the_hub_loads_where_there_is_transformers_and_no_more(bundled: Bundled, tmp_path: Path) -> None:
    """From the hub's cache, file by file; what is saved there carries its code along; it trains there, too."""
    folder, _, cargo, _ = bundled["one_file"]
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home/hub/models--me--my-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-I", "-S", "elsewhere.py", str(clean_site(tmp_path / "site")), str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = cargo.model_class.from_pretrained(tmp_path / "saved").eval()
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = cargo.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = cargo.processor(text=[text], images=[[Image.new("RGB", (90, 60), "red")]], return_tensors="pt")
    with torch.no_grad():
        expected = float(model(**inputs).logits.double().sum())
    assert float(done.stdout.split("RESULT ")[1]) == pytest.approx(expected, abs=1e-3)
    saved = json.loads((tmp_path / "saved/config.json").read_text())["auto_map"]
    assert set(saved.values()) <= {
        f"modeling_one_file_model.{name}" for name in ("Model", "Config", "CustomInternVLProcessor")
    }


NEED_PACKAGES = [name for name in family_names() if name not in FAMILIES]


@pytest.mark.skipif(not NEED_PACKAGES, reason="every family's processor works here, so that all are bundled above")
@pytest.mark.parametrize("name", NEED_PACKAGES or ["none"])
def test_the_code_of_a_family_that_cannot_run_here_is_whole(name: str) -> None:
    """Its processor wants a package; each name that a file imports from another one is there."""
    module = load_family(name)
    found = REGISTERED[f"custom_{name}"]
    classes: list[Any] = [found, found.config_class, found.processor_class]
    kept = reach(Modules(), [(one.__module__, one.__name__) for one in classes])
    files = write_modules(kept, flat_names(kept, set()), "0")
    sources = {file.removesuffix(".py"): ast.parse(text) for file, text in files.items()}
    tops = {file: {word for node in tree.body for word in bound_at(node)} for file, tree in sources.items()}
    assert {one.__name__ for one in classes} <= tops[module.__name__.replace(".", "_")]
    for tree in sources.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                wanted = {alias.name for alias in node.names}
                assert wanted <= (sources.keys() if node.module is None else tops[node.module]), ast.unparse(node)


def bound_at(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.alias):
            yield child.asname or child.name
