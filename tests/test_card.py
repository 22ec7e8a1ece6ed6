"""The change card: what it says of a model and of its training, that it is the same twice, and that nobody's words are lost."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Family, chat_row
from huggingface_hub import ModelCard, metadata_load
from test_recipes import finetune, stock_checkpoint

import hfcustom
from hfcustom import card, record
from hfcustom.card_text import cell, code
from hfcustom.encoders import encoder_names, load_encoder
from hfcustom.registry import REGISTERED
from hfcustom.train_config import TrainConfig

MY_FILE = """
import hfcustom, torch
from torch import nn
from hfcustom.families.internvl import CustomInternVLForConditionalGeneration

@hfcustom.token_loss
def doubled(logits, targets, factor: float = 2.0):
    return -factor * logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

@hfcustom.register
class MyVLM(CustomInternVLForConditionalGeneration):
    default_loss = {"cross_entropy": 1.0, "doubled": 0.5}
    default_connector = "average_pool"

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()

    def transform_embeddings(self, embeddings, image_mask):
        return embeddings * (1 + torch.tanh(self.gate(embeddings)))

    def compute_logits(self, hidden_states):
        return 1.0 * self.get_output_embeddings()(hidden_states)
"""


@pytest.fixture(name="my_file")
def card_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "card_file", raising=False)
    path = tmp_path / "card_file.py"
    path.write_text(MY_FILE)
    return path


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def snippet(text: str) -> str:
    return re.search(r"## Load it\n\n```python\n(.*?)```", text, re.DOTALL).group(1)


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_every_family_s_card_has_metadata_and_a_snippet(family: Family, tmp_path: Path) -> None:
    model = family.model()
    text = saved(model, tmp_path)
    data = metadata_load(tmp_path / "README.md")
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert "hfcustom" in data["tags"]
    assert f"import {type(model).__module__}  # defines and registers {type(model).__name__}" in text
    assert "Nothing is overridden" in text
    assert "Its weights began at random." in text
    assert text.isascii()


@pytest.mark.parametrize("name", encoder_names())
def test_an_encoder_s_card(name: str, tmp_path: Path) -> None:
    model = REGISTERED[f"custom_{name}"](load_encoder(name).tiny_config())
    text = saved(model, tmp_path)
    assert metadata_load(tmp_path / "README.md")["pipeline_tag"] == "zero-shot-image-classification"
    assert "AutoModel.from_pretrained(folder)" in text


def test_a_run_of_the_recipe_is_told_whole(internvl: Family, tmp_path: Path, my_file: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    scored = ["--eval-data", str(folder / "rows.jsonl"), "--eval-rows", "2", "--max-new-tokens", "2"]
    options = ["--custom", f"{my_file}:MyVLM", "--lora", "--lora-rank", "4", "--train-full", "connector", "--merge"]
    data = json.dumps({str(folder / "rows.jsonl"): 0.75, str(my_file.parent / "other.jsonl"): 0.25})
    (folder / "other.jsonl").write_text((folder / "rows.jsonl").read_text())
    out = finetune(folder, *options, *scored, "--data", data, "--warmup-steps", "3")
    for name in ("model", "merged"):
        text = (out / name / "README.md").read_text()
        assert "Its weights began as stock (a local folder)." in text
        assert (
            "| `transform_embeddings` | merged embeddings | fills | `CustomVLM.transform_embeddings` | `MyVLM` |"
            in text
        )
        assert "```diff\n--- CustomVLM.compute_logits\n+++ MyVLM.compute_logits\n" in text
        assert "| `gate` | `Linear` | weight 1x64, bias 1 | 65 |" in text
        assert "| `doubled` | 0.5 |" in text
        assert "@hfcustom.token_loss\ndef doubled(logits" in text
        assert "### Connector\n\n`average_pool`" in text
        assert "LoRA with dropout 0; in full beside it: `gate, model.multi_modal_projector`:" in text
        assert "| language | 4 | 8 | 14 |" in text
        assert re.search(r"\| language \| LoRA \| 0 \| 8,192 \| 95,232 \|", text)
        assert re.search(r"\| vision \| frozen \| 0 \| 0 \|", text)
        assert "| rows.jsonl | 0.75 |\n| other.jsonl | 0.25 |" in text
        assert re.search(r"Altogether: rows 8, fingerprint [0-9a-f]{16}\.", text)
        assert "| `warmup_steps` | 3 |" in text
        assert "| `lr` |" not in text, "it is the default"
        assert "| `steps` | 2 |" in text
        assert re.search(r"\| `exact_match` \| \S+ \| rows.jsonl \|  \| 2 \|", text)
        assert f"| transformers | {record.versions()['transformers']} |" in text
        assert str(tmp_path) not in text
        assert str(tmp_path) not in (out / name / "hfcustom.json").read_text()
        (result,) = ModelCard(text).data.eval_results
        assert (result.dataset_name, result.metric_type) == ("rows.jsonl", "exact_match")
    assert "hfcustom.load_adapter(folder, base)" in (out / "model" / "README.md").read_text()
    assert (out / "checkpoints" / "step-000002" / "model" / "README.md").exists()


def test_each_scope_of_an_adapter_has_its_rank(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    ranks = [
        "--lora-parts",
        "vision",
        "language",
        "--lora-rank",
        '{"vision": 2, "language": 3}',
        "--lora-kind",
        "rslora",
    ]
    text = (finetune(folder, "--lora", *ranks) / "model" / "README.md").read_text()
    assert "rsLoRA with dropout 0:" in text
    assert "| vision | 2 | 4 | 12 |\n| language | 3 | 6 | 14 |" in text


def test_stages_are_runs_of_one_card(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    stages = [{"name": "align", "train": ["connector"]}, {"name": "tune", "lora": True}]
    (folder / "stages.json").write_text(json.dumps({"stages": stages}))
    out = finetune(folder, "--config", str(folder / "stages.json"))
    text = (out / "2-tune" / "model" / "README.md").read_text()
    assert "Its weights began as stock (a local folder)." in text
    first, second = text.partition("## Training run 2")[::2]
    assert re.search(r"\| connector \| in full \|", first)
    assert re.search(r"\| language \| LoRA \|", second)


def test_quantised_training_names_bits_and_matrices(internvl: Family, tmp_path: Path) -> None:
    folder = stock_checkpoint(internvl, tmp_path)
    out = finetune(folder, "--lora", "--load-in", "8bit")
    text = (out / "model" / "README.md").read_text()
    assert "Weights were held in 8 bits by bitsandbytes while training:" in text
    assert "| language: Linear8bitLt | 14 |" in text
    assert "| language: Linear |" not in text, "LoRA's own matrices are none of the model's"


def test_weights_that_began_at_random_are_said_to(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path / "one")
    text = saved(internvl.model_class.from_pretrained(tmp_path / "one"), tmp_path / "two")
    assert "Its weights began at random." in text


def test_a_tied_head_is_said_to_be_one(families: dict[str, Family], tmp_path: Path) -> None:
    model = families["gemma3"].model()
    assert model.config.get_text_config().tie_word_embeddings
    model.training_runs = [{"parts": record.trained_parts(model)}]
    assert "| head | tied to another part | 0 | 0 | 0 |" in saved(model, tmp_path)


def test_runs_follow_the_weights_and_a_resumed_run_is_one(internvl: Family, tmp_path: Path) -> None:
    model, rows = internvl.model(), [chat_row(1, at) for at in range(4)]
    options: dict[str, Any] = {"output_dir": str(tmp_path / "one"), "batch_size": 2, "lr": 1e-3}
    hfcustom.fit(model, internvl.processor, rows, TrainConfig(**options, max_steps=1))
    resumed = internvl.model_class.from_pretrained(tmp_path / "one" / "model")
    hfcustom.fit(resumed, internvl.processor, rows, TrainConfig(**options, max_steps=2, resume=True))
    (run,) = record.read_record(tmp_path / "one" / "model")["training"]
    assert (run["steps"], run["rows_per_step"], run["settings"]["lr"]) == (2, 2, 1e-3)
    again = internvl.model_class.from_pretrained(tmp_path / "one" / "model")
    hfcustom.freeze(again, "vision")
    hfcustom.fit(
        again, internvl.processor, rows, TrainConfig(output_dir=str(tmp_path / "two"), batch_size=4, max_steps=1)
    )
    text = saved(again, tmp_path / "final")
    assert "## Training run 1" in text
    assert "## Training run 2" in text
    first, second = record.read_record(tmp_path / "final")["training"]
    assert [part["full"] == 0 for part in second["parts"] if part["part"] == "vision"] == [True]
    assert [part["full"] == 0 for part in first["parts"] if part["part"] == "vision"] == [False]
    assert second["data"]["sources"] == [{"name": "rows in memory", "weight": 1.0}]


def test_evaluations_while_training_are_told(internvl: Family, tmp_path: Path) -> None:
    model, rows = internvl.model(), [chat_row(1, at) for at in range(4)]
    config = TrainConfig(output_dir=str(tmp_path), batch_size=2, max_steps=2, eval_steps=1)
    hfcustom.fit(model, internvl.processor, rows, config, evaluate=lambda model, step: {"right": step / 4})
    assert "| `right` | 0.5 | while training, step 2 |" in (tmp_path / "model" / "README.md").read_text()


def test_results_replace_those_of_the_same_rows_and_need_a_run(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no training run that results could belong to; call fit"):
        card.add_results(model, tmp_path, {"f1": 0.5}, data="rows")
    model.training_runs = [{"results": []}]
    card.add_results(model, tmp_path, {"f1": 0.5}, data="rows")
    card.add_results(model, tmp_path, {"f1": 0.75}, data="rows")
    card.add_results(model, tmp_path, {"f1": 0.25}, data="rows", split="hard", rows=7)
    found = [
        (item.dataset_split, item.metric_value) for item in ModelCard.load(tmp_path / "README.md").data.eval_results
    ]
    assert found == [(None, 0.75), ("hard", 0.25)]
    assert [len(run["results"]) for run in record.read_record(tmp_path)["training"]] == [2]
    card.add_results(model, tmp_path, {"f1": 1.0}, data={"a.jsonl": 1.0, "/data/someone/b.jsonl": 2.0})
    assert "| `f1` | 1 | a.jsonl, b.jsonl |" in (tmp_path / "README.md").read_text()


# ---- whose words ----------------------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_bytes(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(connector="average_pool", loss={"cross_entropy": 1.0, "z_loss": 1e-4})
    saved(model, tmp_path / "one")
    loaded = internvl.model_class.from_pretrained(tmp_path / "one")
    loaded.origin = None
    for name in ("README.md", "hfcustom.json"):
        before = (tmp_path / "one" / name).read_bytes()
        model.save_pretrained(tmp_path / "two")
        assert (tmp_path / "two" / name).read_bytes() == before
        model.save_pretrained(tmp_path / "one")
        assert (tmp_path / "one" / name).read_bytes() == before, "again into the same folder"
        loaded.save_pretrained(tmp_path / "three")
        assert (tmp_path / "three" / name).read_bytes() == before


@pytest.mark.parametrize("own", ["# Mine\n", "---\nlicense: mit\n---\n# Mine\n", "", "\ufeffodd \x00 text"])
def test_a_readme_of_one_s_own_stays(own: str, internvl: Family, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    internvl.model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == own


def test_what_stands_around_the_marks_stays(internvl: Family, tmp_path: Path) -> None:
    text = saved(internvl.model(), tmp_path)
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", text, re.DOTALL).groups()
    (tmp_path / "README.md").write_text(f"---\n{head}\nlicense: mit\n---\n\nBefore.\n\n{body}\nAfter.\n")
    renewed = saved(internvl.model(loss="focal"), tmp_path)
    assert "| `focal` |" in renewed
    assert "cross_entropy" not in renewed
    assert "\nBefore.\n\n<!-- hfcustom:begin" in renewed
    assert renewed.endswith("<!-- hfcustom:end -->\n\nAfter.\n")
    assert "license: mit\n" in renewed
    assert saved(internvl.model(loss="focal"), tmp_path) == renewed


def test_metadata_that_somebody_changed_stays_and_other_metadata_is_renewed(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.origin = {"name": "owner/first", "commit": None, "hub": True}
    text = saved(model, tmp_path)
    assert "base_model: owner/first\n" in text
    model.origin = {"name": "owner/second", "commit": None, "hub": True}
    assert "base_model: owner/second\n" in saved(model, tmp_path), "nobody has touched it"
    text = (tmp_path / "README.md").read_text().replace("base_model: owner/second", "base_model: owner/mine")
    (tmp_path / "README.md").write_text(text.replace("\n- hfcustom\n", "\n- nice\n"))
    data = ModelCard(saved(model, tmp_path)).data
    assert data.base_model == "owner/mine"
    assert data.tags == ["nice", "custom-internvl", "hfcustom"]


def test_metadata_broken_by_hand_is_left_as_it_is(internvl: Family, tmp_path: Path) -> None:
    text = saved(internvl.model(), tmp_path).replace("tags:", "tags: [")
    (tmp_path / "README.md").write_text(text)
    renewed = saved(internvl.model(loss="focal"), tmp_path)
    assert "tags: [" in renewed
    assert "| `focal` |" in renewed


def test_what_was_written_survives_the_end_of_another_run(internvl: Family, tmp_path: Path) -> None:
    rows = [chat_row(1, at) for at in range(2)]
    options: dict[str, Any] = {"output_dir": str(tmp_path), "batch_size": 2}
    hfcustom.fit(internvl.model(), internvl.processor, rows, TrainConfig(**options, max_steps=1))
    readme = tmp_path / "model" / "README.md"
    with readme.open("a") as file:  # in place: the checkpoint has a file of its own
        file.write("After.\n")
    hfcustom.fit(internvl.model(), internvl.processor, rows, TrainConfig(**options, max_steps=2, resume=True))
    assert readme.read_text().endswith("After.\n")
    assert "| `steps` | 2 |" in readme.read_text()
    readme.write_text("All mine.\n")
    hfcustom.fit(internvl.model(), internvl.processor, rows, TrainConfig(**options, max_steps=3, resume=True))
    assert readme.read_text() == "All mine.\n"


# ---- nothing that should not be there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/data/someone/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\someone\\rows.jsonl", "rows.jsonl"),
        ("../private/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("/a/my_file.py:loss", "my_file.py:loss"),
        ("owner/data", "owner/data"),
        ("yes/no, or else", "yes/no, or else"),
        ({"tower": "/models/clip", "size": 2}, {"tower": "clip", "size": 2}),
        (["hf_" + "a" * 34, 1, None], ["hf_...", 1, None]),
    ],
)
def test_what_may_be_told(value: Any, told: Any) -> None:
    assert record.public(value) == told


def test_a_folder_with_the_shape_of_a_name_is_told_from_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert record.public("outputs/model") == "outputs/model"
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    assert record.public("outputs/model") == "model"


HOSTILE = "<script>x</script> | [a](javascript:b) `c` **d** <!-- hfcustom:end --> \x1b[31m\n# e"


def test_strings_of_data_are_only_text(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    model.origin = {"name": HOSTILE, "commit": HOSTILE, "hub": True}
    part = {"part": HOSTILE, "full": HOSTILE, "lora": 0, "parameters": 2}
    data = {"sources": [{"name": HOSTILE, "weight": HOSTILE}], "hub": [HOSTILE, 3], "rows": HOSTILE}
    results = [{"data": HOSTILE, "split": HOSTILE, "values": {HOSTILE: 1.0, "x": HOSTILE}}, 3]
    run = {
        "parts": [part, 1],
        "lora": {"kind": HOSTILE, "scopes": [{"part": HOSTILE}, 3]},
        "data": data,
        "results": results,
        "settings": {HOSTILE: HOSTILE},
    }
    model.training_runs = [run, {}, {"parts": 1, "lora": 2, "data": 3, "settings": 4, "results": 5, "quantization": 6}]
    text = saved(model, tmp_path)
    data = metadata_load(tmp_path / "README.md")
    assert "base_model" not in data and "datasets" not in data, "which the hub would refuse"
    model.training_runs = [{"results": [{"data": "Scanned Digits, read", "values": {"f1": 1.0}}]}]
    saved(model, tmp_path / "named")
    (result,) = metadata_load(tmp_path / "named" / "README.md")["model-index"][0]["results"]
    assert result["dataset"] == {"name": "Scanned Digits, read", "type": "scanned-digits-read"}
    assert "<script" not in text.partition("\n---\n")[2]
    assert text.count("<!-- hfcustom:end -->") == text.partition("\n---\n")[0].count("<!-- hfcustom:end -->") + 1
    assert "\x1b" not in text
    assert "\n# e" not in text
    assert "[a](" not in text.partition("\n---\n")[2]
    assert saved(internvl.model_class.from_pretrained(tmp_path), tmp_path / "again")


def test_code_is_fenced_by_more_than_it_holds() -> None:
    assert code("if a:\n\tb = '\u00e9'\n") == "```python\nif a:\n    b = '\u00e9'\n```"
    text = code("a = '````'\n<!-- hfcustom:end -->\nkey = 'hf_" + "b" * 30 + f"'\npath = '{Path.home()}/x'\n")
    assert text.startswith("`````python\n")
    assert "<!--" not in text
    assert "bbbb" not in text
    assert "path = '~/x'" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (1e-4, "0.0001"), (None, ""), (True, "yes"), ("a_b _c_", "a_b \\_c\\_")],
)
def test_cells(value: Any, shown: str) -> None:
    assert cell(value) == shown


def test_only_the_main_process_writes(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "hfcustom.json").exists()
