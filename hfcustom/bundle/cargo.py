"""What is to be bundled: a checkpoint's folder, its class, its processor, and the names that its code is reached from."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hfcustom.base import CustomVLM
from hfcustom.bundle.modules import import_code
from hfcustom.connectors import CONNECTORS
from hfcustom.custom_model import CustomModel
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.families import family_names, load_family
from hfcustom.losses import LOSSES
from hfcustom.losses.pairs import PAIR_LOSSES
from hfcustom.naming import unknown
from hfcustom.registry import REGISTERED

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class Cargo:
    """A checkpoint whose class and processor are known."""

    checkpoint: Path
    config: dict[str, Any]  # config.json
    model_class: Any
    processor: Any
    folders: list[Path] = field(default_factory=list)  # that the user's modules are imported from
    modules: list[str] = field(default_factory=list)  # that were named with --code
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Whether it answers questions, or compares pictures with texts."""
        return "vlm" if issubclass(self.model_class, CustomVLM) else "encoder"

    @property
    def processor_parts(self) -> dict[str, Any]:
        """The processor and its parts whose classes are not transformers' own, by their Auto classes."""
        parts = {"AutoProcessor": self.processor}
        for name in self.processor.get_attributes():
            part = getattr(self.processor, name, None)
            auto = "AutoTokenizer" if isinstance(part, PreTrainedTokenizerBase) else AUTO_PARTS.get(name)
            if auto is not None and part is not None:
                parts[auto] = part
        return {auto: part for auto, part in parts.items() if not type(part).__module__.startswith("transformers.")}

    def roots(self) -> list[tuple[str, str]]:
        """Return the names that everything else is reached from: (module, name)."""
        classes: list[Any] = [
            self.model_class,
            self.model_class.config_class,
            *map(type, self.processor_parts.values()),
        ]
        functions = [*self._losses(), *self._connectors()]
        return [(found.__module__, found.__qualname__) for found in (*classes, *functions)]

    def _losses(self) -> list[Any]:
        spec = self.config.get("loss")
        names = [spec] if isinstance(spec, str) else list(spec or ())
        table: Any = LOSSES if self.kind == "vlm" else PAIR_LOSSES
        for name in names:
            if name != "stock" and name not in table:
                cure = "Name the file that registers it as well: --code my_file.py my_losses.py."
                raise ValueError(f"{self.checkpoint}: {unknown('loss', name, table, cure)}")
        return [table[name].function for name in names if name != "stock"]

    def _connectors(self) -> list[Any]:
        spec = self.config.get("connector")
        name = spec.get("name") if isinstance(spec, dict) else spec
        if name is None:
            return []
        if name not in CONNECTORS:
            cure = "Name the file that registers it as well: --code my_file.py my_connectors.py."
            raise ValueError(f"{self.checkpoint}: {unknown('connector', name, CONNECTORS, cure)}")
        return [CONNECTORS[name]]


def find_cargo(checkpoint: str | Path, code: Sequence[str | Path] = ()) -> Cargo:
    """Import the user's code, and find the class and the processor of a checkpoint.

    Raises FileNotFoundError, ImportError or ValueError, each with the cure, for what cannot be bundled.
    """
    folder = _folder_of(checkpoint)
    config = check_checkpoint(folder)
    modules, folders = import_code([Path(file) for file in code])
    model_class = _class_of(config, folder, bool(code))
    cargo = Cargo(
        folder, config, model_class, _processor_of(folder, model_class), folders, [m.__name__ for m in modules]
    )
    config_class: Any = model_class.config_class
    _check_importable([model_class, config_class, *map(type, cargo.processor_parts.values())])
    cargo.notes += _match_processor(cargo)
    return cargo


def _folder_of(checkpoint: str | Path) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if str(checkpoint).startswith((".", "/", "~")) or str(checkpoint).count("/") != 1:
        raise FileNotFoundError(f"There is no folder {checkpoint}; give that of a saved model, or a name on the hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(checkpoint)))
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"There is no folder {checkpoint}, and on the hub neither ({error}).") from error


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Return config.json; FileNotFoundError or ValueError for a folder that is no whole model in full precision."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is an adapter (adapter_config.json). Merge it into its base first: hfcustom.merge_adapter(load_adapter(...)), "
            "then save_pretrained of the result and of the processor; or train with --merge and bundle the merged folder."
        )
    if not (folder / "config.json").is_file():
        below = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        hint = (
            f" Do you mean {folder / below[0]}?" if below else " Save the model there: model.save_pretrained(folder)."
        )
        raise FileNotFoundError(f"{folder} holds no config.json.{hint}")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        raise ValueError(
            f"{folder} is quantised ({quantization.get('quant_method', 'unknown')}), and what its matrices were is lost. Bundle "
            "the full-precision checkpoint that it was made of (merge an adapter into that one); whoever loads the bundle can "
            "quantise it: from_pretrained(..., quantization_config=...)."
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        why = f"only {pickled[0]}, which runs code when it is read" if pickled else "no model.safetensors"
        raise FileNotFoundError(
            f"{folder} holds {why}. Load the model and save it again: model.save_pretrained(folder)."
        )
    return config


def _class_of(config: dict[str, Any], folder: Path, has_code: bool) -> type[CustomModel]:
    model_type = str(config.get("model_type", ""))
    name = model_type.removeprefix("custom_")
    if model_type.startswith("custom_") and name in family_names():
        load_family(name)
    elif model_type.startswith("custom_") and name in encoder_names():
        load_encoder(name)
    if model_type in REGISTERED:
        return REGISTERED[model_type]
    if model_type in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{folder} has model_type {model_type!r}: transformers itself loads it, anywhere and without a bundle. If your class "
            "is to go with it, save it from that class first: MyModel.from_pretrained(...).save_pretrained(folder)."
        )
    own = sorted(name for name in REGISTERED if not name.startswith("custom_"))
    cure = (
        f"The files that --code names register {', '.join(own) or 'no class'}; put @hfcustom.register above the class that "
        "saved the checkpoint."
        if has_code
        else "Name the file that defines and registers its class: --code my_file.py."
    )
    raise ValueError(f"{folder} has model_type {model_type!r}, which no family of hfcustom has. {cure}")


def _processor_of(folder: Path, model_class: Any) -> Any:
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise FileNotFoundError(
            f"{folder} holds no processor, without which nobody can use the model. Save it there: "
            f"{model_class.__name__}.processor_class.from_pretrained(...).save_pretrained(folder)."
        )
    return AutoProcessor.from_pretrained(folder)


def _check_importable(classes: Sequence[type]) -> None:
    for found in classes:
        if found.__module__ == "__main__":
            raise ValueError(
                f"{found.__qualname__} is defined in a notebook or a prompt, of which no file can travel. Write it into a file "
                "(%%writefile my_file.py in a notebook), import it from there, and name the file: --code my_file.py."
            )
        if "<locals>" in found.__qualname__ or "." in found.__qualname__:
            raise ValueError(
                f"{found.__module__}.{found.__qualname__} is defined inside a function or a class, where no import finds it. "
                "Move it to the top of its file."
            )


def _match_processor(cargo: Cargo) -> list[str]:
    """Make the processor follow the model's connector, and say so where it did not."""
    if cargo.kind != "vlm" or "placeholders" in cargo.model_class.lacks:
        return []
    config = cargo.model_class.config_class.from_pretrained(cargo.checkpoint)
    with torch.device("meta"):
        model = cargo.model_class(config)
    before = json.dumps(copy.deepcopy(cargo.processor.to_dict()), sort_keys=True, default=str)
    cargo.processor = model.match_processor(cargo.processor)
    if json.dumps(cargo.processor.to_dict(), sort_keys=True, default=str) == before:
        return []
    return [
        f"The processor in {cargo.checkpoint} did not follow the model's connector {config.connector!r}; that in the bundle does "
        "(model.match_processor)."
    ]


AUTO_PARTS = {"image_processor": "AutoImageProcessor", "video_processor": "AutoVideoProcessor"}
