"""The folder of a bundle: config with auto_map, weights, processor, code, what to install, and hfcustom's license.

The same input gives the same bytes. Nothing of this machine is written: a path of it in any text is an error.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from hfcustom.bundle.cargo import WEIGHTS, Cargo
from hfcustom.bundle.code import Code
from hfcustom.bundle.modules import PACKAGE

COPIED = (
    "generation_config.json",
    "README.md",
)  # in which the card is renewed, and what somebody wrote around it stays
TEXTS = (".json", ".jinja", ".md", ".py", ".txt")
LICENSE = "LICENSE.hfcustom"
NOT_SAVED = ("_name_or_path", "name_or_path")


def fill_folder(cargo: Cargo, code: Code, folder: Path) -> None:
    """Write a bundle into an empty folder; ValueError for what names a place of this machine."""
    for name, text in code.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    code.check_files(folder)
    config = {name: value for name, value in cargo.config.items() if name not in NOT_SAVED}
    config |= {"architectures": [cargo.model_class.__name__], "auto_map": code.auto_map()}
    write_json(folder / "config.json", config)
    _save_processor(cargo, code, folder)
    for name in (*COPIED, *weight_files(cargo.checkpoint)):
        if (cargo.checkpoint / name).is_file():
            shutil.copyfile(cargo.checkpoint / name, folder / name)
    _write_card(cargo, code, folder)
    lines = [f"{package}{version}" for package, version in code.requirements(folder).items()]
    lines += [f"# {package}, for some uses only" for package in code.optional()]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copyfile(license_file(), folder / LICENSE)
    check_places(cargo, folder)


def _write_card(cargo: Cargo, code: Code, folder: Path) -> None:
    """Write the change card, which loads the folder with its own code, and the record beside it."""
    from hfcustom.card import write_beside
    from hfcustom.record import origin_of, read_record

    config: Any = cargo.model_class.config_class.from_pretrained(cargo.checkpoint)
    config.auto_map = code.auto_map()
    with torch.device("meta"):
        model = cargo.model_class(config)
    record = read_record(cargo.checkpoint)
    model.training_runs, model.origin = record.get("training", []), origin_of(cargo.checkpoint, record)
    write_beside(model, folder)


def weight_files(checkpoint: Path) -> list[str]:
    """Return the names of the files that hold the weights: one, or an index and its shards."""
    single, index = WEIGHTS
    if not (checkpoint / index).is_file():
        return [single]
    shards = set(json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"].values())
    outside = [name for name in shards if Path(name).name != name or not (checkpoint / name).is_file()]
    if outside:
        raise FileNotFoundError(f"{checkpoint / index} names {outside[0]!r}, which is not in the folder.")
    return [index, *sorted(shards)]


def _save_processor(cargo: Cargo, code: Code, folder: Path) -> None:
    """Write the processor, and which classes its parts have that are not transformers' own."""
    cargo.processor.save_pretrained(folder)
    names = code.auto_map()
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for auto in cargo.processor_parts:
        part = {"AutoImageProcessor": "image_processor", "AutoVideoProcessor": "video_processor"}.get(auto)
        if part is not None and part in config:
            config[part]["auto_map"] = {auto: names[auto]}
        elif auto == "AutoProcessor":
            config["auto_map"] = {auto: names[auto]}
    write_json(path, _without(config, NOT_SAVED))
    tokens = folder / "tokenizer_config.json"
    if tokens.is_file():
        settings = _without(json.loads(tokens.read_text(encoding="utf-8")), (*NOT_SAVED, "auto_map"))
        if "AutoTokenizer" in cargo.processor_parts:
            settings["auto_map"] = {"AutoTokenizer": [None, names["AutoTokenizer"]]}
        write_json(tokens, settings)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def write_json(path: Path, content: Any) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def license_file() -> Path:
    """Return hfcustom's license, which goes with its code: beside the package, or where pip put it."""
    places = [PACKAGE.parent / "LICENSE"]
    try:
        files = importlib.metadata.distribution("hfcustom").files or []
        places += [Path(str(file.locate())) for file in files if file.name == "LICENSE"]
    except importlib.metadata.PackageNotFoundError:
        pass
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            "hfcustom's LICENSE is not beside the package and not among what pip installed, but has to go with its code. Install "
            "hfcustom again."
        )
    return found


def check_places(cargo: Cargo, folder: Path) -> None:
    """Raise ValueError where a text holds a path of this machine: it leads nowhere elsewhere, and tells who made the bundle."""
    private = {str(path) for path in (Path.home(), Path.cwd(), cargo.checkpoint.resolve(), *cargo.folders)}
    paths = "|".join(re.escape(path) for path in sorted(private, key=len, reverse=True) if len(path) > 2)
    found = re.compile(rf"(?<![\w./-])(?:{paths})(?![\w-])")
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix != ".py", path.name)):  # cards quote the code
        if path.suffix not in TEXTS:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if (place := found.search(line)) is not None:
                cure = (
                    "Take it out of the code, or read it from an environment variable."
                    if path.suffix == ".py"
                    else f"Take it out of {cargo.checkpoint}."
                )
                raise ValueError(
                    f"{path.name}:{number} holds a path of this machine, {place[0]}: {line.strip()[:200]}. {cure}"
                )
