"""The change card: a README.md that says what was customised, what was trained on what, and how to load it.

model -> facts -> Markdown between two marks, under the metadata that the hub reads

What stands outside of the marks is the reader's own and stays; a README.md without them is never touched. The same model gives
the same bytes: no dates, no paths, no names of machines.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from transformers.utils import logging
from yaml import YAMLError

from hfcustom import changes, sentinel
from hfcustom.card_text import as_dict, as_list, plain, render
from hfcustom.files import write_text
from hfcustom.parts import class_of_model, find_parts, part_table, unwrap
from hfcustom.record import is_hub_name, public, versions, write_record

logger = logging.get_logger("hfcustom")

README = "README.md"
BEGIN, END = "<!-- hfcustom:begin {digest} -->", "<!-- hfcustom:end -->"
HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
MARKED = re.compile(r"<!-- hfcustom:begin ([0-9a-f]{12}) -->.*<!-- hfcustom:end -->", re.DOTALL)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_beside(model: Any, folder: Path, *, adapter: bool = False) -> None:
    """Write hfcustom.json and the card beside a model's weights, leaving a README.md of the user's as it is."""
    core = unwrap(model)
    write_record(folder, record_of(core))
    write_card(folder, card_facts(core, adapter=adapter))


def record_of(core: Any) -> dict[str, Any]:
    """Return what hfcustom.json holds."""
    return {"origin": core.origin, "training": list(core.training_runs), "relies_on": sentinel.relies_on(core)}


def write_card(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Write a folder's card; False where its README.md is the user's own, which stays."""
    path = folder / README
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    text = merge_card(before, facts)
    if text is None:
        logger.info(f"{path} is your own and stays as it is; `hfcustom card {folder}` prints the generated one.")
        return False
    write_text(path, text)
    return True


def keep_readme(old: Path, new: Path) -> None:
    """Carry what somebody wrote into a folder's README.md over to the folder that is about to take its place."""
    before, generated = old / README, new / README
    if before.is_file():
        text = before.read_text(encoding="utf-8", errors="replace")
        made = generated.read_text(encoding="utf-8") if generated.is_file() else None
        kept = merge_texts(text, made) if made is not None and is_generated(made) else None
        write_text(generated, text if kept is None else kept)


def is_generated(text: str) -> bool:
    """Whether a README.md has a part between the marks."""
    return MARKED.search(text) is not None


def merge_card(before: str | None, facts: Mapping[str, Any]) -> str | None:
    """Return the text of a README.md with its generated part renewed; None for one without the marks."""
    data, section = metadata(facts), render(facts)
    text = _whole(data, f"{BEGIN.format(digest=_digest(data.to_yaml()))}\n{section}\n{END}\n")
    return text if before is None else merge_texts(before, text)


def merge_texts(before: str, generated: str) -> str | None:
    """Return a README.md with the part between the marks taken from a generated card; None for one without the marks.

    Metadata that nobody has changed since it was generated is renewed too; of metadata that somebody has, each key stays.
    """
    marked, new, head = MARKED.search(before), MARKED.search(generated), HEAD.match(before)
    assert new is not None, "a generated card without marks"
    if marked is None:
        return None
    body = before[: marked.start()] + new.group() + before[marked.end() :]
    data: CardData = ModelCard(generated).data
    try:
        own = ModelCard(before).data
    except (TypeError, ValueError, YAMLError):  # broken by hand: theirs, and no part of it is lost
        return body
    if head is None:
        return _whole(data, body)
    if _digest(head.group(1)) != marked.group(1):
        data = ModelCardData(ignore_metadata_errors=True, **_merged(data.to_dict(), own.to_dict()))
    return _whole(data, body[head.end() :].lstrip("\n"))


def is_edited(text: str) -> bool:
    """Whether somebody has written outside of the marks of a card, or there are none."""
    marked, head = MARKED.search(text), HEAD.match(text)
    if marked is None or head is None:
        return True
    around = text[head.end() : marked.start()] + text[marked.end() :]
    return bool(around.strip()) or _digest(head.group(1)) != marked.group(1)


def _merged(generated: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return metadata with the user's keys before the generated ones; tags of both, and results as they are now."""
    merged = {**generated, **own}
    merged["tags"] = list(dict.fromkeys([*(own.get("tags") or []), *generated["tags"]]))
    if "model-index" in generated:
        merged["model-index"] = generated["model-index"]
    return merged


def _whole(data: CardData, body: str) -> str:
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def _digest(head: str) -> str:
    return hashlib.sha256(head.strip().encode()).hexdigest()[:12]


def add_results(
    model: Any,
    folder: str | Path,
    results: Mapping[str, float],
    *,
    data: str | Mapping[str, float],
    split: str | None = None,
    rows: int | None = None,
) -> None:
    """Put what an evaluation found into a saved folder's card and record, and into what the model will be saved with."""
    core, folder = unwrap(model), Path(folder)
    name = public(data) if isinstance(data, str) else ", ".join(public(source) for source in data)
    found = {
        "data": name,
        "split": split,
        "rows": rows,
        "values": {str(k): float(v) for k, v in results.items()},
    }
    if not core.training_runs:
        raise ValueError(f"{type(core).__name__} has no training run that results could belong to; call fit() first.")
    *earlier, last = core.training_runs
    others = [
        item
        for item in as_list(last.get("results"))
        if (item.get("data"), item.get("split")) != (found["data"], split)
    ]
    core.training_runs = [*earlier, {**last, "results": [*others, found]}]
    write_beside(model, folder, adapter=(folder / "adapter_config.json").is_file())


# ---- facts ----------------------------------------------------------------------------------------------------------


def card_facts(core: Any, *, adapter: bool = False) -> dict[str, Any]:
    """Return everything that a card says, in plain values."""
    model_class, config = class_of_model(core), core.config
    own, part_map = changes.own_classes(model_class), find_parts(core)
    return {
        "class": model_class.__name__,
        "bases": [cls.__name__ for cls in model_class.__mro__ if cls in own][1:],
        "module": module_of(model_class),
        "parent": next(cls.__name__ for cls in model_class.__mro__ if cls not in own),
        "stock_class": model_class.stock_class().__name__,
        "model_type": config.model_type,
        "encoder": not core.can_generate(),
        "adapter": adapter,
        "remote_code": "auto_map" in config.to_dict(),
        "origin": core.origin,
        "sizes_of": "",  # a checkpoint, for a class that has no weights of its own
        "changes": changes.changes_of(model_class),
        "settings": changes.class_settings(model_class),
        "new_modules": changes.new_modules(core, part_map),
        "connector": public(config.connector),
        "connector_source": changes.connector_source(config.connector),
        "losses": changes.losses_of(config),
        "parts": [(row.part, row.modules, row.parameters, row.dtypes) for row in part_table(core, part_map)],
        "training": list(core.training_runs),
        "versions": versions(),
    }


def module_of(model_class: type) -> str:
    """Return the name under which a class's module is imported; nothing for a notebook or a prompt."""
    name = model_class.__module__
    if name != "__main__":
        return name
    file = vars(sys.modules["__main__"]).get("__file__")
    return Path(file).stem if file else ""


def metadata(facts: Mapping[str, Any]) -> ModelCardData:
    """Return the YAML head that the hub reads."""
    origin, runs = facts["origin"] or {}, facts["training"]
    named = [name for run in runs for name in as_list(as_dict(run.get("data")).get("hub"))]
    datasets = sorted({name for name in named if is_hub_name(name)})
    base = origin.get("name")
    lora = any(run.get("lora") for run in runs)
    results = evaluation_results(facts)
    task = "zero-shot-image-classification" if facts["encoder"] else "image-text-to-text"
    return ModelCardData(
        base_model=base if origin.get("hub") and is_hub_name(base) else None,
        library_name="peft" if facts["adapter"] else "transformers",
        pipeline_tag=task,
        tags=["hfcustom", facts["model_type"].replace("_", "-"), *(["lora"] if lora else [])],
        datasets=datasets or None,
        model_name=facts["class"] if results else None,
        eval_results=results or None,
    )


def evaluation_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """Return the last run's results in the form of the hub's model-index."""
    runs = facts["training"]
    found = as_list(runs[-1].get("results")) if runs else []
    task = "zero-shot-image-classification" if facts["encoder"] else "image-text-to-text"
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^a-z0-9./_-]+", "-", plain(item.get("data")).lower()) or "rows",
            dataset_name=plain(item.get("data")) or "rows",
            dataset_split=plain(item["split"]) if item.get("split") else None,
            metric_type=plain(name),
            metric_value=round(float(value), 6),
        )
        for item in found
        if isinstance(item, dict)
        for name, value in as_dict(item.get("values")).items()
        if isinstance(value, int | float)
    ]
