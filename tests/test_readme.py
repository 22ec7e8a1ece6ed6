"""Every snippet and command of the READMEs runs, every printed block is what is printed, and the file tree is true."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from bundle_cases import save
from conftest import ROOT, Family, picture
from test_added_tower import save_tower

from hfcustom.bundle.modules import import_code
from hfcustom.options import read

DOCUMENTS = ("README.md", "README_customize_hf_models.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHECKPOINT = "OpenGVLab/InternVL3-1B-hf"  # the name that the documents use; here a folder of that name
TOWER = "facebook/dinov2-base"  # likewise
SMALL = {
    "make quickstart": "--max-steps 3 --lora-steps 2 --train-rows 24 --held-out-rows 6 --batch-size 4",
    "make test": "tests/test_naming.py -q -n 0",
    "accelerate launch recipes/finetune.py": "--max-steps 2 --batch-size 2",
    "hfcustom bundle": "--no-verify",  # with it: tests/test_bundle.py
    "hfcustom card": "",
    "hfcustom doctor": "--check parity overrides",  # all: tests/test_doctor.py
    "hfcustom export": "",
    "hfcustom families": "",
    "hfcustom lint-serving": "",
    "hfcustom inspect": "",
    "hfcustom preflight rows.jsonl --image-hosts": "--workers 0",
    "hfcustom plan": "--batch-size 2",
    "hfcustom preflight": "",
    "hfcustom frames": "",
    "hfcustom lens": "",
    "hfcustom runs": "",
}


def blocks(document: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / document).read_text())


def commands() -> list[str]:
    texts = [text for document in DOCUMENTS for kind, text in blocks(document) if kind in ("sh", "bash", "console")]
    return [line for text in texts for line in text.splitlines() if line]


# one launch shows that the launcher takes these commands; what a process of its own adds is the same for all of them
LAUNCHED = next(command for command in commands() if command.startswith("accelerate launch"))


@pytest.fixture
def workplace(tmp_path: Path, internvl: Family) -> Path:
    """A folder with what the documents name: a stock checkpoint, a vision tower, a picture, rows, a class, a config, the recipes."""
    internvl.model(internvl.stock_class).to(torch.bfloat16).save_pretrained(tmp_path / CHECKPOINT)  # as on the hub
    internvl.processor.save_pretrained(tmp_path / CHECKPOINT)
    save_tower("dinov2", tmp_path / TOWER)
    internvl.model().save_pretrained(tmp_path / "outputs/run/model")  # what a training leaves
    internvl.processor.save_pretrained(tmp_path / "outputs/run/model")
    (tmp_path / "outputs/run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    picture().save(tmp_path / "cat.png")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    files = {"python": ["my_file.py"], "json": ["rows.jsonl", "pairs.jsonl", "chats.jsonl"], "yaml": ["run.yaml"]}
    for kind, names in files.items():
        texts = [text for found, text in blocks("README.md") if found == kind]
        for name, text in zip(names, texts, strict=True):
            (tmp_path / name).write_text(text)
    return tmp_path


def run(command: list[str], cwd: Path, start: Any = subprocess.run) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PATH": path}
    done = start(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_script(text: str) -> str:
    """Return a snippet as it runs among others: a file's first line out of place, transformers' own files from outside."""
    text = text.replace("from __future__ import annotations\n", "")
    return re.sub(r"^from \.\.(\w+)\.", r"from transformers.models.\1.", text, flags=re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run_and_print_what_they_say(document: str, workplace: Path) -> None:
    found = blocks(document)
    texts = [as_script(text) for kind, text in found if kind == "python"]
    (workplace / "snippets.py").write_text("\n".join(texts))
    printed = run([sys.executable, "snippets.py"], workplace, forked.run)
    at = 0
    for before, (kind, text) in zip(found, found[1:], strict=False):
        if kind == "text" and before[0] == "python":
            assert text in printed[at:], f"{document} promises\n{text}\nbut what follows is\n{printed[at:]}"
            at = printed.index(text, at) + len(text)


@pytest.mark.parametrize("command", commands())
def test_commands_run(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with fewer steps: each command takes further options at its end."""
    small = next((options for start, options in SMALL.items() if command.startswith(start)), None)
    assert small is not None, f"{command!r} is in a README and not tested: give it small options in SMALL"
    words = [*shlex.split(command), *shlex.split(small)]
    monkeypatch.setattr(sys, "path", list(sys.path))
    if command.startswith("hfcustom bundle"):  # of what a training has left
        monkeypatch.delitem(sys.modules, "my_file", raising=False)
        (module,), _ = import_code([workplace / "my_file.py"])
        save(module.MyVLM, workplace / "outputs/run/model")
    if command.startswith("make"):  # in the environment that runs this test, not in a new one
        outputs = f" --output-dir {workplace / 'outputs'}" if "quickstart" in command else ""
        stamps = [word for name in ("recipes", "dev") for word in ("-o", f"{sys.prefix}/{name}")]
        run([*command.split(), "-C", str(ROOT), f"VENV={sys.prefix}", *stamps, f"ARGS={small}{outputs}"], workplace)
    elif command == LAUNCHED:
        run(words, workplace)
    else:
        run_here(words, workplace, monkeypatch)


def run_here(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe's file as accelerate launch does, or a console script's entry point, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_file", raising=False)  # another test's folder
    if words[:2] == ["accelerate", "launch"]:
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_path(words[2], run_name="__main__")
        return
    (script,) = entry_points(group="console_scripts", name=words[0])
    monkeypatch.setattr(sys, "argv", words)
    assert script.load()() == 0


@pytest.mark.parametrize("text", [text for kind, text in blocks(DOCUMENTS[1]) if kind == "yaml"])
def test_config_files_of_the_guide_are_sound(text: str, tmp_path: Path) -> None:
    from finetune import FinetuneConfig

    (tmp_path / "run.yaml").write_text(text)
    assert read(FinetuneConfig, None, ["--config", str(tmp_path / "run.yaml")]).in_stages()


def test_the_guide_needs_no_command_or_language_that_is_not_tested() -> None:
    kinds = {kind for document in DOCUMENTS for kind, _ in blocks(document)}
    assert kinds <= {"json", "python", "sh", "text", "yaml"}


def test_the_file_tree_is_true() -> None:
    (tree,) = [text for kind, text in blocks("README.md") if kind == "text" and text.startswith("hfcustom/")]
    listed, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        listed.add("/".join(folders))
    missing = [path for path in listed if not (ROOT / path).exists()]
    assert not missing, f"README.md lists what is not there: {missing}"
    packages = ("bundle", "data", "doctor", "inspector", "losses")
    sources = [
        path for folder in ("", *(f"{name}/" for name in packages)) for path in ROOT.glob(f"hfcustom/{folder}*.py")
    ]
    unlisted = {path.relative_to(ROOT).as_posix() for path in sources} - listed
    unlisted -= {f"hfcustom/{folder}/__init__.py" for folder in packages}
    assert not unlisted, f"README.md does not list {sorted(unlisted)}"


def test_the_family_that_the_guide_shows_is_the_file() -> None:
    (shown,) = [text for kind, text in blocks(DOCUMENTS[1]) if kind == "python" and text.startswith('"""Idefics3')]
    assert shown == (ROOT / "hfcustom/families/idefics3.py").read_text()


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert target[1:] in anchors, f"{document}: no heading for {target}"
            else:
                assert (ROOT / target).exists(), f"{document}: no file {target}"


def test_the_project_speaks_of_itself_alone() -> None:
    """No path of one machine and no registry's address in anything that is shipped."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() or [str(path) for path in ROOT.rglob("*") if path.suffix in (".py", ".md")]
    private = re.compile(r"/(?:root|home|work|tmp|opt)/\w|pypi\.|/simple\b|index-url")
    for name in files:
        path = ROOT / name
        if path.suffix not in (".png", ".safetensors") and path != Path(__file__):
            found = private.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found and found.group()}"
